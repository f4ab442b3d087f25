"""Does the model work at all? Damaged weights, a wrong configuration or the wrong tokenizer must
not end in a PASS: a model that predicts nothing recites nothing either.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from math import log
from typing import TYPE_CHECKING, Any

import numpy as np

from goldfish.audit.intervals import SPLITS, Figures, percent
from goldfish.audit.windows import Survey

if TYPE_CHECKING:
    from goldfish.audit.score import Scorer

# What is read of a split. Behind the first tokens of a suffix the shuffled prefix is
# far away, and a damaged model is harder to tell from one that works (benchmarks/sanity.py).
WINDOWS = 16
TOKENS = 16  # of each suffix
# Nats per token that a prefix must be worth to the first tokens of its suffix, beside its tokens in
# a shuffled order. Measured on SmolLM2-135M: 2.00 as it is, 0.22 with the wrong layout of rotary
# factors, 0.12 with a wrong eps, -0.02 with its heads in the wrong order (benchmarks/sanity.py).
# The small models of recipes/memorize.py have 0.30 to 1.84: the threshold lies between the two.
GAIN = 0.26
# Of a uniform guess's loss: a model with more knows nothing about such texts.
WORKS = 0.9


def measure(
    scorer: "Scorer", surveys: Mapping[str, Survey]
) -> dict[str, dict[str, float]]:
    """What a prefix is worth to the model, by split, up to the first split where it is enough.

    A model that works predicts the first tokens of a suffix better after the prefix than after the
    same tokens in a shuffled order. Damaged ones (positions, heads, norms) lose most of the
    difference. Means in nats per token over the first windows.
    """
    found = {}
    for split, each in surveys.items():
        choose = np.random.default_rng(0)
        ordered = []
        shuffled = []
        # After the generation prompt of a chat template the answer may be an unlikely one.
        windows = (window for window, _ in each.windows())
        as_trained = filter(lambda window: window.prompt_kind == "training", windows)
        for window in islice(as_trained, WINDOWS):
            # The first token stays: it may be a BOS, without which some models fail.
            first, *others = window.prefix
            disorder = choose.permutation(others).tolist()
            start = window.suffix[:TOKENS]
            ordered.append(replace(window, ids=window.prefix + start))
            shuffled.append(replace(window, ids=[first, *disorder, *start]))
        if not ordered:  # no text of this split was asked as in training
            continue
        nll = scorer.mean_nll(ordered)
        nll_shuffled = scorer.mean_nll(shuffled)
        found[split] = {
            "windows": len(ordered),
            "nll": nll,
            "nll_shuffled": nll_shuffled,
        }
        # One split is enough: it costs as much as scoring so many windows.
        if nll_shuffled - nll > GAIN:
            break
    return found


def answer(run: Mapping[str, Any], figures: Figures) -> tuple[bool, str]:
    """Whether the model works, and why: it predicts the texts of either split better than a guess,
    and uses what stands before them.

    Not the held-out split alone: an overfitted model can be worse than a uniform guess there.
    """
    losses = [each for each in figures.select(figure="nll") if each.value is not None]
    if not losses:
        return False, "Sanity check failed: no text was asked as in training"
    # The split that the model predicts better speaks for it.
    best = min(losses, key=lambda each: each.value or 0.0)
    loss = best.value or 0.0
    accuracy = figures.get(best.split, "teacher_forced_accuracy")
    right = (accuracy.value if accuracy is not None else None) or 0.0
    vocabulary = run["protocol"]["vocabulary"]
    guess = log(vocabulary)
    by_chance = 1 / vocabulary
    numbers = (
        f"{SPLITS[best.split]}: {loss:.2f} nats per token (a uniform guess: {guess:.2f}), "
        f"{percent(right)} of tokens predicted (by chance: {percent(by_chance)})"
    )
    if loss >= WORKS * guess or right <= by_chance:
        why = (
            f"no better than guessing on these texts; {numbers}; a model that works has less than "
            f"{WORKS * guess:.2f} nats per token and predicts more tokens than chance does"
        )
        return False, f"Sanity check failed: {why}"
    if why := _context_unused(run["sanity"]):
        return False, f"Sanity check failed: {why}"
    return True, f"Sanity check passed: better than guessing on these texts; {numbers}"


def _context_unused(measured: Mapping[str, Mapping[str, float]] | None) -> str:
    """In words that no split shows a use of the context; "" if one does, or nothing was measured.

    measured: by `measure`.
    """
    gains = {}
    for split, each in (measured or {}).items():
        gains[split] = each["nll_shuffled"] - each["nll"]
    if not measured or max(gains.values()) > GAIN:
        return ""
    best = measured[max(gains, key=lambda split: gains[split])]
    return (
        "the model hardly uses the text before a token "
        f"({best['nll']:.2f} nats per token after it, {best['nll_shuffled']:.2f} after its tokens "
        f"in random order; the difference should exceed {GAIN})"
    )
