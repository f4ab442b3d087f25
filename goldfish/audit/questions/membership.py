"""Membership: how well scores separate members from held-out texts, beside blind baselines.

The records have the scores of each window (`membership_scores`); figures compare those of both
splits. Scores: higher = more likely a member. Intervals resample the documents of both sides.
"""

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

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
NOT_BY_MORE = "more documents would not decide it"
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
    nll = np.asarray(nll, dtype=np.float64)
    log_p = -nll
    mean = float(log_p.mean())
    # "replace": a token may end within a character, and half of one has no UTF-8.
    encoded = text.encode("utf-8", "replace")
    compressed = zlib.compress(encoded)
    deviations = log_p - entropy_mean
    spread = np.maximum(entropy_std, LEAST_STD)
    normalized = deviations / spread
    scores: dict[str, float | None] = {
        "mia_loss": mean,
        "mia_zlib": float(log_p.sum()) / len(compressed),
        "mia_min_k": mean_of_lowest(log_p),
        "mia_min_k_plus_plus": mean_of_lowest(normalized),
        "mia_reference": None,
        "mia_wbc": None,
        "mia_kept_loss": None,
        "mia_dropped_gap": None,
    }
    if reference_nll is not None:
        differences = reference_nll + log_p
        of_reference = float(reference_nll.mean())
        scores["mia_reference"] = of_reference + mean
        scores["mia_wbc"] = window_votes(differences)
    if dropped is not None and dropped.any() and not dropped.all():
        kept = log_p[~dropped]
        gone = log_p[dropped]
        mean_of_kept = float(kept.mean())
        scores["mia_kept_loss"] = mean_of_kept
        scores["mia_dropped_gap"] = mean_of_kept - float(gone.mean())
    return scores


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
    scores = {}
    for attack in ATTACKS:
        column = f"mia_{attack}"
        scores[attack] = side.numbers(column)
    # Views of one array: as Python lists the words would take five times the memory.
    flat = list_flatten(side.table["words"])
    words = flat.to_numpy()
    ends = np.cumsum(side.lengths("words"))
    *of_windows, _ = np.split(words, ends)
    _, codes = np.unique(side.documents, return_inverse=True)
    lengths = side.numbers("characters")
    return Scores(codes, scores, of_windows, lengths)


def figures(members: Scores, heldout: Scores) -> list[Figure]:
    """The figures that compare both splits; see docs/audit-files.md, "Membership"."""
    # Of chats a split may have nothing but questions after the generation prompt.
    if min(len(members.documents), len(heldout.documents)) == 0:
        reason = "no text of one side was asked as in training"
        return [Figure("both", "membership_auc", reason=reason)]
    found = []
    attacks = {}
    for name, scores in members.scores.items():
        of_heldout = heldout.scores[name]
        attack = _attack(members, heldout, scores, of_heldout)
        if attack is not None:
            attacks[name] = attack
            found += attack.figures("attack", name, LEVEL)
    # What can be told without the model.
    of_words = word_scores(members, heldout)
    words = _attack(members, heldout, *of_words)
    length = _attack(members, heldout, members.lengths, heldout.lengths)
    baselines = {"words": words, "length": length}
    for name, baseline in baselines.items():
        if baseline is not None:
            auc, *_ = baseline.figures("blind", name, LEVEL)
            found.append(auc)
    confounded = _confounded(words, length)
    found.append(confounded)
    if confounded.value:
        hidden = Figure("both", "membership_auc", reason=CONFOUNDED)
        found.append(hidden)
        return found
    best = max(attacks, key=lambda name: attacks[name].auc)
    # Widened for having been chosen: 95% for all attacks together (Bonferroni).
    outside = (1 - LEVEL) / len(attacks)
    level = 1 - outside
    chosen = attacks[best]
    found += chosen.figures("membership", best, level)
    return found


def answer(figures: Figures, limit: float) -> Answer | None:
    """Does the model show which texts it was trained on? None for one split only."""
    found = figures.select(figure="membership_auc")
    if not found:
        return None
    auc = found[0]
    if auc.value is None:
        return Answer(INCONCLUSIVE, str(auc.reason), NOT_BY_MORE)
    confounded = figures.get("both", "confounded")
    unknown = confounded is None or confounded.value is None
    if auc.low is None or auc.high is None or unknown:
        why = auc.reason or "too few documents for the blind baselines"
        fewest = 2 * FEWEST_DOCUMENTS
        needs = f"at least {fewest} documents on each side may decide it"
        return Answer(INCONCLUSIVE, why, needs)
    attack = ATTACKS[auc.setting]
    why = f"attack {attack}: AUC {auc}"
    blind = strongest_blind(figures)
    seen_blindly = 0.0
    if blind is not None:
        why += f"; a blind baseline has {blind.point()}"
        seen_blindly = blind.high or 0.0
    if auc.high < 0.5:
        why += "; held-out texts look more like members than the members do: are the files swapped?"
        return Answer(INCONCLUSIVE, why, NOT_BY_MORE)
    if auc.high <= limit:
        return Answer(PASS, why)
    explained = max(limit, seen_blindly)
    if auc.low > explained:
        share = figures.get("members", "dropped_share")
        if share is not None and share.value is not None:
            why += "; as expected: the goldfish loss hides dropped tokens, not that a text was seen"
        return Answer(FAIL, why)
    # The interval shrinks with the square root of the number of documents.
    half = (auc.high - auc.low) / 2
    distance = abs(auc.value - limit)
    times_narrower = half / max(distance, 1e-4)
    times = max(1.1, times_narrower) ** 2
    documents = int(auc.documents * times)
    why += f"; neither clearly above nor below {limit}"
    return Answer(INCONCLUSIVE, why, needed(documents))


def strongest_blind(figures: Figures) -> Figure | None:
    """The AUC of the baseline that separates the splits most, either way, without the model."""

    def distance(auc: Figure) -> float:
        value = auc.value or 0.5
        return abs(value - 0.5)

    blind = figures.select(figure="blind_auc")
    return max(blind, key=distance, default=None)


class _Scored:
    """The windows of one side that have a score."""

    def __init__(self, scores: Floats, documents: Codes) -> None:
        has_score = ~np.isnan(scores)
        self.scores = scores[has_score]
        # Codes from 0 without gaps: windows without a score may have left some out.
        documents = documents[has_score]
        distinct, self.codes = np.unique(documents, return_inverse=True)
        self.documents = len(distinct)

    def means(self) -> Floats:
        """The mean score of each document."""
        sums = np.bincount(self.codes, self.scores)
        windows = np.bincount(self.codes)
        means: Floats = sums / windows
        return means


def _attack(
    members: Scores,
    heldout: Scores,
    scores: Floats,
    heldout_scores: Floats,
) -> "_Attack | None":
    """An attack by these scores; None if no window of a side has one."""
    here = _Scored(scores, members.documents)
    there = _Scored(heldout_scores, heldout.documents)
    if here.documents and there.documents:
        return _Attack(here, there)
    return None


class _Attack:
    """One score on both sides, and its figures under resampled documents."""

    def __init__(self, members: _Scored, heldout: _Scored) -> None:
        self._members = members
        self._heldout = heldout
        self.fewest = min(members.documents, heldout.documents)
        windows = len(members.scores) + len(heldout.scores)
        documents = members.documents + heldout.documents
        # Every figure is about these.
        self._about = Figure("both", n=windows, documents=documents)
        self._ranking = Ranking(members.scores, heldout.scores)
        once = np.ones(windows)
        self._values = self._ranking.figures(once, RATES)
        self.auc = float(self._values[0])
        self._draws: Floats | None = None
        if self.fewest >= FEWEST_DOCUMENTS:
            self._draws = self._resampled()

    def _resampled(self) -> Floats:
        """(RESAMPLES, 1 + RATES): the figures with the documents of both sides drawn anew."""
        draws = []
        documents = (self._members.documents, self._heldout.documents)
        drawn = resamples(documents, self._about.n, RESAMPLES)
        for of_members, of_heldout in drawn:
            # A window counts as often as its document was drawn.
            members = of_members[:, self._members.codes]
            heldout = of_heldout[:, self._heldout.codes]
            weights = np.concatenate([members, heldout], axis=1)
            figures = self._ranking.figures(weights, RATES)
            draws.append(figures)
        return np.concatenate(draws)

    def rank_test(self, alternative: str) -> float:
        """The p-value of Mann and Whitney's test of the documents' mean scores."""
        members = self._members.means()
        heldout = self._heldout.means()
        found = mannwhitneyu(members, heldout, alternative=alternative)
        return float(found.pvalue)

    def figures(self, name: str, setting: str, level: float) -> list[Figure]:
        """{name}_auc, and {name}_tpr for each of RATES, with intervals of that level."""
        # An AUC compares pairs of a member and a held-out document, each used once.
        auc = replace(self._about, figure=f"{name}_auc", setting=setting)
        trials = self.fewest
        figures = [self._with_numbers(auc, 0, trials, level)]
        for column, fpr in enumerate(RATES, 1):
            tpr = replace(auc, figure=f"{name}_tpr", x=fpr)
            # With fewer the rate would be that of a threshold set by less than ten documents.
            least = round(10 / fpr)
            documents = self._heldout.documents
            if documents >= least:
                trials = self._members.documents
                tpr = self._with_numbers(tpr, column, trials, level)
            else:
                reason = (
                    f"a false positive rate of {fpr:.1%} needs {least:,} held-out documents, "
                    f"got {documents:,}"
                )
                tpr = replace(tpr, reason=reason)
            figures.append(tpr)
        return figures

    def _with_numbers(
        self,
        figure: Figure,
        column: int,
        trials: int,
        level: float,
    ) -> Figure:
        """A figure with its value and interval.

        trials: if every resample agrees (an AUC of 1), the interval is that of so many independent
        trials.
        """
        value = float(self._values[column])
        figure = replace(figure, value=value)
        if self._draws is None:
            few = counted(self.fewest, "document")
            reason = f"{few} on one side; an interval needs {FEWEST_DOCUMENTS}"
            return replace(figure, reason=reason)
        draws = self._draws[:, column]
        spread = np.ptp(draws)
        if spread < 1e-9:
            wins = value * trials
            low, high = clopper_pearson(wins, trials, level)
        else:
            lower = 50 * (1 - level)
            upper = 50 * (1 + level)
            low = float(np.percentile(draws, lower))
            high = float(np.percentile(draws, upper))
        return replace(figure, low=low, high=high)


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
        falling = scores[self._order]
        steps = np.diff(falling, append=np.nan)
        self._ends = np.flatnonzero(steps)

    def curve(self, weights: Floats) -> tuple[Floats, Floats]:
        """False and true positive rates of "score >= threshold", the strictest threshold first.

        weights: (..., members + held-out windows). Returns (..., thresholds + 1), both from 0 to 1.
        """
        ordered = weights[..., self._order]
        of_members = ordered * self._is_member
        is_heldout = ~self._is_member
        of_heldout = ordered * is_heldout
        false = self._shares(of_heldout)
        true = self._shares(of_members)
        return false, true

    def _shares(self, weights: Floats) -> Floats:
        """The share of a side that passes each threshold; weights: 0 for the other side."""
        sums = np.cumsum(weights, axis=-1)
        passed = sums[..., self._ends]
        total = passed[..., -1:]
        share = passed / total
        nothing = np.zeros_like(total)  # a threshold that none passes
        return np.concatenate([nothing, share], axis=-1)

    def figures(self, weights: Floats, rates: Sequence[float]) -> Floats:
        """The AUC, and for each false positive rate the true one; (..., 1 + rates).

        The AUC is P(a member scores higher than a held-out window) + P(equal) / 2. A true positive
        rate is that of the loosest threshold which at most such a share of the held-out passes.
        """
        false, true = self.curve(weights)
        # Trapezoids count half of the pairs with equal scores.
        widths = np.diff(false)
        left = true[..., :-1]
        right = true[..., 1:]
        heights = (left + right) / 2
        areas = widths * heights
        auc = areas.sum(axis=-1)
        columns = [auc]
        for rate in rates:
            # Rates are sums of weights divided by their total: equal ones differ by rounding.
            at_most = rate + 1e-12
            allowed = np.where(false <= at_most, true, 0)
            most = allowed.max(axis=-1)
            columns.append(most)
        return np.stack(columns, axis=-1)


def _confounded(words: _Attack | None, length: _Attack | None) -> Figure:
    """Whether a baseline that never saw the model separates the sides: 1 or 0.

    Both baselines together are to accuse one honest random split in twenty: 2.5% each, by rank
    tests of documents, whose level holds for few of them.
    """
    figure = Figure("both", "confounded")
    few = replace(figure, reason="too few documents to say")
    if words is None or length is None:
        return few
    if min(words.fewest, length.fewest) < FEWEST_DOCUMENTS:
        return few
    # A classifier below chance has learned nothing; lengths may differ either way.
    of_words = words.rank_test("greater")
    of_length = length.rank_test("two-sided")
    separated = min(of_words, of_length) < 0.025
    return replace(figure, value=float(separated))


def word_scores(members: Scores, heldout: Scores) -> tuple[Floats, Floats]:
    """Naive Bayes on which words occur, learned from every second document, for the others.

    Not cross-validated: scores of several folds depend on each other, and accused one random split
    in ten.

    Returns:
        For the windows of each side log P(words | member) - log P(words | held-out); NaN for those
        that it learned from.
    """
    in_members = log_word_shares(members)
    in_heldout = log_word_shares(heldout)
    weights = in_members - in_heldout
    of_members = sums_of_words(members, weights)
    of_heldout = sums_of_words(heldout, weights)
    return of_members, of_heldout


def log_word_shares(side: Scores) -> Floats:
    """(FEATURES,): for each word the log of the share of windows that have it.

    Of documents with even codes.
    """
    even = side.documents % 2 == 0
    learning = np.flatnonzero(even).tolist()
    of_windows = [side.words[i] for i in learning]
    words = np.concatenate(of_windows)
    seen = np.bincount(words, minlength=FEATURES)
    # Half a window more with each word, so that no word has a probability of 0.
    windows = len(learning) + 1
    shares = (seen + 0.5) / windows
    return np.log(shares)


def sums_of_words(side: Scores, weights: Floats) -> Floats:
    """(windows,): the sum of the weights of each window's words, NaN in documents of even codes."""
    windows = len(side.words)
    sums = np.full(windows, np.nan)
    odd = side.documents % 2 == 1
    for i, words in enumerate(side.words):
        if odd[i]:
            of_words = weights[words]
            sums[i] = of_words.sum()
    return sums


def window_votes(differences: Floats) -> float:
    """WBC (Chen et al. 2026, arXiv 2601.02751, section 4.1).

    The share of runs of consecutive tokens on which the reference model's summed loss is the higher
    one, averaged over WBC_SIZES; sizes beyond the text are the whole text.

    differences: (T-1,), loss under the reference model minus loss under the model.
    """
    # The sum over a run is the difference of two running sums.
    from_zero = np.append(0.0, differences)
    total = np.cumsum(from_zero)
    longest = len(differences)
    sizes = np.minimum(WBC_SIZES, longest)
    shares = []
    for size in sizes:
        before = total[:-size]
        behind = total[size:]
        higher = behind > before
        shares.append(higher.mean())
    return float(np.mean(shares))


def mean_of_lowest(values: Floats) -> float:
    """Mean of the lowest floor(LOWEST * n) values, at least one (Shi et al. 2024, equation 1)."""
    share = int(LOWEST * len(values))
    count = max(1, share)
    parted = np.partition(values, count - 1)
    lowest = parted[:count]
    return float(lowest.mean())


def word_buckets(text: str) -> list[int]:
    """The distinct words of a text, each hashed into one of FEATURES buckets."""
    words = re.findall(r"\w+", text.lower())
    buckets = set()
    for word in set(words):
        # CRC is the same in every process, which Python's hash of a string is not.
        encoded = word.encode("utf-8", "replace")
        code = zlib.crc32(encoded)
        buckets.add(code % FEATURES)
    return sorted(buckets)
