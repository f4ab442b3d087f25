"""Passages that occur more than once in a data set, and whether their dropped words agree."""

import re
import zlib
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

WORD = re.compile(r"[^\W_]+")
PASSAGE = 8  # words
# Passages in memory. If there are more, every second one is forgotten (by checksum), again and
# again: what is reported is then the share of a sample, of 131,072 passages and more.
MOST = 2**18
_FACTOR = np.uint64(
    0x9E3779B97F4A7C15
)  # odd, so that no word of a passage is lost modulo 2**64


@dataclass
class Passages:
    """Counts of passages. A passage is a run of 8 words of a row, or all words of a shorter row.

    total: passages counted. recurring: those that occur in an earlier row. differing: the recurring
    ones in which other words have a dropped token than in the first row.
    repeated: (row, earlier row, share of the row's passages that are in it), if at least half are.
    """

    total: int = 0
    recurring: int = 0
    differing: int = 0
    repeated: list[tuple[int, int, float]] = field(default_factory=list)
    # checksum -> first row, which words are dropped (one bit each); checksums that _every divides
    _seen: dict[int, tuple[int, int]] = field(default_factory=dict, repr=False)
    _every: int = 1
    _checksums: dict[str, int] = field(default_factory=dict, repr=False)  # of words

    def count(
        self, text: str, rows: list[int], begins: list[int], marks: NDArray[np.bool_]
    ) -> None:
        """Add the words of some rows.

        Args:
            text: the rows, one after the other, with characters between them that are no words.
            rows, begins: the number of each row, and where it begins in the text.
            marks: (2, characters of text), whether a character is a target, and a dropped one.
        """
        words = [
            (m.start(), m.end(), self._checksum(m.group())) for m in WORD.finditer(text)
        ]
        if not words:
            return
        table = np.array(words, dtype=np.int64)
        table = table[marks[0, table[:, 0]]]
        dropped_before = np.concatenate([[0], np.cumsum(marks[1])])
        dropped = dropped_before[table[:, 1]] > dropped_before[table[:, 0]]
        place = np.searchsorted(begins, table[:, 0], side="right") - 1
        bounds = np.searchsorted(place, np.arange(len(rows) + 1))
        found = [_windows(table[:, 2], dropped, place)]
        for first, end in pairwise(bounds.tolist()):
            if 0 < end - first < PASSAGE:
                found.append(
                    _whole(table[first:end, 2], dropped[first:end], place[first])
                )
        checksums, drops, places = (
            np.concatenate(each) for each in zip(*found, strict=True)
        )
        kept = checksums % self._every == 0
        order = np.argsort(places[kept], kind="stable")
        columns = (each[kept][order].tolist() for each in (checksums, drops, places))
        self._compare(list(zip(*columns, strict=True)), rows)

    def _checksum(self, word: str) -> int:
        checksum = self._checksums.get(word)
        if checksum is None:
            if len(self._checksums) > MOST:
                self._checksums.clear()
            checksum = zlib.crc32(word.casefold().encode("utf-8", "replace"))
            self._checksums[word] = checksum
        return checksum

    def _compare(self, found: list[tuple[int, int, int]], rows: list[int]) -> None:
        """Compare (checksum, dropped words, index of the row) with the passages seen before."""
        totals = Counter(place for _, _, place in found)
        earlier: dict[int, Counter[int]] = {}
        for checksum, drop, place in found:
            row = rows[place]
            first, before = self._seen.setdefault(checksum, (row, drop))
            if first != row:
                self.recurring += 1
                self.differing += before != drop
                earlier.setdefault(place, Counter())[first] += 1
        self.total += len(found)
        for place, counts in earlier.items():
            first, count = counts.most_common(1)[0]
            if 2 * count >= totals[place]:
                self.repeated.append((rows[place], first, count / totals[place]))
        while len(self._seen) > MOST:
            self._every *= 2
            kept = {
                each: seen
                for each, seen in self._seen.items()
                if each % self._every == 0
            }
            self._seen = kept


Found = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def _windows(
    words: NDArray[np.int64], dropped: NDArray[np.bool_], place: NDArray[np.int64]
) -> Found:
    """Checksum, dropped words and row of each run of 8 words inside a row.

    The checksum of w0 ... w7 is w0 f**7 + w1 f**6 + ... + w7 modulo 2**64, made for all runs at
    once: after the j-th step every run has its first j words.
    """
    count = max(0, len(words) - PASSAGE + 1)
    checksums = np.zeros(count, dtype=np.uint64)
    drops = np.zeros(count, dtype=np.int64)
    for j in range(PASSAGE):
        checksums = checksums * _FACTOR + words[j : j + count].astype(np.uint64)
        drops = drops * 2 + dropped[j : j + count]
    inside = place[:count] == place[PASSAGE - 1 :][:count]
    return _mixed(checksums[inside]), drops[inside], place[:count][inside]


def _whole(words: NDArray[np.int64], dropped: NDArray[np.bool_], place: int) -> Found:
    """The same for a row with fewer than 8 words, which is one passage."""
    checksum = np.full(1, len(words), dtype=np.uint64)
    drops = np.zeros(1, dtype=np.int64)
    for word, drop in zip(words.astype(np.uint64), dropped, strict=True):
        checksum = checksum * _FACTOR + word
        drops = drops * 2 + drop
    return _mixed(checksum), drops, np.full(1, place, dtype=np.int64)


def _mixed(checksums: NDArray[np.uint64]) -> NDArray[np.int64]:
    """44 bits in which every word counts: the lowest bits of a product ignore higher ones."""
    mixed: NDArray[np.uint64] = (checksums * _FACTOR) >> np.uint64(20)
    return mixed.astype(np.int64)
