"""What of a secret can be learned: every place where it occurs, and which tokens are dropped."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from goldfish.text.passages import code_points, runs

# Places of a secret in which a model is asked for the bits of its tokens.
BITS_OF_PLACES = 8
SHOWN_ROWS = 5
# Characters by which places of secrets are looked up.
_PREFIX = 4
# Characters. Places of shorter secrets must not lie inside a word or number.
SHORT = 6

# A word that nobody marked looks like a secret if it has at least 6 characters and 6 tokens of at
# most 2 characters on average. Ordinary words have more characters to a token.
LEAST = 6
DENSE = 2
# Between letters and digits these belong to one word, as in "XK7-PQ2" or "a1b2@c3".
SIGNS = "@#%&*+/=.:~-"


@dataclass
class Secret:
    """A secret and its places.

    rows: the first rows in which it is a target; count: of all its places.
    tokens: the characters of each token at its first place, such as [(0, 2), (2, 7)].
    dropped: for each rule the characters whose token is dropped in every place, as bits of an
        integer: 0b0110 if characters 1 and 2 are. A token kept in one place is learned there.
    bits: for some places the characters of each token and its -log2 p.
    """

    text: str
    tokens: list[tuple[int, int]]
    dropped: list[int]
    rows: list[int] = field(default_factory=list)
    count: int = 0
    bits: list[list[tuple[int, int, float]]] = field(default_factory=list)

    def add(self, row: int, dropped: list[int]) -> None:
        self.count += 1
        if len(self.rows) < SHOWN_ROWS:
            self.rows.append(row)
        self.dropped = [
            old & new for old, new in zip(self.dropped, dropped, strict=True)
        ]

    def protected(self, informative: int, rule: int = 0) -> list[tuple[int, int]]:
        """Its tokens with informative characters that are dropped in every place."""
        return [
            (begin, end)
            for begin, end in self.tokens
            if _all_dropped(begin, end, informative, self.dropped[rule])
        ]

    def bits_to_guess(self, informative: int) -> float | None:
        """-log2 p of its protected tokens together, where they are easiest to guess."""
        sums = [
            sum(
                bits
                for begin, end, bits in place
                if _all_dropped(begin, end, informative, self.dropped[0])
            )
            for place in self.bits
        ]
        return min(sums, default=None)


def _all_dropped(begin: int, end: int, informative: int, dropped: int) -> bool:
    """Whether the characters from begin to end inform, and all that do are dropped.

    _all_dropped(1, 3, 0b0101, 0b1100): of the characters 1 and 2 only 2 informs, and it is dropped.
    """
    here = informative & as_bits(begin, end)
    return here != 0 and here & ~dropped == 0


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
        outline = "".join("x" if char.isalnum() else char for char in text)
        outlines.setdefault(outline, []).append(text)
    several = len(texts) > 1
    start = _common_start(texts) if several else 0
    end = _common_start(sorted(text[::-1] for text in texts)) if several else 0
    result = {}
    for outline, group in outlines.items():
        columns = list(zip(*group, strict=True))
        informs = [
            outline[i] == "x" and (len(group) == 1 or len(set(column)) > 1)
            for i, column in enumerate(columns)
        ]
        for text in group:
            inner = range(start, len(text) - end)
            result[text] = sum(1 << i for i in inner if informs[i])
    return result


def _common_start(texts: list[str]) -> int:
    """How many characters all of some sorted texts begin with: what the first and the last share.

    >>> _common_start(["CX-17", "CX-2", "CX-29"])
    3
    """
    pairs = zip(texts[0], texts[-1], strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


class Finder:
    """Finds every place of many secrets in a text, in time that hardly depends on their number.

    An expression finds the first four characters of any secret; what follows is looked up by its
    length. A place inside a longer number or word, such as 17 in 2170, is none.
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets = set(secrets)
        lengths: dict[str, set[int]] = {}
        for secret in self._secrets:
            lengths.setdefault(secret[:_PREFIX], set()).add(len(secret))
        self._lengths = {prefix: sorted(each) for prefix, each in lengths.items()}
        self._expression = re.compile(_any_of(set(self._lengths)))

    def __call__(self, text: str) -> Iterator[tuple[int, int]]:
        match = self._expression.search(text) if self._secrets else None
        while match:
            begin = match.start()
            for prefix in _beginnings(match.group()):
                for length in self._lengths.get(prefix, ()):
                    end = begin + length
                    if text[begin:end] in self._secrets and _is_apart(text, begin, end):
                        yield begin, end
            match = self._expression.search(text, begin + 1)  # places may overlap


def _any_of(texts: set[str]) -> str:
    """An expression for the longest of some texts, with what they have in common written once.

    >>> _any_of({"ab", "ac", "a"})
    '(?:a(?:b|c)?)'
    """
    rest: dict[str, set[str]] = {}
    for text in texts - {""}:
        rest.setdefault(text[0], set()).add(text[1:])
    branches = [re.escape(char) + _any_of(more) for char, more in sorted(rest.items())]
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)})" + ("?" if "" in texts else "")


def _beginnings(prefix: str) -> list[str]:
    return [prefix[:length] for length in range(1, len(prefix) + 1)]


def _is_apart(text: str, begin: int, end: int) -> bool:
    """Whether no number or word goes on across the bounds of a place.

    Asked of short secrets only: 42 is no secret in 1425. A longer one does not occur in a word by
    chance, so it counts wherever it stands, also in "pinKX7QW2".
    """
    if end - begin >= SHORT:
        return True
    for left in (begin - 1, end - 1):
        pair = text[left : left + 2] if left >= 0 else ""
        if len(pair) == 2 and (pair.isdecimal() or pair.isalpha()):
            return False
    return True


def likely_secrets(text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where words begin and end that are long enough for secrets; see `is_dense` for the rest.

    They begin and end with an ASCII letter, digit or underscore.
    """
    kinds = _kinds()[np.minimum(code_points(text), 0x80)]
    begins, ends = runs(kinds == 2)
    # "XK7-PQ2, 5" has the runs XK7, PQ2 and 5. Only the second gap has characters of kind 0.
    others_before = np.concatenate([[0], np.cumsum(kinds == 0)])
    together = others_before[begins[1:]] == others_before[ends[:-1]]
    gaps = np.flatnonzero(together)
    begins, ends = np.delete(begins, gaps + 1), np.delete(ends, gaps)
    long = ends - begins >= LEAST
    return begins[long], ends[long]


def is_dense(
    tokens: NDArray[np.int64], characters: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether words with so many tokens and characters look like secrets."""
    return (tokens >= LEAST) & (tokens * DENSE >= characters)


@cache
def _kinds() -> NDArray[np.int8]:
    """Of each ASCII character, and of all others together: 2 letters and digits, 1 SIGNS, 0."""
    kinds = np.zeros(0x81, dtype=np.int8)
    for code in range(0x80):
        if re.match(r"\w", chr(code)):
            kinds[code] = 2
        elif chr(code) in SIGNS:
            kinds[code] = 1
    return kinds
