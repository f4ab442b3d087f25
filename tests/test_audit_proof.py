"""The rule's seed is found in the losses of a model that was trained with it, and in no others."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from audit_records import made_up_audit, made_up_records
from scipy.stats import rankdata
from toy_tokenizers import byte_level

from goldfish import Goldfish
from goldfish.audit.questions import proof
from goldfish.audit.questions.proof import centred_ranks, decisions_of, seed_test
from goldfish.audit.render import rule_words

RULE = Goldfish(k=4, h=5, max_kept=4, seed=7)


def documents(count, length=40):
    return np.random.default_rng(1).integers(250, size=(count, length)).tolist()


def test_ranks_share_ties_and_are_centred():
    for losses in ([3.0], [1.0, 1.0], [2.0, 0.5, 7.0, 0.5], [0.0, 0.0, 0.0, 4.0]):
        ranks = centred_ranks(np.array(losses))
        above_half = 0.5 * (len(losses) > 1)
        expected = (rankdata(losses) - 1) / max(1, len(losses) - 1) - above_half
        np.testing.assert_allclose(ranks, expected, atol=1e-12)
        assert abs(ranks.sum()) < 1e-12
    assert len(centred_ranks(np.zeros(0))) == 0


@pytest.mark.parametrize("strategy", ["hash", "letters"])
def test_decisions_are_those_of_each_row_alone(strategy):
    rows = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7], list(range(50, 90)), [4]]
    lengths = [3, 2, 40, 1]
    rule = replace(RULE, strategy=strategy, h=2).bind(byte_level())
    for seed in (0, 7):
        expected = []
        for row, length in zip(rows, lengths, strict=True):
            dropped = replace(rule, seed=seed).dropped(torch.tensor(row))
            expected += dropped.tolist()[-length:]
        assert decisions_of(rule, rows, lengths)(seed).tolist() == expected


def test_a_model_trained_under_the_rule_gives_the_least_possible_p():
    rows = documents(10)
    lengths = [20] * len(rows)
    under = decisions_of(RULE, rows, lengths)
    # Losses of tokens that the training dropped are one nat higher on average.
    losses = np.random.default_rng(2).exponential(1.0, 200) + under(7)
    windows = list(losses.reshape(10, 20))
    found = seed_test(windows, under, 7)
    assert found.p == 1 / 1000
    assert found.gap > 3 * found.deviation
    assert seed_test(windows, under, 8).p > 0.05, "under another seed it is nothing"


def test_p_is_uniform_for_models_that_never_saw_the_rule():
    """200 seeds against the losses of one model: p must not be small too often."""
    rows = documents(4)
    lengths = [30] * len(rows)
    under = decisions_of(RULE, rows, lengths)
    losses = list(np.random.default_rng(3).exponential(1.0, (4, 30)))
    p = [seed_test(losses, under, seed, others=19).p for seed in range(200)]
    # Each p is uniform on 0.05..1, but all share one model: bounds of four standard errors.
    for level in (0.05, 0.25, 0.5):
        error = (level * (1 - level) / 200) ** 0.5
        assert abs(np.mean(np.array(p) <= level) - level) < 4 * error


def exact_gap(windows, dropped):
    """In fractions, with every rank counted out; None if one kind is missing."""
    sides = {True: [], False: []}
    place = 0
    for window in windows:
        for loss in window:
            below = sum(other < loss for other in window)
            equal = sum(other == loss for other in window)
            rank = Fraction(2 * below + equal - 1, 2)
            # Not centred: that takes the same from both sides.
            sides[dropped[place]].append(rank / max(1, len(window) - 1))
            place += 1
    if not sides[True] or not sides[False]:
        return None
    means = {side: sum(ranks) / len(ranks) for side, ranks in sides.items()}
    return means[True] - means[False]


@pytest.mark.parametrize("case", range(12))
def test_p_against_fractions(case):
    """Short windows with equal losses, so that gaps tie; seeds of 64 bits; the same text twice."""
    choose = np.random.default_rng(case)
    lengths = choose.integers(2, 7, size=1 + case % 3).tolist()
    rows = [choose.integers(3, size=length + 2).tolist() for length in lengths]
    rows.append(rows[0])
    lengths.append(lengths[0])
    losses = [choose.integers(4, size=length) / 4 for length in lengths]
    seed = (0, 7, 2**63, 2**64 - 1)[case % 4]
    rule = Goldfish(k=(2, 4)[case % 2], h=2, seed=seed)

    def gap_under(other):
        dropped = []
        for row, length in zip(rows, lengths, strict=True):
            decided = replace(rule, seed=other).dropped(torch.tensor(row)).tolist()
            dropped += decided[-length:]
        return exact_gap(losses, dropped)

    found = seed_test(losses, decisions_of(rule, rows, lengths), seed, others=60)
    claimed = gap_under(seed)
    if claimed is None:
        assert found is None
        return
    gaps = [gap_under(other) for other in proof._other_seeds(seed, 60)]
    gaps = [gap for gap in gaps if gap is not None]
    at_least = 1 + sum(gap >= claimed for gap in gaps)
    assert found.p == pytest.approx(at_least / (1 + len(gaps)), abs=1e-12)


def test_p_is_uniform_where_most_seeds_drop_nothing():
    """20 tokens and k=50: among the seeds that can be tested p is not small too often."""
    row = np.random.default_rng(1).integers(250, size=20).tolist()
    losses = [np.random.default_rng(2).exponential(size=20)]
    under = decisions_of(Goldfish(k=50, h=3), [row], [20])
    found = [seed_test(losses, under, seed, others=60) for seed in range(100)]
    p = np.array([each.p for each in found if each is not None])
    assert 20 < len(p) < 50
    for level in (0.25, 0.5):
        error = (level * (1 - level) / len(p)) ** 0.5
        assert abs(np.mean(p <= level) - level) < 4 * error


@pytest.mark.parametrize(
    "rows", [[], [[5]], [[5, 6]]], ids=["none", "one token", "two tokens"]
)
def test_nothing_to_compare(rows):
    lengths = [len(row) for row in rows]
    losses = [np.ones(length) for length in lengths]
    found = seed_test(losses, decisions_of(RULE, rows, lengths), 7, others=9)
    assert found is None or 0.1 <= found.p <= 1


def of_audit(trained, claimed, **more):
    """An audit that claims one rule, of a model that learned the kept tokens of another."""
    records = made_up_records(
        "members", 60, 0.95, rule=trained, recall_dropped=0.5, **more
    )
    return made_up_audit(records, run={"rule": claimed.to_dict()})


def explanation(audit):
    (found,) = [e for e in audit.verdict["explanations"] if e["question"] == "rule"]
    return found


def test_an_audit_finds_the_claimed_rule_and_no_other():
    rule = Goldfish(k=3, h=4)
    audit = of_audit(rule, rule)
    assert audit["members.rule_p"].value == 0.001
    assert audit["members.rule_p"].documents == 60
    assert audit["members.rule_gap"].value > 0.1
    assert explanation(audit)["answer"] == "yes"
    assert "is in the weights (p = .001)" in explanation(audit)["why"]
    other = of_audit(rule, replace(rule, seed=1))
    assert other["members.rule_p"].value > 0.05
    assert explanation(other)["answer"] == "undecided"
    assert "no sign of the claimed rule" in explanation(other)["why"]
    assert audit.verdict["outcome"] == other.verdict["outcome"]


def test_windows_from_further_on_are_left_out():
    """The rule reads what comes before them, which their records lack."""
    rule = Goldfish(k=3, h=4)
    audit = of_audit(rule, rule, offset=5)
    assert audit["members.rule_p"].n == 0
    assert audit["members.rule_p"].reason


@pytest.mark.parametrize("strategy", ["static", "random", "letters", "entropy"])
def test_what_cannot_be_tested_is_named(strategy):
    rule = Goldfish(k=3, h=4)
    audit = of_audit(rule, replace(rule, strategy=strategy))
    assert audit["members.rule_p"].value is None
    assert explanation(audit)["answer"] == "not asked"
    assert strategy in explanation(audit)["why"]


def test_rules_that_differ_by_source_are_not_tested_as_one():
    """A rule is known for every text: "no rule is known" would be wrong."""
    rules = {"web": Goldfish(k=3, h=4), "books": Goldfish(k=8, h=4)}
    sources = {name: {"rule": rule.to_dict()} for name, rule in rules.items()}
    records = made_up_records("members", 20, 0.8, rule=rules["web"])
    audit = made_up_audit(records, run={"receipt": {"sources": sources}})
    assert "differ by source" in audit["members.rule_p"].reason
    assert explanation(audit)["answer"] == "not asked"
    assert "differ by source" in explanation(audit)["why"]
    assert rule_words(audit.run) == "differs by source (2 sources)"
    assert audit["members.dropped_share"].value is not None


def test_a_checkpoint_without_a_rule_is_not_asked():
    audit = made_up_audit(made_up_records("members", 3, 0.8))
    assert audit["members.rule_p"].value is None
    assert all(e["question"] != "rule" for e in audit.verdict["explanations"])
