"""Passages that occur more than once in a data set, and whether their dropped words agree."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from goldfish.hashing import mix, prefix_hashes, shift_right, window_hashes

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

PLANE = 0x10000  # code points
PASSAGE = 8  # words
SHOWN = 10  # rows that are listed
# Passages in memory (6 MB). If there are more, every second one is forgotten (by checksum), again
# and again, and those that are left stand for as many as were forgotten.
MOST = 2**18
_NOTHING = np.zeros((3, 0), dtype=np.int64)


class Words(NamedTuple):
    """The words of a text: runs of letters and digits.

    begins, ends: characters, int64 (N,). checksums: equal for words that differ in case only.
    """

    begins: Ints
    ends: Ints
    checksums: Ints

    @classmethod
    def of(cls, text: str) -> "Words":
        codes = code_points(text)
        last = int(codes.max(initial=0))
        planes = last // PLANE + 1
        letters = _folded(planes)[codes]
        begins, ends = runs(letters > 0)
        checksums = _checksums(letters, begins, ends)
        return cls(begins, ends, checksums)


@dataclass
class Passages:
    """Counts of passages. A passage is a run of 8 words of a row, or all words of a shorter row.

    total: passages. recurring: those that occur in an earlier row. differing: the recurring ones in
    which other words have a dropped token than in the first row. Estimates once passages are
    sampled: each that is compared stands for `one_in` passages at that time.
    repeated: (row, earlier row, share of the row's passages that are in it), if at least half of
    those that are compared are; the first SHOWN of repeated_count.
    one_in: of so many passages one is compared.
    """

    total: int = 0
    recurring: int = 0
    differing: int = 0
    repeated: list[tuple[int, int, float]] = field(default_factory=list)
    repeated_count: int = 0
    one_in: int = 1
    # Three rows: the checksums of passages in ascending order, which of their words are dropped
    # (one bit each), and the row in which each was first seen.
    _seen: Ints = field(default_factory=lambda: _NOTHING, repr=False, compare=False)

    def count(
        self,
        words: Ints,
        dropped: Flags,
        rows: Ints,
    ) -> None:
        """Add the words of some rows; int64 or bool (N,).

        Args:
            words: the checksum of each word, in the order of the text.
            dropped: whether a token of the word is dropped.
            rows: the number of the row in which the word is, ascending.
        """
        begins, ends = _passages(rows)
        checksums = _checksums(words, begins, ends)
        compared = checksums % self.one_in == 0
        begins = begins[compared]
        ends = ends[compared]
        found = np.stack(
            [
                checksums[compared],
                _as_bits(dropped, begins, ends),
                rows[begins],
            ]
        )
        self._compare(found)

    def _compare(self, found: Ints) -> None:
        """Compare passages with those before them; int64 (3, N) as in _seen, in order of rows."""
        known = self._seen.shape[1]
        every = np.concatenate([self._seen, found], axis=1)
        # first: where each checksum is for the first time, those seen before ahead of new ones.
        # which: for each passage the place of its checksum in `first`.
        _, first, which = np.unique(
            every[0],
            return_index=True,
            return_inverse=True,
        )
        self._seen = every[:, first]
        _, first_drops, first_rows = self._seen[:, which[known:]]
        _, drops, rows = found
        recurs = first_rows != rows
        differs = recurs & (first_drops != drops)
        # Each stands for the passages that are not compared.
        self.total += len(rows) * self.one_in
        self.recurring += int(recurs.sum()) * self.one_in
        self.differing += int(differs.sum()) * self.one_in
        for repeated in _repeated(rows, first_rows):
            self.repeated_count += 1
            if len(self.repeated) < SHOWN:
                self.repeated.append(repeated)
        while self._seen.shape[1] > MOST:
            self.one_in *= 2
            left = self._seen[0] % self.one_in == 0
            self._seen = self._seen[:, left]


def _repeated(rows: Ints, first_rows: Ints) -> Iterator[tuple[int, int, float]]:
    """(row, earlier row, share) if at least half of a row's passages were in that earlier row.

    Args:
        rows, first_rows: of each passage its row, and the row in which it was first.
    """
    totals = Counter(rows.tolist())
    recurs = rows != first_rows
    pairs = zip(
        rows[recurs].tolist(),
        first_rows[recurs].tolist(),
        strict=True,
    )
    best: dict[int, tuple[int, int]] = {}
    for (row, first), count in Counter(pairs).items():
        most, _ = best.get(row, (0, 0))
        if count > most:
            best[row] = (count, first)
    for row, (count, first) in best.items():
        share = count / totals[row]
        if share >= 0.5:
            yield row, first, share


def _passages(rows: Ints) -> tuple[Ints, Ints]:
    """Where passages begin and end, given the row of each word.

    With passages of 2 words, the rows [5, 5, 5, 6] have the passages 0-2, 1-3 and 3-4.
    """
    words = np.arange(len(rows))
    first_of_row = np.searchsorted(rows, rows, side="left")
    end_of_row = np.searchsorted(rows, rows, side="right")
    fits = words + PASSAGE <= end_of_row
    # A row with fewer than 8 words is one passage.
    begins = np.flatnonzero(fits | (words == first_of_row))
    ends = np.minimum(begins + PASSAGE, end_of_row[begins])
    return begins, ends


def _as_bits(flags: Flags, begins: Ints, ends: Ints) -> Ints:
    """The flags of each passage as bits: [True, False, True] -> 0b10100000."""
    bits = np.zeros(len(begins), dtype=np.int64)
    last = len(flags) - 1
    # After step j, each passage has its first j + 1 flags.
    for j in range(PASSAGE):
        place = begins + j
        inside = place < ends
        flag = flags[np.minimum(place, last)]
        bits = 2 * bits + (flag & inside)
    return bits


def _checksums(symbols: Ints, begins: Ints, ends: Ints) -> Ints:
    """A checksum of each symbols[begin:end], 44 bits; the length counts too."""
    begin = torch.from_numpy(begins)
    end = torch.from_numpy(ends)
    prefix = prefix_hashes(torch.from_numpy(symbols))
    hashes = window_hashes(prefix, begin, end)
    length = end - begin
    mixed = mix(hashes + length)
    return shift_right(mixed, 20).numpy()


def code_points(text: str) -> NDArray[np.uint32]:
    data = text.encode("utf-32-le", "surrogatepass")
    return np.frombuffer(data, dtype="<u4")


def runs(flags: Flags) -> tuple[Ints, Ints]:
    """Where runs of True begin and end: [0, 1, 1, 0, 1] -> [1, 4], [3, 5]."""
    # +1 where a run begins, -1 behind its end.
    steps = np.diff(
        flags.astype(np.int8),
        prepend=0,
        append=0,
    )
    begins = np.flatnonzero(steps == 1)
    ends = np.flatnonzero(steps == -1)
    return begins, ends


@cache
def _folded(planes: int) -> Ints:
    """For every code point of a letter or digit its lower case, 0 for the others: A and a -> 97.

    Of a lower case of several characters the first one counts, so "ß" is the same as "s". Most
    texts need one or two of the 17 planes of Unicode, each of which takes 20 milliseconds.
    """
    folded = np.zeros(planes * PLANE, dtype=np.int64)
    for code in range(len(folded)):
        character = chr(code)
        if character.isalnum():
            lower = character.casefold()
            folded[code] = ord(lower[0])
    return folded
