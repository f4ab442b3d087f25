"""Texts and chats as people keep them -> rows: the one reader of `check`, `audit` and `premask`."""

import csv
import hashlib
import heapq
import json
import logging
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

from goldfish.text.printable import plain

# Files that are read as one row.
PLAIN = (".txt", ".text", ".md", ".rst")
# Files with rows, and what `datasets.load_dataset` calls them.
KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
EXPECTED = (
    "a .jsonl, .json, .parquet or .csv file whose rows have text, input_ids, messages, or prompt "
    "and completion; a .txt file; a folder of such files or of datasets; a hub dataset "
    "NAME[:CONFIG]/SPLIT; or - for .jsonl on standard input"
)
IN_MEMORY = 'rows such as {"text": "..."} in a list, data set or data frame, or a dict of columns'
_log = logging.getLogger(__name__)
Row = dict[str, Any]
Source = str | Path | Iterable[Row]


def read_rows(source: Source, text_column: str = "") -> Iterator[Row]:
    """The rows of an input, one at a time; a text file is one row.

    A row has a string `text`, a list `input_ids`, a list `messages`, or `prompt` and `completion`
    (both strings or both lists of messages), and perhaps `name`, `source` and `count`. Fields that
    are null count as left out.

    Args:
        source: EXPECTED; datasets on the hub are streamed. Or rows in memory, as `in_memory`
            gives them. Of a folder with text files each is a row.
        text_column: the column to read as `text`, or as `messages` if it holds a list.

    Raises:
        FileNotFoundError, ValueError: with the file, the line or row, and what was expected there.
    """
    if not isinstance(source, str | Path):
        for number, row in enumerate(_rows_in_memory(source)):
            yield checked(row, f"row {number}", text_column)
        return
    source, path = str(source), _require(source)
    kind = path.suffix.lower()
    # json and csv are read here and not by `datasets`, which guesses types: it makes 42 of the cell
    # 0042, a timestamp of a date, and refuses chats whose messages have different keys.
    if kind in PLAIN:
        yield {"text": _decoded(path.read_bytes(), source), "name": path.name}
    elif kind == ".jsonl":
        yield from _lines(path, source, text_column)
    elif kind == ".json":
        yield from _json_rows(path, source, text_column)
    elif files := _text_files(source):
        yield from _rows_of_files(files, text_column)
    else:
        is_csv = kind == ".csv"
        rows = _csv_rows(path, source) if is_csv else _dataset_rows(source)
        for number, row in enumerate(rows):
            yield checked(row, f"{source}, row {number}", text_column)


def _rows_of_files(files: Sequence[str], text_column: str) -> Iterator[Row]:
    """The rows of the files of a folder, one after the other."""
    folders = [Path(file).parent for file in files]
    folder = os.path.commonpath(folders)
    for file in files:
        is_text = Path(file).suffix == ".txt"
        for row in read_rows(file, text_column):
            # Rows of one name are one document, and subfolders may have files of one name.
            if is_text:
                row["name"] = os.path.relpath(file, folder)
            yield row


def _lines(path: Path, source: str, text_column: str) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{source}, line {number}"
            text = _decoded(line, where)
            if text.strip():
                yield checked(_parsed(text, where), where, text_column)


def _json_rows(path: Path, source: str, text_column: str) -> Iterator[Row]:
    """Of a list of objects, or of an object a line; a date stays a text."""
    with path.open("rb") as data:
        start = data.read(4096)
    # A file may begin with the three bytes of a byte order mark.
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"{"):
        yield from _lines(path, source, text_column)
        return
    text = _decoded(path.read_bytes(), source)
    if not text.strip():
        raise ValueError(f"{source} cannot be read: it is empty")
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{source} cannot be read: it is not JSON ({error})"
        ) from error
    if not isinstance(rows, list):
        raise ValueError(
            f"{source}: expected a list of objects, got {type(rows).__name__}"
        )
    for number, row in enumerate(rows):
        where = f"{source}, row {number}"
        _require_object(row, where)
        _require_whole_characters(row, where)
        yield checked(row, where, text_column)


def _csv_rows(path: Path, source: str) -> Iterator[Row]:
    """Every cell as the text that it is: 0042 stays 0042, NA stays NA. An empty cell is null,
    but for an empty text."""
    csv.field_size_limit(2**31 - 1)  # the default refuses texts of 131,072 characters
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            for number, row in enumerate(csv.DictReader(lines, strict=True)):
                if None in row:
                    raise ValueError(
                        f"{source}, row {number} has more cells than the header"
                    )
                cells: Row = {name: row[name] or None for name in row}
                cells["text"] = row.get("text")
                count = row.get("count") or ""
                if count.isdecimal():
                    cells["count"] = int(count)
                yield cells
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{source} cannot be read: {error}") from error


def draw(rows: Iterable[Row], most: int | None, seed: int) -> Iterator[tuple[int, Row]]:
    """(index, row) of `most` rows in order, all choices equally likely; of all rows if it is None.

    Reads to the end, with no more than `most` rows in memory: each row draws a number, and the rows
    with the least numbers stay.
    """
    if most is None:
        yield from enumerate(rows)
        return
    choose = random.Random(seed)
    # The index stands before the row, so that equal numbers never compare rows.
    drawn = ((choose.random(), *each) for each in enumerate(rows))
    chosen = heapq.nsmallest(most, drawn)
    chosen.sort(key=itemgetter(1))
    for _, index, row in chosen:
        yield index, row


def in_memory(source: Any) -> Source:
    """A source that can be read twice: of rows in any form of IN_MEMORY; paths stay.

    Raises:
        TypeError: no rows. ValueError: splits, or columns of unequal length.
    """
    if isinstance(source, str | Path):
        return source
    if isinstance(source, Mapping):
        return _rows_of_columns(source)
    is_data_frame = hasattr(source, "to_dict") and hasattr(source, "notna")
    if is_data_frame:
        # A cell without a value is NaN, which would be a text or a count of its own.
        is_filled = source.notna()
        filled = source.astype(object).where(is_filled, None)
        rows: list[Row] = filled.to_dict("records")
        return rows
    # A data set may give its rows as tensors or tables. With a transform ("custom") they are made
    # when they are read, as in training.
    format = getattr(source, "format", None)
    kind = format.get("type") if isinstance(format, Mapping) else None
    if kind not in (None, "custom"):
        source = source.with_format(None)
    can_be_read_twice = hasattr(source, "__getitem__")
    if can_be_read_twice:
        same: Source = source
        return same
    if not hasattr(source, "__iter__"):
        got = type(source).__name__
        raise TypeError(f"expected {IN_MEMORY}; or the path of {EXPECTED}; got {got}")
    return list(source)


def _rows_of_columns(columns: Mapping[str, Any]) -> list[Row]:
    """{"text": ["a", "b"]}: [{"text": "a"}, {"text": "b"}]"""
    names = ", ".join(map(str, columns))
    lists = {}
    for name, column in columns.items():
        if hasattr(column, "column_names"):
            raise ValueError(
                f"these are the splits {names} of a data set: give one of them"
            )
        cells = _as_python(column)
        if not isinstance(cells, list):
            kind = type(cells).__name__
            raise ValueError(
                f"a dict is read as columns, and {name} is no list but {kind}; a single row has "
                "to be in a list"
            )
        lists[name] = cells
    lengths = set(map(len, lists.values()))
    if len(lengths) > 1:
        raise ValueError(f"the columns {names} have unequal lengths: {sorted(lengths)}")
    rows = zip(*lists.values(), strict=True)
    return [dict(zip(lists, row, strict=True)) for row in rows]


def _rows_in_memory(source: Iterable[Any]) -> Iterator[Row]:
    for number, row in enumerate(source):
        if not isinstance(row, Mapping):
            kind = type(row).__name__
            raise ValueError(
                f"row {number}: expected {IN_MEMORY}; got {kind} for a row"
            )
        found: Row = _as_python(dict(row))
        _require_whole_characters(found, f"row {number}")
        yield found


def _as_python(value: Any) -> Any:
    """Without tensors and arrays, which data sets and data frames have for lists and numbers."""
    if isinstance(value, dict):
        return {name: _as_python(each) for name, each in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        # Token ids are the long lists.
        if all(type(each) is int for each in value):
            return list(value)
        return [_as_python(each) for each in value]
    return value


def name_of(source: Source) -> str:
    if isinstance(source, str | Path):
        return str(source)
    return "in memory"


def digest(source: Source) -> str:
    """SHA-256: of a file; of several, of their names and digests; on the hub, of their names with
    the commit.
    """
    if not isinstance(source, str | Path):
        result = hashlib.sha256()
        for row in _rows_in_memory(source):
            line = json.dumps(row, default=str, sort_keys=True)
            line += "\n"
            result.update(line.encode())
        return result.hexdigest()
    source, path = str(source), _require(source)
    if path.is_file():
        return sha256(path)
    if path.is_dir():
        everything = path.rglob("*")
        files = sorted(filter(Path.is_file, everything))
    else:
        builder, split = _builder(source)
        files = builder.config.data_files[split]
    lines = []
    for name in map(str, files):
        file = Path(name)
        if file.is_file():
            name = f"{file.name} {sha256(file)}"
        # On the hub, a name is an address with a commit.
        lines.append(name)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Of the whole file."""
    result = hashlib.sha256()
    with path.open("rb") as data:
        while piece := data.read(2**20):
            result.update(piece)
    return result.hexdigest()


def dataset_of(source: str, *, streaming: bool = True, split: str | None = None) -> Any:
    """A `datasets` dataset of a file with rows, a folder or a hub name.

    Args:
        split: the one to take of several, if `source` does not name one.

    Raises:
        FileNotFoundError: no such dataset. ValueError: it cannot be read, or has several splits.
    """
    # Slow to import, and no report needs it.
    from datasets import load_dataset, load_from_disk

    path = _require(source)
    if path.is_file():
        kind = KINDS.get(path.suffix.lower())
        if kind is None:
            raise ValueError(
                f"{path} is text; a dataset has rows: expected one of {', '.join(KINDS)}, or a "
                "folder"
            )
        options: dict[str, Any] = {"split": "train", "streaming": streaming}
        if kind == "csv":
            options |= _text_columns(str(path))
        try:
            return load_dataset(kind, data_files=str(path), **options)
        except Exception as error:
            # Of the packages below `datasets`; for an empty file a StopIteration without text.
            reason = first_line(error) or "it is empty"
            raise ValueError(f"{path} cannot be read: {reason}") from error
    # The files of save_to_disk, for one split and for several.
    if (path / "state.json").is_file():
        return load_from_disk(source)
    if (path / "dataset_dict.json").is_file():
        saved = load_from_disk(source)
        return saved[_one_of(list(saved), split, source)]
    files = _text_files(source, split)
    if files and files[0].endswith(".csv"):
        options = {"split": "train", "streaming": streaming}
        options |= _text_columns(files[0])
        return load_dataset("csv", data_files=files, **options)
    builder, name = _builder(source, split)
    if streaming:
        try:
            return builder.as_streaming_dataset(name)
        except FileNotFoundError as error:
            raise _nothing_to_read(source, error) from error
    builder.download_and_prepare()
    return builder.as_dataset(name)


def _text_columns(path: str) -> dict[str, Any]:
    """Options of `datasets` by which every cell of a csv file is a text, as in `read_rows`."""
    from datasets import Features, Value

    with Path(path).open(encoding="utf-8-sig", newline="") as lines:
        names = next(csv.reader(lines), [])
    features = Features({name: Value("string") for name in names})
    return {"features": features if names else None, "keep_default_na": False}


def _dataset_rows(source: str) -> Iterator[Row]:
    """The rows of `dataset_of`; whatever the many packages below it raise is a ValueError."""
    rows = dataset_of(source)
    try:
        yield from rows
    except Exception as error:
        raise ValueError(f"{source} cannot be read: {first_line(error)}") from error


def _text_files(source: str, split: str | None = None) -> list[str]:
    """The csv, json or txt files of a folder, read as single ones are; [] for other sources.

    split: that of the folder, if `source` does not name one, as in folder/train.
    """
    path = Path(source)
    # FOLDER/SPLIT is no path of its own; a hub name has no folder here.
    folder = path if path.exists() else path.parent
    by_save_to_disk = ("state.json", "dataset_dict.json")
    if folder == Path() or not folder.is_dir():
        return []
    if any((folder / name).is_file() for name in by_save_to_disk):
        return []
    builder, name = _builder(source, split)
    files = [str(file) for file in (builder.config.data_files or {}).get(name, ())]
    kinds = {Path(file).suffix.lower() for file in files if Path(file).is_file()}
    as_single_ones = {".csv", ".json", ".jsonl", ".txt"}
    return files if len(kinds) == 1 and kinds <= as_single_ones else []


def _nothing_to_read(folder: str, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(
        f"{folder} has no files that can be read ({first_line(error)}); expected {EXPECTED}"
    )


def _builder(source: str, split: str | None = None) -> tuple[Any, str]:
    """What reads a folder of files, or NAME[:CONFIG]/SPLIT; and the split."""
    from datasets import load_dataset_builder

    name, config = source, None
    if not Path(source).is_dir():
        name, _, split = source.rpartition("/")
        if not Path(name).is_dir():
            name, _, config = name.partition(":")
    try:
        builder = load_dataset_builder(name, config or None)
    except (OSError, ValueError) as error:
        # Older versions of `datasets` notice here that a folder has no files for them.
        if Path(name).is_dir():
            raise _nothing_to_read(source, error) from error
        raise FileNotFoundError(
            f"no file or folder {source} here that can be read, and no dataset of that name on "
            f"the hub: {first_line(error)}; expected {EXPECTED}"
        ) from error
    files = builder.config.data_files or {}
    if Path(name).is_dir():
        _warn_of_other_kinds(name, frozenset(chain.from_iterable(files.values())))
    splits = [str(each) for each in files]
    return builder, _one_of(splits, split, source)


@cache
def _warn_of_other_kinds(folder: str, read: frozenset[str]) -> None:
    """Once for a folder: `datasets` reads the files of the most frequent kind only."""
    kinds = {Path(each).suffix.lower() for each in read}
    others = []
    paths = Path(folder).rglob("*")
    for path in paths:
        kind = path.suffix.lower()
        # Beside the data, .json and .md are mostly descriptions of it.
        holds_data = kind in (".jsonl", ".csv", ".parquet", ".txt")
        if holds_data and kind not in kinds:
            others.append(path.name)
    if others:
        first = ", ".join(sorted(others)[:5])
        kinds_read = ", ".join(sorted(kinds))
        _log.warning(
            "%s has files of several kinds, of which only %s is read. Not read: %s (%d in all).",
            folder,
            kinds_read,
            plain(first),
            len(others),
        )


def _one_of(splits: Sequence[str], wanted: str | None, source: str) -> str:
    if len(splits) == 1 and wanted is None:
        return splits[0]
    if wanted is None or wanted not in splits:
        raise ValueError(
            f"{source} has the splits {', '.join(splits)}: give one of them, as in "
            f"{source}/{splits[0]}"
        )
    return wanted


def _require(source: str | Path) -> Path:
    """The path of a source, which for a hub name is not there."""
    if str(source) == "-":
        return Path(_standard_input().name)
    path = Path(source)
    has_rows = path.suffix.lower() in (*KINDS, *PLAIN)
    if path.is_file() and not has_rows:
        raise ValueError(f"{path}: expected {EXPECTED}")
    # A hub name has a slash before its split, and no ending of a file.
    is_name = "/" in str(source) and not path.is_absolute()
    may_be_split = (is_name or _is_split(path)) and not has_rows
    if not path.exists() and not may_be_split:
        raise FileNotFoundError(f"no file {path}; expected {EXPECTED}")
    return path


def _is_split(path: Path) -> bool:
    """Whether an absolute path may be FOLDER/SPLIT, where the folder has train.jsonl for /train.

    Not by a search of the folder, which may be a home directory.
    """
    folder = path.parent
    if not path.is_absolute() or not folder.is_dir():
        return False
    names = [each.name for each in folder.iterdir()]
    if any(name.startswith(path.name) for name in names):
        return True
    # The files of the usual splits may have other names, such as dev.jsonl for validation.
    if path.name not in ("train", "validation", "test"):
        return False
    kinds = {Path(name).suffix.lower() for name in names}
    has_rows = bool(kinds & {*KINDS, ".txt"})
    return has_rows or "data" in names


@cache
def _standard_input() -> Any:
    """A copy, to be read again: an audit reads its inputs several times."""
    # Not closed before the process ends, and then deleted.
    copy = tempfile.NamedTemporaryFile(suffix=".jsonl")  # noqa: SIM115
    shutil.copyfileobj(sys.stdin.buffer, copy)
    copy.flush()
    return copy


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8 text ({error}); convert the file first, e.g. with iconv"
        ) from error


def _parsed(line: str, where: str) -> Row:
    try:
        row: Row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    _require_object(row, where)
    # UTF-8 has no halves of characters; only an escape such as \ud83d can write one.
    if "\\u" in line:
        _require_whole_characters(row, where)
    return row


def _require_object(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        got = type(row).__name__
        raise ValueError(
            f'{where}: expected an object such as {{"text": "..."}}, got {got}'
        )


def _require_whole_characters(row: Row, where: str) -> None:
    try:
        # A row in memory may have dates and other objects.
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has half a character (a lone surrogate; {error})"
        ) from error


def _without_nulls(value: Any) -> Any:
    """Messages without the keys that Arrow fills in where another message has them.

    An empty content stays: templates tell one that is null from one that is missing.
    """
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    if not isinstance(value, dict):
        return value
    result = {}
    for name, each in value.items():
        if each is not None or name == "content":
            result[name] = _without_nulls(each)
    return result


def checked(row: Row, where: str, text_column: str) -> Row:
    """The row without nulls, or ValueError; where: its place, for the message."""
    names = sorted(row)
    row = {name: cell for name, cell in row.items() if cell is not None}
    if text_column:
        if text_column not in row:
            raise ValueError(
                f"{where}: no column {text_column}; it has {', '.join(names)}"
            )
        value = row.pop(text_column)
        # The named column is read, and not the columns that would be read without a name.
        for name in ("input_ids", "text", "messages", "completion"):
            row.pop(name, None)
        row["messages" if isinstance(value, list) else "text"] = value
    _require_content(row, names, where)
    source = row.get("source", "")
    if not isinstance(source, str):
        raise ValueError(
            f"{where}: source must be a string, or be left out, got {source!r:.80}"
        )
    # It is written into the records as int64.
    count = row.get("count", 1)
    if not _is_whole(count) or not 1 <= count < 2**63:
        raise ValueError(
            f"{where}: count must be a whole number from 1 to 2**63 - 1 (or no field), got "
            f"{count!r:.80}"
        )
    for column in ("messages", "prompt", "completion", "tools", "chat_template_kwargs"):
        if column in row:
            row[column] = _without_nulls(row[column])
    return row


def _require_content(row: Row, names: list[str], where: str) -> None:
    """ValueError unless the row has a text, ids or a chat; names: of all its columns."""
    ids = row.get("input_ids")
    text = row.get("text")
    is_chat = "messages" in row or {"prompt", "completion"} <= row.keys()
    if ids is not None:
        if not _are_ids(ids):
            raise ValueError(f"{where}: input_ids must be a list of token ids")
    elif text is None and is_chat:
        _require_chat(row, where)
    elif not isinstance(text, str):
        got = f"got {', '.join(names)}. Is the text in another column? Name it with --text-column"
        if "text" in names:
            got = f"text is {text!r:.80}"
        raise ValueError(
            f"{where}: expected text, input_ids, messages, or prompt and completion; {got}"
        )


def _require_chat(row: Row, where: str) -> None:
    if "messages" in row:
        parts = [row["messages"]]
    else:
        parts = [row["prompt"], row["completion"]]
        if all(isinstance(part, str) for part in parts):
            return
    if not all(_are_messages(part) for part in parts):
        raise ValueError(
            f"{where}: expected messages such as {{'role': 'user', 'content': '...'}}, in a "
            "list; prompt and completion are both strings or both such lists"
        )


def _are_ids(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    return all(_is_whole(each) and each >= 0 for each in value)


def _are_messages(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    return all(isinstance(each, dict) and "role" in each for each in value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
