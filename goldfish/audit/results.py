"""A finished audit as Python values: every figure under its name, the records as a table.

audit = goldfish.audit.read("audit/goldfish")
audit["em"].upper95, audit.outcome, audit.to_pandas(), audit.records()
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from goldfish.audit.columns import SCHEMA, records

ALIASES = {"em": "members.exact_match", "heldout.em": "heldout.exact_match"}
LISTS = {  # a list's entries are named by these keys: prefix_sweep@25
    "prefix_sweep": ("prefix_length", "exact_match"),
    "offset_sweep": ("offset", "exact_match"),
    "strata": ("count_from", "exact_match"),
    "beam_search": ("beams", "exact_match"),
    "expected": ("n", "share"),
}
NO_RULE = "no rule is known for this checkpoint"
ONE_SPLIT = "membership needs members and held-out texts"


@dataclass(frozen=True)
class Figure:
    """One estimate of a summary; docs/audit.md, "Estimates"."""

    name: str
    value: float | None
    lower95: float | None = None
    upper95: float | None = None
    k: int | None = None
    n: int = 0
    documents: int = 0
    reason: str | None = None


@dataclass(frozen=True)
class Audit:
    """What an audit folder says. `audit["members.rouge_l_text"]` is a Figure; `summary` is the whole summary.json."""

    folder: Path
    summary: dict[str, Any] = field(repr=False)
    figures: dict[str, Figure] = field(repr=False)

    @property
    def name(self) -> str:
        return str(self.summary["name"])

    @property
    def outcome(self) -> str:
        """PASS, FAIL or INCONCLUSIVE."""
        return str(self.summary["verdict"]["outcome"])

    def __getitem__(self, name: str) -> Figure:
        return find(self.figures, name)

    def to_pandas(self) -> Any:
        """All figures as a DataFrame, one row each. Needs pandas."""
        import pandas

        return pandas.DataFrame([asdict(figure) for figure in self.figures.values()]).set_index("name")

    def records(self, columns: Sequence[str] | None = None) -> Any:
        """The records, or some of their columns, as a DataFrame, one row a window. Needs pandas."""
        return records(self.folder, columns).to_pandas()


def read(folder: str | Path) -> Audit:
    """A finished audit.

    Raises:
        FileNotFoundError: a folder without summary.json. ValueError: one of another schema, or not readable.
    """
    path = Path(folder) / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is no finished audit: it has no summary.json; run goldfish audit -o {folder}"
        )
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); audit again") from error
    schema = summary.get("schema") if isinstance(summary, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path}: the schema is {schema!r}, this version reads {SCHEMA!r}; audit again")
    return Audit(Path(folder), summary, figures(summary))


def figures(summary: Mapping[str, Any]) -> dict[str, Figure]:
    """Every estimate of a summary by its name (docs/audit.md, "Names of figures")."""
    found = []
    for split, values in summary["splits"].items():
        found += [_figure(f"{split}.{name}", estimate) for name, estimate in _estimates(values)]
        if values["attribution"] is None:
            nameless = ("attribution.hazard_ratio", "teacher_forced_accuracy_dropped", "teacher_forced_accuracy_kept")
            found += [Figure(f"{split}.{name}", None, reason=NO_RULE) for name in nameless]
    found += _membership(summary["membership"])
    return {figure.name: figure for figure in found}


def find(known: Mapping[str, Figure], name: str) -> Figure:
    """The figure of a name, of an alias, or of a name of the members' without "members.".

    Raises:
        KeyError: with the names that look like it.
    """
    for candidate in (ALIASES.get(name, name), f"members.{name}"):
        if candidate in known:
            return known[candidate]
    near = difflib.get_close_matches(name, [*known, *ALIASES], 5, 0.4)
    raise KeyError(f"this audit has no figure {name!r}; it has {', '.join(near or list(known)[:5])}, ...")


def _figure(name: str, estimate: Mapping[str, Any]) -> Figure:
    point = next(estimate[key] for key in ("rate", "mean", "value") if key in estimate)
    others = {key: estimate.get(key) for key in ("lower95", "upper95", "k", "reason")}
    return Figure(name, point, n=estimate["n"], documents=estimate["documents"], **others)


def _estimates(values: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and "lower95" in value:
            yield key, value
        elif key == "sampling":
            for i, setting in enumerate(value):
                suffix = f",{setting['name']}" if i else ""
                for each in setting["extractable"]:
                    yield f"extractable@{each['n']},{each['p']:g}{suffix}", each["windows"]
                for each in setting["expected"]:
                    yield f"expected@{each['n']}{suffix}", each["share"]
                yield f"impossible{suffix and '@' + suffix[1:]}", setting["impossible"]
        elif key in LISTS:
            at, inner = LISTS[key]
            yield from ((f"{key}@{each[at]}", each[inner]) for each in value or ())
        elif key == "attribution" and value:
            yield from ((f"{key}.{name}", estimate) for name, estimate in _estimates(value))


def _membership(membership: Mapping[str, Any] | None) -> Iterator[Figure]:
    if membership is None or membership["headline"] is None:
        reason = membership["reason"] if membership else ONE_SPLIT
        yield from (Figure(f"mia.{name}", None, reason=reason) for name in ("auc", "tpr@1%", "tpr@0.1%"))
    else:
        yield from _attack("mia", membership["headline"])
    if membership:
        for name, attack in membership["attacks"].items():
            yield from _attack(f"mia.{name}", attack)
        for name, attack in membership["blind"].items():
            yield from _attack(f"mia.blind.{name}", attack)


def _attack(name: str, attack: Mapping[str, Any]) -> Iterator[Figure]:
    yield _figure(f"{name}.auc", attack["auc"])
    yield from (_figure(f"{name}.tpr@{100 * each['fpr']:g}%", each["tpr"]) for each in attack["tpr"])
