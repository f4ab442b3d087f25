"""An audit on its way: blocks of records on disk, so that a run killed at any moment goes on where it was."""

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from goldfish.audit.schema import RECORDS as COLUMNS

RECORDS, TOKENS, SUMMARY = "records.parquet", "tokens.parquet", "summary.json"


class Shards:
    """The folder of an audit. While it runs, `unfinished/` holds run.json and one file a block and kind.

    run.json says what is being run, so that a run goes on only with its own blocks. A file is there whole or not at
    all, and a summary.json means a finished audit.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._unfinished = folder, folder / "unfinished"
        self._marker = self._unfinished / "run.json"

    def refuse(self) -> None:
        """FileExistsError unless the folder is new, empty, or holds an audit on its way."""
        if not self.folder.exists() or self._marker.is_file():
            return
        if self.folder.is_dir():  # a run killed at its first step leaves an empty `unfinished/`
            things = [path for path in self.folder.rglob("*") if path not in (self._unfinished, _part(self._marker))]
            if not things:
                return
        raise FileExistsError(
            f"{self.folder} exists and is not an empty folder; choose another output folder or remove it"
        )

    def open(self, run: Mapping[str, Any]) -> None:
        """Begin, or go on with, this run.

        Raises:
            FileExistsError: something else is there: another run, finished or not.
        """
        self.refuse()
        told = json.loads(json.dumps(run))
        if not self._marker.is_file():
            self._unfinished.mkdir(parents=True, exist_ok=True)
            _write_json(self._marker, told)
        before = json.loads(self._marker.read_text(encoding="utf-8"))
        if before != told:
            differences = [
                f"{key} ({before.get(key)!r:.80} there, {told.get(key)!r:.80} now)"
                for key in dict.fromkeys([*before, *told])
                if before.get(key) != told.get(key)
            ]
            raise FileExistsError(
                f"{self.folder} holds an unfinished audit with other settings: {'; '.join(differences)}. "
                "Repeat that one to finish it, choose another output folder, or remove this one"
            )

    def summary(self) -> dict[str, Any] | None:
        """That of a finished audit."""
        path = self.folder / SUMMARY
        if not path.is_file():
            return None
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return summary

    def has(self, block: int) -> bool:
        return self._path(block, RECORDS).is_file()

    def write(self, block: int, records: Sequence[Mapping[str, Any]], tokens: pa.Table | None) -> None:
        """Write a block; its records last, since they say that it is done."""
        if tokens is not None:
            _write_table(self._path(block, TOKENS), [tokens])
        _write_table(self._path(block, RECORDS), [pa.Table.from_pylist(list(records), COLUMNS)])

    def join(self, blocks: int, kind: str) -> Path:
        """All blocks in order as one file, a row group each."""
        paths = [self._path(block, kind) for block in range(blocks)]
        _write_table(self.folder / kind, map(pq.read_table, paths))
        return self.folder / kind

    def finish(self, summary: Mapping[str, Any]) -> None:
        _write_json(self.folder / SUMMARY, summary)
        self.clean()

    def clean(self) -> None:
        """Remove what only an unfinished audit needs; the marker last, so that this too can be stopped."""
        for path in self._unfinished.iterdir():
            if path != self._marker:
                path.unlink()
        self._marker.unlink()
        self._unfinished.rmdir()

    def _path(self, block: int, kind: str) -> Path:
        return self._unfinished / f"{block:06d}.{kind}"


class Records:
    """Rows of a parquet file as dictionaries, read a row group at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with pq.ParquetFile(self._path) as file:
            for group in range(file.num_row_groups):
                yield from file.read_row_group(group).to_pylist()


def _write_json(path: Path, value: Any) -> None:
    def write(file: Path) -> None:
        file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    _whole_or_not_at_all(path, write)


def _write_table(path: Path, tables: Iterable[pa.Table]) -> None:
    """Write tables of one schema, a row group each."""

    def write(file: Path) -> None:
        writer = None
        try:
            for table in tables:
                writer = writer or pq.ParquetWriter(file, table.schema)
                writer.write_table(table, row_group_size=max(1, len(table)))
        finally:
            if writer is not None:
                writer.close()

    _whole_or_not_at_all(path, write)


def _whole_or_not_at_all(path: Path, write: Callable[[Path], None]) -> None:
    part = _part(path)
    try:
        write(part)
        with part.open("rb") as data:
            os.fsync(data.fileno())  # or a power cut could leave the name without the bytes
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC,
                f"the disk is full; what was audited so far is kept in {path.parent}: make room and repeat the command",
            ) from error
        raise


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")
