"""Membership: how well scores separate members from held-out texts, beside blind baselines.

The records have the scores of each window (`membership_scores`); figures compare those of both
splits. Scores: higher = more likely a member. Intervals resample the documents of both sides.
"""

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyarrow.compute import list_flatten
from scipy.stats import mannwhitneyu

from goldfish.audit.intervals import (
    FEWEST_DOCUMENTS,
    LEVEL,
    Bools,
    Codes,
    Figure,
    Figures,
    Floats,
    Side,
    clopper_pearson,
    resamples,
)
from goldfish.audit.questions import FAIL, INCONCLUSIVE, PASS, Answer, needed
from goldfish.text.printable import counted

RATES = (0.01, 0.001)  # false positive rates at which the true positive rate is given
RESAMPLES = 1_000
CONFOUNDED = (
    "members and held-out texts may differ without regard to the model (a baseline that never saw "
    "it beats chance, which happens to one honest random split in twenty), so what the attacks see "
    "need not be membership; split at random before training, or audit texts of one kind"
)
FEATURES = 2**16  # buckets that words are hashed into
# The share of tokens that Min-K% and Min-K%++ look at; both papers' default.
LOWEST = 0.2
WBC_SIZES = (2, 3, 4, 6, 9, 13, 18, 25, 32, 40)  # tokens, of the authors' experiments
# With a smaller standard deviation the model is certain, and (log P - mu) / sigma is rounding
# divided by rounding.
LEAST_STD = 1e-6
# Membership attacks: name in the files, name in sentences and tables.
ATTACKS = {
    "loss": "loss",
    "zlib": "zlib",
    "reference": "reference",
    "min_k": "Min-K%",
    "min_k_plus_plus": "Min-K%++",
    "kept_loss": "kept loss",
    "dropped_gap": "dropped gap",
    "wbc": "WBC",
}


def membership_scores(
    nll: Floats,
    entropy_mean: Floats,
    entropy_std: Floats,
    text: str,
    dropped: Bools | None = None,
    reference_nll: Floats | None = None,
) -> dict[str, float | None]:
    """The membership scores of n tokens, higher = more likely a member; None for what is unknown.

    docs/audit-files.md has their table and sources; Min-K%++ is (log P - mu) / sigma (Zhang et al.
    2025, equation 3).

    Args:
        nll: (n,) -log P of each token. entropy_mean, entropy_std: (n,) mean and standard deviation
            of log P over the vocabulary.
        text: of the tokens.
        dropped: (n,) which tokens the training dropped.
        reference_nll: (n,) the loss under the reference model.
    """
    log_p = -np.asarray(nll, dtype=np.float64)
    loss = float(-log_p.mean())
    kept_loss = dropped_loss = None
    if dropped is not None and dropped.any() and not dropped.all():
        kept_loss = float(-log_p[~dropped].mean())
        dropped_loss = float(-log_p[dropped].mean())
    # "replace": a token may end within a character, and half of one has no UTF-8.
    compressed = len(zlib.compress(text.encode("utf-8", "replace")))
    normalized = (log_p - entropy_mean) / np.maximum(entropy_std, LEAST_STD)
    scores: dict[str, float | None] = {
        "mia_loss": -loss,
        "mia_zlib": float(log_p.sum()) / compressed,
        "mia_min_k": mean_of_lowest(log_p),
        "mia_min_k_plus_plus": mean_of_lowest(normalized),
        "mia_reference": None,
        "mia_wbc": None,
        "mia_kept_loss": None,
        "mia_dropped_gap": None,
    }
    if reference_nll is not None:
        scores["mia_reference"] = float(reference_nll.mean()) - loss
        scores["mia_wbc"] = window_votes(reference_nll + log_p)
    if kept_loss is not None and dropped_loss is not None:
        scores["mia_kept_loss"] = -kept_loss
        scores["mia_dropped_gap"] = dropped_loss - kept_loss
    return scores


def window_votes(differences: Floats) -> float:
    """WBC (Chen et al. 2026, arXiv 2601.02751, section 4.1).

    The share of runs of consecutive tokens on which the reference model's summed loss is the higher
    one, averaged over WBC_SIZES; sizes beyond the text are the whole text.

    differences: (T-1,), loss under the reference model minus loss under the model.
    """
    # The sum over a run is the difference of two running sums.
    total = np.cumsum(np.append(0.0, differences))
    sizes = np.minimum(WBC_SIZES, len(differences))
    shares = []
    for size in sizes:
        higher = total[size:] > total[:-size]
        shares.append(higher.mean())
    return float(np.mean(shares))


def mean_of_lowest(values: Floats, share: float = LOWEST) -> float:
    """Mean of the lowest floor(share * n) values, at least one (Shi et al. 2024, equation 1)."""
    count = max(1, int(share * len(values)))
    lowest = np.partition(values, count - 1)[:count]
    return float(lowest.mean())


def word_buckets(text: str) -> list[int]:
    """The distinct words of a text, each hashed into one of FEATURES buckets."""
    words = set(re.findall(r"\w+", text.lower()))
    # CRC is the same in every process, which Python's hash of a string is not.
    codes = (zlib.crc32(word.encode("utf-8", "replace")) for word in words)
    return sorted({code % FEATURES for code in codes})


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


def scores_of(side: Side) -> Scores:
    """The scores of the windows that were asked as in training."""
    side = side.as_trained
    scores = {attack: side.numbers(f"mia_{attack}") for attack in ATTACKS}
    ends = np.cumsum(side.lengths("words"))
    # Views of one array: as Python lists the words would take five times the memory.
    words = np.split(list_flatten(side.table["words"]).to_numpy(), ends)[:-1]
    codes = np.unique(side.documents, return_inverse=True)[1]
    return Scores(codes, scores, words, side.numbers("characters"))


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


def figures(members: Scores, heldout: Scores) -> list[Figure]:
    """The figures that compare both splits; see docs/audit-files.md, "Membership"."""
    found = []
    attacks = {}
    for name, scores in members.scores.items():
        attack = _attack(members, heldout, scores, heldout.scores[name])
        if attack:
            attacks[name] = attack
            found += attack.figures("attack", name, LEVEL)
    # What can be told without the model.
    words = _attack(members, heldout, *word_scores(members, heldout))
    length = _attack(members, heldout, members.lengths, heldout.lengths)
    for name, baseline in (("words", words), ("length", length)):
        if baseline:
            found += baseline.figures("blind", name, LEVEL)[:1]
    confounded = _confounded(words, length)
    if confounded is None:
        found.append(Figure("both", "confounded", reason="too few documents to say"))
    else:
        found.append(Figure("both", "confounded", value=float(confounded)))
    if confounded:
        return [*found, Figure("both", "membership_auc", reason=CONFOUNDED)]
    best = max(attacks, key=lambda name: attacks[name].auc)
    # Widened for having been chosen: 95% for all attacks together (Bonferroni).
    level = 1 - (1 - LEVEL) / len(attacks)
    return found + attacks[best].figures("membership", best, level)


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


# The share of tokens that Min-K% and Min-K%++ look at; both papers' default.


def answer(figures: Figures, limit: float) -> Answer | None:
    """Does the model show which texts it was trained on? None for one split only."""
    found = figures.select(figure="membership_auc")
    if not found:
        return None
    auc = found[0]
    confounded = figures.get("both", "confounded")
    if auc.value is None:
        return Answer(
            INCONCLUSIVE, str(auc.reason), "more documents would not decide it"
        )
    unknown = confounded is None or confounded.value is None
    if auc.low is None or auc.high is None or unknown:
        why = auc.reason or "too few documents for the blind baselines"
        fewest = 2 * FEWEST_DOCUMENTS
        needs = f"at least {fewest} documents on each side may decide it"
        return Answer(INCONCLUSIVE, why, needs)
    why = f"attack {ATTACKS[auc.setting]}: AUC {auc}"
    blind = strongest_blind(figures)
    if blind is not None:
        why += f"; a blind baseline has {blind.point()}"
    if auc.high < 0.5:
        why += "; held-out texts look more like members than the members do: are the files swapped?"
        return Answer(INCONCLUSIVE, why, "more documents would not decide it")
    if auc.high <= limit:
        return Answer(PASS, why)
    if auc.low > max(limit, (blind.high if blind else None) or 0.0):
        share = figures.get("members", "dropped_share")
        if share is not None and share.value is not None:
            why += "; as expected: the goldfish loss hides dropped tokens, not that a text was seen"
        return Answer(FAIL, why)
    # The interval shrinks with the square root of the number of documents.
    half = (auc.high - auc.low) / 2
    distance = max(abs(auc.value - limit), 1e-4)
    times = max(1.1, half / distance) ** 2
    why += f"; neither clearly above nor below {limit}"
    return Answer(INCONCLUSIVE, why, needed(int(auc.documents * times)))


def strongest_blind(figures: Figures) -> Figure | None:
    """The AUC of the baseline that separates the splits most, either way, without the model."""
    blind = figures.select(figure="blind_auc")
    return max(blind, key=lambda auc: abs((auc.value or 0.5) - 0.5), default=None)
