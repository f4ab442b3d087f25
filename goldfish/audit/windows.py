"""Texts -> windows: a prefix that the model is given and the suffix that it may recite."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLAIN = (".txt", ".text", ".md", ".rst")  # read as one row


@dataclass(frozen=True)
class Window:
    """One question to a model: given ids[:prefix_length], does it go on with ids[prefix_length:]?

    split: "members" (trained on) or "heldout". index: the row of the input file, from 0. document: its name.
    source: the rule it was trained under, where there was one for each source.
    count: how often it was trained on. offset: tokens from the row's start to the window's.
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


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl file (objects with `input_ids` or `text`, perhaps `name`, `source`), or a .txt file as one.

    Raises:
        FileNotFoundError, ValueError: with the file, the line and what was expected there.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected .jsonl with a `text` or `input_ids` field a line, or .txt")
    if path.suffix.lower() not in (".jsonl", *PLAIN):
        raise ValueError(f"{path}: expected .jsonl with an object a line, or plain text ({', '.join(PLAIN)})")
    try:
        if path.suffix.lower() != ".jsonl":
            yield {"text": path.read_text(encoding="utf-8"), "name": path.name}
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _row(line, f"{path}, line {number}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it first, e.g. with iconv") from error


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f'{where}: expected an object such as {{"text": "..."}}, got {type(row).__name__}')
    ids = row.get("input_ids")
    if ids is not None:
        if not (isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids)):
            raise ValueError(f"{where}: input_ids must be a list of token ids")
    elif not isinstance(row.get("text"), str):
        raise ValueError(f"{where}: expected a string `text` or a list `input_ids`, got the fields {sorted(row)}")
    return row


def cut_windows(
    rows: Iterable[dict[str, Any]], split: str, tokenizer: Any, prefix_length: int, suffix_length: int
) -> tuple[list[Window], int]:
    """The first prefix_length + suffix_length tokens of every row, and how many rows were too short for that.

    A row's `input_ids` are taken as they are; a `text` is tokenized as the tokenizer does by default (with BOS where
    it adds one), but without an EOS at its end.
    """
    windows, skipped = [], 0
    for index, row in enumerate(rows):
        ids = row["input_ids"] if row.get("input_ids") is not None else tokenizer(row["text"])["input_ids"]
        ids = ids[: prefix_length + suffix_length]
        if len(ids) < prefix_length + suffix_length:
            skipped += 1
            continue
        name = row.get("name") or f"{split} {index}"
        windows.append(Window(split, index, str(name), ids, prefix_length, row.get("source"), row.get("count")))
    return windows, skipped
