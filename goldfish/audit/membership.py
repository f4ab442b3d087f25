"""Membership scores of two splits -> how well they tell members from held-out texts, with blind baselines beside.

Scores: higher = more likely a member. Intervals resample the documents of both sides.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from goldfish.audit.columns import FEATURES
from goldfish.audit.stats import FEWEST_DOCUMENTS, Codes, Estimate, Floats, clopper_pearson

RATES = (0.01, 0.001)  # false positive rates at which the true positive rate is told
RESAMPLES = 1_000
ROC_POINTS = 200


@dataclass(frozen=True)
class Side:
    """Windows of one split: their documents' codes, and their scores by attack, NaN where an attack has none."""

    documents: Codes
    scores: Mapping[str, Floats]
    words: Sequence[NDArray[np.int32]]  # for the blind baseline: the buckets of each window's words
    lengths: Floats  # characters


class Weighted:
    """AUC and TPR of one score under weights for every window; sorts once, for all resamples."""

    def __init__(self, members: Floats, heldout: Floats) -> None:
        values, place = np.unique(np.concatenate([members, heldout]), return_inverse=True)
        self._members, self._heldout, self._count = place[: len(members)], place[len(members) :], len(values)

    def _per_value(self, members: Floats, heldout: Floats) -> tuple[Floats, Floats]:
        """The weight of members and of held-out windows at each distinct score, ascending."""
        return (
            np.bincount(self._members, members, self._count).astype(np.float64),
            np.bincount(self._heldout, heldout, self._count).astype(np.float64),
        )

    def auc(self, members: Floats, heldout: Floats) -> float:
        """P(a member scores higher than a held-out window) + P(equal) / 2."""
        up, down = self._per_value(members, heldout)
        below = np.cumsum(down) - down / 2
        return float(up @ below / (up.sum() * down.sum()))

    def curve(self, members: Floats, heldout: Floats) -> tuple[Floats, Floats]:
        """False and true positive rate of "score >= threshold" for every threshold, from the strictest on."""
        up, down = (np.concatenate([[0.0], np.cumsum(side[::-1])]) for side in self._per_value(members, heldout))
        return down / down[-1], up / up[-1]

    def tpr(self, members: Floats, heldout: Floats, fpr: float) -> float:
        """The true positive rate at the loosest threshold that lets at most `fpr` of held-out windows through."""
        false, true = self.curve(members, heldout)
        return float(true[np.searchsorted(false, fpr + 1e-12, side="right") - 1])


def membership_figures(members: Side, heldout: Side) -> dict[str, Any]:
    """A summary's `membership`; see docs/audit.md."""
    attacks = {}
    for name in members.scores:
        if attack := _attack(members, heldout, members.scores[name], heldout.scores[name]):
            attacks[name] = attack
    blind = {
        "words": _attack(members, heldout, *word_scores(members, heldout)),
        "length": _attack(members, heldout, members.lengths, heldout.lengths),
    }
    told = {name: attack.figures(0.95) for name, attack in blind.items() if attack}
    bounds = {name: (figures["auc"]["lower95"], figures["auc"]["upper95"]) for name, figures in told.items()}
    confounded = None
    if len(bounds) == len(blind) and all(low is not None for low, _ in bounds.values()):
        # Text lengths may differ either way; a classifier below chance has learned nothing.
        confounded = bounds["words"][0] > 0.5 or not bounds["length"][0] <= 0.5 <= bounds["length"][1]
    result: dict[str, Any] = {
        "members": {"n": len(members.documents), "documents": len(np.unique(members.documents))},
        "heldout": {"n": len(heldout.documents), "documents": len(np.unique(heldout.documents))},
        "attacks": {name: attack.figures(0.95) for name, attack in attacks.items()},
        "blind": told,
        "confounded": confounded,
        "headline": None,
    }
    if confounded:
        result["reason"] = (
            "members and held-out texts can be told apart without the model (a blind baseline beats chance), so what "
            "the attacks see need not be membership; split at random before training, or audit texts of one kind"
        )
    else:
        best = max(attacks, key=lambda name: attacks[name].auc)
        widened = attacks[best].figures(1 - 0.05 / len(attacks))
        result["headline"] = {"attack": best, "auc": widened["auc"], "tpr": widened["tpr"]}
    result["exposure"] = exposure(members.scores["loss"], heldout.scores["loss"])
    return result


def _attack(members: Side, heldout: Side, scores: Floats, heldout_scores: Floats) -> "_Attack | None":
    """Of the windows that have a score; None where a side has none."""
    here, there = ~np.isnan(scores), ~np.isnan(heldout_scores)
    if not (here.any() and there.any()):
        return None
    return _Attack(scores[here], heldout_scores[there], members.documents[here], heldout.documents[there])


class _Attack:
    """One score on both sides, and its figures under resampled documents."""

    def __init__(self, members: Floats, heldout: Floats, documents: Codes, heldout_documents: Codes) -> None:
        self._weighted = Weighted(members, heldout)
        self._sides = tuple(np.unique(each, return_inverse=True)[1] for each in (documents, heldout_documents))
        self._ones = np.ones(len(members)), np.ones(len(heldout))
        self._documents = tuple(int(side.max()) + 1 for side in self._sides)
        self._rates = [fpr for fpr in RATES if self._documents[1] * fpr >= 10]
        self._draws = self._resampled() if min(self._documents) >= FEWEST_DOCUMENTS else None
        self.auc = self._weighted.auc(*self._ones)

    def _resampled(self) -> Floats:
        """(RESAMPLES, 1 + rates): AUC and true positive rates with the documents of both sides drawn anew."""
        generator, draws = np.random.default_rng(0), []
        for _ in range(RESAMPLES):
            members, heldout = (
                np.bincount(generator.integers(count, size=count), minlength=count).astype(np.float64)[side]
                for side, count in zip(self._sides, self._documents, strict=True)
            )
            rates = [self._weighted.tpr(members, heldout, fpr) for fpr in self._rates]
            draws.append([self._weighted.auc(members, heldout), *rates])
        return np.array(draws)

    def figures(self, level: float) -> dict[str, Any]:
        """`auc`, `tpr` and `roc` as in docs/audit.md, with intervals of that level."""
        tpr = []
        for fpr in RATES:
            if fpr in self._rates:
                point, column = self._weighted.tpr(*self._ones, fpr), 1 + self._rates.index(fpr)
                estimate = self._estimate(point, column, self._documents[0], level)
            else:
                reason = f"a false positive rate of {fpr:.1%} needs {10 / fpr:.0f} held-out documents"
                estimate = self._estimate(None, None, 0, level) | {"reason": f"{reason}, got {self._documents[1]}"}
            tpr.append({"fpr": fpr, "tpr": estimate})
        return {"auc": self._estimate(self.auc, 0, min(self._documents), level), "tpr": tpr, "roc": self._roc()}

    def _estimate(self, value: float | None, column: int | None, trials: int, level: float) -> Estimate:
        """`trials`: where every resample agrees (AUC of 1), the interval is that of as many independent trials: for an
        AUC, pairs of a member and a held-out document, each used once."""
        size = {"n": sum(map(len, self._ones)), "documents": sum(self._documents)}
        found: Estimate = {"value": value, **size, "lower95": None, "upper95": None}
        if value is None or column is None or self._draws is None:
            few = f"{min(self._documents)} documents on one side; an interval needs {FEWEST_DOCUMENTS}"
            return found | {"reason": few}
        draws = self._draws[:, column]
        if np.ptp(draws) == 0:
            low, high = clopper_pearson(value * trials, trials, level)
        else:
            low, high = np.percentile(draws, [50 * (1 - level), 50 * (1 + level)])
        return found | {"lower95": float(low), "upper95": float(high)}

    def _roc(self) -> list[list[float]]:
        """At most ROC_POINTS points of the curve, denser at small false positive rates."""
        false, true = self._weighted.curve(*self._ones)
        if len(false) > ROC_POINTS:
            least = math.log10(1 / len(self._ones[1]))
            grid = np.concatenate([[0.0], np.logspace(least, 0, ROC_POINTS - 1)])
            keep = np.unique([0, *(np.searchsorted(false, grid + 1e-12, side="right") - 1)])
            false, true = false[keep], true[keep]
        return [[float(x), float(y)] for x, y in zip(false, true, strict=True)]


def word_scores(members: Side, heldout: Side) -> list[Floats]:
    """Naive Bayes on which words occur, learned from every second document; the others' windows are scored.

    Not cross-validated: scores of several folds depend on each other, and an interval that takes them for independent
    called one random split in ten told apart (60 and 400 documents a side) where it promised one in forty.

    Returns:
        log P(words | member) - log P(words | held-out), NaN for the windows that it learned from; of both sides.
    """
    shares = []
    for side in (members, heldout):
        learned = [found for found, even in zip(side.words, side.documents % 2 == 0, strict=True) if even]
        seen = np.bincount(np.concatenate(learned), minlength=FEATURES)
        shares.append((seen + 0.5) / (len(learned) + 1))
    weights = np.log(shares[0]) - np.log(shares[1])
    return [
        np.array(
            [
                weights[found].sum() if odd else np.nan
                for found, odd in zip(side.words, side.documents % 2 == 1, strict=True)
            ]
        )
        for side in (members, heldout)
    ]


def exposure(member_scores: Floats, candidate_scores: Floats) -> dict[str, Any]:
    """log2(m+1) - log2(rank) of each member among itself and the m candidates, in bits.

    Carlini et al. 2019, section 4, where members and candidates are canaries of one kind.

    Args:
        member_scores, candidate_scores: higher = more probable; a tie counts against the member.
    """
    ordered = np.sort(candidate_scores)
    above = len(ordered) - np.searchsorted(ordered, member_scores, side="left")
    ceiling = math.log2(len(ordered) + 1)
    bits = ceiling - np.log2(above + 1)
    return {
        "mean": float(bits.mean()),
        "greatest": float(bits.max()),
        "ceiling": ceiling,
        "candidates": len(ordered),
    }
