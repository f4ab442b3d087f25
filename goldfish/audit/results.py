"""A finished audit as Python values: every estimate by its name."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from goldfish.audit.estimate import Estimate, census, read_json
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
    if counts := summary.get("secrets"):
        named["secrets"] = census(counts["given_away"], counts["marked"])
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
