"""Which rows are one document, the unit of every count and interval.

Rows that repeat or continue each other are no independent evidence: were each counted for itself,
intervals would be too narrow. So dependence is found here, before anything is counted.
"""

import re
import unicodedata
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from goldfish.text.chats import contents, is_chat
from goldfish.text.rows import Row

SHOWN = 5  # rows in both splits that are named
# Rows of so many letters and digits are one document if they share most of their text. Shorter
# ones are not: texts of one template, such as a sentence with a code in it, share most of theirs.
SIMILAR_FROM = 1_000
SIMILAR = 0.6  # the least Jaccard similarity of their shingles
SHINGLE = 16  # letters and digits, about three words
MOST_LETTERS = 2**17  # of a row that are compared
BINS, BAND = 32, 4  # of the similarity sketch; candidates agree in a band of 4 bins
# What more rows share is a template, such as a form, and says nothing about two of them; rows of
# which fewer bins are their own are not compared.
TEMPLATE_FROM = 20
FEWEST_BINS = 8
# 2^64 / the golden ratio, odd: multiplying by it mixes the bits.
PHI = np.uint64(0x9E3779B97F4A7C15)
Codes = NDArray[np.int64]


class Relations:
    """What makes rows one document, the unit of every count and interval.

    Rows are one document if they share a window, or a conversation up to an answer (histories that
    are exported turn by turn), if their whole texts hold the same letters and digits, if they have
    the same name in one split, or if they are long and share most of their text; but rows with
    different marked secrets are never joined by the latter.

    One object for each split; `number_documents` puts them together.
    """

    def __init__(self, split: str) -> None:
        self._split = split
        self.rows = 0  # with windows
        self.row_of_window = array("q")
        # Rows that share a key are one document.
        self.keys = array("q")
        self.row_of_key = array("q")
        # Long rows, of each a sketch (BINS uint32) and a hash of its secrets.
        self.long_rows = array("q")
        self.sketches = bytearray()
        self.secrets_of_long = array("q")

    def add(
        self,
        row: Row,
        name: str,
        windows: Sequence[Sequence[int]],
        secrets: Sequence[str],
    ) -> None:
        """Note a row with windows.

        windows: the token ids of each. secrets: all marked ones of the row.
        """
        text = letters_of(row)
        keys: set[tuple[Any, ...]] = set()
        keys.add(("letters", text))
        keys.add(("name", self._split, name))
        for ids in windows:
            keys.add(("window", tuple(ids)))
        if is_chat(row):
            keys.update(_history_keys(row))
        number = self.rows
        self.rows += 1
        for key in keys:
            self.keys.append(hash(key))
            self.row_of_key.append(number)
        self.row_of_window.extend([number] * len(windows))
        if len(text) >= SIMILAR_FROM:
            self.sketches += sketch(text).tobytes()
            self.long_rows.append(number)
            self.secrets_of_long.append(hash(frozenset(secrets)))


def _history_keys(row: Row) -> Iterator[tuple[str, str]]:
    """A key for the conversation up to each answer."""
    history = ""
    for role, said in contents(row):
        history += normal_letters(said) + "\n"
        if role == "assistant":
            yield ("history", history)


def number_documents(relations: Sequence[Relations]) -> list[list[int]]:
    """For each split the number of every window's document, from 0 through all splits."""
    # Rows are numbered through all splits.
    counts = [each.rows for each in relations]
    firsts = np.cumsum([0, *counts]).tolist()
    keys = [np.array(each.keys, dtype=np.int64) for each in relations]
    rows = _numbered([each.row_of_key for each in relations], firsts)
    a, b = equal_pairs(np.concatenate(keys))
    pairs = [(rows[a], rows[b])]
    sketches = b"".join(each.sketches for each in relations)
    secrets = [np.array(each.secrets_of_long, dtype=np.int64) for each in relations]
    rows = _numbered([each.long_rows for each in relations], firsts)
    a, b = similar_pairs(
        np.frombuffer(sketches, dtype=np.uint32).reshape(-1, BINS),
        np.concatenate(secrets),
    )
    pairs.append((rows[a], rows[b]))
    groups = connected(firsts[-1], pairs)
    documents = groups[_numbered([each.row_of_window for each in relations], firsts)]
    # In the order of their first windows.
    numbers: dict[int, int] = {}
    for group in documents.tolist():
        numbers.setdefault(group, len(numbers))
    numbered = (numbers[group] for group in documents.tolist())
    return [list(islice(numbered, len(each.row_of_window))) for each in relations]


def _numbered(rows: list[Any], firsts: list[int]) -> Codes:
    """Rows of each split -> rows of all splits together."""
    shifted = []
    for each, first in zip(rows, firsts, strict=False):
        of_split = np.array(each, dtype=np.int64)
        shifted.append(of_split + first)
    return np.concatenate(shifted)


def similar_pairs(sketches: NDArray[np.uint32], secrets: Codes) -> tuple[Codes, Codes]:
    """Pairs of texts whose sketches agree in SIMILAR of the bins, and in `secrets`.

    Bins that more than TEMPLATE_FROM texts share do not count. Compared are texts that agree in a
    whole band (locality-sensitive hashing): of two texts of similarity .6 that is so with a
    probability of 1 - (1 - .6^4)^8 = .67, of .8 with .98.
    """
    own = np.empty(sketches.shape, dtype=np.bool_)  # no template
    for column, values in zip(own.T, sketches.T, strict=True):
        found = np.unique(values, return_inverse=True, return_counts=True)
        places, counts = found[1:]
        column[:] = counts[places] <= TEMPLATE_FROM
    pairs = []
    for start in range(0, BINS, BAND):
        # One key of the band's bins and the secrets.
        keys = secrets.astype(np.uint64)
        for values in sketches[:, start : start + BAND].T:
            keys = (keys ^ values.astype(np.uint64)) * PHI
            keys ^= keys >> np.uint64(32)
        a, b = equal_pairs(keys)
        compared = own[a] | own[b]
        count = compared.sum(-1)
        equal = ((sketches[a] == sketches[b]) & compared).sum(-1)
        similar = (count >= FEWEST_BINS) & (equal >= SIMILAR * count)
        pairs.append((a[similar], b[similar]))
    return _joined(pairs)


def sketch(text: str) -> NDArray[np.uint32]:
    """(BINS,) numbers; two texts agree in about as many as their Jaccard similarity says.

    The similarity is of their sets of shingles, SHINGLE characters in a row. Their hashes are
    spread over the bins, and of each bin the least is kept (one-permutation MinHash: Li, Owen and
    Zhang 2012).
    """
    data = text[:MOST_LETTERS].encode("utf-32-le")
    codes = np.frombuffer(data, dtype=np.uint32).astype(np.uint64)
    shingles = max(1, len(codes) - SHINGLE + 1)
    # A polynomial of each shingle's characters, modulo 2^64, one place of all shingles at a time.
    hashes = np.zeros(shingles, dtype=np.uint64)
    for place in range(min(SHINGLE, len(codes))):
        hashes = hashes * PHI + codes[place : place + shingles]
    # The high bits of a product depend on all bits below them; two rounds mix all.
    for _ in range(2):
        hashes ^= hashes >> np.uint64(32)
        hashes *= PHI
    # The upper 5 bits are the bin, the lower 32 the value of which the least is kept.
    bins = (hashes >> np.uint64(59)).astype(np.int64)
    values = hashes.astype(np.uint32)
    least = np.full(BINS, 2**32 - 1, dtype=np.uint32)
    np.minimum.at(least, bins, values)
    return least


def equal_pairs(keys: NDArray[Any]) -> tuple[Codes, Codes]:
    """Codes of equal keys, each with the next one of its kind.

    >>> equal_pairs(np.array([7, 5, 7, 7]))
    (array([0, 2]), array([2, 3]))
    """
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    return order[same], order[same + 1]


def connected(size: int, pairs: Sequence[tuple[Codes, Codes]]) -> NDArray[np.int32]:
    """(size,): numbers of the groups that pairs of 0 ... size - 1 are connected to."""
    if size == 0:
        return np.zeros(0, dtype=np.int32)
    a, b = _joined(pairs)
    graph = coo_array((np.ones(len(a)), (a, b)), shape=(size, size))
    groups: NDArray[np.int32] = connected_components(graph, directed=False)[1]
    return groups


def _joined(pairs: Sequence[tuple[Codes, Codes]]) -> tuple[Codes, Codes]:
    first, second = zip(*pairs, strict=True)
    return np.concatenate(first), np.concatenate(second)


def overlap_of(
    members: Mapping[int, int],
    heldout: Mapping[int, int],
) -> dict[str, Any] | None:
    """How many documents are in both splits, and the first rows of some; None if there are none.

    members, heldout: of every document the first row.
    """
    shared = sorted(members.keys() & heldout.keys())
    if not shared:
        return None
    examples = []
    for number in shared[:SHOWN]:
        examples.append([members[number], heldout[number]])
    return {"documents": len(shared), "rows": examples}


def letters_of(row: Row) -> str:
    """A row's letters and digits; of token ids, a character for each."""
    if "input_ids" in row:
        # Characters past the surrogates, which no text may have.
        return "".join(chr(0xE000 + token % 0x100000) for token in row["input_ids"])
    if is_chat(row):
        return normal_letters("\n".join(said for _, said in contents(row)))
    return normal_letters(row["text"])


def normal_letters(text: str) -> str:
    """A text's letters and digits, case and compatibility forms folded; the text if it has none."""
    folded = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return re.sub(r"[\W_]+", "", folded.casefold()) or text
