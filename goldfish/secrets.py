"""Tokens of secrets that a regular expression marks in the text of a document.

On the CPU: `re` needs the text, which is put together from the ids.
"""

import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from goldfish.letters import Vocabulary


@cache
def compiled(pattern: str) -> re.Pattern[str]:
    """The expression; ValueError if it is none, or if it matches everywhere."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"secrets={pattern!r} is not a regular expression: {error}") from error
    if expression.search("") is not None:
        raise ValueError(
            f"secrets={pattern!r} matches an empty text; "
            "give an expression that matches secrets only"
        )
    return expression


def spans(expression: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    r"""Where the secrets of a text begin and end: the matches, or the first group of each.

    >>> list(spans(compiled(r"code is (\d+)"), "The code is 4711, not 12."))
    [(12, 16)]
    """
    group = 1 if expression.groups else 0
    for match in expression.finditer(text):
        begin, end = match.span(group)
        if 0 <= begin < end:  # (-1, -1) if the group has no part in the match
            yield begin, end


def secret_tokens(
    expression: re.Pattern[str],
    vocabulary: Vocabulary,
    ids: NDArray[np.int64],
    starts: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """Which tokens of a row overlap a secret of their document.

    Args:
        ids: (T,), without padding.
        starts: (T,), whether a token is the first of a document; the first token always is.

    Returns:
        bool (T,).
    """
    result = np.zeros(len(ids), dtype=bool)
    first_tokens = [*np.flatnonzero(starts).tolist(), len(ids)]
    entries = vocabulary.entries_of(ids)
    for first, end in pairwise(first_tokens):
        result[first:end] = _of_document(expression, entries[first:end])
    return result


def _of_document(expression: re.Pattern[str], entries: list[bytes]) -> NDArray[np.bool_]:
    """Which tokens of a document overlap a secret, given the bytes of each token.

    A byte that is part of no character is decoded as a character of its own (U+DC80 to U+DCFF), so
    places in the text can be counted in bytes again.
    """
    result = np.zeros(len(entries), dtype=bool)
    data = b"".join(entries)
    text = data.decode("utf-8", "surrogateescape")
    found = list(spans(expression, text))
    if not found:
        return result
    byte_of = _byte_offsets(text)
    token_ends = np.cumsum([len(entry) for entry in entries])
    for begin, end in found:
        # From the token with the secret's first byte to the token with its last.
        first = np.searchsorted(token_ends, byte_of[begin], side="right")
        last = np.searchsorted(token_ends, byte_of[end], side="left")
        result[first : last + 1] = True
    return result


def _byte_offsets(text: str) -> NDArray[np.int64]:
    """The place of each character, and of the end, in UTF-8 bytes.

    >>> _byte_offsets("aé€").tolist()
    [0, 1, 3, 6]
    """
    code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    sizes = np.ones(len(text), dtype=np.int64)
    for least in (0x80, 0x800, 0x10000):  # the first code points of two, three and four bytes
        sizes += code_points >= least
    sizes[(code_points >= 0xDC80) & (code_points <= 0xDCFF)] = 1
    return np.concatenate([[0], np.cumsum(sizes)])
