"""What a rule drops from a text, in colour: for the terminal, or as HTML; with plain-text marks where there is none."""

import re
import unicodedata
from collections.abc import Container
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from goldfish.pieces import plain, text_pieces
from goldfish.rule import Goldfish

DROPPED = "bold white on dark_red"
DIFFERS = "bold black on yellow"
MARKS = {DROPPED: ("[-", "-]"), DIFFERS: ("{~", "~}"), "": ("", "")}  # where there are no colours


@dataclass
class Shown:
    """A text as the pieces of its tokens, and which of them are dropped."""

    pieces: list[str]
    dropped: list[bool]

    def render(self, colour: bool, differs: Container[int] = ()) -> Text:
        """The text with its dropped tokens and the characters in `differs` in colour, or in MARKS without colour."""
        text = Text()
        styles = (DIFFERS if i in differs else DROPPED if drop else "" for i, drop in enumerate(self.by_character()))
        for style, run in groupby(zip(styles, "".join(self.pieces), strict=True), key=lambda pair: pair[0]):
            content = "".join(char if char in "\n\t" else plain(char) for _, char in run)
            before, after = ("", "") if colour else MARKS[style]
            text.append(before + content + after, style)
        return text

    def by_character(self) -> list[bool]:
        return [drop for piece, drop in zip(self.pieces, self.dropped, strict=True) for _ in piece]

    def words(self) -> list[tuple[str, bool, range]]:
        """Of every word its normal form, whether a token of it is dropped, and its characters."""
        dropped = self.by_character()
        return [
            (unicodedata.normalize("NFKC", m.group()).casefold(), any(dropped[slice(*m.span())]), range(*m.span()))
            for m in re.finditer(r"[^\W_]+", "".join(self.pieces))
        ]


def read_text(argument: str) -> str:
    """The content of the file of this name, or the argument itself.

    Raises:
        ValueError: the argument looks like the name of a file (no white space, and a slash or a suffix), but there is
            no such file.
    """
    if len(argument) < 256 and Path(argument).is_file():
        return Path(argument).read_text(encoding="utf-8")
    if re.fullmatch(r"\S*/\S*|\S+\.[A-Za-z]\w{0,9}", argument):
        raise ValueError(f"there is no file {argument}; to show these characters as a text, add a space")
    return argument


def shown(rule: Goldfish, tokenizer: Any, text: str) -> Shown:
    """A text under a rule that is bound to the tokenizer (`Goldfish.bind`)."""
    ids = tokenizer(text)["input_ids"]
    return Shown(text_pieces(tokenizer, [], ids), rule.dropped(torch.tensor(ids, dtype=torch.int64)).tolist())


def show_one(text: Shown, *, colour: bool = True) -> Text:
    """The text, and a line that counts."""
    count = f"\n\n{sum(text.dropped)} of {len(text.dropped)} tokens dropped"
    return text.render(colour).append(count if colour else f"{count}, marked [-so-]", "dim")


def show_two(first: Shown, second: Shown, *, colour: bool = True) -> Table:
    """Two versions of a text side by side; marked where a word of both is dropped in only one of them."""
    words = first.words(), second.words()
    forms = [[word for word, _, _ in side] for side in words]
    matcher = SequenceMatcher(None, forms[0], forms[1], autojunk=False)
    blocks = matcher.get_matching_blocks()
    shared = [(words[0][block.a + i], words[1][block.b + i]) for block in blocks for i in range(block.size)]
    different = [pair for pair in shared if pair[0][1] != pair[1][1]]
    differs = [{place for pair in different for place in pair[side][2]} for side in (0, 1)]
    table = Table(show_header=False, box=None, padding=(0, 2), expand=True)
    for _ in range(2):
        table.add_column(ratio=1)
    table.add_row(first.render(colour, differs[0]), second.render(colour, differs[1]))
    same = len(shared) - len(different)
    result = f"{same} of {len(shared)} shared words get the same decision" if shared else "no word in common"
    if not colour:
        result += "; dropped tokens are marked [-so-], words with different decisions {~so~}"
    table.add_row(Text(f"\n{result}", "dim"), "")
    return table
