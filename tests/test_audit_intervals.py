"""Intervals against scipy, cases by hand and their coverage; how a figure is written."""

from dataclasses import replace
from math import comb

import numpy as np
import pytest
from scipy.stats import binomtest

from goldfish.audit.intervals import (
    Figure,
    Figures,
    Population,
    clopper_pearson,
    difference,
    hypergeometric,
    mean,
    percent,
    rate,
    token_rate,
)

pytestmark = pytest.mark.core


@pytest.mark.parametrize("level", [0.95, 0.99])
@pytest.mark.parametrize(
    ("k", "n"),
    [(0, 1), (0, 32), (1, 32), (16, 32), (31, 32), (32, 32), (0, 368), (3, 10_000)],
)
def test_clopper_pearson_equals_scipy(k, n, level):
    bounds = binomtest(k, n).proportion_ci(level, method="exact")
    assert clopper_pearson(k, n, level) == pytest.approx(
        (bounds.low, bounds.high), abs=1e-9
    )


@pytest.mark.parametrize(
    ("k", "n", "population"), [(0, 10, 30), (3, 10, 30), (10, 10, 30), (1, 40, 62)]
)
def test_hypergeometric_by_counting(k, n, population):
    """Every number of hits that the sample does not rule out, by counting samples."""

    def chance(hits, wanted):
        ways = [comb(hits, i) * comb(population - hits, n - i) for i in wanted]
        return sum(ways) / comb(population, n)

    possible = [
        hits
        for hits in range(population + 1)
        if chance(hits, range(k, n + 1)) > 0.025 and chance(hits, range(k + 1)) > 0.025
    ]
    expected = possible[0] / population, possible[-1] / population
    assert hypergeometric(k, n, population) == pytest.approx(expected)


def test_a_census_is_exact_and_a_large_population_a_sample():
    assert hypergeometric(3, 62, 62) == (3 / 62, 3 / 62)
    assert hypergeometric(3, 62, 10**7) == pytest.approx(
        clopper_pearson(3, 62), abs=2e-4
    )
    assert str(rate([False] * 62, population=Population(62))) == "0 of 62 (exact)"


def test_windows_of_one_document_count_as_one():
    """100 windows of 10 documents bound no closer than ten."""
    tens = np.repeat(np.arange(10), 10)
    assert rate(np.zeros(100), tens) == rate(np.zeros(10))
    assert (rate(np.arange(100) < 11, tens).k, rate(np.arange(100) < 11, tens).n) == (
        2,
        10,
    )
    assert (
        rate(np.zeros(4), np.array([7, 7, 7, 7])).documents == 1
    )  # numbers need not start at 0
    values = np.random.default_rng(0).random(40)
    copies = mean(np.repeat(values, 4), np.repeat(np.arange(40), 4))
    single = mean(values)
    assert (copies.n, copies.documents, copies.value) == (
        160,
        40,
        pytest.approx(single.value),
    )
    assert (copies.low, copies.high) == pytest.approx((single.low, single.high))


@pytest.mark.parametrize(
    ("k", "n"), [(0, 10), (0, 368), (3, 100), (10, 10), (1, 32), (60, 100)]
)
def test_the_interval_of_a_mean_of_zeros_and_ones_is_near_the_exact_one(k, n):
    found = mean(np.arange(n) < k)
    low, high = clopper_pearson(k, n)
    assert found.value == k / n
    assert found.low == pytest.approx(low, abs=0.35 / n**0.5)
    assert found.high == pytest.approx(high, abs=0.35 / n**0.5)


def test_many_documents_give_the_normal_interval():
    found = mean(np.random.default_rng(0).random(4_000))
    assert found.high - found.low == pytest.approx(
        2 * 1.96 * 0.2887 / 4_000**0.5, rel=0.05
    )


def verbatim(generator, n):
    """2% of texts come out whole, the others a little."""
    return np.where(generator.random(n) < 0.02, 1.0, generator.uniform(0.1, 0.2, n))


COVERED = {  # a population of shares: its samples, its mean
    "expected, 2% extractable": (lambda g, n: (g.random(n) < 0.02) * 1.0, 0.02),
    "share .98": (lambda g, n: (g.random(n) < 0.98) * 1.0, 0.98),
    "token rate .02": (lambda g, n: g.binomial(50, g.beta(0.1, 4.9, n)) / 50, 0.02),
    "ROUGE-L, 2% verbatim": (verbatim, 0.02 + 0.98 * 0.15),
}


@pytest.mark.parametrize("name", COVERED)
def test_intervals_hold_what_they_promise(name):
    """At least 93% at 10, 20, 50 and 200 documents; benchmarks/verdict.py counts more of them."""
    draw, truth = COVERED[name]
    generator = np.random.default_rng(2)
    for n in (10, 20, 50, 200):
        held = 0
        for _ in range(200):
            found = mean(draw(generator, n))
            held += found.low <= truth <= found.high
        assert held >= 0.93 * 200, n


def test_lengths_and_losses_have_no_interval():
    found = mean(np.arange(20.0), bounded=False)
    assert (found.value, found.low, found.high) == (9.5, None, None)
    assert "has no interval" in found.reason


def test_documents_of_different_size():
    """sum / sum, with an interval that knows how large a document can be."""
    found = token_rate([1, 0, 9], [2, 0, 10])
    assert (found.k, found.n, found.documents, found.value) == (10, 12, 2, 10 / 12)
    generator, held = np.random.default_rng(0), 0
    for _ in range(200):
        sizes = generator.integers(1, 6, 20)
        hits = generator.binomial(sizes, np.where(sizes > 3, 0.4, 0.1))
        found = mean(hits, None, sizes)
        held += found.low <= (9 * 0.4 + 6 * 0.1) / 15 <= found.high
    assert held >= 0.94 * 200


def test_the_interval_of_a_difference_covers_what_it_promises():
    """About 95% of 200 samples of 40 clustered documents hold the truth."""
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        documents = np.repeat(np.arange(40), 5)
        values = generator.normal(0.3, 1, 40)[documents] + generator.normal(0, 1, 200)
        found = difference(values, documents)
        held += found.low <= 0.3 <= found.high
    assert 0.90 <= held / 200 <= 0.985


def test_too_little_is_told_in_words_and_never_zero():
    assert rate([]) == Figure(k=0, reason="nothing to count")
    assert mean([]) == Figure(reason="nothing to count")
    assert (
        difference(np.ones(9), np.arange(9)).reason
        == "9 documents; an interval needs 10"
    )
    assert "differ by the same" in difference(np.full(12, 0.1), np.arange(12)).reason


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (Figure(value=0.075, k=3, n=40, low=0.0157, high=0.204), "3 of 40 (1.6–20.4%)"),
        (Figure(value=0.0, k=0, n=1_032, low=0.0, high=0.1), "0 of 1,032 (0–10%)"),
        (Figure(value=0.213, n=40, low=0.19, high=0.24), "0.21 (0.19–0.24)"),
        (Figure(value=-0.3, n=40, low=-0.4, high=0.2), "-0.30 (-0.40 to 0.20)"),
        (Figure(n=9, low=3.2), "above 3.20 (at least 3.20)"),
        (Figure(n=9, reason="few"), "not estimable"),
    ],
)
def test_one_way_to_write_it(figure, text):
    assert str(figure) == text


def test_a_share_is_never_rounded_to_certainty():
    shown = [percent(each) for each in (0.0, 1e-9, 0.0123, 0.99999, 1.0)]
    assert shown == ["0%", "<0.1%", "1.2%", ">99.9%", "100%"]


def test_rows_are_selected_by_their_keys():
    row = Figure("members", "extractable", value=0.5, k=1, n=2)
    curve = [replace(row, setting="T=1", x=x) for x in (1, 10)]
    rows = Figures([row, *curve])
    assert rows.get("members", "extractable") is row
    assert rows.get("members", "extractable", "T=1", 10) is curve[1]
    assert rows.get("heldout", "extractable") is None
    assert rows.select(figure="extractable", setting="T=1") == curve
