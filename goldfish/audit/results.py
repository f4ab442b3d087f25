"""A finished audit as Python values: every estimate by its name, and conditions on them for CI.

A condition such as `em.upper95 > 0.01` says when an audit fails. Exit codes: 0 no condition holds, 1 one holds,
2 an error, 3 one cannot be decided (and none holds).
"""

import difflib
import math
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from goldfish.audit.estimate import Estimate, clopper_pearson, read_json
from goldfish.audit.membership import FIGURES

ALIASES = {"em": "members.exact_match", "heldout.em": "heldout.exact_match"}
NO_RULE = "no rule is known for this checkpoint"
OF_RULES = (
    "teacher_forced_accuracy_dropped",
    "teacher_forced_accuracy_kept",
    *(
        f"attribution.{name}"
        for name in ("dropped_share", "hazard_ratio", "hazard_dropped", "hazard_kept")
    ),
)
ONE_SPLIT = "membership needs members and held-out texts"
OPERATORS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
FIELDS = ("lower95", "upper95", "k", "n", "documents", "value")
NO_SHARES = ("nll", "longest_run", "first_divergence", "attribution")  # of the figures of a split


@dataclass(frozen=True)
class Audit:
    """A finished audit. `audit["members.rouge_l_text"]` is an Estimate; `summary` is summary.json with Estimates."""

    folder: Path
    summary: dict[str, Any] = field(repr=False)
    estimates: dict[str, Estimate] = field(repr=False)

    @property
    def name(self) -> str:
        return str(self.summary["name"])

    @property
    def outcome(self) -> str:
        """PASS, FAIL or INCONCLUSIVE."""
        return str(self.summary["verdict"]["outcome"])

    def __getitem__(self, name: str) -> Estimate:
        return self.estimates[find(self.estimates, name)]


def read(folder: str | Path) -> Audit:
    """Read a finished audit.

    Raises:
        FileNotFoundError: a folder without summary.json. ValueError: one of another schema, or not readable.
    """
    path = Path(folder) / "summary.json"
    missing = (
        f"{folder} is not a finished audit: it has no summary.json; run goldfish audit -o {folder}"
    )
    summary = read_json(path, missing)
    return Audit(Path(folder), summary, estimates(summary))


def estimates(summary: Mapping[str, Any]) -> dict[str, Estimate]:
    """Every estimate of a summary by its name (docs/audit-files.md, "Names of figures")."""
    membership: Mapping[str, Any] = summary["membership"] or {"headline": None, "reason": ONE_SPLIT}
    headline = membership["headline"] or dict.fromkeys(
        FIGURES, Estimate(None, reason=membership["reason"])
    )
    attacks = {**membership.get("attacks", {}), "blind": membership.get("blind", {})}
    named = dict(_named({"mia": {**headline, **attacks}, **summary["splits"]}))
    for split, values in summary["splits"].items():
        if values["attribution"] is None:
            named |= {f"{split}.{name}": Estimate(None, reason=NO_RULE) for name in OF_RULES}
    return named


def _named(values: Mapping[str, Any]) -> Iterator[tuple[str, Estimate]]:
    """The estimates by their paths."""
    for key, value in values.items():
        if isinstance(value, Estimate):
            yield key, value
        elif isinstance(value, Mapping):
            yield from ((f"{key}.{name}", estimate) for name, estimate in _named(value))


def find(known: Mapping[str, Any], name: str) -> str:
    """The full name of a figure, given by that name, by an alias, or without "members.".

    Raises:
        KeyError: an unknown name, with the names that look like it.
    """
    for candidate in (ALIASES.get(name, name), f"members.{name}"):
        if candidate in known:
            return candidate
    names = [*known, *(alias for alias, full in ALIASES.items() if full in known)]
    near = difflib.get_close_matches(name, names, 5, 0.4)
    raise KeyError(
        f"this audit has no figure {name!r}; it has {', '.join(near or list(known)[:5])}, ..."
    )


@dataclass(frozen=True)
class Condition:
    """`figure.field operator threshold`; an audit in which it holds fails."""

    text: str
    figure: str
    field: str
    operator: str
    threshold: float


def parse(text: str) -> Condition:
    """A condition such as "em.upper95 > 0.01" or "mia.tpr@1%.lower95 > 5%".

    Raises:
        ValueError: anything else; names are not looked up yet.
    """
    match = re.fullmatch(
        r"\s*([^\s<>=]\S*?)\s*(>=|<=|>|<)\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)(%?)\s*", text
    )
    try:
        threshold = float(match[3]) / (100 if match[4] else 1) if match else math.nan
    except ValueError:
        threshold = math.nan
    if match is None or not math.isfinite(threshold):
        raise ValueError(
            f'--fail-on takes a figure, one of > >= < <= and a number, such as "em.upper95 > 0.01"; got {text!r}'
        )
    name, _, last = match[1].rpartition(".")
    figure, of_figure = (name, last) if name and last in FIELDS else (match[1], "value")
    return Condition(text.strip(), figure, of_figure, match[2], threshold)


def judge(known: Mapping[str, Estimate], conditions: Sequence[Condition]) -> list[dict[str, str]]:
    """`conditions` of summary.json; ValueError for a figure that this audit does not have."""
    outcomes = [(condition.text, *_check(condition, known)) for condition in conditions]
    return [dict(zip(("condition", "outcome", "why"), each, strict=True)) for each in outcomes]


def exit_code(checks: Sequence[Mapping[str, str]]) -> int:
    """1 where a condition is violated, else 3 where one is inconclusive, else 0."""
    outcomes = [check["outcome"] for check in checks]
    return 1 if "violated" in outcomes else 3 if "inconclusive" in outcomes else 0


def _check(condition: Condition, known: Mapping[str, Estimate]) -> tuple[str, str]:
    try:
        name = find(known, condition.figure)
    except KeyError as error:
        raise ValueError(f"--fail-on {condition.text!r}: {error.args[0]}") from error
    estimate = known[name]
    number = getattr(estimate, condition.field)
    if number is None:
        return (
            "inconclusive",
            f"{name}: not estimable ({estimate.reason or f'it has no {condition.field}'})",
        )
    why = f"{name}.{condition.field} is {number:.4g}"
    if estimate.k is not None:
        why += f" ({estimate.point()})"
    if not OPERATORS[condition.operator](number, condition.threshold):
        return "passed", why
    if _any_result_would_violate(condition, name, estimate):
        return "inconclusive", f"{why}, and {estimate.documents} documents cannot bound it closer"
    return "violated", why


def _any_result_would_violate(condition: Condition, name: str, estimate: Estimate) -> bool:
    """Whether the upper bound of a share is above the threshold, would be so if every document had 0, and the lower
    bound is not: too few documents to decide. The same for lower bounds from below."""
    split, kind = name.split(".")[:2]
    if split == "mia" or kind in NO_SHARES or estimate.lower95 is None or estimate.upper95 is None:
        return False
    n, violates = estimate.documents, OPERATORS[condition.operator]
    ends = {
        ("upper95", ">"): (estimate.lower95, clopper_pearson(0, n)[1]),
        ("lower95", "<"): (estimate.upper95, clopper_pearson(n, n)[0]),
    }
    other, best = ends.get(
        (condition.field, condition.operator[0]), (condition.threshold, condition.threshold)
    )
    return bool(violates(best, condition.threshold)) and not violates(other, condition.threshold)
