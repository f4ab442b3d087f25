"""Which tokens of a text a rule drops: in colour, or with plain-text marks."""

from itertools import groupby
from typing import Any

import torch
from rich.text import Text

from goldfish.rule import Goldfish
from goldfish.text.printable import plain, text_pieces

DROPPED = "bold white on dark_red"


def show(rule: Goldfish, tokenizer: Any, text: str, *, colour: bool = True) -> Text:
    """The text with its dropped tokens in colour, or marked [-so-] without; then their number.

    Args:
        rule: bound to the tokenizer (`Goldfish.bind`) if its strategy reads text.
        tokenizer: a Hugging Face tokenizer; special tokens that it adds are shown too.
        text: one document.
        colour: mark dropped tokens by colour instead of brackets.
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
