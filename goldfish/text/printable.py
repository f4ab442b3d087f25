"""Text for people: what each token adds, and visible escapes for invisible characters."""

from bisect import bisect_right
from typing import Any

# These shape emoji, Persian and Indic scripts; alone they do nothing.
JOINERS = "\u200c\u200d"
# Tokens: enough for a character that is cut by tokens, and for spaces between words.
OVERLAP = 4
# Tokens decoded at once: decoding all would take time that grows with the square of the length.
LONGEST = 64


def text_pieces(tokenizer: Any, prefix_ids: list[int], ids: list[int]) -> list[str]:
    """The text that each token of `ids` adds to the text before it.

    A token that ends inside a character adds "" until the character's last byte has come.

    Args:
        tokenizer: anything with a Hugging Face tokenizer's `decode`.
        prefix_ids: the tokens before `ids`. Leading spaces and cut characters depend on them.
        ids: the tokens to decode.

    Returns:
        One string per token; joined they are the text of `ids` after `prefix_ids`.
    """
    context = prefix_ids[-OVERLAP:]
    all_ids = context + ids

    def text(begin: int, end: int) -> str:
        part = all_ids[begin:end]
        return str(tokenizer.decode(part, clean_up_tokenization_spaces=False))

    # For the tokens b"caf", b"\xc3", b"\xa9!" the texts are "caf", "caf\ufffd" and "café!". Without
    # the cut character at the end they have 3, 3 and 5 characters: the pieces are "caf", "", "é!".
    pieces = []
    begin = 0
    boundaries = [0]  # ends of tokens at which no character is cut
    before = text(0, len(context)).rstrip("\ufffd")
    shown = len(before)
    for end in range(len(context) + 1, len(all_ids) + 1):
        now = text(begin, end)
        # A cut character is decoded as U+FFFD. At the very end it stays: no more bytes come.
        complete = now.rstrip("\ufffd")
        if complete == now:
            boundaries.append(end)
        elif end < len(all_ids):
            now = complete
        pieces.append(now[shown:])
        shown = max(shown, len(now))
        is_long = end - begin > LONGEST
        if boundaries[-1] == end and is_long:
            # Begin later from now on, at the last place at or before `latest` where no character
            # is cut.
            latest = max(begin, end - LONGEST // 4)
            begin = boundaries[bisect_right(boundaries, latest) - 1]
            shown = len(text(begin, end))
    return pieces


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "secret"), counted(2_000, "secret")
    ('1 secret', '2,000 secrets')
    """
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}s"


def plain(text: str, limit: int = 200) -> str:
    """At most `limit` characters of `text`, on one line, with visible escapes.

    >>> plain("two\\nlines", limit=5)
    'two\\\\nl…'
    """
    cut = text[:limit]
    if len(text) > limit:
        cut += "…"
    if cut.isprintable():
        return cut
    return "".join(map(visible, cut))


def visible(char: str) -> str:
    """`char`, or its Python escape such as \\x00 or \\u202e if it cannot be seen.

    These are controls, bidi overrides, zero-width characters, lone surrogates, line separators
    and unusual spaces: they would hide text, or steer what renders it.
    """
    if char.isprintable() or char in JOINERS:
        return char
    return char.encode("unicode_escape").decode("ascii")
