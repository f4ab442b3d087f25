"""What a rule does to a text, in colour: for the terminal, or as HTML."""

import re
import unicodedata
from collections.abc import Container
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from goldfish.pieces import plain, text_pieces
from goldfish.rule import Goldfish

DROPPED = "bold white on dark_red"
DIFFERS = "bold black on yellow"


@dataclass
class Shown:
    """A text as its tokens' pieces, and which of them are dropped."""

    pieces: list[str]
    dropped: list[bool]

    def render(self, marked: Container[int] = ()) -> Text:
        """The text with its dropped tokens coloured, and those characters that are `marked`."""
        text, place = Text(), 0
        for piece, gone in zip(self.pieces, self.dropped, strict=True):
            for char in piece:
                style = DIFFERS if place in marked else DROPPED if gone else None
                text.append(char if char in "\n\t" else plain(char), style)
                place += 1
        return text

    def words(self) -> list[tuple[str, bool, range]]:
        """Of every word its normal form, whether a token of it is dropped, and its characters."""
        fate = [gone for piece, gone in zip(self.pieces, self.dropped, strict=True) for _ in piece]
        found = re.finditer(r"[^\W_]+", "".join(self.pieces))
        return [
            (unicodedata.normalize("NFKC", m.group()).casefold(), any(fate[slice(*m.span())]), range(*m.span()))
            for m in found
        ]


def shown(rule: Goldfish, tokenizer: Any, text: str) -> Shown:
    """A text under a rule that knows the tokenizer (`Goldfish.bind`)."""
    ids = tokenizer(text)["input_ids"]
    return Shown(text_pieces(tokenizer, [], ids), rule.dropped(torch.tensor(ids, dtype=torch.int64)).tolist())


def show_one(text: Shown) -> Text:
    """The text, and a line that counts."""
    count = f"\n\n{sum(text.dropped)} of {len(text.dropped)} tokens dropped"
    return text.render().append(count, "dim")


def show_two(first: Shown, second: Shown) -> Table:
    """Two versions of a text side by side; yellow where a word that both have is dropped in one of them only."""
    words = first.words(), second.words()
    forms = [[word for word, _, _ in side] for side in words]
    matcher = SequenceMatcher(None, forms[0], forms[1], autojunk=False)
    marked: tuple[set[int], set[int]] = (set(), set())
    shared = same = 0
    for block in matcher.get_matching_blocks():
        for i in range(block.size):
            one, other = words[0][block.a + i], words[1][block.b + i]
            shared += 1
            same += one[1] == other[1]
            if one[1] != other[1]:
                marked[0].update(one[2])
                marked[1].update(other[2])
    table = Table(show_header=False, box=None, padding=(0, 2), expand=True)
    table.add_column(ratio=1)
    table.add_column(ratio=1)
    table.add_row(first.render(marked[0]), second.render(marked[1]))
    verdict = f"{same} of {shared} words that both have get the same decision" if shared else "no word in common"
    table.add_row(Text(f"\n{verdict}", "dim"), "")
    return table
