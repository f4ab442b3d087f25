"""Passages that occur more than once in a data set, and whether their dropped words agree."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from goldfish.hashing import mix, prefix_hashes, shift_right, window_hashes

PASSAGE = 8  # words
SHOWN = 10  # rows that are listed
# Passages in memory (6 MB). If there are more, every second one is forgotten (by checksum), again
# and again, and those that are left stand for as many as were forgotten.
MOST = 2**18


class Words(NamedTuple):
    """The words of a text: runs of letters and digits.

    begins, ends: characters, int64 (N,). checksums: equal for words that differ in case only.
    """

    begins: NDArray[np.int64]
    ends: NDArray[np.int64]
    checksums: NDArray[np.int64]

    @classmethod
    def of(cls, text: str) -> "Words":
        letters = _folded()[code_points(text)]
        begins, ends = runs(letters > 0)
        return cls(begins, ends, _checksums(letters, begins, ends))


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
    _seen: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros((3, 0), dtype=np.int64),
        repr=False,
        compare=False,
    )

    def count(
        self,
        words: NDArray[np.int64],
        dropped: NDArray[np.bool_],
        rows: NDArray[np.int64],
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
        begins, ends = begins[compared], ends[compared]
        drops = np.zeros(len(begins), dtype=np.int64)
        for j in range(PASSAGE):
            inside = begins + j < ends
            place = np.minimum(begins + j, len(rows) - 1)
            drops = 2 * drops + (dropped[place] & inside)
        self._compare(np.stack([checksums[compared], drops, rows[begins]]))

    def _compare(self, found: NDArray[np.int64]) -> None:
        """Compare passages with those before them; int64 (3, N) as in _seen, in order of rows."""
        every = np.concatenate([self._seen, found], axis=1)
        _, first, which = np.unique(every[0], return_index=True, return_inverse=True)
        # first: where each checksum is for the first time. Those seen before come first.
        self._seen = every[:, first]
        known = len(which) - found.shape[1]
        _, drops, rows = found
        _, first_drops, first_rows = self._seen[:, which[known:]]
        recurs = first_rows != rows
        self.total += self.one_in * len(rows)
        self.recurring += self.one_in * int(recurs.sum())
        self.differing += self.one_in * int((recurs & (first_drops != drops)).sum())
        for repeated in _repeated(rows, first_rows):
            self.repeated_count += 1
            if len(self.repeated) < SHOWN:
                self.repeated.append(repeated)
        while self._seen.shape[1] > MOST:
            self.one_in *= 2
            self._seen = self._seen[:, self._seen[0] % self.one_in == 0]


def _repeated(
    rows: NDArray[np.int64], first_rows: NDArray[np.int64]
) -> Iterator[tuple[int, int, float]]:
    """(row, earlier row, share) if at least half of a row's passages were in that earlier row.

    Args:
        rows, first_rows: of each passage its row, and the row in which it was first.
    """
    numbers, totals = np.unique(rows, return_counts=True)
    total_of = dict(zip(numbers.tolist(), totals.tolist(), strict=True))
    recurs = rows != first_rows
    pairs = np.stack([rows[recurs], first_rows[recurs]])
    pairs, counts = np.unique(pairs, axis=1, return_counts=True)
    best: dict[int, tuple[int, int]] = {}
    for row, first, count in zip(*pairs.tolist(), counts.tolist(), strict=True):
        best[row] = max(best.get(row, (0, 0)), (count, first))
    for row, (count, first) in best.items():
        if 2 * count >= total_of[row]:
            yield row, first, count / total_of[row]


def _passages(
    rows: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where passages begin and end, given the row of each word.

    With passages of 2 words, the rows [5, 5, 5, 6] have the passages 0-2, 1-3 and 3-4.
    """
    words = np.arange(len(rows))
    first_of_row = np.searchsorted(rows, rows, side="left")
    end_of_row = np.searchsorted(rows, rows, side="right")
    # A row with fewer than 8 words is one passage.
    begins = np.flatnonzero((words + PASSAGE <= end_of_row) | (words == first_of_row))
    return begins, np.minimum(begins + PASSAGE, end_of_row[begins])


def _checksums(
    symbols: NDArray[np.int64], begins: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.int64]:
    """A checksum of each symbols[begin:end], 44 bits; the length counts too."""
    begin, end = torch.from_numpy(begins), torch.from_numpy(ends)
    hashes = window_hashes(prefix_hashes(torch.from_numpy(symbols)), begin, end)
    return shift_right(mix(hashes + (end - begin)), 20).numpy()


def code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def runs(flags: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where runs of True begin and end: [0, 1, 1, 0, 1] -> [1, 4], [3, 5]."""
    steps = np.diff(flags.astype(np.int8), prepend=0, append=0)
    return np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)


@cache
def _folded() -> NDArray[np.int64]:
    """For every code point of a letter or digit its lower case, 0 for the others: A and a -> 97.

    Of a lower case of several characters the first one counts, so "ß" is the same as "s".
    """
    folded = np.zeros(0x110000, dtype=np.int64)
    for code in range(len(folded)):
        character = chr(code)
        if character.isalnum():
            folded[code] = ord(character.casefold()[0])
    return folded
