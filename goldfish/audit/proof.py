"""Is the claimed rule in the weights? An exact test of the rule's seed, from one audit.

The seed is a randomization. A model that was not trained with it cannot tell the tokens that this
seed drops from those that another seed drops, so under such a model every seed is equally likely
to have the largest gap between the losses of dropped and of kept tokens. That makes the p-value
exact for any model and any texts: it needs no held-out texts and no further run of the model.

What it does not show is in docs/proof.md: a seed can be searched for after the training.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from goldfish.audit.intervals import Bools, Floats

if TYPE_CHECKING:
    from goldfish.rule import Goldfish

# Strategies that decide from the seed and the text alone: "static" and "reference" have no seed,
# "random" draws anew in every step.
SEEDED = ("hash", "letters")
OTHER_SEEDS = 999  # the least possible p-value is 1 / (OTHER_SEEDS + 1)
# Every seed decides about so many tokens at most: 5 seconds for 1,000 seeds on one core.
MOST_TOKENS = 2**16

EQUAL = 1e-9  # gaps that differ by less are equal

Decisions = Callable[[int], Bools]


@dataclass(frozen=True)
class SeedTest:
    """The result of `seed_test`.

    p: the share of seeds, the claimed one included, whose gap is at least as large. Seeds that
        drop none or all of these tokens do not count.
    gap: the mean rank of dropped tokens minus that of kept ones, with the ranks of each window
    scaled to -0.5..0.5, beyond the mean of the same under the other seeds: with max_kept they
    share the drops that come when no hash has hit for long, so that their gap is not 0.
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
    of_windows = [centred_ranks(each) for each in losses]
    ranks = np.concatenate([*of_windows, np.zeros(0)])
    claimed = dropped_under(seed)
    if claimed.all() or not claimed.any():
        return None
    gap = _gap(ranks, claimed)
    drawn = _other_seeds(seed, others)
    gaps = np.array([_gap(ranks, dropped_under(other)) for other in drawn])
    # Seeds without a gap are left out, as the claimed one would have been: with 20 tokens and k=50
    # two of three have none, and a p among all of them was below .05 in 10% of null tests.
    finite = gaps[np.isfinite(gaps)]
    # The claimed seed is one of the 1,000, so that p is never 0. Equal gaps differ by rounding.
    at_least = 1 + int(np.count_nonzero(finite >= gap - EQUAL))
    usual = 0.0
    deviation = 0.0
    if len(finite):
        usual = float(finite.mean())
        deviation = float(finite.std())
    return SeedTest(
        p=at_least / (1 + len(finite)),
        gap=gap - usual,
        deviation=deviation,
    )


def centred_ranks(losses: Floats) -> Floats:
    """Ranks of one window's losses, scaled to -0.5..0.5; equal losses share their mean rank.

    >>> centred_ranks(np.array([2.0, 0.5, 7.0, 0.5])).round(3).tolist()
    [0.167, -0.333, 0.5, -0.333]
    """
    if len(losses) < 2:
        return np.zeros(len(losses))
    _, place, counts = np.unique(losses, return_inverse=True, return_counts=True)
    # A loss that occurs c times takes the ranks e - c .. e - 1, whose mean is e - (c + 1) / 2.
    ranks = np.cumsum(counts) - (counts + 1) / 2
    scaled: Floats = ranks[place] / (len(losses) - 1) - 0.5
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

    # All rows are packed into one: no padding, and one call for each seed.
    packed: list[int] = []
    places: list[int] = []
    asked: list[bool] = []
    for row, length in zip(rows, lengths, strict=True):
        before = len(row) - length
        packed += row
        places += range(len(row))
        asked += [False] * before + [True] * length
    ids = torch.tensor(packed, dtype=torch.int64)
    positions = torch.tensor(places, dtype=torch.int64)
    chosen = np.array(asked, dtype=bool)

    def dropped_under(seed: int) -> Bools:
        with_seed = replace(rule, seed=seed, secrets=None)
        dropped: Bools = with_seed.dropped(ids, positions).numpy()[chosen]
        return dropped

    return dropped_under


def _gap(ranks: Floats, dropped: Bools) -> float:
    """The mean rank of dropped tokens minus that of kept ones; -inf if one kind is missing."""
    if dropped.all() or not dropped.any():
        return float("-inf")
    return float(ranks[dropped].mean() - ranks[~dropped].mean())


def _other_seeds(seed: int, count: int) -> list[int]:
    """`count` distinct seeds, none of them `seed`."""
    # Other ones for each claim, so that the results of several claims are independent.
    generator = np.random.default_rng(seed)
    drawn: dict[int, None] = {}
    while len(drawn) < count:
        other = int(generator.integers(2**63))
        if other != seed:
            drawn[other] = None
    return list(drawn)
