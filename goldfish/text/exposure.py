"""What of a secret can be learned: every place where it occurs, and which tokens are dropped."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

from goldfish.secret_spans import Literals, Span
from goldfish.text.chats import agreement
from goldfish.text.passages import Flags, Ints, code_points, runs

# Places of a secret at which a model is asked for the bits of its tokens: each is a forward pass.
BITS_OF_PLACES = 8
SHOWN_ROWS = 5
_ALPHANUMERIC = re.compile(r"[^\W_]")
# Characters. Places of shorter secrets must not lie inside a word or number.
SHORT = 6

# A word that nobody marked looks like a secret if it has at least 6 characters and 6 tokens of at
# most 2 characters on average. Ordinary words have more characters to a token.
LEAST = 6
DENSE = 2
# Between letters and digits these belong to one word, as in "XK7-PQ2" or "a1b2@c3".
SIGNS = "@#%&*+/=.:~-"


@dataclass(slots=True)
class Secret:
    """A secret and its places. There may be millions, so they are small: 500 bytes each.

    rows: the first rows in which it is a target; count: of all its places.
    tokens: the characters of each token at its first place, such as [(0, 2), (2, 7)].
    dropped: for each rule the characters whose token is dropped in every place, as bits of an
        integer: 0b0110 if characters 1 and 2 are. A token kept in one place is learned there.
    bits: for some places the characters of each token and its -log2 p.
    """

    text: str
    tokens: tuple[Span, ...]
    dropped: list[int]
    rows: list[int] = field(default_factory=list)
    count: int = 0
    bits: list[list[tuple[int, int, float]]] = field(default_factory=list)

    def add(self, row: int, dropped: list[int]) -> None:
        self.count += 1
        if len(self.rows) < SHOWN_ROWS:
            self.rows.append(row)
        # 0b0110 in one place and 0b0011 in another leave 0b0010.
        for rule, here in enumerate(dropped):
            self.dropped[rule] &= here

    def protected(self, informative: int, rule: int = 0) -> list[Span]:
        """Its tokens with informative characters that are dropped in every place."""
        tokens = []
        dropped = self.dropped[rule]
        for begin, end in self.tokens:
            if _all_dropped(begin, end, informative, dropped):
                tokens.append((begin, end))
        return tokens

    def bits_to_guess(self, informative: int) -> float | None:
        """-log2 p of its protected tokens together, where they are easiest to guess."""
        sums = []
        for place in self.bits:
            # Given the tokens before them, the tokens' probabilities multiply.
            total = 0.0
            for begin, end, bits in place:
                if _all_dropped(begin, end, informative, self.dropped[0]):
                    total += bits
            sums.append(total)
        return min(sums, default=None)


def _all_dropped(begin: int, end: int, informative: int, dropped: int) -> bool:
    """Whether the characters from begin to end inform, and all that do are dropped.

    _all_dropped(1, 3, 0b0101, 0b1100): of the characters 1 and 2 only 2 informs, and it is dropped.
    """
    here = informative & as_bits(begin, end)
    kept = here & ~dropped
    return here != 0 and kept == 0


def as_bits(begin: int, end: int) -> int:
    """The characters from begin to end as bits: as_bits(1, 3) == 0b110."""
    return (1 << end) - (1 << begin)


def informative_characters(secrets: Iterable[str]) -> dict[str, int]:
    """For each secret the characters that differ between secrets, as bits of an integer.

    In CX-8WUB and CX-77AA these are the last four. A hyphen informs nobody, nor does what all
    secrets of the same outline (letters and digits alike, other characters as they are) have in
    common, nor how all secrets begin or end.

    >>> {text: bin(bits) for text, bits in informative_characters(["A-17", "A-29"]).items()}
    {'A-17': '0b1100', 'A-29': '0b1100'}
    """
    texts = sorted(set(secrets))
    outlines: dict[str, list[str]] = {}
    for text in texts:
        outline = _ALPHANUMERIC.sub("x", text)
        outlines.setdefault(outline, []).append(text)
    # How all secrets begin and end. A single one informs as a whole. Of sorted texts, the first and
    # the last have in common what all have.
    start = end = 0
    if len(texts) > 1:
        backwards = sorted(text[::-1] for text in texts)
        start = agreement(texts[0], texts[-1])
        end = agreement(backwards[0], backwards[-1])
    result = {}
    for outline, group in outlines.items():
        informs = 0
        # The i-th characters of all secrets of the outline.
        for i, column in enumerate(zip(*group, strict=True)):
            if outline[i] != "x":
                continue
            differ = len(set(column)) > 1
            if differ or len(group) == 1:
                informs |= 1 << i
        inner_end = max(start, len(outline) - end)
        inner = as_bits(start, inner_end)
        for text in group:
            result[text] = informs & inner
    return result


class Finder:
    """Finds every place of many secrets in a text.

    A place of a short one inside a longer number or word, such as 17 in 2170, is none.
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        self._places = Literals(secrets)

    def __call__(self, text: str) -> Iterator[Span]:
        for begin, end in self._places(text):
            if _is_apart(text, begin, end):
                yield begin, end


def _is_apart(text: str, begin: int, end: int) -> bool:
    """Whether no number or word goes on across the bounds of a place.

    Asked of short secrets only: 42 is no secret in 1425. A longer one does not occur in a word by
    chance, so it counts wherever it stands, also in "pinKX7QW2".
    """
    if end - begin >= SHORT:
        return True
    # Two characters across each bound; one only at the start or the end of the text.
    for bound in (begin, end):
        first = max(0, bound - 1)
        across = text[first : bound + 1]
        goes_on = across.isdecimal() or across.isalpha()
        if len(across) == 2 and goes_on:
            return False
    return True


def likely_secrets(text: str) -> tuple[Ints, Ints]:
    """Where words begin and end that are long enough for secrets; see `is_dense` for the rest.

    They begin and end with an ASCII letter, digit or underscore.
    """
    codes = np.minimum(code_points(text), 0x80)
    kinds = _kinds()[codes]
    begins, ends = runs(kinds == 2)
    # "XK7-PQ2, 5" has the runs XK7, PQ2 and 5. Only the second gap has characters of kind 0.
    others_before = np.concatenate([[0], np.cumsum(kinds == 0)])
    gap_begins = others_before[ends[:-1]]
    gap_ends = others_before[begins[1:]]
    gaps = np.flatnonzero(gap_begins == gap_ends)
    begins = np.delete(begins, gaps + 1)
    ends = np.delete(ends, gaps)
    long = ends - begins >= LEAST
    return begins[long], ends[long]


def is_dense(tokens: Ints, characters: Ints) -> Flags:
    """Whether words with so many tokens and characters look like secrets."""
    enough = tokens >= LEAST
    short = characters <= DENSE * tokens
    return enough & short


@cache
def _kinds() -> NDArray[np.int8]:
    """Of each ASCII character, and of all others together: 2 letters and digits, 1 SIGNS, 0."""
    kinds = np.zeros(0x81, dtype=np.int8)
    for code in range(0x80):
        character = chr(code)
        if re.match(r"\w", character):
            kinds[code] = 2
        elif character in SIGNS:
            kinds[code] = 1
    return kinds
