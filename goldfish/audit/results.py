"""The folder of an audit: how a run is stored and continued, and what a finished one says."""

import difflib
import errno
import json
import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from goldfish.audit.intervals import Figure, Figures
from goldfish.audit.questions import ask
from goldfish.audit.questions.ask import ASKED, ELSEWHERE
from goldfish.audit.records import (
    COLUMNS,
    RECORDS,
    RUN,
    SCHEMA,
    dumps,
    read_json,
    read_records,
    read_run,
)
from goldfish.audit.verdict import parse_limits, verdict
from goldfish.text.printable import plain

try:
    import fcntl
except ImportError:  # Windows: there, two audits in one folder are not noticed
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import pandas as pd


_log = logging.getLogger(__name__)
SUMMARY = "summary.json"
LOCK = "lock"
PART = ".part"
SHOWN = 5  # differences to another audit that are named
# The tables of an audit that are written in blocks, each in a folder of its own.
SCHEMAS = {RECORDS: COLUMNS, ASKED: ask.COLUMNS}


@dataclass(frozen=True)
class Audit:
    """A finished audit.

    `audit["members.exact_match"]` is a Figure, `audit.figures` the whole table, `audit.records`
    what was asked and answered.

    Attributes:
        folder: of the audit. run: run.json, what was asked. rows: the figures as Python objects.
        verdict: see docs/audit-files.md. limits, require: what it was judged by. examples: by split
        and figure, names of documents that count.
    """

    folder: Path
    run: dict[str, Any] = field(repr=False)
    rows: Figures = field(repr=False)
    verdict: dict[str, Any] = field(repr=False)
    limits: dict[str, float] = field(repr=False)
    require: list[str] = field(repr=False)
    examples: dict[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        return str(self.run["name"])

    @property
    def outcome(self) -> str:
        """PASS, FAIL or INCONCLUSIVE."""
        return str(self.verdict["outcome"])

    @property
    def splits(self) -> list[str]:
        """members, heldout or both, in this order."""
        return [
            split for split in ("members", "heldout") if split in self.run["inputs"]
        ]

    @property
    def counted(self) -> set[str]:
        """The figures that the audit has for its members."""
        return {each.figure for each in self.rows if each.split == "members"}

    @cached_property
    def figures(self) -> "pd.DataFrame":
        """The table of figures: docs/audit-files.md has its columns and every figure."""
        import pandas as pd

        return pd.DataFrame([asdict(each) for each in self.rows])

    @cached_property
    def records(self) -> "pd.DataFrame":
        """One row for each question that the model was asked, with its answer."""
        return read_records(self.folder).to_pandas()

    def __getitem__(self, name: str) -> Figure:
        """A figure that is a single number, by its name: "members.exact_match".

        Raises:
            KeyError: no such figure, or a curve, whose rows are in `figures`.
        """
        return self._singles[self._known(name)]

    @cached_property
    def _singles(self) -> dict[str, Figure]:
        """The figures without x, by name. Those of one setting alone need not name it."""
        singles: dict[str, Figure] = {}
        # The first setting comes first, so the short name is its.
        for each in self.rows:
            if each.x is None:
                singles.setdefault(f"{each.split}.{each.figure}", each)
                if each.setting:
                    singles[f"{each.split}.{each.figure}.{each.setting}"] = each
        return singles

    def _known(self, name: str) -> str:
        if name in self._singles:
            return name
        # A cutoff of .4 finds "members.em" too, which the default of .6 does not.
        near = difflib.get_close_matches(name, self._singles, 5, 0.4)
        some = ", ".join(near or list(self._singles)[:5])
        raise KeyError(
            f"this audit has no figure {name!r} that is a single number; it has {some}, ...; "
            "curves are in `figures`"
        )

    def to_json(self) -> dict[str, Any]:
        """summary.json."""
        return {
            "schema": SCHEMA,
            "limits": self.limits,
            "require": self.require,
            "verdict": self.verdict,
            "examples": self.examples,
            "figures": [asdict(each) for each in self.rows],
        }

    def _repr_html_(self) -> str:
        """For notebooks: the verdict and the figures that are single numbers."""
        sentence = _safe(self.verdict["sentence"])
        lines = [f"<p><b>{_safe(self.name)}</b>: {sentence}</p>", "<table>"]
        for name, figure in self._singles.items():
            cells = f"<td>{_safe(name)}</td><td>{_safe(str(figure))}</td>"
            lines.append(f"<tr>{cells}</tr>")
        return "\n".join([*lines, "</table>"])


def _safe(text: str) -> str:
    # Settings are the user's, names of texts are anybody's.
    return escape(plain(text, 1000))


def read(folder: str | Path) -> Audit:
    """Read a finished audit.

    >>> audit = read("audit")  # doctest: +SKIP
    >>> audit["members.exact_match"].high < 0.01  # doctest: +SKIP
    True

    Raises:
        FileNotFoundError: a folder without summary.json. ValueError: one of another schema, or not
            readable.
    """
    path = Path(folder) / SUMMARY
    missing = (
        f"{folder} is not a finished audit: it has no {SUMMARY}; "
        f"run goldfish audit -o {folder}"
    )
    summary = read_json(path, missing)
    try:
        rows = Figures(Figure(**row) for row in summary["figures"])
        stored = [summary[key] for key in ("verdict", "limits", "require", "examples")]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); audit again") from error
    return Audit(Path(folder), read_run(folder), rows, *stored)


def judge(
    folder: str | Path,
    limits: Sequence[str] = (),
    require: Sequence[str] = (),
) -> Audit:
    """A finished audit under other limits; nothing is computed again, and nothing written."""
    # The figures are those of the summary: limits change what they are held against.
    audit = read(folder)
    parsed = parse_limits(limits)
    judged = verdict(audit.run, audit.rows, parsed, require)
    return replace(audit, verdict=judged, limits=parsed, require=list(require))


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
        if self.path.is_dir():
            # A run that was killed at once left no more than these.
            names = {path.name for path in self.path.iterdir()}
            if names <= {LOCK, RUN + PART}:
                return
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
        # "a+" leaves what is in the file: it says who is using the folder.
        with path.open("a+", encoding="utf-8") as lock:
            try:
                # The system lets go of it when the process ends, however that happens.
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.seek(0)
                user = lock.read().strip()
                raise FileExistsError(
                    f"{self.path} is in use by another audit ({user}); wait until it has ended, "
                    "or choose another output folder"
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
        before = _settings(read_run(self.path))
        now = _settings(json.loads(dumps(run)))  # tuples are lists in JSON
        differences = []
        for key in dict.fromkeys([*before, *now]):
            old = before.get(key)
            new = now.get(key)
            if old != new:
                differences.append(f"{key} ({old!r:.80} there, {new!r:.80} now)")
        if differences:
            more = "; ..." if len(differences) > SHOWN else ""
            shown = "; ".join(differences[:SHOWN]) + more
            raise FileExistsError(
                f"{self.path} holds an audit with other settings: {shown}. Repeat that audit to "
                "finish it, choose another output folder, or remove this one"
            )

    def is_finished(self) -> bool:
        """Whether there is a summary of records and answers that are all there."""
        if not (self.path / SUMMARY).is_file():
            return False
        run = read_run(self.path)
        expected = sum(each["windows"] for each in run["inputs"].values())
        try:
            found = self._rows(RECORDS)
            if run["protocol"]["ask"]:
                # It was made of all answers, and has a row for each.
                expected += pq.read_metadata(self.path / ELSEWHERE).num_rows
                found += self._rows(ASKED)
        except (OSError, pa.ArrowInvalid):  # damaged: the blocks are looked through
            return False
        return bool(found == expected)

    def _rows(self, folder: str) -> int:
        """Of all blocks in records/ or asked/."""
        rows = 0
        for file in (self.path / folder).glob("*.parquet"):
            metadata = pq.read_metadata(file)
            rows += int(metadata.num_rows)
        return rows

    def has(self, kind: str, number: int, rows: int | None = None) -> bool:
        """Whether a block is there, whole and readable; a damaged one is to be made again.

        kind: RECORDS or ASKED. rows: how many the block must have, if that is known.
        """
        file = self._file(kind, number)
        if not file.is_file():
            return False
        try:
            table = pq.read_table(file, partitioning=None)
            whole = table.schema.equals(SCHEMAS[kind]) and rows in (None, len(table))
        except (OSError, pa.ArrowException):
            whole = False
        if not whole:
            _log.warning("%s is damaged; it is made again.", file)
        return bool(whole)

    def write(
        self,
        kind: str,
        number: int,
        rows: Sequence[Mapping[str, Any]],
    ) -> None:
        """Write a block, the `number`-th of its kind."""
        table = pa.Table.from_pylist(list(rows), SCHEMAS[kind])
        write_table(self._file(kind, number), table)

    def _file(self, kind: str, number: int) -> Path:
        return self.path / kind / f"{number:06d}.parquet"


def _settings(run: Mapping[str, Any]) -> dict[str, Any]:
    """What a run must share with the one that it continues; one level deep, for the message."""
    flat = {**run, **run["protocol"]}
    # What follows from the rest is not known yet when a finished audit is asked for again.
    derived = ("vocabulary", "output_length", "overlap", "sanity", "notes")
    nested = ("protocol", "inputs", "weights")
    for key in ("date", "command", "unasked_secrets", *derived, *nested):
        flat.pop(key, None)
    # Each input and each file of the weights by itself, so that the message can name it.
    for split, about in run["inputs"].items():
        flat[split] = about["path"]
        flat[f"SHA-256 of {split}"] = about["sha256"]
    for which, files in zip(("weights", "control"), run["weights"], strict=False):
        for name, sha256 in files.items():
            flat[f"{which} {name}"] = sha256
    return flat


def write_text(path: Path, text: str) -> None:
    """Whole or not at all; OSError where the disk is full."""
    _whole_or_not_at_all(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_table(path: Path, table: pa.Table) -> None:
    """The same for a parquet file; its folder is made."""
    path.parent.mkdir(exist_ok=True)
    _whole_or_not_at_all(path, lambda part: pq.write_table(table, part))


def _whole_or_not_at_all(path: Path, write: Callable[[Path], Any]) -> None:
    part = path.with_name(path.name + PART)
    try:
        write(part)
        # Or a power cut could leave the name without the bytes.
        with part.open("rb") as data:
            os.fsync(data.fileno())
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
