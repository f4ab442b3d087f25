"""Reads an audit folder, summary.json and records.parquet, and refuses what it does not understand."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = "goldfish.audit/2"
SPLITS = {"members": "members", "heldout": "held-out"}  # as written in the files: as said on the page
_COLUMNS = pa.schema(
    [
        ("split", pa.string()),
        ("index", pa.int64()),
        ("document", pa.string()),
        ("prefix_text", pa.string()),
        ("suffix_tokens", pa.list_(pa.string())),
        ("output_tokens", pa.list_(pa.string())),
        ("dropped", pa.list_(pa.bool_())),
        ("nll", pa.list_(pa.float64())),
        ("exact_match", pa.bool_()),
        ("first_divergence", pa.int64()),
        ("rouge_l_ids", pa.float64()),
    ]
)
_MAY_BE_NULL = {"document", "dropped"}


@dataclass(frozen=True)
class Proportion:
    """k of n, with the bounds of its 95% interval where one was computed."""

    k: int
    n: int
    lower95: float | None = None
    upper95: float | None = None


@dataclass(frozen=True)
class Mean:
    """A mean over n things, with the bounds of its 95% interval where one was computed."""

    mean: float
    n: int
    lower95: float | None = None
    upper95: float | None = None


@dataclass(frozen=True)
class Split:
    """The figures of one split; `n` counts windows, `skipped` the rows too short to make one."""

    n: int
    skipped: int
    exact_match: Proportion
    teacher_forced_accuracy: Proportion
    teacher_forced_accuracy_dropped: Proportion | None
    teacher_forced_accuracy_kept: Proportion | None
    rouge_l_ids: Mean
    nll: Mean
    first_divergence_dropped: Proportion | None


@dataclass(frozen=True)
class Window:
    """One prefix, the true suffix and what the model wrote; `dropped` and `nll` run along the suffix's tokens."""

    split: str
    index: int
    document: str | None
    prefix_text: str
    suffix_tokens: tuple[str, ...]
    output_tokens: tuple[str, ...]
    dropped: tuple[bool, ...] | None
    nll: tuple[float, ...]
    exact_match: bool
    first_divergence: int
    rouge_l_ids: float


@dataclass(frozen=True)
class Audit:
    """One audited checkpoint."""

    name: str
    checkpoint: str
    rule: dict[str, Any] | None
    protocol: dict[str, Any]
    versions: dict[str, Any]
    splits: dict[str, Split]
    windows: tuple[Window, ...]

    def of_split(self, split: str) -> list[Window]:
        return [window for window in self.windows if window.split == split]


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
        FileNotFoundError: `folder` is not a folder, or lacks summary.json or records.parquet.
        ValueError: a file that cannot be read, has another schema, or contradicts itself or the other file.
    """
    summary_path, records_path = folder / "summary.json", folder / "records.parquet"
    for path in (summary_path, records_path):
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} is no audit folder: it has no {path.name}; give the folder that `goldfish audit -o` wrote"
            )
    summary = _Fields(_read_json(summary_path), str(summary_path))
    if (schema := summary.get("schema", str)) != SCHEMA:
        raise ValueError(
            f"{summary_path}: the schema is {schema!r}, this version reads {SCHEMA!r}; "
            "audit again, or report with the version that audited"
        )
    splits = summary.get("splits", dict)
    if not splits or not splits.keys() <= SPLITS.keys():
        raise ValueError(f"{summary_path}: splits must hold members, heldout or both, got {sorted(splits)}")
    audit = Audit(
        name=summary.get("name", str),
        checkpoint=summary.get("checkpoint", str),
        rule=summary.get("rule", (dict, type(None))),
        protocol=summary.get("protocol", dict),
        versions=summary.get("versions", dict),
        splits={key: _split(summary.inside("splits").inside(key)) for key in SPLITS if key in splits},
        windows=_read_windows(records_path),
    )
    for key in SPLITS:
        windows = audit.of_split(key)
        said = (audit.splits[key].n, audit.splits[key].exact_match.k) if key in audit.splits else (0, 0)
        if (found := (len(windows), sum(window.exact_match for window in windows))) != said:
            raise ValueError(
                f"{folder}: summary.json speaks of {said[0]} {key} windows, {said[1]} of them exact; records.parquet "
                f"holds {found[0]} and {found[1]}. They are of two runs, or one is cut short; audit again"
            )
    return audit


@dataclass(frozen=True)
class _Fields:
    """A JSON object that says where it stands when a field is missing or of the wrong type."""

    values: dict[str, Any]
    where: str

    def get(self, key: str, kind: Any) -> Any:
        if key not in self.values:
            raise ValueError(
                f"{self.where}: {key!r} is missing; it has {', '.join(map(repr, self.values)) or 'nothing'}"
            )
        value = self.values[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            expected = " or ".join("null" if one is type(None) else one.__name__ for one in kinds)
            raise ValueError(f"{self.where}: {key!r} must be {expected}, got {value!r:.80}")
        return value

    def number(self, key: str) -> float:
        value = self.get(key, (int, float))
        if not abs(value) < 1e300:  # 1e999 is valid JSON, and infinite
            raise ValueError(f"{self.where}: {key!r} must be a finite number, got {value!r:.80}")
        return float(value)

    def inside(self, key: str) -> "_Fields":
        return _Fields(self.get(key, dict), f"{self.where}: {key}")


def _read_json(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"it holds {constant}, which is no JSON number")

    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path}: not readable as JSON ({error}); audit again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _split(fields: _Fields) -> Split:
    def proportion(key: str, null: bool = False) -> Any:
        if null and fields.get(key, (dict, type(None))) is None:
            return None
        inner = fields.inside(key)
        k, n = inner.get("k", int), inner.get("n", int)
        if not 0 <= k <= n:
            raise ValueError(f"{inner.where}: expected 0 <= k <= n, got k={k}, n={n}")
        return Proportion(k, n, **_bounds(inner))

    def mean(key: str) -> Mean:
        inner = fields.inside(key)
        return Mean(inner.number("mean"), inner.get("n", int), **_bounds(inner, math.inf))

    return Split(
        n=fields.get("n", int),
        skipped=fields.get("skipped", int),
        exact_match=proportion("exact_match"),
        teacher_forced_accuracy=proportion("teacher_forced_accuracy"),
        teacher_forced_accuracy_dropped=proportion("teacher_forced_accuracy_dropped", null=True),
        teacher_forced_accuracy_kept=proportion("teacher_forced_accuracy_kept", null=True),
        rouge_l_ids=mean("rouge_l_ids"),
        nll=mean("nll"),
        first_divergence_dropped=proportion("first_divergence_dropped", null=True),
    )


def _bounds(fields: _Fields, most: float = 1) -> dict[str, float]:
    if fields.values.get("lower95") is None or fields.values.get("upper95") is None:
        return {}
    lower, upper = fields.number("lower95"), fields.number("upper95")
    if not 0 <= lower <= upper <= most:
        raise ValueError(f"{fields.where}: expected 0 <= lower95 <= upper95 <= {most:g}, got {lower} and {upper}")
    return {"lower95": lower, "upper95": upper}


def _read_windows(path: Path) -> tuple[Window, ...]:
    try:
        names = pq.read_schema(path).names
        if missing := [name for name in _COLUMNS.names if name not in names]:
            raise ValueError(f"it lacks the columns {', '.join(missing)}")
        rows = pq.read_table(path, columns=_COLUMNS.names).select(_COLUMNS.names).cast(_COLUMNS).to_pylist()
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"{path}: not readable as records of an audit ({error}); audit again") from error
    return tuple(_window(row, f"{path}, row {i}") for i, row in enumerate(rows))


def _window(row: dict[str, Any], where: str) -> Window:
    for name, value in row.items():
        if (value is None and name not in _MAY_BE_NULL) or (isinstance(value, list) and None in value):
            raise ValueError(f"{where}: {name} holds a null")
        if isinstance(value, list):
            row[name] = tuple(value)
    window = Window(**row)
    length = len(window.suffix_tokens)
    if window.split not in SPLITS:
        raise ValueError(f"{where}: split must be one of {', '.join(SPLITS)}, got {window.split!r:.80}")
    for name, values in (("nll", window.nll), ("dropped", window.dropped)):
        if values is not None and len(values) != length:
            raise ValueError(f"{where}: {name} has {len(values)} entries for a suffix of {length} tokens")
    if not 0 <= window.first_divergence <= length or window.exact_match != (window.first_divergence == length):
        raise ValueError(
            f"{where}: first_divergence {window.first_divergence} does not fit a suffix of {length} tokens "
            f"with exact_match {window.exact_match}"
        )
    if not 0 <= window.rouge_l_ids <= 1:
        raise ValueError(f"{where}: rouge_l_ids must lie between 0 and 1, got {window.rouge_l_ids}")
    if any(math.isnan(nll) for nll in window.nll):
        raise ValueError(f"{where}: nll holds NaN")
    return window
