"""Text as people look at it: what each token adds, and visible escapes for characters that cannot be seen."""

from typing import Any

JOINERS = "\u200c\u200d"  # shape emoji, Persian and Indic scripts; alone they do nothing
OVERLAP = 4  # tokens: enough for a character that is cut by tokens, and for spaces between words
LONGEST = (
    64  # tokens that are decoded at once, or the time would grow with the square of the length
)


def text_pieces(tokenizer: Any, prefix_ids: list[int], ids: list[int]) -> list[str]:
    """The text that each token of `ids` adds to the text before it; "" until the last byte of a character has come.

    Args:
        tokenizer: anything with a Hugging Face tokenizer's `decode`.
        prefix_ids: the tokens before `ids`, which decide about leading spaces and complete cut characters.
        ids: the tokens to decode.

    Returns:
        One string per token; joined they are the text of `ids` after `prefix_ids`.
    """
    context = prefix_ids[-OVERLAP:]
    all_ids = context + ids

    def text(begin: int, end: int) -> str:
        return str(tokenizer.decode(all_ids[begin:end], clean_up_tokenization_spaces=False))

    pieces, begin = [], 0
    boundaries = [0]  # ends of tokens at which no character is cut
    shown = len(text(0, len(context)).rstrip("\ufffd"))
    for end in range(len(context) + 1, len(all_ids) + 1):
        now = text(begin, end)
        complete = now.rstrip("\ufffd")
        if complete == now:
            boundaries.append(end)
        elif end < len(all_ids):
            now = complete
        pieces.append(now[shown:])
        shown = max(shown, len(now))
        if boundaries[-1] == end and end - begin > LONGEST:
            begin = next(
                place for place in reversed(boundaries) if place <= max(begin, end - LONGEST // 4)
            )
            shown = len(text(begin, end))
    return pieces


def plain(text: str, limit: int = 200) -> str:
    """At most `limit` characters of `text`, on one line and with visible escapes; for titles, labels and terminals."""
    cut = text[:limit] + ("…" if len(text) > limit else "")
    return cut if cut.isprintable() else "".join(map(visible, cut))


def visible(char: str) -> str:
    """`char`, or its Python escape such as \\x00 or \\u202e where it is invisible or steers the renderer: controls,
    bidi overrides, zero-width characters, lone surrogates, line separators, unusual spaces."""
    return (
        char
        if char.isprintable() or char in JOINERS
        else char.encode("unicode_escape").decode("ascii")
    )
