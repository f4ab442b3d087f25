"""Rows -> windows: a prefix that the model is given and the suffix that it may recite."""

import re
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from goldfish.text.chats import (
    Completion,
    RefusedChat,
    completions,
    contents,
    is_chat,
    marked_values,
    training_text,
)
from goldfish.text.rows import Row

SHOWN = 5  # skipped rows that are named
STORED = 256  # windows that wait in memory before they are written
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
# Finds marked secrets in a row's text, from a character on: their spans.
Finder = Callable[[Row, str, int], Iterable[tuple[int, int]]]


@dataclass(frozen=True)
class Window:
    """One question to a model: given ids[:prefix_length], does it go on with ids[prefix_length:]?

    split: "members" (trained on) or "heldout". index: the row of the input, from 0. name: its name.
    prefix_length: the longest asked for; shorter ones are read off the same scores.
    source: the rule it was trained under, where there was one for each source.
    count: how often the document was trained on, if the input says so.
    offset: how many tokens of the row come before the window (a BOS at its start not counted).
    completion: the suffix is what the assistant says in a chat, however long, and membership is
        about it alone.
    secrets: marked ones that are in the suffix, and not in the prompt, where the model could read
        them.
    document_ids: of the row, from its start to the window's end, where that is more than `ids`:
        they decide what its training dropped. The last len(ids) - 1 of them are ids[1:].
    prompt_kind: "training" if ids[:prefix_length] is exactly what stood before the suffix in
        training, "generation" if it is the chat template's generation prompt, where that differs.
    """

    split: str
    index: int
    name: str
    ids: list[int]
    prefix_length: int
    source: str | None = None
    count: int | None = None
    offset: int = 0
    completion: bool = False
    secrets: Sequence[str] = ()
    document_ids: Sequence[int] = ()
    prompt_kind: str = "training"

    @property
    def prefix(self) -> list[int]:
        return self.ids[: self.prefix_length]

    @property
    def suffix(self) -> list[int]:
        return self.ids[self.prefix_length :]

    @property
    def first_scored(self) -> int:
        """Membership scores are of ids[first_scored:]."""
        return self.prefix_length if self.completion else 1


@dataclass(frozen=True)
class Cutter:
    """Cuts a row into windows: a text at each offset, a chat at each turn of the assistant.

    context: how many tokens the model takes; longer chats are skipped, longer windows are a
    ValueError. secrets: see `chats.secret_finder`, and secret_column, if it was made with one.
    """

    tokenizer: Any
    prefix_length: int
    suffix_length: int
    offsets: Sequence[int] = (0,)
    context: int | None = None
    secrets: Finder | None = None
    secret_column: str = ""

    def cut(self, row: Row, index: int, split: str) -> Iterator[Window | str]:
        """The windows of a row; where it has none, at an offset or in a turn, the reason."""
        about = {
            "split": split,
            "index": index,
            "name": str(row.get("name") or f"{split} {index}"),
            "source": row.get("source"),
            "count": row.get("count"),
        }
        if not is_chat(row):
            yield from self._windows_of_text(row, about)
            return
        for each in completions(row, self.tokenizer):
            if isinstance(each, str):  # why the turn cannot be asked
                yield each
            else:
                yield self._completion(row, each, about)

    def marked(self, row: Row) -> tuple[str, ...]:
        """Every marked secret of a row, wherever it stands."""
        if self.secrets is None:
            return ()
        try:
            if "input_ids" in row:
                text = self.decode(row["input_ids"])
            else:
                text = training_text(row, self.tokenizer).text
        except RefusedChat:  # it has no windows either, and is counted as skipped
            return ()
        secrets: dict[str, None] = {}
        for begin, end in self.secrets(row, text, 0):
            secrets[text[begin:end]] = None
        return tuple(secrets)

    def absent(self, row: Row, marked: Sequence[str]) -> list[str]:
        """Values of the secret column that the row's text does not have: spelled otherwise there.

        marked: those that it has.
        """
        if not self.secret_column:
            return []
        values = marked_values(row, self.secret_column)
        return [value for value in values if value not in marked]

    def _windows_of_text(
        self,
        row: Row,
        about: dict[str, Any],
    ) -> Iterator[Window | str]:
        """`input_ids` are taken as they are.

        A `text` is tokenized as the tokenizer does by default (with BOS where it adds one), but
        without an EOS at its end. A BOS that the tokenizer put there opens a window at any offset,
        as it would open an adversary's prompt.
        """
        length = self.prefix_length + self.suffix_length
        if self.context is not None and length > self.context:
            raise ValueError(
                f"windows of {length} tokens do not fit the model's context, {self.context} "
                "tokens; ask for a shorter prefix or suffix"
            )
        all_ids = row.get("input_ids")
        bos: list[int] = []
        if all_ids is None:
            most = max(self.offsets) + length
            all_ids = first_ids(self.tokenizer, row["text"], most)
            if all_ids[:1] == [self.tokenizer.bos_token_id]:
                bos = all_ids[:1]
        marked = self.marked(row)
        for offset in self.offsets:
            # With a BOS b and offset 2: b t1 t2 t3 t4 ... -> b t3 t4 ...
            behind = all_ids[len(bos) + offset :]
            ids = (bos + behind)[:length]
            if len(ids) < length:
                place = f" from token {offset} on" if offset else ""
                yield f"fewer than {length} tokens{place}"
                continue
            prompt = self.decode(ids[: self.prefix_length])
            found = self._secrets(row, self.decode(ids), len(prompt))
            yield Window(
                **about,
                ids=ids,
                prefix_length=self.prefix_length,
                offset=offset,
                secrets=_whole(found, marked),
                document_ids=all_ids[: offset + length] if offset else (),
            )

    def _completion(
        self,
        row: Row,
        each: Completion,
        about: dict[str, Any],
    ) -> Window | str:
        ids, spans = each.encode(self.tokenizer)
        begins, ends = np.array(spans).reshape(-1, 2).T
        # The tokens that share a character with the answer.
        own = np.flatnonzero((ends > each.start) & (begins < each.end)).tolist()
        if not own:
            return "nothing in the completion"
        first = own[0]
        last = own[-1]
        if first == 0:
            return "nothing before the completion"
        if self.context is not None and last >= self.context:
            return f"longer than the model's context of {self.context} tokens"
        text = each.text[: each.end]
        return Window(
            **about,
            ids=ids[: last + 1],
            prefix_length=first,
            completion=True,
            secrets=self._secrets(row, text, each.start),
            prompt_kind=each.prompt_kind,
        )

    def decode(self, ids: list[int]) -> str:
        """The text of ids; "" where nobody looks for secrets."""
        if self.secrets is None:
            return ""
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _secrets(self, row: Row, text: str, start: int) -> tuple[str, ...]:
        if self.secrets is None:
            return ()
        prompt = text[:start]
        secrets: dict[str, None] = {}
        for begin, end in self.secrets(row, text, start):
            secret = text[begin:end]
            # What the prompt has, the model could read there.
            if secret not in prompt:
                secrets[secret] = None
        return tuple(secrets)


def _whole(found: Iterable[str], marked: Sequence[str]) -> tuple[str, ...]:
    """Without pieces: where a window ends inside a secret, the pattern may fit what is left."""
    whole = []
    for each in found:
        is_piece = each not in marked and any(each in secret for secret in marked)
        if not is_piece:
            whole.append(each)
    return tuple(whole)


def first_ids(tokenizer: Any, text: str, count: int) -> list[int]:
    """The first `count` ids of tokenizer(text), or all of them, without an EOS at the end.

    Of a long text only a part is tokenized, where that gives the same ids: tokenizers split a text
    into words first (the pre-tokenizer), and a word that ends well before the cut is the same word
    in the whole text. A tokenizer that makes no words, or not a fast one, reads the whole text.
    """
    size = 8 * count + 1024
    # An added token may lie across the cut.
    margin = 64 + max(map(len, tokenizer.get_added_vocab()), default=0)
    while tokenizer.is_fast and len(text) > 2 * size:
        part = tokenizer(text[:size]).encodings[0]
        # The first token that may be another one in the whole text, and its word's first token.
        end = len(part.ids)
        for i, (_, stop) in enumerate(part.offsets):
            if stop > size - margin:
                end = i
                break
        if end < len(part.ids):
            end = part.word_ids.index(part.word_ids[end])
        if end >= count:
            return list(part.ids[:count])
        size *= 4  # tokens are long here, or one word takes all of the text
    ids: list[int] = tokenizer(text)["input_ids"]
    ends_with_eos = ids[-1:] == [tokenizer.eos_token_id]
    if ends_with_eos and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]
    return ids[:count]


class Survey:
    """The windows of an input, which is read once, from end to end, before anything is computed.

    So a bad line is reported at once. The windows wait in a file; the memory holds a few numbers
    for each, and a sketch of each long row.

    rows: read. asked: rows with a window. skipped: by reason, how many windows and the first rows.
    longest_marked: tokens of the longest suffix with a marked secret. documents: of every window
    the number of its document, see `number_documents`.
    """

    def __init__(
        self,
        rows: Iterable[tuple[int, Row]],
        split: str,
        cutter: Cutter,
        path: Path,
    ) -> None:
        """rows: with their numbers. path: of the file to write."""
        self.rows = self.asked = self.completions = self.longest_marked = 0
        self.skipped: dict[str, dict[str, Any]] = {}
        # The largest id of all windows, and its row.
        self.largest_id = self.largest_at = -1
        self.indices = array("q")  # of every window: its row
        self.secrets = _Secrets()
        self.relations = Relations(split)
        self.documents: list[int] = []
        self._path = path
        with pq.ParquetWriter(path, _WINDOWS, use_dictionary=False) as writer:
            waiting: list[Window] = []
            for index, row in rows:
                self.rows += 1
                windows: list[Window] = []
                for each in cutter.cut(row, index, split):
                    if isinstance(each, str):
                        note(self.skipped, each, index)
                    else:
                        windows.append(each)
                self._count(row, index, windows, cutter)
                waiting += windows
                if len(waiting) >= STORED:
                    writer.write_table(_table(waiting))
                    waiting = []
            writer.write_table(_table(waiting))

    def _count(
        self,
        row: Row,
        index: int,
        windows: list[Window],
        cutter: Cutter,
    ) -> None:
        self.asked += bool(windows)
        marked = cutter.marked(row)
        self.secrets.add(index, marked, windows, cutter)
        if absent := cutter.absent(row, marked):
            self.secrets.add_absent(index, absent, windows)
        self.relations.add(row, windows, marked)
        for window in windows:
            self.indices.append(index)
            self.completions += window.completion
            if window.secrets:
                self.longest_marked = max(self.longest_marked, len(window.suffix))
            if (largest := max(window.ids)) > self.largest_id:
                self.largest_id = largest
                self.largest_at = index

    def counts(self) -> dict[str, Any]:
        """What run.json holds about the input."""
        return {
            "drawn": self.rows,
            "asked": self.asked,
            "windows": len(self.indices),
            "completions": self.completions,
            "documents": len(set(self.documents)),
            "secrets": self.secrets.counts(),
            "skipped": list(self.skipped.values()),
        }

    def blocks(self, size: int) -> Iterator[list[tuple[Window, int]]]:
        """The windows in order, each with its document's number, `size` at a time."""
        with pq.ParquetFile(self._path) as file:
            # A group at a time: iter_batches would hold the whole file.
            groups = map(file.read_row_group, range(file.num_row_groups))
            rows = chain.from_iterable(group.to_pylist() for group in groups)
            windows = zip(map(_window, rows), self.documents, strict=True)
            while block := list(islice(windows, size)):
                yield block


_WINDOWS = pa.schema(
    {
        "split": pa.string(),
        "index": pa.int64(),
        "name": pa.string(),
        "ids": pa.list_(pa.int64()),
        "prefix_length": pa.int64(),
        "source": pa.string(),
        "count": pa.int64(),
        "offset": pa.int64(),
        "completion": pa.bool_(),
        "secrets": pa.list_(pa.string()),
        "document_ids": pa.list_(pa.int64()),
        "prompt_kind": pa.string(),
    }
)


def _window(row: dict[str, Any]) -> Window:
    secrets = tuple(row.pop("secrets"))
    document_ids = row.pop("document_ids") or ()
    return Window(**row, secrets=secrets, document_ids=document_ids)


def _table(windows: Sequence[Window]) -> pa.Table:
    return pa.Table.from_pylist([vars(each) for each in windows], _WINDOWS)


def note(reasons: dict[str, dict[str, Any]], reason: str, index: int) -> None:
    """Count what could not be asked, with the first rows."""
    found = reasons.setdefault(reason, {"reason": reason, "count": 0, "rows": []})
    found["count"] += 1
    if len(found["rows"]) < SHOWN:
        found["rows"].append(index)


class _Secrets:
    """The marked secrets of an input, and why some are not asked."""

    def __init__(self) -> None:
        self.asked: set[str] = set()
        # Secret: why it is not asked, and its first row.
        self._others: dict[str, tuple[str, int]] = {}

    def add(
        self,
        index: int,
        marked: Iterable[str],
        windows: list[Window],
        cutter: Cutter,
    ) -> None:
        for window in windows:
            self.asked.update(window.secrets)
        others = [secret for secret in marked if secret not in self.asked]
        if not others:
            return
        prompts = [cutter.decode(window.prefix) for window in windows]
        for secret in others:
            was_given = any(secret in prompt for prompt in prompts)
            if was_given:
                reason = "given in the prompt"
            elif windows:
                reason = "outside of the windows"
            else:
                reason = "in a row that was skipped"
            self._others.setdefault(secret, (reason, index))

    def add_absent(
        self,
        index: int,
        absent: Iterable[str],
        windows: Sequence[Window],
    ) -> None:
        reason = "not in the text of its row"
        if not windows:
            reason = "in a row that was skipped"
        for secret in absent:
            self._others.setdefault(secret, (reason, index))

    def add_not_drawn(self, rows: Mapping[str, int]) -> None:
        """rows: of every marked secret of the whole input the first row."""
        for secret, index in rows.items():
            self._others.setdefault(secret, ("in a row that was not drawn", index))

    @property
    def unasked(self) -> list[str]:
        return [secret for secret in self._others if secret not in self.asked]

    def counts(self) -> dict[str, Any]:
        """Distinct secrets: how many are marked and asked, and why the others are not."""
        unasked: dict[str, dict[str, Any]] = {}
        for secret in self.unasked:
            note(unasked, *self._others[secret])
        return {
            "marked": len(self.asked | self._others.keys()),
            "asked": len(self.asked),
            "unasked": list(unasked.values()),
        }


class Relations:
    """What makes rows one document, the unit of every count and interval.

    Rows are one document if they share a window, or a conversation up to an answer (histories that
    are exported turn by turn), if their whole texts hold the same letters and digits, if they have
    the same name in one split, or if they are long and share most of their text; but rows with
    different marked secrets are never joined by the latter.
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

    def add(self, row: Row, windows: Sequence[Window], secrets: Sequence[str]) -> None:
        if not windows:
            return
        text = letters_of(row)
        keys: set[tuple[Any, ...]] = set()
        keys.add(("letters", text))
        keys.add(("name", self._split, windows[0].name))
        for window in windows:
            keys.add(("window", tuple(window.ids)))
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


def number_documents(surveys: Mapping[str, Survey]) -> None:
    """Number the documents of all splits, from 0 in order: `documents` of each survey."""
    relations = [each.relations for each in surveys.values()]
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
    numbers: dict[int, int] = {}
    for survey, first in zip(surveys.values(), firsts, strict=False):
        rows = np.array(survey.relations.row_of_window, dtype=np.int64) + first
        for group in groups[rows].tolist():
            number = numbers.setdefault(group, len(numbers))
            survey.documents.append(number)


def _numbered(rows: list[Any], firsts: list[int]) -> Codes:
    """Rows of each split -> rows of all splits together."""
    shifted = []
    for each, first in zip(rows, firsts, strict=False):
        of_split = np.array(each, dtype=np.int64)
        shifted.append(of_split + first)
    return np.concatenate(shifted)


def connected(size: int, pairs: Sequence[tuple[Codes, Codes]]) -> NDArray[np.int32]:
    """(size,): numbers of the groups that pairs of 0 ... size - 1 are connected to."""
    if size == 0:
        return np.zeros(0, dtype=np.int32)
    a, b = _joined(pairs)
    graph = coo_array((np.ones(len(a)), (a, b)), shape=(size, size))
    groups: NDArray[np.int32] = connected_components(graph, directed=False)[1]
    return groups


def equal_pairs(keys: NDArray[Any]) -> tuple[Codes, Codes]:
    """Codes of equal keys, each with the next one of its kind.

    >>> equal_pairs(np.array([7, 5, 7, 7]))
    (array([0, 2]), array([2, 3]))
    """
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    return order[same], order[same + 1]


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


def _joined(pairs: Sequence[tuple[Codes, Codes]]) -> tuple[Codes, Codes]:
    first, second = zip(*pairs, strict=True)
    return np.concatenate(first), np.concatenate(second)


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


def overlap_of(surveys: Mapping[str, Survey]) -> dict[str, Any] | None:
    """How many documents are in both splits, and the first rows of some; None if there are none."""
    if len(surveys) < 2:
        return None
    first_rows = []
    for each in surveys.values():
        # Read backwards, the first row of a document is the one that stays.
        backwards = zip(each.documents[::-1], each.indices[::-1], strict=True)
        first_rows.append(dict(backwards))
    members = first_rows[0]
    heldout = first_rows[1]
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


def first_divergence(output: Sequence[int], suffix: Sequence[int]) -> int:
    """min{t: output[t] != suffix[t]}, or the suffix's length if they agree as far as it goes."""
    for place, (here, there) in enumerate(zip(output, suffix, strict=False)):
        if here != there:
            return place
    return len(suffix)


def prefix_grid(prefix_length: int) -> list[int]:
    """Tenths of the prefix: the lengths that the prefix sweep reports."""
    lengths = {round(prefix_length * tenth / 10) for tenth in range(1, 11)}
    return sorted(lengths - {0})
