"""Conditions on an audit's figures, for CI: `em.upper95 > 0.01` fails where it is so.

Exit codes: 0 no condition holds, 1 one holds, 2 an error, 3 nothing can be said about one (and none holds).
"""

import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from goldfish.audit.results import Figure, figures, find
from goldfish.audit.stats import clopper_pearson

OPERATORS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
FIELDS = ("lower95", "upper95", "k", "n", "documents", "value")
# Rates of windows, whose bounds depend on k and the number of documents alone.
EXACT = (
    "exact_match",
    "exact_match_nontrivial",
    "prefix_sweep",
    "offset_sweep",
    "strata",
    "beam_search",
    "extractable",
)

Outcome = Literal["passed", "violated", "inconclusive"]
EXIT_CODES: dict[Outcome, int] = {"passed": 0, "violated": 1, "inconclusive": 3}


@dataclass(frozen=True)
class Condition:
    """`figure.field operator threshold`; an audit in which it holds is refused."""

    text: str
    figure: str
    field: str
    operator: str
    threshold: float


@dataclass(frozen=True)
class Check:
    """A condition, and what an audit says about it."""

    condition: Condition
    outcome: Outcome
    says: str


def parse(text: str) -> Condition:
    """A condition such as "em.upper95 > 0.01" or "mia.tpr@1%.lower95 > 5%".

    Raises:
        ValueError: anything else; names are not looked up yet.
    """
    match = re.fullmatch(r"\s*([^\s<>=]\S*?)\s*(>=|<=|>|<)\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)(%?)\s*", text)
    try:
        threshold = float(match[3]) / (100 if match[4] else 1) if match else math.nan
    except ValueError:
        threshold = math.nan
    if match is None or not math.isfinite(threshold):
        raise ValueError(
            f'--fail-on takes a figure, one of > >= < <= and a number, such as "em.upper95 > 0.01"; got {text!r}'
        )
    name, _, last = match[1].rpartition(".")
    if name and last in FIELDS:
        return Condition(text.strip(), name, last, match[2], threshold)
    return Condition(text.strip(), match[1], "value", match[2], threshold)


def judge(summary: Mapping[str, Any], conditions: Sequence[Condition]) -> list[Check]:
    """Every condition on a summary.

    Raises:
        ValueError: a figure that this audit does not have.
    """
    known = figures(summary)
    return [_check(condition, known) for condition in conditions]


def exit_code(checks: Sequence[Check]) -> int:
    """1 where a condition is violated, else 3 where one is inconclusive, else 0."""
    outcomes = {check.outcome for check in checks}
    worst: tuple[Outcome, ...] = ("violated", "inconclusive")
    return next((EXIT_CODES[outcome] for outcome in worst if outcome in outcomes), 0)


def _check(condition: Condition, known: Mapping[str, Figure]) -> Check:
    try:
        figure = find(known, condition.figure)
    except KeyError as error:
        raise ValueError(f"--fail-on {condition.text!r}: {error.args[0]}") from error
    number = getattr(figure, condition.field)
    if number is None:
        reason = figure.reason or f"it has no {condition.field}"
        return Check(condition, "inconclusive", f"{figure.name}: not estimable ({reason})")
    says = f"{figure.name}.{condition.field} is {number:.4g}"
    if figure.k is not None:
        says += f" ({figure.k} of {figure.n})"
    if not OPERATORS[condition.operator](number, condition.threshold):
        return Check(condition, "passed", says)
    if _any_result_would_violate(condition, figure):
        return Check(condition, "inconclusive", f"{says}, and {figure.documents} documents cannot bound it closer")
    return Check(condition, "violated", says)


def _any_result_would_violate(condition: Condition, figure: Figure) -> bool:
    """An upper bound above the threshold, which 0 of these n would not put below it, while the lower is not above:
    too few to say (and the same for lower bounds from below)."""
    kind = figure.name.split(".")[1].split("@")[0]
    if kind not in EXACT or figure.lower95 is None or figure.upper95 is None:
        return False
    violates = OPERATORS[condition.operator]
    if condition.field == "upper95" and condition.operator.startswith(">"):
        other, best = figure.lower95, clopper_pearson(0, figure.documents)[1]
    elif condition.field == "lower95" and condition.operator.startswith("<"):
        other, best = figure.upper95, clopper_pearson(figure.documents, figure.documents)[0]
    else:
        return False
    return not violates(other, condition.threshold) and bool(violates(best, condition.threshold))
