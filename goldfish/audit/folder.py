"""The folder of an audit: what is there whole, what continues it, who is using it."""

import errno
import json
import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from goldfish.audit.records import COLUMNS, RECORDS, RUN, dumps, read_run

try:
    import fcntl
except ImportError:  # Windows: there, two audits in one folder are not noticed
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)
SUMMARY, LOCK, PART = "summary.json", "lock", ".part"


class Folder:
    """The folder of an audit: run.json, one parquet file a block in records/, at last summary.json.

    run.json says what is being run, so that a run continues only with its own blocks. A file is
    there whole or not at all, and a summary.json means a finished audit.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def require_usable(self) -> None:
        """FileExistsError unless the folder is new, empty, or holds an audit."""
        if not self.path.exists() or (self.path / RUN).is_file():
            return
        if not self.path.is_dir() or any(
            path.name not in (LOCK, RUN + PART) for path in self.path.iterdir()
        ):
            raise FileExistsError(
                f"{self.path} exists and is not an empty folder; choose another output folder or "
                "remove it"
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other audits out of the folder; the lock of a killed process does not count.

        Raises:
            FileExistsError: another audit holds it; says which.
        """
        self.require_usable()
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / LOCK
        with path.open("a+", encoding="utf-8") as lock:
            try:
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.seek(0)
                raise FileExistsError(
                    f"{self.path} is in use by another audit ({lock.read().strip()}); wait until "
                    "it has ended, or "
                    "choose another output folder"
                ) from None
            lock.truncate(0)
            print(f"process {os.getpid()} on {platform.node()}", file=lock, flush=True)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def open(self, run: Mapping[str, Any]) -> None:
        """Begin this run, or continue it.

        Raises:
            FileExistsError: the folder holds something else: another run, finished or not.
        """
        if not (self.path / RUN).is_file():
            write_text(self.path / RUN, dumps(run))
        before, now = _settings(read_run(self.path)), _settings(json.loads(dumps(run)))
        if before != now:
            differences = [
                f"{key} ({before.get(key)!r:.80} there, {now.get(key)!r:.80} now)"
                for key in dict.fromkeys([*before, *now])
                if before.get(key) != now.get(key)
            ]
            raise FileExistsError(
                f"{self.path} holds an audit with other settings: {'; '.join(differences)}. "
                "Repeat that audit to "
                "finish it, choose another output folder, or remove this one"
            )

    def is_finished(self) -> bool:
        """Whether there is a summary of records that are all there."""
        if not (self.path / SUMMARY).is_file():
            return False
        expected = sum(
            each["windows"] for each in read_run(self.path)["inputs"].values()
        )
        files = (self.path / RECORDS).glob("*.parquet")
        try:
            return bool(
                sum(pq.read_metadata(file).num_rows for file in files) == expected
            )
        except (OSError, pa.ArrowInvalid):
            return False

    def has(self, block: int, windows: int) -> bool:
        """Whether a block is there, whole and readable; a damaged one is to be made again."""
        file = self._file(block)
        if not file.is_file():
            return False
        try:
            table = pq.read_table(file, partitioning=None)
            whole = len(table) == windows and table.schema.equals(COLUMNS)
        except (OSError, pa.ArrowException):
            whole = False
        if not whole:
            _log.warning("%s is damaged; its windows are scored again.", file)
        return whole

    def write(self, block: int, records: Sequence[Mapping[str, Any]]) -> None:
        table = pa.Table.from_pylist(list(records), COLUMNS)
        (self.path / RECORDS).mkdir(exist_ok=True)
        _whole_or_not_at_all(
            self._file(block), lambda part: pq.write_table(table, part)
        )

    def _file(self, block: int) -> Path:
        return self.path / RECORDS / f"{block:06d}.parquet"


def _settings(run: Mapping[str, Any]) -> dict[str, Any]:
    """What a run must share with the one that it continues, one level deep for messages; counts
    follow from it.
    """
    flat = {**run, **run["protocol"]}
    derived = ("vocabulary", "output_length", "overlap", "sanity", "notes")
    for key in ("date", "command", "protocol", *derived):
        flat.pop(key, None)
    inputs = {
        split: [each["path"], each["sha256"]] for split, each in run["inputs"].items()
    }
    return {**flat, "inputs": inputs}


def write_text(path: Path, text: str) -> None:
    """Whole or not at all; OSError where the disk is full."""
    _whole_or_not_at_all(path, lambda part: part.write_text(text, encoding="utf-8"))


def _whole_or_not_at_all(path: Path, write: Callable[[Path], Any]) -> None:
    part = path.with_name(path.name + PART)
    try:
        write(part)
        with part.open("rb") as data:
            os.fsync(
                data.fileno()
            )  # or a power cut could leave the name without the bytes
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno == errno.ENOSPC:
            message = (
                f"the disk is full; the blocks in {path.parent} are kept: make room and repeat "
                "the command"
            )
            raise OSError(errno.ENOSPC, message) from error
        raise
