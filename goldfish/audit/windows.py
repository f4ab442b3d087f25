"""Texts -> windows: a prefix that the model is given and the suffix that it may recite. Streams, in constant memory."""

import hashlib
import json
import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PLAIN = (".txt", ".text", ".md", ".rst")  # read as one row
SHOWN = 5  # skipped rows that are named


@dataclass(frozen=True)
class Window:
    """One question to a model: given ids[:prefix_length], does it go on with ids[prefix_length:]?

    split: "members" (trained on) or "heldout". index: the row of the input file, from 0. document: its name.
    prefix_length: the longest asked for; shorter ones with the same start are read off the same scores.
    source: the rule it was trained under, where there was one for each source.
    count: how often the document was trained on, where the input says so.
    offset: how many tokens of the document come before the window (a BOS at its start not counted).
    """

    split: str
    index: int
    document: str
    ids: list[int]
    prefix_length: int
    source: str | None = None
    count: int | None = None
    offset: int = 0

    @property
    def suffix(self) -> list[int]:
        return self.ids[self.prefix_length :]


@dataclass(frozen=True)
class Skipped:
    """A row without a window at an offset, and why."""

    index: int
    reason: str


def require_input(path: str | Path) -> Path:
    """FileNotFoundError, ValueError for what `read_rows` cannot read."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected .jsonl with a `text` or `input_ids` field a line, or .txt")
    if path.suffix.lower() not in (".jsonl", *PLAIN):
        raise ValueError(f"{path}: expected .jsonl with an object a line, or plain text ({', '.join(PLAIN)})")
    return path


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl file, one at a time, or a .txt file as one row.

    A line is an object with `text` or `input_ids`, perhaps `name`, `source` and `count`. Empty lines are no rows.

    Raises:
        FileNotFoundError, ValueError: with the file, the line and what was expected there.
    """
    path = require_input(path)
    if path.suffix.lower() != ".jsonl":
        yield {"text": _decoded(path.read_bytes(), str(path)), "name": path.name}
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            text = _decoded(line, where)
            if text.strip():
                yield _row(text, where)


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text ({error}); convert the file first, e.g. with iconv") from error


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f'{where}: expected an object such as {{"text": "..."}}, got {type(row).__name__}')
    ids = row.get("input_ids")
    if ids is not None:
        if not (isinstance(ids, list) and all(_is_whole(i) and i >= 0 for i in ids)):
            raise ValueError(f"{where}: input_ids must be a list of token ids")
    elif not isinstance(row.get("text"), str):
        raise ValueError(f"{where}: expected a string `text` or a list `input_ids`, got the fields {sorted(row)}")
    for key in ("text", "name", "source"):
        value = row.get(key)
        if key == "source" and not isinstance(value, str | None):
            raise ValueError(f"{where}: source must be a string, or be left out, got {value!r:.80}")
        try:
            str(value).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: {key} holds half a character (a lone surrogate; {error})") from error
    count = row.get("count")
    if count is not None and not (_is_whole(count) and 1 <= count < 2**63):
        raise ValueError(f"{where}: count must be a whole number from 1 to 2**63 - 1 (or no field), got {count!r:.80}")
    return row


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def cut_windows(rows: Iterable[dict[str, Any]], split: str, *how: Any) -> Iterator[Window | Skipped]:
    """The windows of rows, in order; `how`: see `cut_row`."""
    for index, row in enumerate(rows):
        yield from cut_row(row, index, split, *how)


def cut_row(
    row: dict[str, Any],
    index: int,
    split: str,
    tokenizer: Any,
    prefix_length: int,
    suffix_length: int,
    offsets: Sequence[int] = (0,),
) -> Iterator[Window | Skipped]:
    """A row's first prefix_length + suffix_length tokens, from each offset.

    `input_ids` are taken as they are; a `text` is tokenized as the tokenizer does by default (with BOS where it adds
    one), but without an EOS at its end. A BOS that the tokenizer put there opens a window at any offset, as it would
    open an adversary's prompt.
    """
    length = prefix_length + suffix_length
    all_ids, opening = row.get("input_ids"), []
    if all_ids is None:
        all_ids = first_ids(tokenizer, row["text"], max(offsets) + length)
        if all_ids[:1] == [tokenizer.bos_token_id]:
            opening = all_ids[:1]
    name, source, count = row.get("name") or f"{split} {index}", row.get("source"), row.get("count")
    for offset in offsets:
        ids = opening + all_ids[len(opening) + offset :][: length - len(opening)]
        if len(ids) < length:
            yield Skipped(index, f"fewer than {length} tokens" + (f" from token {offset} on" if offset else ""))
        else:
            yield Window(split, index, str(name), ids, prefix_length, source, count, offset)


def first_ids(tokenizer: Any, text: str, count: int) -> list[int]:
    """The first `count` ids of tokenizer(text), or all of them, without an EOS at the end.

    Of a long text only a part is tokenized, where that gives the same ids: tokenizers split a text into words first
    (the pre-tokenizer), and a word that ends well before the cut is the same word in the whole text. A tokenizer
    that makes no words, or not a fast one, reads the whole text.
    """
    size = 8 * count + 1024
    margin = 64 + max(map(len, tokenizer.get_added_vocab()), default=0)  # an added token may lie across the cut
    while tokenizer.is_fast and len(text) > 2 * size:
        part = tokenizer(text[:size]).encodings[0]
        end = next((i for i, (_, stop) in enumerate(part.offsets) if stop > size - margin), len(part.ids))
        if end < len(part.ids):
            end = part.word_ids.index(part.word_ids[end])
        if end >= count:
            return list(part.ids[:count])
        size *= 4
    ids: list[int] = tokenizer(text)["input_ids"]
    if ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]
    return ids[:count]


class Documents:
    """Numbers windows by document. Windows belong to one document if they share any of their keys."""

    def __init__(self) -> None:
        self._first: dict[int, int] = {}  # hash of a key -> a number that has it
        self._parents: list[int] = []

    def add(self, keys: Sequence[Any]) -> int:
        """The number of the window's document so far; see `root`."""
        hashes = [hash(key) for key in keys]
        numbers = {self.root(self._first[each]) for each in hashes if each in self._first}
        number = min(numbers, default=len(self._parents))
        if not numbers:
            self._parents.append(number)
        for other in numbers:
            self._parents[other] = number
        self._first.update(dict.fromkeys(hashes, number))
        return number

    def root(self, number: int) -> int:
        """The least number of the document that a number has become part of."""
        while self._parents[number] != number:
            self._parents[number] = number = self._parents[self._parents[number]]
        return number

    def clusters(self, surveys: "Mapping[str, Survey]") -> dict[str, list[int]]:
        """Of every window of each split: its document's number, counted from 0 in order."""
        numbers: dict[int, int] = {}
        return {
            split: [numbers.setdefault(self.root(number), len(numbers)) for number in each.numbers]
            for split, each in surveys.items()
        }


@dataclass
class Survey:
    """The windows of an input, read once from end to end. `skipped`: by reason, how many and the first rows."""

    rows: int = 0
    names: int = 0  # of documents
    skipped: dict[str, dict[str, Any]] = field(default_factory=dict)
    largest_id: int = -1  # of all windows; it stands in row `largest_at`
    largest_at: int = -1
    numbers: "array[int]" = field(default_factory=lambda: array("q"))  # of every window: its document's, see Documents
    indices: "array[int]" = field(default_factory=lambda: array("q"))  # of every window: its row


def survey(rows: Iterable[dict[str, Any]], split: str, documents: Documents, *how: Any) -> Survey:
    """Read all windows before anything is computed, so that a bad line is reported at once.

    Windows with the same ids, and rows whose whole texts hold the same letters and digits (whatever the case, spaces
    and punctuation), are of one document, as are rows with the same name in one split.

    Args:
        documents: shared by the splits. how: see `cut_row`.
    """
    result, names = Survey(), set()
    for index, row in enumerate(rows):
        result.rows, whole = index + 1, None
        for window in cut_row(row, index, split, *how):
            if isinstance(window, Skipped):
                skipped = result.skipped.setdefault(window.reason, {"reason": window.reason, "count": 0, "rows": []})
                skipped["count"] += 1
                skipped["rows"] = [*skipped["rows"], index][:SHOWN]
                continue
            if whole is None:
                ids = row.get("input_ids")
                whole = normal_letters(row["text"]) if ids is None else tuple(ids)
            names.add(hash(window.document))
            result.numbers.append(documents.add([(split, window.document), tuple(window.ids), ("whole", whole)]))
            result.indices.append(index)
            if (largest := max(window.ids)) > result.largest_id:
                result.largest_id, result.largest_at = largest, index
    result.names = len(names)
    return result


def overlap_of(surveys: Mapping[str, Survey], clusters: Mapping[str, Sequence[int]]) -> dict[str, Any] | None:
    """How many documents are in both splits, and the first rows of some; None for one split or no such document."""
    rows: list[dict[int, int]] = []
    for split, each in surveys.items():
        rows.append({})
        for cluster, row in zip(clusters[split], each.indices, strict=True):
            rows[-1].setdefault(cluster, row)
    shared = sorted(rows[0].keys() & rows[-1].keys()) if len(rows) == 2 else []
    return {"clusters": len(shared), "rows": [[each[i] for each in rows] for i in shared[:SHOWN]]} if shared else None


def normal_letters(text: str) -> str:
    """A text's letters and digits, compatibility forms and case folded; where it has none, the text."""
    folded = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return re.sub(r"[\W_]+", "", folded.casefold()) or text


def sha256(path: Path) -> str:
    """Of the whole file."""
    digest = hashlib.sha256()
    with path.open("rb") as data:
        while piece := data.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def first_divergence(output: Sequence[int], suffix: Sequence[int]) -> int:
    """min{t: output[t] != suffix[t]}, or their length where they agree."""
    return next((t for t, (a, b) in enumerate(zip(output, suffix, strict=True)) if a != b), len(suffix))


def prefix_grid(prefix_length: int) -> list[int]:
    """Tenths of the prefix: the lengths that the prefix sweep reports."""
    return sorted({round(prefix_length * tenth / 10) for tenth in range(1, 11)} - {0})


def lowercase_ids(window: Window, tokenizer: Any) -> list[int]:
    """The ids of the window's text in lower case, for lowercase_nll; a BOS stays."""
    ids = window.ids
    opening = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    text = tokenizer.decode(ids[len(opening) :], clean_up_tokenization_spaces=False).lower()
    lowered: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return opening + lowered
