"""Which rows are one document, the unit of every count and interval.

Rows that repeat or continue each other are not independent evidence. If each of them counted as a
document, intervals would be too narrow. So they are joined here, before anything is counted.
"""

import re
import unicodedata
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from goldfish.text.chats import contents, is_chat
from goldfish.text.rows import Row

SHOWN = 5  # rows in both splits that are named
# Rows with so many letters and digits are one document if they share most of their text. Shorter
# ones are not: texts of one template, such as a sentence with a code in it, share most of theirs.
SIMILAR_FROM = 1_000
SIMILAR = 0.6  # the least Jaccard similarity of their shingles
SHINGLE = 16  # letters and digits, about three words
MOST_LETTERS = 2**17  # of a row that are compared
BINS = 32  # of the similarity sketch
EMPTY = 2**32 - 1  # the value of a bin without shingles
BAND = 4  # bins in a row; only texts that agree in a whole band are compared
# What more rows share is a template, such as a form, and is no evidence that two of them are one
# document. Rows with fewer bins of their own are not compared.
TEMPLATE_FROM = 20
FEWEST_BINS = 8
# 2^64 / the golden ratio, odd: multiplying by it mixes the bits.
PHI = np.uint64(0x9E3779B97F4A7C15)
HALF = np.uint64(32)  # half of the bits of a hash
Codes = NDArray[np.int64]
Sketches = NDArray[np.uint32]


class Relations:
    """What makes rows of an audit, of both splits, the same document.

    Rows are one document if they
    - share a window,
    - share a conversation up to an answer (histories that are exported turn by turn),
    - hold the same letters and digits,
    - have the same name in one split,
    - or are long and share most of their text, unless their marked secrets differ.
    """

    def __init__(self) -> None:
        self._rows = 0  # with windows
        self._row_of_window = array("q")
        # Rows that share a key are one document.
        self._keys = array("q")
        self._row_of_key = array("q")
        # Long rows, each with its sketch (BINS uint32) and a hash of its secrets.
        self._long_rows = array("q")
        self._sketches = bytearray()
        self._secrets_of_long = array("q")

    def add(
        self,
        row: Row,
        split: str,
        name: str,
        windows: Sequence[Sequence[int]],
        secrets: Sequence[str],
    ) -> None:
        """Note a row with windows.

        windows: the token ids of each. secrets: all marked ones of the row.
        """
        letters = letters_of(row)
        self._add_key("letters", letters)
        self._add_key("name", split, name)
        for ids in windows:
            self._row_of_window.append(self._rows)
            self._add_key("window", tuple(ids))
        if is_chat(row):
            history = ""
            for role, said in contents(row):
                history += normal_letters(said) + "\n"
                if role == "assistant":
                    self._add_key("history", history)
        if len(letters) >= SIMILAR_FROM:
            self._long_rows.append(self._rows)
            bins = sketch(letters)
            self._sketches += bins.tobytes()
            in_any_order = frozenset(secrets)
            self._secrets_of_long.append(hash(in_any_order))
        self._rows += 1

    def _add_key(self, *key: Any) -> None:
        # Texts would fill the memory, so only their hashes are kept.
        self._keys.append(hash(key))
        self._row_of_key.append(self._rows)

    def number_documents(self) -> list[int]:
        """For every window the number of its document, from 0 in the order of their windows."""
        row_of_key = np.array(self._row_of_key)
        places = equal_pairs(np.array(self._keys))
        share_a_key = row_of_key[places]
        bins = np.frombuffer(self._sketches, dtype=np.uint32)
        long_rows = np.array(self._long_rows)
        secrets = np.array(self._secrets_of_long)
        places = similar_pairs(bins.reshape(-1, BINS), secrets)
        are_similar = long_rows[places]
        pairs = np.concatenate([share_a_key, are_similar], axis=1)
        groups = connected(self._rows, pairs)
        # Groups -> numbers, in the order of their first windows.
        number_of: dict[int, int] = {}
        numbers = []
        for group in groups[np.array(self._row_of_window)].tolist():
            unused = len(number_of)
            number = number_of.setdefault(group, unused)
            numbers.append(number)
        return numbers


def letters_of(row: Row) -> str:
    """A row's letters and digits; of token ids, a character for each."""
    if "input_ids" in row:
        # Characters past the surrogates, which no text may have.
        ids = row["input_ids"]
        codes = [0xE000 + token % 0x100000 for token in ids]
        return "".join(map(chr, codes))
    if is_chat(row):
        turns = [said for _, said in contents(row)]
        return normal_letters("\n".join(turns))
    return normal_letters(row["text"])


def normal_letters(text: str) -> str:
    """A text's letters and digits, case and compatibility forms folded; the text if it has none."""
    folded = text
    if not text.isascii():  # ASCII has no other forms
        folded = unicodedata.normalize("NFKC", text)
    folded = folded.casefold()
    letters = re.sub(r"[\W_]+", "", folded)
    return letters or text


def overlap_of(
    members: Mapping[int, int],
    heldout: Mapping[int, int],
) -> dict[str, Any] | None:
    """How many documents are in both splits, and the first rows of some; None if there are none.

    members, heldout: the first row of every document, by its number.
    """
    shared = members.keys() & heldout.keys()
    if not shared:
        return None
    examples = []
    for number in sorted(shared)[:SHOWN]:
        pair = [members[number], heldout[number]]
        examples.append(pair)
    return {"documents": len(shared), "rows": examples}


def sketch(text: str) -> Sketches:
    """(BINS,) numbers; the share in which two texts agree estimates their Jaccard similarity.

    The similarity is that of their sets of shingles, SHINGLE characters in a row. The hashes of the
    shingles are spread over the bins, and each bin keeps the least (one-permutation MinHash: Li,
    Owen and Zhang 2012).
    """
    compared = text[:MOST_LETTERS]
    data = compared.encode("utf-32-le")
    codes = np.frombuffer(data, dtype=np.uint32)
    length = min(SHINGLE, len(codes))
    shingles = len(codes) - length + 1
    # A polynomial of each shingle's characters, modulo 2^64, for all shingles at once: the two of
    # "abcd" with 3 characters take in a and b first, then b and c, then c and d.
    hashes = np.zeros(shingles, dtype=np.uint64)
    for start in range(length):
        end = start + shingles
        hashes *= PHI
        hashes += codes[start:end]
    # The high bits of a product depend on all bits below them; two rounds mix all.
    for _ in range(2):
        high = hashes >> HALF
        hashes ^= high
        hashes *= PHI
    # The upper 5 bits are the bin. The lower 32 are the value, of which the least is kept.
    upper = hashes >> np.uint64(59)
    bins = upper.astype(np.int64)
    values = hashes.astype(np.uint32)
    least = np.full(BINS, EMPTY, dtype=np.uint32)
    np.minimum.at(least, bins, values)
    return least


def similar_pairs(sketches: Sketches, secrets: Codes) -> Codes:
    """int64 (2, pairs): texts whose sketches agree in SIMILAR of the bins, and in `secrets`.

    Bins that more than TEMPLATE_FROM texts share do not count. Only texts that agree in a whole
    band are compared (locality-sensitive hashing): two texts of similarity .6 do with a probability
    of 1 - (1 - .6^4)^8 = .67, two of similarity .8 with .98.

    Args:
        sketches: uint32 (texts, BINS). secrets: int64 (texts,), a hash of each text's secrets.
    """
    is_own = np.empty_like(sketches, dtype=bool)
    for column, values in enumerate(sketches.T):
        found = np.unique(values, return_inverse=True, return_counts=True)
        _, place, counts = found
        texts = counts[place]  # that share this bin
        is_own[:, column] = texts <= TEMPLATE_FROM
    all_pairs = []
    bands = np.split(sketches, BINS // BAND, axis=1)
    for band in bands:
        # One key for the secrets and the bins of the band.
        keys = secrets.astype(np.uint64)
        for values in band.T:
            keys ^= values
            keys *= PHI
            high = keys >> HALF
            keys ^= high
        pairs = equal_pairs(keys)
        a, b = sketches[pairs]
        own_in_a, own_in_b = is_own[pairs]
        compared = own_in_a | own_in_b
        agree = compared & (a == b)
        bins = compared.sum(axis=1)
        equal = agree.sum(axis=1)
        chosen = equal >= SIMILAR * bins
        chosen &= bins >= FEWEST_BINS
        similar = pairs[:, chosen]
        all_pairs.append(similar)
    return np.concatenate(all_pairs, axis=1)


def equal_pairs(keys: NDArray[Any]) -> Codes:
    """int64 (2, pairs): places of equal keys, each with the next one of its kind.

    >>> equal_pairs(np.array([7, 5, 7, 7]))
    array([[0, 2],
           [2, 3]])
    """
    order = np.argsort(keys, kind="stable")
    first = order[:-1]
    second = order[1:]
    neighbours = np.stack([first, second])
    a, b = keys[neighbours]
    return neighbours[:, a == b]


def connected(size: int, pairs: Codes) -> NDArray[np.int32]:
    """int32 (size,): the group of each of the numbers 0 ... size - 1.

    pairs: int64 (2, pairs), numbers of one group.
    """
    if size == 0:
        return np.zeros(0, dtype=np.int32)
    a, b = pairs
    weights = np.ones(len(a))
    shape = (size, size)
    graph = coo_array((weights, (a, b)), shape)
    groups: NDArray[np.int32]
    _, groups = connected_components(graph, directed=False)
    return groups
