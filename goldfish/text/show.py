"""Which tokens of a text a rule drops: in colour, or with plain-text marks."""

from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from rich.text import Text

from goldfish.rule import Goldfish
from goldfish.text.printable import counted, plain, text_pieces

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
    tensor = torch.tensor(ids, dtype=torch.int64)
    dropped = rule.dropped(tensor).tolist()
    pieces = text_pieces(tokenizer, [], ids)
    result = Text()
    # Neighbours that are dropped share one mark. A token without text, such as the first half of a
    # character, must not end it.
    with_text = [pair for pair in zip(dropped, pieces, strict=True) if pair[1]]
    for drop, run in groupby(with_text, key=itemgetter(0)):
        content = ""
        for _, piece in run:
            for char in piece:
                # The text's own lines stay; other control characters are shown as escapes.
                content += char if char in "\n\t" else plain(char)
        if not drop:
            result.append(content)
        elif colour:
            result.append(content, DROPPED)
        else:
            result.append(f"[-{content}-]", DROPPED)
    count = f"\n\n{sum(dropped):,} of {counted(len(dropped), 'token')} dropped"
    return result.append(count if colour else f"{count}, marked [-so-]", "dim")
