"""Intervals against scipy, hand-made cases and the coverage that they promise; how an estimate is written."""

import json

import numpy as np
import pytest
from scipy.stats import binomtest

from goldfish.audit.estimate import (
    Estimate,
    clopper_pearson,
    difference,
    dumps,
    loads,
    mean,
    percent,
    rate,
    token_rate,
)

pytestmark = pytest.mark.core


@pytest.mark.parametrize("level", [0.95, 0.99])
@pytest.mark.parametrize(
    ("k", "n"), [(0, 1), (0, 32), (1, 32), (16, 32), (31, 32), (32, 32), (0, 368), (3, 10_000)]
)
def test_clopper_pearson_equals_scipy(k, n, level):
    bounds = binomtest(k, n).proportion_ci(level, method="exact")
    assert clopper_pearson(k, n, level) == pytest.approx((bounds.low, bounds.high), abs=1e-9)


def test_rate_of_windows():
    bounds = binomtest(1, 4).proportion_ci(0.95, method="exact")
    assert rate([True, False, False, False]) == Estimate(
        0.25, 1, 4, 4, pytest.approx(bounds.low, abs=1e-9), pytest.approx(bounds.high, abs=1e-9)
    )


def test_windows_of_one_document_count_as_one():
    """A document counts once, where any of its windows does; 100 windows of 10 documents bound no closer than ten."""
    tens = np.repeat(np.arange(10), 10)
    assert rate(np.zeros(100), tens) == rate(np.zeros(10))
    assert (rate(np.arange(100) < 11, tens).k, rate(np.arange(100) < 11, tens).n) == (2, 10)
    assert rate(np.zeros(4), np.array([7, 7, 7, 7])).documents == 1  # codes need not start at 0
    values = np.random.default_rng(0).random(40)
    copies = mean(np.repeat(values, 4), np.repeat(np.arange(40), 4))
    single = mean(values)
    assert (copies.n, copies.documents, copies.value) == (160, 40, pytest.approx(single.value))
    assert (copies.lower95, copies.upper95) == pytest.approx((single.lower95, single.upper95))


@pytest.mark.parametrize(("k", "n"), [(0, 10), (0, 368), (3, 100), (10, 10), (1, 32), (60, 100)])
def test_the_interval_of_a_mean_of_zeros_and_ones_is_clopper_pearson(k, n):
    found = mean(np.arange(n) < k)
    low, high = clopper_pearson(k, n)
    assert found.value == k / n
    assert found.lower95 == pytest.approx(low, rel=0.1, abs=5e-4)
    assert found.upper95 == pytest.approx(high, rel=0.06)


def test_many_documents_give_the_normal_interval():
    """Of 4,000 (which take several chunks) as of 400."""
    for n in (400, 4_000):
        found = mean(np.random.default_rng(0).random(n))
        assert found.upper95 - found.lower95 == pytest.approx(2 * 1.96 * 0.2887 / n**0.5, rel=0.1)


def verbatim(generator, n):
    """2% of texts come out whole, the others a little."""
    return np.where(generator.random(n) < 0.02, 1.0, generator.uniform(0.1, 0.2, n))


COVERED = {  # a population: its samples, its mean, the greatest value that is possible
    "expected@n, 2% extractable": (lambda g, n: (g.random(n) < 0.02) * 1.0, 0.02, 1),
    "share .98": (lambda g, n: (g.random(n) < 0.98) * 1.0, 0.98, 1),
    "token rate .02": (lambda g, n: g.binomial(50, g.beta(0.1, 4.9, n)) / 50, 0.02, 1),
    "token rate .98": (lambda g, n: 1 - g.binomial(50, g.beta(0.1, 4.9, n)) / 50, 0.98, 1),
    "ROUGE-L, 2% verbatim": (verbatim, 0.02 + 0.98 * 0.15, 1),
    "lognormal loss": (lambda g, n: g.lognormal(0, 1, n), np.exp(0.5), np.log(50_000)),
}


@pytest.mark.parametrize("name", COVERED)
def test_intervals_hold_what_they_promise(name):
    """At least 94% at 10, 20, 50 and 200 documents; benchmarks/verdict.py counts more of them."""
    draw, truth, greatest = COVERED[name]
    generator = np.random.default_rng(2)
    for n in (10, 20, 50, 200):
        held = 0
        for _ in range(150):
            values = draw(generator, n)
            found = mean(values, bounds=(0, max(greatest, values.max())))
            held += found.lower95 <= truth <= found.upper95
        assert held >= 0.94 * 150, n


def test_ten_documents_do_not_bound_what_none_of_them_shows():
    """A bootstrap of ten texts without extraction says "at most 1e-93"; 2% of the population may be extractable."""
    assert mean(np.full(10, 1e-93)).upper95 == pytest.approx(clopper_pearson(0, 10)[1], rel=0.02)


def test_documents_of_different_size():
    """sum / sum, with a bound that knows how large a document can be."""
    found = token_rate([1, 0, 9], [2, 0, 10])
    assert (found.k, found.n, found.documents, found.value) == (10, 12, 2, 10 / 12)
    assert mean([2.0, 9.0], None, [2, 3], (0, 9)).value == 11 / 5
    generator, held = np.random.default_rng(0), 0
    for _ in range(200):
        sizes = generator.integers(1, 6, 20)
        hits = generator.binomial(sizes, np.where(sizes > 3, 0.4, 0.1))
        found = mean(hits, None, sizes)
        held += found.lower95 <= (9 * 0.4 + 6 * 0.1) / 15 <= found.upper95
    assert held >= 0.94 * 200


def test_bootstrap_of_a_difference_covers_what_it_promises():
    """Of 200 samples of 40 clustered documents, about 95% of the intervals hold the truth."""
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        documents = np.repeat(np.arange(40), 5)
        values = generator.normal(0.3, 1, 40)[documents] + generator.normal(0, 1, 200)
        found = difference(values, documents)
        held += found.lower95 <= 0.3 <= found.upper95
    assert 0.90 <= held / 200 <= 0.98


def test_too_little_is_said_in_words_and_never_zero():
    assert rate([]) == Estimate(None, 0, reason="nothing to count")
    assert mean([]) == Estimate(None, reason="nothing to count")
    assert difference(np.ones(9), np.arange(9)).reason == "9 documents; an interval needs 10"
    assert (
        "every resample gives the same value" in difference(np.full(12, 0.1), np.arange(12)).reason
    )


def test_an_estimate_survives_json_and_nan_does_not():
    tree = {"a": [rate([True, False]), {"b": None}], "c": mean([0.5])}
    text = dumps(tree)
    assert loads(text) == tree
    assert set(json.loads(text)["c"]) == {
        "value",
        "k",
        "n",
        "documents",
        "lower95",
        "upper95",
        "reason",
    }
    with pytest.raises(ValueError, match="JSON compliant"):
        dumps(Estimate(float("nan")))


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.075, 3, 40, 40, 0.0157, 0.204), "3 of 40 (1.6–20.4%)"),
        (Estimate(0.0, 0, 1_032, 32, 0.0, 0.1), "0 of 1,032 (0–10%)"),
        (Estimate(0.213, None, 40, 40, 0.19, 0.24), "0.21 (0.19–0.24)"),
        (Estimate(-0.3, None, 40, 40, -0.4, 0.2), "-0.30 (-0.40 to 0.20)"),
        (Estimate(None, None, 9, 9, 3.2), "above 3.20 (no upper bound)"),
        (Estimate(None, None, 9, 9, reason="few"), "not estimable"),
    ],
)
def test_one_way_to_write_it(estimate, text):
    assert str(estimate) == text


def test_a_share_is_never_rounded_to_certainty():
    assert [percent(each) for each in (0.0, 1e-9, 0.0123, 0.99999, 1.0)] == [
        "0%",
        "<0.1%",
        "1.2%",
        ">99.9%",
        "100%",
    ]
