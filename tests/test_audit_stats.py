"""Intervals against scipy, hand-made cases and their own promise of coverage."""

import numpy as np
import pytest
from scipy.stats import binomtest

from goldfish.audit.stats import clopper_pearson, effective_size, mcnemar, mean, rate, token_rate, value

pytestmark = pytest.mark.core


@pytest.mark.parametrize("level", [0.95, 0.99])
@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 32), (1, 32), (16, 32), (31, 32), (32, 32), (0, 368), (3, 10_000)])
def test_clopper_pearson_equals_scipy(k, n, level):
    bounds = binomtest(k, n).proportion_ci(level, method="exact")
    assert clopper_pearson(k, n, level) == pytest.approx((bounds.low, bounds.high), abs=1e-9)


def test_rate_of_windows():
    found = rate([True, False, False, False])
    bounds = binomtest(1, 4).proportion_ci(0.95, method="exact")
    assert (found["k"], found["n"], found["documents"], found["rate"]) == (1, 4, 4, 0.25)
    assert (found["lower95"], found["upper95"]) == pytest.approx((bounds.low, bounds.high), abs=1e-9)


def test_windows_of_one_document_count_as_one():
    """100 windows of 10 documents bound a rate no closer than 10 documents do; unequal ones even less."""
    tens = np.repeat(np.arange(10), 10)
    assert effective_size(tens) == 10
    assert effective_size(np.arange(7)) == 7
    assert effective_size(np.array([0] * 9 + [1])) == pytest.approx(100 / 82)
    assert rate(np.zeros(100), tens)["upper95"] == pytest.approx(rate(np.zeros(10))["upper95"])
    assert rate(np.arange(100) < 50, tens)["documents"] == 10
    assert rate(np.zeros(4), np.array([7, 7, 7, 7]))["documents"] == 1  # codes need not start at 0


def test_interval_of_a_mean_is_near_the_normal_one_and_wider_for_documents():
    values = np.random.default_rng(0).random(400)
    found = mean(values)
    assert found["upper95"] - found["lower95"] == pytest.approx(2 * 1.96 * 0.2887 / 20, rel=0.1)
    copies = mean(np.repeat(values, 4), np.repeat(np.arange(400), 4))
    assert (copies["n"], copies["documents"]) == (1600, 400)
    assert copies["mean"] == pytest.approx(found["mean"])
    assert (copies["lower95"], copies["upper95"]) == pytest.approx((found["lower95"], found["upper95"]))


def test_bootstrap_covers_what_it_promises():
    """Of 300 samples of 40 clustered documents, about 95% of the intervals hold the truth."""
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        documents = np.repeat(np.arange(40), 5)
        values = generator.normal(0.3, 1, 40)[documents] + generator.normal(0, 1, 200)
        found = mean(values, documents)
        held += found["lower95"] <= 0.3 <= found["upper95"]
    assert 0.90 <= held / 300 <= 0.98


def test_token_rate_divides_once_at_the_end():
    found = token_rate([1, 0, 9], [2, 0, 10])
    assert (found["k"], found["n"], found["documents"], found["rate"]) == (10, 12, 2, 10 / 12)
    assert mean([2.0, 9.0], None, [2, 3])["mean"] == 11 / 5


def test_too_little_is_said_in_words_and_never_zero():
    assert rate([])["rate"] is None
    assert mean([])["reason"] == "nothing to count"
    few = mean([0.1] * 4 + [0.2] * 5)
    assert (few["lower95"], few["reason"]) == (None, "9 documents; an interval needs 10")
    equal = mean([1.0] * 50)
    assert (equal["mean"], equal["upper95"]) == (1.0, None)
    assert "every document has the same value" in equal["reason"]
    ratio = value(lambda total: total[..., 0] / total[..., 1], [[1.0] * 12, [0.0] * 11 + [1.0]], 12, np.arange(12))
    assert (ratio["value"], ratio["lower95"], ratio["reason"]) == (12.0, None, "too few events for an interval")


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(6, 0) == pytest.approx(2 / 2**6)
    assert mcnemar(1, 5) == pytest.approx(2 * (1 + 6) / 2**6)
