"""How well membership scores separate members from held-out texts, beside blind baselines.

Scores: higher = more likely a member. Intervals resample the documents of both sides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu

from goldfish.audit.intervals import (
    FEWEST_DOCUMENTS,
    LEVEL,
    Codes,
    Figure,
    Floats,
    clopper_pearson,
    resamples,
)
from goldfish.audit.records import FEATURES
from goldfish.text.printable import counted

RATES = (0.01, 0.001)  # false positive rates at which the true positive rate is given
RESAMPLES = 1_000
CONFOUNDED = (
    "members and held-out texts may differ without regard to the model (a baseline that never saw "
    "it beats chance, which happens to one honest random split in twenty), so what the attacks see "
    "need not be membership; split at random before training, or audit texts of one kind"
)


@dataclass(frozen=True)
class Scores:
    """The windows of one split.

    documents: (windows,) the codes of their documents, from 0. scores: (windows,) by attack, NaN
    for a window without a score. words: the buckets of each window's words. lengths: (windows,)
    characters. The last two are for the blind baselines.
    """

    documents: Codes
    scores: Mapping[str, Floats]
    words: Sequence[NDArray[np.int32]]
    lengths: Floats


class Ranking:
    """The windows of both sides by falling score.

    The bootstrap asks for the ROC curve a thousand times under other weights, with one sort.
    """

    def __init__(self, members: Floats, heldout: Floats) -> None:
        scores = np.concatenate([members, heldout])
        self._order = np.argsort(-scores)
        self._is_member = self._order < len(members)
        # The last of equal scores: a threshold cannot part them. NaN differs from everything, so
        # the last window is an end too.
        self._ends = np.flatnonzero(np.diff(scores[self._order], append=np.nan))

    def curve(self, weights: Floats) -> tuple[Floats, Floats]:
        """False and true positive rates of "score >= threshold", the strictest threshold first.

        weights: (..., members + held-out windows). Returns (..., thresholds + 1), both from 0 to 1.
        """
        ordered = weights[..., self._order]
        rates = []
        for side in (~self._is_member, self._is_member):
            passed = np.cumsum(ordered * side, -1)[..., self._ends]
            share = passed / passed[..., -1:]
            nothing = np.zeros_like(share[..., :1])  # a threshold that none passes
            rates.append(np.concatenate([nothing, share], -1))
        return rates[0], rates[1]

    def figures(self, weights: Floats, rates: Sequence[float]) -> Floats:
        """The AUC, and for each false positive rate the true one; (..., 1 + rates).

        The AUC is P(a member scores higher than a held-out window) + P(equal) / 2. A true positive
        rate is that of the loosest threshold which at most such a share of the held-out passes.
        """
        false, true = self.curve(weights)
        # Trapezoids count half of the pairs with equal scores.
        widths = np.diff(false)
        heights = (true[..., 1:] + true[..., :-1]) / 2
        auc = (widths * heights).sum(-1)
        # Rates are sums of weights divided by their total: equal ones differ by rounding.
        columns = [auc]
        for rate in rates:
            allowed = false <= rate + 1e-12
            columns.append(np.where(allowed, true, 0).max(-1))
        return np.stack(columns, -1)


def membership_figures(members: Scores, heldout: Scores) -> list[Figure]:
    """The figures that compare both splits; see docs/audit-files.md, "Membership"."""
    figures = []
    attacks = {}
    for name, scores in members.scores.items():
        attack = _attack(members, heldout, scores, heldout.scores[name])
        if attack:
            attacks[name] = attack
            figures += attack.figures("attack", name, LEVEL)
    # What can be told without the model.
    words = _attack(members, heldout, *word_scores(members, heldout))
    length = _attack(members, heldout, members.lengths, heldout.lengths)
    for name, baseline in (("words", words), ("length", length)):
        if baseline:
            figures += baseline.figures("blind", name, LEVEL)[:1]
    confounded = _confounded(words, length)
    if confounded is None:
        figures.append(Figure("both", "confounded", reason="too few documents to say"))
    else:
        figures.append(Figure("both", "confounded", value=float(confounded)))
    if confounded:
        return [*figures, Figure("both", "membership_auc", reason=CONFOUNDED)]
    best = max(attacks, key=lambda name: attacks[name].auc)
    # Widened for having been chosen: 95% for all attacks together (Bonferroni).
    level = 1 - (1 - LEVEL) / len(attacks)
    return figures + attacks[best].figures("membership", best, level)


def _confounded(words: "_Attack | None", length: "_Attack | None") -> bool | None:
    """Whether a baseline that never saw the model separates the sides; None with too few documents.

    Both baselines together are to accuse one honest random split in twenty: 2.5% each, by rank
    tests of documents, whose level holds for few of them.
    """
    if not (words and length and words.draws is not None and length.draws is not None):
        return None
    # A classifier below chance has learned nothing; lengths may differ either way.
    of_words = mannwhitneyu(*words.means(), alternative="greater")
    of_length = mannwhitneyu(*length.means(), alternative="two-sided")
    return bool(min(of_words.pvalue, of_length.pvalue) < 0.025)


def _attack(
    members: Scores,
    heldout: Scores,
    scores: Floats,
    heldout_scores: Floats,
) -> "_Attack | None":
    """Of the windows that have a score; None where a side has none."""
    here = ~np.isnan(scores)
    there = ~np.isnan(heldout_scores)
    if not (here.any() and there.any()):
        return None
    return _Attack(
        (scores[here], heldout_scores[there]),
        (members.documents[here], heldout.documents[there]),
    )


class _Attack:
    """One score on both sides, and its figures under resampled documents."""

    def __init__(
        self,
        scores: tuple[Floats, Floats],
        documents: tuple[Codes, Codes],
    ) -> None:
        self._scores = scores
        self._ranking = Ranking(*scores)
        # Codes from 0 without gaps: windows without a score may have left some out.
        self._sides = [np.unique(each, return_inverse=True)[1] for each in documents]
        self._documents = [int(side.max()) + 1 for side in self._sides]
        windows = sum(map(len, scores))
        self._sizes: dict[str, Any] = {
            "n": windows,
            "documents": sum(self._documents),
        }
        self._values = self._ranking.figures(np.ones(windows), RATES)
        self.auc = float(self._values[0])
        self.draws: Floats | None = None
        if min(self._documents) >= FEWEST_DOCUMENTS:
            self.draws = self._resampled(windows)

    def means(self) -> list[Floats]:
        """The mean score of each document, of both sides."""
        means = []
        for side, scores in zip(self._sides, self._scores, strict=True):
            windows = np.bincount(side)
            means.append(np.bincount(side, scores) / windows)
        return means

    def _resampled(self, windows: int) -> Floats:
        """(RESAMPLES, 1 + RATES): the figures with the documents of both sides drawn anew."""
        draws = []
        for times in resamples(self._documents, windows, RESAMPLES):
            # A window counts as often as its document was drawn.
            members = times[0][:, self._sides[0]]
            heldout = times[1][:, self._sides[1]]
            weights = np.concatenate([members, heldout], -1)
            draws.append(self._ranking.figures(weights, RATES))
        return np.concatenate(draws)

    def figures(self, name: str, setting: str, level: float) -> list[Figure]:
        """{name}_auc, and {name}_tpr for each of RATES, with intervals of that level."""
        auc = Figure("both", f"{name}_auc", setting)
        figures = [self._figure(auc, 0, min(self._documents), level)]
        for column, fpr in enumerate(RATES, 1):
            tpr = Figure("both", f"{name}_tpr", setting, fpr, **self._sizes)
            # With fewer the rate would be that of a threshold set by less than ten documents.
            needed = round(10 / fpr)
            if self._documents[1] >= needed:
                figures.append(self._figure(tpr, column, self._documents[0], level))
            else:
                reason = (
                    f"a false positive rate of {fpr:.1%} needs {needed:,} held-out documents, "
                    f"got {self._documents[1]:,}"
                )
                figures.append(replace(tpr, reason=reason))
        return figures

    def _figure(self, named: Figure, column: int, trials: int, level: float) -> Figure:
        """`named` with its numbers.

        trials: if every resample agrees (an AUC of 1), the interval is that of as many independent
        trials: for an AUC, pairs of a member and a held-out document, each used once.
        """
        value = float(self._values[column])
        named = replace(named, value=value, **self._sizes)
        if self.draws is None:
            few = min(self._documents)
            reason = (
                f"{counted(few, 'document')} on one side; an interval needs "
                f"{FEWEST_DOCUMENTS}"
            )
            return replace(named, reason=reason)
        draws = self.draws[:, column]
        if np.ptp(draws) < 1e-9:
            low, high = clopper_pearson(value * trials, trials, level)
        else:
            low = float(np.percentile(draws, 50 * (1 - level)))
            high = float(np.percentile(draws, 50 * (1 + level)))
        return replace(named, low=low, high=high)


def word_scores(members: Scores, heldout: Scores) -> list[Floats]:
    """Naive Bayes on which words occur, learned from every second document, for the others.

    Not cross-validated: scores of several folds depend on each other, and accused one random split
    in ten.

    Returns:
        For the windows of each side log P(words | member) - log P(words | held-out); NaN for those
        that it learned from.
    """
    log_shares = []
    for side in (members, heldout):
        learning = np.flatnonzero(side.documents % 2 == 0).tolist()
        learned = np.concatenate([side.words[i] for i in learning])
        seen = np.bincount(learned, minlength=FEATURES)
        # Half a window more with each word, so that no word has a probability of 0.
        shares = (seen + 0.5) / (len(learning) + 1)
        log_shares.append(np.log(shares))
    weights = log_shares[0] - log_shares[1]
    scores = []
    for side in (members, heldout):
        sums = [weights[words].sum() for words in side.words]
        others = side.documents % 2 == 1
        scores.append(np.where(others, sums, np.nan))
    return scores
