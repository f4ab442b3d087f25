"""Was the claimed rule used? Dropped beside kept tokens, and an exact test of the rule's seed.

The seed is a randomization. A model that was not trained with it cannot tell the tokens that this
seed drops from those that another seed drops, so under such a model every seed is equally likely
to have the largest gap between the losses of dropped and of kept tokens. That makes the p-value
exact for any model and any texts: it needs no held-out texts and no further run of the model.

What it does not show is in docs/proof.md: a seed can be searched for after the training.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pyarrow.compute import is_valid, list_flatten, list_value_length

from goldfish.audit.intervals import Bools, Figure, Figures, Floats, Side

if TYPE_CHECKING:
    from goldfish.rule import Goldfish

# Strategies that decide from the seed and the text alone: "static" and "reference" have no seed,
# "random" draws anew in every step.
SEEDED = ("hash", "letters")
OTHER_SEEDS = 999  # the least possible p-value is 1 / (OTHER_SEEDS + 1)
# Every seed decides about so many tokens at most: 5 seconds for 1,000 seeds on one core.
MOST_TOKENS = 2**16
SURE = 0.01  # the greatest p that tells of the rule
EQUAL = 1e-9  # gaps that differ by less are equal

NO_RULE = "no rule is known for this checkpoint"
RULES_DIFFER = "rules that differ by source are not tested as one"
# Strategies of which a text alone does not show what they dropped.
UNKNOWN = {
    "random": 'strategy "random" drops other tokens in every epoch',
    "entropy": 'strategy "entropy" drops what its guide is uncertain of, and it is not asked',
}
PROOF = ("rule_p", "rule_gap")
ATTRIBUTION = (
    "dropped_share",
    "teacher_forced_accuracy_dropped",
    "teacher_forced_accuracy_kept",
)

Decisions = Callable[[int], Bools]


def figures(side: Side) -> Iterator[Figure]:
    """Dropped beside kept tokens: was the claimed rule used, and how well is either predicted?"""
    side = side.as_trained
    yield from _proof(side)
    ruled = is_valid(side.table["dropped"]).to_numpy()
    if not ruled.any():
        if side.rule is None:
            reason = _why_no_rule(side)
        else:
            strategy = side.rule.strategy
            reason = UNKNOWN.get(strategy, "no text was asked as in training")
        for name in ATTRIBUTION:
            yield Figure(side.split, name, reason=reason)
        return
    side = side.only(ruled)
    columns = token_counts(side.table).T
    right_dropped, dropped, right_kept, kept = columns
    tokens = dropped + kept
    yield side.token_rate("dropped_share", dropped, tokens)
    yield side.token_rate("teacher_forced_accuracy_dropped", right_dropped, dropped)
    yield side.token_rate("teacher_forced_accuracy_kept", right_kept, kept)


def _proof(side: Side) -> Iterator[Figure]:
    """The test of the rule's seed with the first windows of the split."""
    rule = side.rule
    reason = _why_not_tested(side)
    if rule is None or reason:
        for name in PROOF:
            yield Figure(side.split, name, reason=reason)
        return
    # Windows from further on lack what comes before them, which the rule reads.
    is_first = side.numbers("offset") == 0
    side = side.only(is_first)
    # The first windows, as many as 1,000 seeds can decide about in seconds.
    of_prefix = side.lengths("prefix_ids")
    lengths = of_prefix + side.lengths("suffix_ids")
    few_enough = np.cumsum(lengths) <= MOST_TOKENS
    used = max(1, int(np.count_nonzero(few_enough)))
    windows = side.table.slice(0, used)
    prefixes = windows["prefix_ids"].to_pylist()
    suffixes = windows["suffix_ids"].to_pylist()
    rows = []
    for prefix, suffix in zip(prefixes, suffixes, strict=True):
        rows.append(prefix + suffix)
    nll = windows["nll"].to_pylist()
    losses = list(map(np.array, nll))
    tested = list(map(len, losses))
    dropped_under = decisions_of(rule, rows, tested)
    found = seed_test(losses, dropped_under, rule.seed)
    tokens = sum(tested)
    documents = len(windows["document"].unique())
    about = Figure(side.split, n=tokens, documents=documents)
    if found is None:
        reason = "the rule drops none of these tokens, or all of them"
        for name in PROOF:
            yield replace(about, figure=name, reason=reason)
        return
    yield replace(about, figure="rule_p", value=found.p)
    yield replace(about, figure="rule_gap", value=found.gap)


def _why_no_rule(side: Side) -> str:
    receipt = side.run["receipt"] or {}
    if "sources" in receipt:
        return RULES_DIFFER
    return NO_RULE


def _why_not_tested(side: Side) -> str:
    """Why the rule's seed cannot be tested; "" if it can."""
    rule = side.rule
    if rule is None:
        return _why_no_rule(side)
    if rule.strategy in UNKNOWN:
        return UNKNOWN[rule.strategy]
    if rule.strategy not in SEEDED:
        return f'strategy "{rule.strategy}" has no seed that other seeds could stand beside'
    if rule.strategy == "letters" and rule.vocabulary is None:
        return 'strategy "letters" needs the tokenizer'
    return ""


def token_counts(table: pa.Table) -> Floats:
    """(records, 4), from records with `dropped`.

    Dropped tokens that are predicted teacher-forced; dropped tokens; the same for kept tokens.
    """
    count = len(table)
    lengths = list_value_length(table["dropped"]).to_numpy()
    # The record of each token, of all records in one row.
    numbers = np.arange(count)
    records = np.repeat(numbers, lengths)
    dropped = list_flatten(table["dropped"]).to_numpy()
    correct = list_flatten(table["correct"]).to_numpy()
    columns = []
    for chosen in (dropped, ~dropped):
        right = correct & chosen
        for tokens in (right, chosen):
            in_records = np.bincount(records, tokens, count)
            columns.append(in_records)
    return np.stack(columns, axis=1)


def answer(run: Mapping[str, Any], figures: Figures) -> tuple[str, str] | None:
    """Was the model trained under the claimed rule? The answer and why; None without a claim."""
    found = figures.get("members", "rule_p")
    if found is None or found.reason == NO_RULE:
        return None
    if found.value is None:
        return "not asked", str(found.reason)
    p = f"p = {found.value:.3f}".replace("0.", ".")
    rule = run["rule"] or {}
    seed = rule.get("seed", 0)
    compared = f"the tokens that seed {seed} drops, compared with those of other seeds"
    if found.value <= SURE:
        return "yes", f"the claimed rule is in the weights ({p}): {compared}"
    return "undecided", f"no sign of the claimed rule ({p}): {compared}"


@dataclass(frozen=True)
class SeedTest:
    """The result of `seed_test`.

    p: the share of seeds, the claimed one included, whose gap is at least as large. Seeds that
        drop none or all of these tokens do not count.
    gap: the mean rank of dropped tokens minus that of kept ones, with the ranks of each window
        scaled to -0.5..0.5, beyond the mean of the same under the other seeds. Theirs is not 0 with
        max_kept: all seeds share the drops that come when no hash has hit for long.
    deviation: the standard deviation over the other seeds.
    """

    p: float
    gap: float
    deviation: float


def seed_test(
    losses: Sequence[Floats],
    dropped_under: Decisions,
    seed: int,
    others: int = OTHER_SEEDS,
) -> SeedTest | None:
    """Compare the losses of tokens that `seed` drops with those that other seeds drop.

    The ranks are taken within each window, so that it does not matter how hard a window is.

    Args:
        losses: for each window the losses of its tokens, nats; (T_i,) each.
        dropped_under: a function from a seed to its decisions about all these tokens, bool,
            (sum of T_i,).
        seed: the claimed one.
        others: how many other seeds to compare with. They are drawn with `seed`, always the same.

    Returns:
        None if no token or every token is dropped, so that there is nothing to compare.

    >>> def dropped_under(seed):
    ...     return np.random.default_rng(seed).random(40) < 0.25
    >>> losses = [1.0 + dropped_under(7)]  # of a model that did not learn what seed 7 drops
    >>> seed_test(losses, dropped_under, seed=7, others=99).p
    0.01
    """
    claimed = dropped_under(seed)
    if claimed.all() or not claimed.any():
        return None
    of_windows = list(map(centred_ranks, losses))
    ranks = np.concatenate(of_windows)
    gap = _gap(ranks, claimed)
    gaps = np.empty(others)
    seeds = _other_seeds(seed, others)
    for i, other in enumerate(seeds):
        dropped = dropped_under(other)
        gaps[i] = _gap(ranks, dropped)
    # Seeds without a gap are left out, as the claimed one would have been: with 20 tokens and k=50
    # two of three have none, and a p among all of them was below .05 in 10% of null tests.
    has_gap = np.isfinite(gaps)
    finite = gaps[has_gap]
    # Equal gaps differ by rounding.
    at_least = finite >= gap - EQUAL
    # The claimed seed is one of the 1,000, so that p is never 0.
    hits = 1 + int(np.count_nonzero(at_least))
    tried = 1 + len(finite)
    p = hits / tried
    if len(finite) == 0:
        return SeedTest(p, gap, deviation=0.0)
    usual = float(finite.mean())
    deviation = float(finite.std())
    beyond = gap - usual
    return SeedTest(p, beyond, deviation)


def centred_ranks(losses: Floats) -> Floats:
    """Ranks of one window's losses, scaled to -0.5..0.5; equal losses share their mean rank.

    >>> centred_ranks(np.array([2.0, 0.5, 7.0, 0.5])).round(3).tolist()
    [0.167, -0.333, 0.5, -0.333]
    """
    if len(losses) < 2:
        return np.zeros(len(losses))
    found = np.unique(losses, return_inverse=True, return_counts=True)
    _, place, counts = found
    # A loss that occurs c times takes the ranks e - c .. e - 1, whose mean is e - (c + 1) / 2.
    ends = np.cumsum(counts)
    half = (counts + 1) / 2
    ranks = ends - half
    last = len(losses) - 1
    scaled: Floats = ranks[place] / last - 0.5
    return scaled


def decisions_of(
    rule: "Goldfish",
    rows: Sequence[Sequence[int]],
    lengths: Sequence[int],
) -> Decisions:
    """A function from a seed to what the rule with that seed drops of the ends of documents.

    `secrets=` is left out: it drops the same tokens under every seed, which tells nothing.

    Args:
        rule: bound to the tokenizer, if it reads text.
        rows: token ids from the start of each document, (T_i,) each.
        lengths: the decisions are about the last `lengths[i]` ids of rows[i].
    """
    import torch

    # All rows are packed into one: no padding, and one call for each seed. Rows a b c and d e, the
    # last 2 and the last 1 asked: ids a b c d e, positions 0 1 2 0 1, chosen 0 1 1 0 1.
    packed: list[int] = []
    places: list[int] = []
    asked: list[bool] = []
    for row, length in zip(rows, lengths, strict=True):
        packed += row
        places += range(len(row))
        before = len(row) - length
        asked += [False] * before
        asked += [True] * length
    ids = torch.tensor(packed, dtype=torch.int64)
    positions = torch.tensor(places, dtype=torch.int64)
    chosen = np.array(asked, dtype=bool)

    def dropped_under(seed: int) -> Bools:
        with_seed = replace(rule, seed=seed, secrets=None)
        dropped = with_seed.dropped(ids, positions)
        of_asked: Bools = dropped.numpy()[chosen]
        return of_asked

    return dropped_under


def _gap(ranks: Floats, dropped: Bools) -> float:
    """The mean rank of dropped tokens minus that of kept ones; -inf if one kind is missing."""
    if dropped.all() or not dropped.any():
        return float("-inf")
    of_dropped = ranks[dropped].mean()
    of_kept = ranks[~dropped].mean()
    return float(of_dropped - of_kept)


def _other_seeds(seed: int, count: int) -> list[int]:
    """`count` distinct seeds, none of them `seed`; the same ones in every call."""
    # Other ones for each claim, so that the results of several claims are independent.
    generator = np.random.default_rng(seed)
    drawn: dict[int, None] = {}
    while len(drawn) < count:
        other = int(generator.integers(2**63))
        if other != seed:
            drawn[other] = None
    return list(drawn)
