"""On the site, links to files such as ../goldfish/spec.py lead to the repository."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    def absolute(match: re.Match[str]) -> str:
        target = match[1]
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return (
            f"]({config['repo_url']}/{kind}/main/{target}"
            if (ROOT / target).exists()
            else match[0]
        )

    return re.sub(r"\]\(\.\./([^)#\s]+)", absolute, markdown)
