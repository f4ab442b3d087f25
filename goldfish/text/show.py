"""What a rule drops from a text, in colour for the terminal; with plain-text marks where there is none."""

import re
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from goldfish.rule import Goldfish
from goldfish.text.printable import plain, text_pieces

DROPPED = "bold white on dark_red"


def show(rule: Goldfish, tokenizer: Any, text: str, *, colour: bool = True) -> Text:
    """The text with its dropped tokens in colour, or marked [-so-] without colour; and a line that counts.

    The rule is bound to the tokenizer (`Goldfish.bind`).
    """
    ids = tokenizer(text)["input_ids"]
    dropped = rule.dropped(torch.tensor(ids, dtype=torch.int64)).tolist()
    by_character = [
        (drop, c)
        for piece, drop in zip(text_pieces(tokenizer, [], ids), dropped, strict=True)
        for c in piece
    ]
    result = Text()
    for drop, run in groupby(by_character, key=lambda pair: pair[0]):
        content = "".join(c if c in "\n\t" else plain(c) for _, c in run)
        result.append(f"[-{content}-]" if drop and not colour else content, DROPPED if drop else "")
    count = f"\n\n{sum(dropped)} of {len(dropped)} tokens dropped"
    return result.append(count if colour else f"{count}, marked [-so-]", "dim")


def read_text(argument: str) -> str:
    """The content of the file of this name, or the argument itself; ValueError if it looks like the name of a file (no
    white space, and a slash or a suffix), but there is none."""
    if len(argument.encode("utf-8", "replace")) < 256 and Path(argument).is_file():
        return Path(argument).read_text(encoding="utf-8")
    if re.fullmatch(r"\S*/\S*|\S+\.[A-Za-z]\w{0,9}", argument):
        raise ValueError(
            f"there is no file {argument}; to show these characters as a text, add a space"
        )
    return argument
