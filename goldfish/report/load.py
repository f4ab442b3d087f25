"""Reads an audit folder, summary.json and records, and refuses what it does not understand."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from goldfish.audit.columns import COLUMNS, SCHEMA, records
from goldfish.audit.results import Figure, figures
from goldfish.report.shape import SUMMARY, fields, of

SPLITS = {"members": "members", "heldout": "held-out"}  # as written in the files: as said on the page
_MAY_BE_NULL = {"document", "dropped"}


@dataclass(frozen=True)
class Window:
    """What the page needs of a record; `dropped`, `nll` and `rank` run along the suffix's tokens."""

    split: str
    index: int
    offset: int
    document: str | None
    prefix_text: str
    suffix_tokens: tuple[str, ...]
    output_tokens: tuple[str, ...]
    dropped: tuple[bool, ...] | None
    nll: tuple[float, ...]
    rank: tuple[int, ...]
    exact_match: bool
    first_divergence: int
    rouge_l_ids: float
    log_p: tuple[float, ...]


_COLUMNS = pa.schema([COLUMNS.field(name) for name in Window.__dataclass_fields__])


@dataclass(frozen=True)
class Audit:
    """One audited checkpoint: its summary, the figures in it by name, and its windows."""

    name: str
    folder: Path
    summary: Mapping[str, Any]
    figures: Mapping[str, Figure]
    windows: tuple[Window, ...]

    @property
    def splits(self) -> list[str]:
        """members, heldout or both, in this order."""
        return [split for split in SPLITS if split in self.summary["splits"]]

    def of_split(self, split: str) -> list[Window]:
        """The windows that the figures speak of: those at the first offset."""
        first = self.summary["protocol"]["offsets"][0]
        return [window for window in self.windows if window.split == split and window.offset == first]


def read_audits(folders: Sequence[str | Path]) -> list[Audit]:
    """Reads each folder; audits that share a name are numbered in the order given."""
    if isinstance(folders, (str, Path)):
        raise TypeError(f"audits must be a list of audit folders, got the single path {str(folders)!r}; write [path]")
    audits = [read_audit(Path(folder)) for folder in folders]
    if not audits:
        raise ValueError("audits is empty: a report needs at least one audit folder")
    names = [audit.name for audit in audits]
    return [
        replace(audit, name=f"{audit.name} ({names[:i].count(audit.name) + 1})")
        if names.count(audit.name) > 1
        else audit
        for i, audit in enumerate(audits)
    ]


def read_audit(folder: Path) -> Audit:
    """Reads one audit folder.

    Raises:
        FileNotFoundError: `folder` is not a folder, or lacks summary.json or records.
        ValueError: a file that cannot be read, has another schema, or contradicts itself or the other file.
    """
    summary_path, records_path = folder / "summary.json", folder / "records"
    for path in (summary_path, records_path):
        if not path.exists():
            raise FileNotFoundError(
                f"{folder} is no audit folder: it has no {path.name}; give the folder that `goldfish audit -o` wrote"
            )
    summary = _read_summary(summary_path)
    settings = len(summary["protocol"]["sampling"])
    audit = Audit(summary["name"], folder, summary, figures(summary), _read_windows(records_path, settings))
    for split in SPLITS:
        windows = audit.of_split(split)
        said = (0, 0)
        if split in summary["splits"]:
            said = (summary["splits"][split]["n"], summary["splits"][split]["exact_match"]["k"])
        if (found := (len(windows), sum(window.exact_match for window in windows))) != said:
            raise ValueError(
                f"{folder}: summary.json speaks of {said[0]} {split} windows, {said[1]} of them exact; records "
                f"holds {found[0]} and {found[1]}. They are of two runs, or one is cut short; audit again"
            )
    return audit


def _read_summary(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"it holds {constant}, which is no JSON number")

    try:
        summary = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path}: not readable as JSON ({error}); audit again") from error
    fields(schema=of(str))(summary, f"{path}: summary")
    if summary["schema"] != SCHEMA:
        raise ValueError(
            f"{path}: the schema is {summary['schema']!r:.80}, this version reads {SCHEMA!r}; "
            "audit again, or report with the version that audited"
        )
    SUMMARY(summary, f"{path}: summary")
    if not summary["protocol"]["offsets"]:
        raise ValueError(f"{path}: protocol.offsets is empty: an audit has at least one offset")
    return dict(summary)


def _read_windows(path: Path, settings: int) -> tuple[Window, ...]:
    try:
        rows = records(path.parent, _COLUMNS.names).cast(_COLUMNS).to_pylist()
    except pa.ArrowException as error:
        raise ValueError(f"{path}: not readable as records of an audit ({error}); audit again") from error
    return tuple(_window(row, settings, f"{path}, row {i}") for i, row in enumerate(rows))


def _window(row: dict[str, Any], settings: int, where: str) -> Window:
    for name, value in row.items():
        if (value is None and name not in _MAY_BE_NULL) or (isinstance(value, list) and None in value):
            raise ValueError(f"{where}: {name} holds a null")
        if isinstance(value, list):
            row[name] = tuple(value)
    window = Window(**row)
    length = len(window.suffix_tokens)
    if window.split not in SPLITS:
        raise ValueError(f"{where}: split must be one of {', '.join(SPLITS)}, got {window.split!r:.80}")
    for name, values in (("nll", window.nll), ("rank", window.rank), ("dropped", window.dropped)):
        if values is not None and len(values) != length:
            raise ValueError(f"{where}: {name} has {len(values)} entries for a suffix of {length} tokens")
    if len(window.log_p) != settings:
        raise ValueError(f"{where}: log_p has {len(window.log_p)} entries for {settings} sampling settings")
    if not 0 <= window.first_divergence <= length or window.exact_match != (window.first_divergence == length):
        raise ValueError(
            f"{where}: first_divergence {window.first_divergence} does not fit a suffix of {length} tokens "
            f"with exact_match {window.exact_match}"
        )
    if not 0 <= window.rouge_l_ids <= 1:
        raise ValueError(f"{where}: rouge_l_ids must lie between 0 and 1, got {window.rouge_l_ids}")
    if any(math.isnan(number) for number in (*window.nll, *window.log_p)):
        raise ValueError(f"{where}: nll or log_p holds NaN")
    return window
