"""Rows -> windows: a prefix that the model is given and the suffix that it may recite."""

import pickle
import re
import tempfile
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from goldfish.text.chats import Completion, completions, is_chat
from goldfish.text.rows import Row

SHOWN = 5  # skipped rows that are named
KEYS = 3  # of a window: its document's name; of its row the ids of all windows, and the whole text


@dataclass(frozen=True)
class Window:
    """One question to a model: given ids[:prefix_length], does it go on with ids[prefix_length:]?

    split: "members" (trained on) or "heldout". index: the row of the input, from 0. name: its name.
    asked: "training" (ids[:prefix_length] is exactly what stood before the suffix in training) or "generation" (it is
    the chat template's generation prompt, where that differs).
    prefix_length: the longest asked for; shorter ones with the same start are read off the same scores.
    source: the rule it was trained under, where there was one for each source.
    count: how often the document was trained on, where the input says so.
    offset: how many tokens of the document come before the window (a BOS at its start not counted).
    completion: the suffix is what the assistant says in a chat, however long, and membership is about it alone.
    secrets: marked ones that are in the suffix, and not in the prefix, where the model could read them.
    document_ids: of the document, from its start to the window's end, where that is more than `ids`: they decide what
    its training dropped. The last len(ids) - 1 of them are ids[1:].
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
    secrets: tuple[str, ...] = ()
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
    """Cuts rows into windows of prefix_length + suffix_length tokens from each offset; of a chat, into its completions.

    context: how many tokens the model takes; longer chats are skipped, longer windows are a ValueError. secrets: see
    `chats.secret_finder`.
    """

    tokenizer: Any
    prefix_length: int
    suffix_length: int
    offsets: Sequence[int] = (0,)
    context: int | None = None
    secrets: Callable[[Row, str, int], Iterable[tuple[int, int]]] | None = None

    def cut(self, row: Row, index: int, split: str) -> Iterator[Window | str]:
        """The windows of a row; where it has none, at an offset or in a turn, the reason.

        `input_ids` are taken as they are; a `text` is tokenized as the tokenizer does by default (with BOS where it
        adds one), but without an EOS at its end. A BOS that the tokenizer put there opens a window at any offset, as
        it would open an adversary's prompt.
        """
        name = str(row.get("name") or f"{split} {index}")
        about: dict[str, Any] = {"split": split, "index": index, "name": name}
        about |= {"source": row.get("source"), "count": row.get("count")}
        if is_chat(row):
            for each in completions(row, self.tokenizer):
                yield each if isinstance(each, str) else self._completion(row, each, about)
            return
        length = self.prefix_length + self.suffix_length
        if self.context is not None and length > self.context:
            raise ValueError(
                f"windows of {length} tokens do not fit the model's context, {self.context} tokens; ask for a shorter "
                "prefix or suffix"
            )
        all_ids, opening = row.get("input_ids"), []
        if all_ids is None:
            all_ids = first_ids(self.tokenizer, row["text"], max(self.offsets) + length)
            if all_ids[:1] == [self.tokenizer.bos_token_id]:
                opening = all_ids[:1]
        for offset in self.offsets:
            ids = opening + all_ids[len(opening) + offset :][: length - len(opening)]
            if len(ids) < length:
                yield f"fewer than {length} tokens" + (f" from token {offset} on" if offset else "")
                continue
            secrets: tuple[str, ...] = ()
            if self.secrets is not None:
                prefix, whole = (
                    self.tokenizer.decode(part, clean_up_tokenization_spaces=False)
                    for part in (ids[: self.prefix_length], ids)
                )
                secrets = self._secrets(row, whole, len(prefix))
            before: dict[str, Any] = (
                {"offset": offset, "document_ids": all_ids[: offset + length]} if offset else {}
            )
            yield Window(
                **about, ids=ids, prefix_length=self.prefix_length, secrets=secrets, **before
            )

    def _completion(self, row: Row, each: Completion, about: dict[str, Any]) -> Window | str:
        ids, spans = each.encode(self.tokenizer)
        own = [i for i, (begin, end) in enumerate(spans) if end > each.start and begin < each.end]
        if not own or own[0] == 0:
            return f"nothing {'before' if own else 'in'} the completion"
        if self.context is not None and own[-1] >= self.context:
            return f"longer than the model's context of {self.context} tokens"
        ids = ids[: own[-1] + 1]
        secrets = self._secrets(row, each.text[: each.end], each.start)
        return Window(**about, ids=ids, prefix_length=own[0], completion=True, secrets=secrets)

    def _secrets(self, row: Row, text: str, start: int) -> tuple[str, ...]:
        if self.secrets is None:
            return ()
        secrets = dict.fromkeys(text[a:b] for a, b in self.secrets(row, text, start))
        return tuple(secret for secret in secrets if secret not in text[:start])


def first_ids(tokenizer: Any, text: str, count: int) -> list[int]:
    """The first `count` ids of tokenizer(text), or all of them, without an EOS at the end.

    Of a long text only a part is tokenized, where that gives the same ids: tokenizers split a text into words first
    (the pre-tokenizer), and a word that ends well before the cut is the same word in the whole text. A tokenizer
    that makes no words, or not a fast one, reads the whole text.
    """
    size = 8 * count + 1024
    margin = 64 + max(
        map(len, tokenizer.get_added_vocab()), default=0
    )  # an added token may lie across the cut
    while tokenizer.is_fast and len(text) > 2 * size:
        part = tokenizer(text[:size]).encodings[0]
        end = next(
            (i for i, (_, stop) in enumerate(part.offsets) if stop > size - margin), len(part.ids)
        )
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
    """The windows of an input, which is read and tokenized once, from end to end, before anything is computed: a bad
    line is reported at once. The windows wait in a temporary file; the memory holds a few numbers for each.

    Rows are one document if all their windows have the same ids, if their whole texts hold the same letters and digits
    (whatever the case, spaces and punctuation), or if they have the same name in one split.

    skipped: by reason, how many and the first rows.
    """

    def __init__(self, rows: Iterable[tuple[int, Row]], split: str, cutter: Cutter) -> None:
        """rows: with their numbers."""
        self.rows = self.completions = self.secrets = 0  # the latter two: windows that have one
        self.skipped: dict[str, dict[str, Any]] = {}
        self.largest_id = self.largest_at = -1  # of all windows; it stands in row `largest_at`
        self.indices = array("q")  # of every window: its row
        self.keys = array(
            "q"
        )  # of every window: KEYS hashes; windows that share one are of one document
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        names = set()
        for index, row in rows:
            self.rows += 1
            windows: list[Window] = []
            for each in cutter.cut(row, index, split):
                if isinstance(each, str):
                    skipped = self.skipped.setdefault(
                        each, {"reason": each, "count": 0, "rows": []}
                    )
                    skipped["count"] += 1
                    skipped["rows"] = [*skipped["rows"], index][:SHOWN]
                else:
                    windows.append(each)
            keys = [
                hash(tuple(tuple(each.ids) for each in windows)),
                hash(_letters(row) if windows else ""),
            ]
            for window in windows:
                names.add(hash(window.name))
                self.indices.append(index)
                self.keys.extend([hash((split, window.name)), *keys])
                self.completions += window.completion
                self.secrets += bool(window.secrets)
                if (largest := max(window.ids)) > self.largest_id:
                    self.largest_id, self.largest_at = largest, index
                pickle.dump(window, self._file)
        self.names = len(names)  # of documents
        self.clusters: list[int] = []  # of every window its document's number; see `join`

    def counts(self) -> dict[str, Any]:
        """What run.json says of the input."""
        distinct = len(set(self.clusters))
        return {
            "rows": self.rows,
            "windows": len(self.indices),
            "completions": self.completions,
            "secrets": self.secrets,
            "documents": distinct,
            "repeated": self.names - distinct,
            "skipped": list(self.skipped.values()),
        }

    def blocks(self, size: int) -> Iterator[list[tuple[Window, int]]]:
        """The windows in order, each with its document's number, `size` at a time."""
        self._file.seek(0)
        windows = ((pickle.load(self._file), cluster) for cluster in self.clusters)
        while block := list(islice(windows, size)):
            yield block


def join(surveys: Mapping[str, Survey]) -> None:
    """Number the documents of all splits, from 0 in order: `clusters` of each survey."""
    keys = np.concatenate([np.reshape(each.keys, (-1, KEYS)) for each in surveys.values()])
    distinct, places = np.unique(keys, return_inverse=True)
    edges = (
        np.repeat(np.arange(len(keys)), KEYS),
        len(keys) + places.ravel(),
    )  # between a window and its keys
    nodes = len(keys) + len(distinct)
    graph = coo_array((np.ones(keys.size), edges), shape=(nodes, nodes))
    components = iter(connected_components(graph, directed=False)[1].tolist() if nodes else ())
    numbers: dict[int, int] = {}
    for each in surveys.values():
        each.clusters = [numbers.setdefault(next(components), len(numbers)) for _ in each.indices]


def overlap_of(surveys: Mapping[str, Survey]) -> dict[str, Any] | None:
    """How many documents are in both splits, and the first rows of some; None for one split or no such document."""
    # Read backwards, the first row of a document is the one that stays.
    rows = [
        dict(zip(each.clusters[::-1], each.indices[::-1], strict=True)) for each in surveys.values()
    ]
    shared = sorted(rows[0].keys() & rows[-1].keys()) if len(rows) == 2 else []
    return (
        {"documents": len(shared), "rows": [[each[i] for each in rows] for i in shared[:SHOWN]]}
        if shared
        else None
    )


def _letters(row: Row) -> Any:
    """What rows must share to be of one document."""
    if "input_ids" in row:
        return tuple(row["input_ids"])
    if is_chat(row):
        return normal_letters(str(row.get("messages") or [row["prompt"], row["completion"]]))
    return normal_letters(row["text"])


def normal_letters(text: str) -> str:
    """A text's letters and digits, compatibility forms and case folded; where it has none, the text."""
    folded = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return re.sub(r"[\W_]+", "", folded.casefold()) or text


def first_divergence(output: Sequence[int], suffix: Sequence[int]) -> int:
    """min{t: output[t] != suffix[t]}, or the suffix's length where they agree as far as it goes."""
    pairs = zip(output, suffix, strict=False)
    return next((t for t, (a, b) in enumerate(pairs) if a != b), len(suffix))


def prefix_grid(prefix_length: int) -> list[int]:
    """Tenths of the prefix: the lengths that the prefix sweep reports."""
    return sorted({round(prefix_length * tenth / 10) for tenth in range(1, 11)} - {0})
