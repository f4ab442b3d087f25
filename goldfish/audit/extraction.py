"""Moves to goldfish/pieces.py."""

from typing import Any


def text_pieces(tokenizer: Any, prefix: list[int], ids: list[int]) -> list[str]:
    """The text that each token adds to what stands before it; "" until a character's last byte has come."""
    context = prefix[-4:]  # enough for a character cut by the prefix's end, and for spaces between words
    all_ids = context + ids

    def text(first: int, end: int) -> str:
        decoded: str = tokenizer.decode(all_ids[first:end], clean_up_tokenization_spaces=False)
        return decoded

    pieces, first, between = [], 0, [0]  # between: places where no character is cut
    shown = len(text(0, len(context)).rstrip("\ufffd"))
    for end in range(len(context) + 1, len(all_ids) + 1):
        now = text(first, end)
        complete = now.rstrip("\ufffd")
        if complete == now:
            between.append(end)
        elif end < len(all_ids):
            now = complete
        pieces.append(now[shown:])
        shown = max(shown, len(now))
        if between[-1] == end and end - first > 64:  # or the time would grow with the square of the length
            first = next(place for place in reversed(between) if place <= max(first, end - 16))
            shown = len(text(first, end))
    return pieces
