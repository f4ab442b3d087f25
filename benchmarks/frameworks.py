"""Can goldfish-loss be installed beside the frameworks that people train with?

    # needs a network; one to three minutes a framework
    python benchmarks/frameworks.py
    python benchmarks/frameworks.py llamafactory==0.9.5

pip resolves both, and installs nothing. Prints a row of docs/trainers.md for each: the versions
that pip would install.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from about import markdown

ROOT = Path(__file__).parents[1]
FRAMEWORKS = (
    "llamafactory==0.9.5",
    "ms-swift==4.6.0",
    "unsloth==2026.10.9",
    "axolotl==0.19.0",
    "memaudit==0.2.0",
)
SHOWN = ("torch", "transformers", "accelerate", "datasets", "trl", "peft")


def resolve(framework: str) -> dict[str, str]:
    """What pip would install, by name; or {"error": its last line}."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--dry-run",
            "--ignore-installed",
            "--quiet",
        ]
        done = subprocess.run(
            [*command, "--report", str(report), str(ROOT), framework],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            return {"error": (done.stderr.strip().splitlines() or ["pip failed"])[-1]}
        installed = json.loads(report.read_text(encoding="utf-8"))["install"]
        return {
            package["metadata"]["name"].lower(): package["metadata"]["version"]
            for package in installed
        }


def main(frameworks: tuple[str, ...]) -> None:
    rows = []
    for framework in frameworks:
        versions = resolve(framework)
        cells = [versions.get(name, "") for name in SHOWN]
        rows.append(
            (framework, *([versions["error"]] if "error" in versions else cells))
        )
        print(rows[-1], flush=True)
    print(markdown(("framework", *SHOWN), rows))


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or FRAMEWORKS)
