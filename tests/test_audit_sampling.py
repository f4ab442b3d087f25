"""Extraction by sampling against Monte Carlo and arithmetic with 60 digits (mpmath, which torch brings)."""

import mpmath
import numpy as np
import pytest

from goldfish.audit.sampling import (
    PROBABILITIES,
    SAMPLES,
    extracted,
    probability_within,
    sampling_figures,
    setting_name,
)


def exactly(logarithm, n):
    """1 - (1 - e^logarithm)^n."""
    with mpmath.workdps(400):
        return 1 - (1 - mpmath.exp(logarithm)) ** n


@pytest.mark.parametrize(
    "logarithm", [0.0, -1e-12, -0.1, -0.6931, -0.7, -5.0, -36.0, -37.0, -400.0, -700.0]
)
@pytest.mark.parametrize("n", [1, 7, 1_000_000])
def test_probability_within_n_samples_to_rounding(logarithm, n):
    assert float(probability_within(logarithm, n)) == pytest.approx(
        float(exactly(logarithm, n)), rel=1e-12
    )


@pytest.mark.parametrize("logarithm", [-0.01, -0.5, -3.0, -10.0])
@pytest.mark.parametrize("p", PROBABILITIES)
def test_extracted_with_the_fewest_samples_that_do(logarithm, p):
    with mpmath.workdps(60):
        n = int(mpmath.ceil(mpmath.log1p(-mpmath.mpf(p)) / mpmath.log1p(-mpmath.exp(logarithm))))
    assert extracted(logarithm, n, p)
    assert n == 1 or not extracted(logarithm, n - 1, p)


def test_ends_of_the_scale():
    assert probability_within(-1e4, 10**6) == 0.0
    assert probability_within(-np.inf, 10**9) == 0.0
    assert not extracted(-np.inf, 10**6, 0.5)
    assert extracted(0.0, 1, 0.999)
    assert extracted(np.log(0.5), 1, 0.5), "p_z = p needs one sample, whatever the rounding"
    assert extracted(np.log(0.9), 1, 0.9)


def test_p_z_and_n_p_curve_against_monte_carlo():
    """A model of three tokens, sampled: how often is the suffix among n samples?"""
    generator = np.random.default_rng(0)
    q = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    suffix = [0, 1, 2]
    trials = 40_000
    hits = np.ones(trials, dtype=bool)
    for t, token in enumerate(suffix):
        hits &= generator.choice(3, size=trials, p=q[t]) == token
    logarithm = np.log(q[range(3), suffix]).sum()
    assert np.exp(logarithm) == pytest.approx(hits.mean(), abs=4 * np.sqrt(0.224 * 0.776 / trials))
    for n in (2, 5):
        within = hits[: trials // n * n].reshape(-1, n).any(1)
        assert probability_within(logarithm, n) == pytest.approx(
            within.mean(), abs=4 * 0.5 / np.sqrt(len(within))
        )


def test_figures_of_a_setting():
    found = sampling_figures(np.append(np.log([0.6, 0.05, 1e-30, 1.0]), -np.inf), np.arange(5))
    k = {name: figure.k for name, figure in found.items()}
    assert k["extractable@1,0.5"] == 2
    assert k["extractable@1,0.9"] == 1
    assert k["extractable@10,0.5"] == 2  # 1 - 0.95^10 = 0.40
    assert k["extractable@100,0.5"] == 3
    assert k["extractable@1000000,0.999"] == 3
    assert found["expected@10"].value == pytest.approx((1 + (1 - 0.4**10) + (1 - 0.95**10)) / 5)
    assert list(found)[-len(SAMPLES) :] == [f"expected@{n}" for n in SAMPLES]
    assert setting_name({"temperature": 1.0, "top_k": None, "top_p": 0.9}) == "T=1,top_p=0.9"
    assert setting_name({"temperature": 0.8, "top_k": 40, "top_p": None}) == "T=0.8,top_k=40"
