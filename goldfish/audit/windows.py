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

from goldfish.text.chats import (
    Completion,
    RefusedChat,
    completions,
    contents,
    is_chat,
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
TEMPLATE_FROM, FEWEST_BINS = 20, 8
PHI = np.uint64(
    0x9E3779B97F4A7C15
)  # 2^64 / the golden ratio, odd: multiplying by it mixes


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
    asked: "training" if ids[:prefix_length] is exactly what stood before the suffix in training,
        "generation" if it is the chat template's generation prompt, where that differs.
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
    asked: str = "training"

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
    ValueError. secrets: see `chats.secret_finder`.
    """

    tokenizer: Any
    prefix_length: int
    suffix_length: int
    offsets: Sequence[int] = (0,)
    context: int | None = None
    secrets: Callable[[Row, str, int], Iterable[tuple[int, int]]] | None = None

    def cut(self, row: Row, index: int, split: str) -> Iterator[Window | str]:
        """The windows of a row; where it has none, at an offset or in a turn, the reason."""
        name = str(row.get("name") or f"{split} {index}")
        about: dict[str, Any] = {"split": split, "index": index, "name": name}
        about |= {"source": row.get("source"), "count": row.get("count")}
        if not is_chat(row):
            yield from self._windows_of_text(row, about)
            return
        for each in completions(row, self.tokenizer):
            yield each if isinstance(each, str) else self._completion(row, each, about)

    def marked(self, row: Row) -> tuple[str, ...]:
        """Every marked secret of a row, wherever it stands."""
        if self.secrets is None:
            return ()
        try:
            if "input_ids" in row:
                text = self._decode(row["input_ids"])
            else:
                text = training_text(row, self.tokenizer).text
        except RefusedChat:  # it has no windows either, and is counted as skipped
            return ()
        return tuple(dict.fromkeys(text[a:b] for a, b in self.secrets(row, text, 0)))

    def _windows_of_text(
        self, row: Row, about: dict[str, Any]
    ) -> Iterator[Window | str]:
        """`input_ids` are taken as they are; a `text` is tokenized as the tokenizer does by default
        (with BOS where it adds one), but without an EOS at its end. A BOS that the tokenizer put
        there opens a window at any offset, as it would open an adversary's prompt."""
        length = self.prefix_length + self.suffix_length
        if self.context is not None and length > self.context:
            raise ValueError(
                f"windows of {length} tokens do not fit the model's context, {self.context} "
                "tokens; ask for a shorter prefix or suffix"
            )
        all_ids, opening = row.get("input_ids"), []
        if all_ids is None:
            all_ids = first_ids(self.tokenizer, row["text"], max(self.offsets) + length)
            if all_ids[:1] == [self.tokenizer.bos_token_id]:
                opening = all_ids[:1]
        for offset in self.offsets:
            ids = opening + all_ids[len(opening) + offset :][: length - len(opening)]
            if len(ids) < length:
                yield f"fewer than {length} tokens" + (
                    f" from token {offset} on" if offset else ""
                )
                continue
            prompt, whole = self._decode(ids[: self.prefix_length]), self._decode(ids)
            found, marked = self._secrets(row, whole, len(prompt)), self.marked(row)
            # Where a window ends inside a secret, the pattern may fit the piece that it holds.
            pieces = {
                each
                for each in found
                if each not in marked and any(each in one for one in marked)
            }
            secrets = tuple(each for each in found if each not in pieces)
            before = all_ids[: offset + length] if offset else ()
            yield Window(
                **about,
                ids=ids,
                prefix_length=self.prefix_length,
                offset=offset,
                secrets=secrets,
                document_ids=before,
            )

    def _completion(
        self, row: Row, each: Completion, about: dict[str, Any]
    ) -> Window | str:
        ids, spans = each.encode(self.tokenizer)
        own = [
            i
            for i, (begin, end) in enumerate(spans)
            if end > each.start and begin < each.end
        ]
        if not own or own[0] == 0:
            return f"nothing {'before' if own else 'in'} the completion"
        if self.context is not None and own[-1] >= self.context:
            return f"longer than the model's context of {self.context} tokens"
        return Window(
            **about,
            ids=ids[: own[-1] + 1],
            prefix_length=own[0],
            completion=True,
            secrets=self._secrets(row, each.text[: each.end], each.start),
            asked=each.asked,
        )

    def _decode(self, ids: list[int]) -> str:
        """The text of ids; "" where nobody looks for secrets."""
        if self.secrets is None:
            return ""
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _secrets(self, row: Row, text: str, start: int) -> tuple[str, ...]:
        if self.secrets is None:
            return ()
        secrets = dict.fromkeys(text[a:b] for a, b in self.secrets(row, text, start))
        return tuple(secret for secret in secrets if secret not in text[:start])


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
        behind = (i for i, (_, stop) in enumerate(part.offsets) if stop > size - margin)
        end = next(behind, len(part.ids))
        if end < len(part.ids):
            end = part.word_ids.index(part.word_ids[end])
        if end >= count:
            return list(part.ids[:count])
        size *= 4
    ids: list[int] = tokenizer(text)["input_ids"]
    if ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token):
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
        self, rows: Iterable[tuple[int, Row]], split: str, cutter: Cutter, path: Path
    ) -> None:
        """rows: with their numbers. path: of the file to write."""
        self.rows = self.asked = self.completions = self.longest_marked = 0
        self.skipped: dict[str, dict[str, Any]] = {}
        self.largest_id = (
            self.largest_at
        ) = -1  # of all windows; it stands in row `largest_at`
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
        self, row: Row, index: int, windows: list[Window], cutter: Cutter
    ) -> None:
        self.asked += bool(windows)
        marked = cutter.marked(row) if cutter.secrets is not None else ()
        self.secrets.add(index, marked, windows, cutter)
        self.relations.add(row, windows, marked)
        for window in windows:
            self.indices.append(index)
            self.completions += window.completion
            if window.secrets:
                self.longest_marked = max(self.longest_marked, len(window.suffix))
            if (largest := max(window.ids)) > self.largest_id:
                self.largest_id, self.largest_at = largest, index

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
        "asked": pa.string(),
    }
)


def _window(row: dict[str, Any]) -> Window:
    secrets, before = tuple(row.pop("secrets")), row.pop("document_ids") or ()
    return Window(**row, secrets=secrets, document_ids=before)


def _table(windows: Sequence[Window]) -> pa.Table:
    return pa.Table.from_pylist([vars(each) for each in windows], _WINDOWS)


def note(reasons: dict[str, dict[str, Any]], reason: str, index: int) -> None:
    """Count what could not be asked, with the first rows."""
    found = reasons.setdefault(reason, {"reason": reason, "count": 0, "rows": []})
    found["count"] += 1
    found["rows"] = [*found["rows"], index][:SHOWN]


class _Secrets:
    """The marked secrets of an input, and why some are not asked."""

    def __init__(self) -> None:
        self.asked: set[str] = set()
        self._others: dict[
            str, tuple[str, int]
        ] = {}  # secret: why it is not asked, its first row

    def add(
        self, index: int, marked: Iterable[str], windows: list[Window], cutter: Cutter
    ) -> None:
        self.asked.update(secret for window in windows for secret in window.secrets)
        others = [secret for secret in marked if secret not in self.asked]
        if not others:
            return
        prompts = [
            cutter.tokenizer.decode(window.prefix, clean_up_tokenization_spaces=False)
            for window in windows
        ]
        for secret in others:
            reason = (
                "outside of the windows" if windows else "in a row that was skipped"
            )
            if any(secret in prompt for prompt in prompts):
                reason = "given in the prompt"
            self._others.setdefault(secret, (reason, index))

    def counts(self) -> dict[str, Any]:
        """Distinct secrets: how many are marked and asked, and why the others are not."""
        unasked: dict[str, dict[str, Any]] = {}
        for secret, (reason, index) in self._others.items():
            if secret not in self.asked:
                note(unasked, reason, index)
        total = len(self.asked | self._others.keys())
        return {
            "marked": total,
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
        self.keys, self.row_of_key = (
            array("q"),
            array("q"),
        )  # rows that share a key are joined
        self.sketches = bytearray()  # BINS uint32 for each of `long_rows`
        self.long_rows, self.secrets_of_long = array("q"), array("q")

    def add(self, row: Row, windows: Sequence[Window], secrets: Sequence[str]) -> None:
        if not windows:
            return
        number, self.rows = self.rows, self.rows + 1
        text = letters_of(row)
        keys = {hash(("name", self._split, windows[0].name)), hash(("letters", text))}
        keys.update(hash(("window", tuple(window.ids))) for window in windows)
        if is_chat(row):
            keys.update(_history_keys(row))
        for key in keys:
            self.keys.append(key)
            self.row_of_key.append(number)
        self.row_of_window.extend([number] * len(windows))
        if len(text) >= SIMILAR_FROM:
            self.sketches += sketch(text).tobytes()
            self.long_rows.append(number)
            self.secrets_of_long.append(hash(frozenset(secrets)))


def _history_keys(row: Row) -> Iterator[int]:
    """A key for the conversation up to each answer."""
    history = ""
    for role, said in contents(row):
        history += normal_letters(said) + "\n"
        if role == "assistant":
            yield hash(("history", history))


def number_documents(surveys: Mapping[str, Survey]) -> None:
    """Number the documents of all splits, from 0 in order: `documents` of each survey."""
    relations = [each.relations for each in surveys.values()]
    firsts = np.cumsum([0, *(each.rows for each in relations)]).tolist()
    groups = Groups(firsts[-1])

    def joined(arrays: list[Any], shift: bool) -> NDArray[np.int64]:
        parts = [np.array(each, dtype=np.int64) for each in arrays]
        if shift:  # rows are numbered through all splits
            parts = [part + first for part, first in zip(parts, firsts, strict=False)]
        return np.concatenate(parts)

    keys = joined([each.keys for each in relations], shift=False)
    groups.join_equal(keys, joined([each.row_of_key for each in relations], shift=True))
    sketches = np.concatenate(
        [
            np.frombuffer(each.sketches, dtype=np.uint32).reshape(-1, BINS)
            for each in relations
        ]
    )
    rows = joined([each.long_rows for each in relations], shift=True)
    secrets = joined([each.secrets_of_long for each in relations], shift=False)
    groups.join_similar(sketches, rows, secrets)
    numbers: dict[int, int] = {}
    for survey, first in zip(surveys.values(), firsts, strict=False):
        roots = (groups.root(first + row) for row in survey.relations.row_of_window)
        survey.documents = [numbers.setdefault(root, len(numbers)) for root in roots]


class Groups:
    """Disjoint sets of numbers (union-find)."""

    def __init__(self, size: int) -> None:
        self._parents = array("q", range(size))

    def root(self, number: int) -> int:
        parents = self._parents
        while parents[number] != number:
            parents[number] = parents[
                parents[number]
            ]  # halves the path for the next one
            number = parents[number]
        return number

    def join(self, a: int, b: int) -> None:
        a, b = self.root(a), self.root(b)
        self._parents[max(a, b)] = min(a, b)

    def join_equal(self, keys: NDArray[np.int64], numbers: NDArray[np.int64]) -> None:
        """Join numbers that have a key in common."""
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
        for a, b in zip(numbers[order[same]], numbers[order[same + 1]], strict=True):
            self.join(int(a), int(b))

    def join_similar(
        self,
        sketches: NDArray[np.uint32],
        numbers: NDArray[np.int64],
        secrets: NDArray[np.int64],
    ) -> None:
        """Join numbers whose sketches agree in SIMILAR of the bins, and in `secrets`; without what
        more than TEMPLATE_FROM of them share.

        Compared are those that agree in a whole band (locality-sensitive hashing): of two texts of
        similarity .6 that is so with a probability of 1 - (1 - .6^4)^8 = .67, of .8 with .98.
        """
        own = np.empty(sketches.shape, dtype=np.bool_)  # no template
        for column, values in zip(own.T, sketches.T, strict=True):
            _, places, counts = np.unique(
                values, return_inverse=True, return_counts=True
            )
            column[:] = counts[places] <= TEMPLATE_FROM
        for start in range(0, BINS, BAND):
            band = sketches[:, start : start + BAND].astype(np.uint64)
            keys = secrets.astype(np.uint64)
            for column in band.T:
                keys = (keys ^ column) * PHI
                keys ^= keys >> np.uint64(32)
            order = np.argsort(keys, kind="stable")
            same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
            a, b = order[same], order[same + 1]
            compared = own[a] | own[b]
            equal = ((sketches[a] == sketches[b]) & compared).sum(-1)
            enough = compared.sum(-1) >= FEWEST_BINS
            similar = enough & (equal >= SIMILAR * compared.sum(-1))
            for i, j in zip(numbers[a[similar]], numbers[b[similar]], strict=True):
                self.join(int(i), int(j))


def sketch(text: str) -> NDArray[np.uint32]:
    """(BINS,) numbers; two texts agree in about as many as their Jaccard similarity says.

    The similarity is of their sets of shingles, SHINGLE characters in a row. Their hashes are
    spread over the bins, and of each bin the least is kept (one-permutation MinHash: Li, Owen and
    Zhang 2012).
    """
    codes = np.frombuffer(text[:MOST_LETTERS].encode("utf-32-le"), dtype=np.uint32)
    codes = codes.astype(np.uint64)
    hashes = np.zeros(max(1, len(codes) - SHINGLE + 1), dtype=np.uint64)
    for place in range(min(SHINGLE, len(codes))):
        hashes = hashes * PHI + codes[place : place + len(hashes)]
    # The high bits of a product depend on all bits below them; two rounds mix all.
    for _ in range(2):
        hashes ^= hashes >> np.uint64(32)
        hashes *= PHI
    least = np.full(BINS, 2**32 - 1, dtype=np.uint32)
    values = (hashes & np.uint64(2**32 - 1)).astype(np.uint32)
    np.minimum.at(least, (hashes >> np.uint64(59)).astype(np.int64), values)
    return least


def overlap_of(surveys: Mapping[str, Survey]) -> dict[str, Any] | None:
    """How many documents are in both splits, and the first rows of some; None if there are none."""
    # Read backwards, the first row of a document is the one that stays.
    rows = [
        dict(zip(each.documents[::-1], each.indices[::-1], strict=True))
        for each in surveys.values()
    ]
    shared = sorted(rows[0].keys() & rows[-1].keys()) if len(rows) == 2 else []
    if not shared:
        return None
    return {
        "documents": len(shared),
        "rows": [[each[i] for each in rows] for i in shared[:SHOWN]],
    }


def letters_of(row: Row) -> str:
    """A row's letters and digits; of token ids, a character for each."""
    if "input_ids" in row:
        # Past the surrogates, which no text may have.
        return "".join(chr(0xE000 + i % 0x100000) for i in row["input_ids"])
    if is_chat(row):
        return normal_letters("\n".join(said for _, said in contents(row)))
    return normal_letters(row["text"])


def normal_letters(text: str) -> str:
    """A text's letters and digits, case and compatibility forms folded; the text if it has none."""
    folded = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return re.sub(r"[\W_]+", "", folded.casefold()) or text


def first_divergence(output: Sequence[int], suffix: Sequence[int]) -> int:
    """min{t: output[t] != suffix[t]}, or the suffix's length if they agree as far as it goes."""
    pairs = zip(output, suffix, strict=False)
    return next((t for t, (a, b) in enumerate(pairs) if a != b), len(suffix))


def prefix_grid(prefix_length: int) -> list[int]:
    """Tenths of the prefix: the lengths that the prefix sweep reports."""
    return sorted({round(prefix_length * tenth / 10) for tenth in range(1, 11)} - {0})
