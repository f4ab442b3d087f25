"""Membership figures against brute force, scikit-learn and published formulas; traps to be seen."""

import math
import zlib
from dataclasses import replace

import numpy as np
import pytest
from audit_records import (
    PREFIX,
    SUFFIX,
    Words,
    made_up_audit,
    made_up_records,
    made_up_score,
)
from sklearn import metrics

from goldfish import Goldfish
from goldfish.audit.intervals import Figures
from goldfish.audit.questions import membership
from goldfish.audit.questions.membership import (
    Ranking,
    Scores,
    mean_of_lowest,
    word_buckets,
    word_scores,
)
from goldfish.audit.records import make_record
from goldfish.audit.windows import Window


def side(scores, texts=None, documents=None, name="loss"):
    scores = np.asarray(scores, dtype=float)
    texts = texts if texts is not None else ["same words"] * len(scores)
    documents = np.arange(len(scores)) if documents is None else documents
    lengths = np.array([len(text) for text in texts], dtype=float)
    return Scores(
        documents, {name: scores}, [word_buckets(text) for text in texts], lengths
    )


def figures_of(members, heldout):
    return Figures(membership.figures(members, heldout))


def attack(members, heldout, figure="attack_auc", setting="loss", x=None):
    return figures_of(members, heldout).get("both", figure, setting, x)


def drawn(n, shift, seed, ties=True):
    values = np.random.default_rng(seed).normal(shift, 1, n)
    return np.round(values, 1) if ties else values


def brute_force(members, heldout, rates):
    auc = np.mean([(a > b) + 0.5 * (a == b) for a in members for b in heldout])
    points = [
        (np.mean(heldout >= t), np.mean(members >= t))
        for t in {math.inf, *members, *heldout}
    ]
    return auc, [max(true for false, true in points if false <= fpr) for fpr in rates]


def test_auc_and_tpr_equal_brute_force():
    """Weights are repetitions, which the bootstrap relies on; with ties and without."""
    rates, generator = (0.0, 0.1, 0.25, 1.0), np.random.default_rng(0)
    for ties in (True, False):
        members, heldout = drawn(30, 0.7, 0, ties), drawn(20, 0, 1, ties)
        weights = np.stack([np.ones(50, dtype=int), generator.integers(0, 4, 50)])
        found = Ranking(members, heldout).figures(weights.astype(float), rates)
        for row, times in zip(found, weights, strict=True):
            auc, tpr = brute_force(
                np.repeat(members, times[:30]), np.repeat(heldout, times[30:]), rates
            )
            assert row == pytest.approx([auc, *tpr], rel=1e-12)


def test_auc_and_roc_equal_scikit_learn():
    members, heldout = drawn(500, 0.5, 0), drawn(700, 0, 1)
    labels, scores = [1] * 500 + [0] * 700, np.concatenate([members, heldout])
    rates = (0.001, 0.01, 0.1, 0.5)
    false, true, _ = metrics.roc_curve(labels, scores, drop_intermediate=False)
    expected = [
        metrics.roc_auc_score(labels, scores),
        *(true[false <= rate].max() for rate in rates),
    ]
    ranking = Ranking(members, heldout)
    assert ranking.figures(np.ones(1200), rates) == pytest.approx(expected, rel=1e-12)
    assert np.allclose(ranking.curve(np.ones(1200)), [false, true], rtol=1e-12)


def test_intervals_of_auc_and_tpr_hold_the_truth(monkeypatch):
    """Scores N(1, 1) and N(0, 1): AUC is Phi(1/sqrt 2)."""
    monkeypatch.setattr(membership, "RESAMPLES", 300)
    truth = 0.5 * (1 + math.erf(1 / 2))
    held = 0
    for seed in range(30):
        auc = attack(
            side(drawn(60, 1, [seed, 1], False)), side(drawn(60, 0, [seed, 2], False))
        )
        held += auc.low <= truth <= auc.high
    assert held >= 25


def test_tpr_needs_ten_heldout_documents_past_the_threshold():
    members = side(drawn(300, 1, 0, False))
    enough, short = (
        figures_of(members, side(drawn(n, 0, 1, False))) for n in (1000, 999)
    )
    tpr = enough.get("both", "attack_tpr", "loss", 0.01)
    assert tpr.low < tpr.value < tpr.high
    assert tpr.value == pytest.approx(0.0923, abs=0.06)  # 1 - Phi(2.326 - 1)
    for figure, needed in (
        (enough.get("both", "attack_tpr", "loss", 0.001), "0.1% needs 10,000"),
        (short.get("both", "attack_tpr", "loss", 0.01), "1.0% needs 1,000"),
    ):
        assert (figure.value, figure.low, figure.high) == (None, None, None)
        assert needed in figure.reason
    clustered = side(drawn(1000, 0, 1, False), documents=np.arange(1000) // 2)
    assert attack(members, clustered, "attack_tpr", x=0.01).value is None


def test_windows_of_a_document_do_not_narrow_the_interval():
    members, heldout = drawn(40, 0.5, 0, False), drawn(40, 0, 1, False)
    single = attack(side(members), side(heldout))
    documents = np.repeat(np.arange(40), 5)
    copies = attack(
        side(np.repeat(members, 5), documents=documents),
        side(np.repeat(heldout, 5), documents=documents),
    )
    assert (copies.low, copies.high) == pytest.approx((single.low, single.high))
    assert (copies.n, copies.documents) == (400, 80)


def test_full_separation_still_has_a_lower_bound():
    auc = attack(side(np.arange(32) + 100.0), side(np.arange(40.0)))
    assert auc.value == auc.high == 1.0
    assert auc.low == pytest.approx(0.025 ** (1 / 32), rel=1e-9)
    few = attack(side(np.arange(9.0)), side(np.arange(40.0)))
    assert (few.low, few.reason) == (
        None,
        "9 documents on one side; an interval needs 10",
    )


def test_headline_pays_for_the_choice():
    generator = np.random.default_rng(0)
    members, heldout = (
        Scores(
            np.arange(100),
            {name: generator.normal(shift, 1, 100) for name in ("loss", *"abcdefg")},
            [word_buckets("same")] * 100,
            np.ones(100),
        )
        for shift in (0.3, 0)
    )
    found = figures_of(members, heldout)
    (widened,) = found.select(figure="membership_auc")
    attacks = found.select(figure="attack_auc")
    plain = found.get("both", "attack_auc", widened.setting)
    assert plain.value == widened.value == max(each.value for each in attacks)
    assert widened.low < plain.low < plain.high < widened.high


def words(n, seed, extra=""):
    generator = np.random.default_rng(seed)
    return [
        " ".join(f"w{i}" for i in generator.zipf(1.3, 60) % 5000) + extra
        for _ in range(n)
    ]


def test_blind_baseline_is_at_chance_on_a_random_split(monkeypatch):
    """Mean AUC over 60 random splits near one half, and few of them called confounded."""
    monkeypatch.setattr(membership, "RESAMPLES", 2)
    aucs, confounded = [], 0
    for seed in range(60):
        found = figures_of(
            side(drawn(60, 1, seed), words(60, [seed, 1])),
            side(drawn(60, 0, seed), words(60, [seed, 2])),
        )
        aucs.append(found.get("both", "blind_auc", "words").value)
        confounded += found.get("both", "confounded").value
    assert 0.45 < np.mean(aucs) < 0.55
    assert confounded <= 6  # 3 are expected: one split in twenty


@pytest.mark.parametrize("extra", [" in 2024", ". " * 40])
def test_texts_that_differ_hide_the_headline(extra):
    """Dates, or lengths, tell the splits apart without any model."""
    found = figures_of(
        side(drawn(60, 2, 0), words(60, 1)), side(drawn(60, 0, 0), words(60, 2, extra))
    )
    assert found.get("both", "confounded").value == 1
    headline = found.get("both", "membership_auc")
    assert headline.value is None
    assert "may differ without regard to the model" in headline.reason
    assert found.get("both", "attack_auc", "loss").value > 0.8


def test_words_are_tested_on_other_documents():
    """Ten windows of a document share a word: known from a sibling, it would tell everything."""
    texts = [f"unique{split}{i // 10} common" for split in "ab" for i in range(200)]
    documents = np.arange(200) // 10
    a, b = word_scores(
        side(np.zeros(200), texts[:200], documents),
        side(np.zeros(200), texts[200:], documents),
    )
    for scores in (a, b):
        assert np.isnan(scores[documents % 2 == 0]).all()
        assert np.abs(scores[documents % 2 == 1]).max() < 1e-9


def test_scores_by_their_published_formulas():
    generator = np.random.default_rng(0)
    window = Window(
        "members", 0, "d", generator.integers(50, size=PREFIX + SUFFIX).tolist(), PREFIX
    )
    mu, sigma = generator.normal(-3, 0.5, 17), generator.random(17) + 0.5
    score = made_up_score(
        window,
        generator.random(17) < 0.5,
        generator,
        entropy_mean=mu.astype(np.float32),
        entropy_std=sigma.astype(np.float32),
    )
    difference = generator.normal(0, 1, 17)
    difference[1:] -= difference[1:].mean() + 0.1
    difference[0] = 1.61  # the whole text is a vote for, its last 16 tokens one against
    control = score.nll + difference
    score = replace(score, control_nll=control)
    rule = Goldfish(k=3, h=4)
    record = make_record(window, score, rule, Words(), 0)
    nll = [float(x) for x in score.nll]
    text = "".join(f" w{i}" for i in window.ids)
    z = [
        (-x - m) / s
        for x, m, s in zip(
            nll, score.entropy_mean.tolist(), score.entropy_std.tolist(), strict=True
        )
    ]
    gone = rule.dropped(np.array(window.ids)).tolist()[1:]
    kept = [x for x, hole in zip(nll, gone, strict=True) if not hole]
    holes = [x for x, hole in zip(nll, gone, strict=True) if hole]
    votes = []
    for size in (
        2,
        3,
        4,
        6,
        9,
        13,
        17,
        17,
        17,
        17,
    ):  # 18, 25, 32 and 40 are longer than the text
        runs = [range(first, first + size) for first in range(17 - size + 1)]
        votes.append(
            sum(sum(control[j] - nll[j] for j in run) > 0 for run in runs) / len(runs)
        )
    expected = {
        "mia_loss": -sum(nll) / 17,
        "mia_zlib": -sum(nll) / len(zlib.compress(text.encode())),
        "mia_reference": sum(control) / 17 - sum(nll) / 17,
        "mia_min_k": -sum(sorted(nll)[-3:]) / 3,
        "mia_min_k_plus_plus": sum(sorted(z)[:3]) / 3,
        "mia_kept_loss": -sum(kept) / len(kept),
        "mia_dropped_gap": sum(holes) / len(holes) - sum(kept) / len(kept),
        "mia_wbc": sum(votes) / 10,
    }
    assert {name: record[name] for name in expected} == pytest.approx(
        expected, rel=1e-9
    )
    assert mean_of_lowest(np.array([3.0, 1.0, 2.0])) == 1.0, "at least one token"


def test_a_certain_model_gives_finite_scores():
    window = Window("members", 0, "d", list(range(PREFIX + SUFFIX)), PREFIX)
    zero = np.zeros(17, dtype=np.float32)
    score = made_up_score(
        window,
        [True] * 17,
        np.random.default_rng(0),
        nll=zero,
        entropy_mean=zero,
        entropy_std=zero,
    )
    assert make_record(window, score, None, Words(), 0)["mia_min_k_plus_plus"] == 0.0


def test_every_attack_points_the_same_way():
    """Members are the more probable: no score may be inverted."""
    rule = Goldfish(k=3, h=4)
    records = made_up_records("members", 60, 0.95, rule=rule, recall_dropped=0.4)
    records += made_up_records("heldout", 60, 0.3, rule=rule, recall_dropped=0.3)
    for record in records:
        record["mia_reference"] = record["mia_wbc"] = 3 + record["mia_loss"]
    found = made_up_audit(records).rows.select(figure="attack_auc")
    assert {each.setting for each in found} == {
        "loss",
        "zlib",
        "reference",
        "min_k",
        "min_k_plus_plus",
        "kept_loss",
        "dropped_gap",
        "wbc",
    }
    for each in found:
        assert each.low > 0.7, each.setting
