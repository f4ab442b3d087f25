"""A finished audit as Python values: the table of figures, the records, the verdict."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from goldfish.audit.figures import make_figures
from goldfish.audit.intervals import Figure, Figures
from goldfish.audit.records import SCHEMA, read_json, read_records, read_run
from goldfish.audit.verdict import parse_limits, verdict
from goldfish.text.printable import plain

if TYPE_CHECKING:
    import pandas as pd

SUMMARY = "summary.json"
SHORT = ("split", "figure", "setting", "x")  # what names a figure


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
        for each in self.rows:
            if each.x is None:
                singles.setdefault(f"{each.split}.{each.figure}", each)
                if each.setting:
                    singles[f"{each.split}.{each.figure}.{each.setting}"] = each
        return singles

    def _known(self, name: str) -> str:
        if name in self._singles:
            return name
        near = difflib.get_close_matches(name, self._singles, 5, 0.4)
        raise KeyError(
            f"this audit has no figure {name!r} that is a single number; it has "
            f"{', '.join(near or list(self._singles)[:5])}, ...; curves are in `figures`"
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
        lines = [
            f"<p><b>{_safe(self.name)}</b>: {_safe(self.verdict['sentence'])}</p><table>"
        ]
        for name, figure in self._singles.items():
            lines.append(
                f"<tr><td>{_safe(name)}</td><td>{_safe(str(figure))}</td></tr>"
            )
        return "\n".join([*lines, "</table>"])


def _safe(text: str) -> str:
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
    missing = f"{folder} is not a finished audit: it has no {SUMMARY}; run goldfish audit -o {folder}"
    summary = read_json(path, missing)
    try:
        rows = Figures(Figure(**row) for row in summary["figures"])
        stored = [summary[key] for key in ("verdict", "limits", "require", "examples")]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); audit again") from error
    return Audit(Path(folder), read_run(folder), rows, *stored)


def summarize(
    folder: str | Path, limits: Sequence[str] = (), require: Sequence[str] = ()
) -> Audit:
    """An audit from its run.json and records; errors as of `read_records`."""
    return summary_of(
        read_run(folder), read_records(folder), limits, require, Path(folder)
    )


def summary_of(
    run: Mapping[str, Any],
    table: pa.Table,
    limits: Sequence[str] = (),
    require: Sequence[str] = (),
    folder: Path = Path(),
) -> Audit:
    """The same, from their content."""
    rows, examples = make_figures(run, table)
    parsed = parse_limits(limits)
    figures = Figures(rows)
    judged = verdict(run, figures, parsed, require)
    return Audit(folder, dict(run), figures, judged, parsed, list(require), examples)


def judge(
    folder: str | Path, limits: Sequence[str] = (), require: Sequence[str] = ()
) -> Audit:
    """A finished audit under other limits; nothing is computed again, and nothing written."""
    audit = read(folder)
    parsed = parse_limits(limits)
    judged = verdict(audit.run, audit.rows, parsed, require)
    return Audit(
        audit.folder,
        audit.run,
        audit.rows,
        judged,
        parsed,
        list(require),
        audit.examples,
    )
