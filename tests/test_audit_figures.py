"""Figures by hand: sampling against Monte Carlo and 60 digits (mpmath, which torch brings), hazards."""

import mpmath
import numpy as np
import pyarrow as pa
import pytest
from audit_records import made_up_audit, made_up_records
from scipy.stats import binomtest

from goldfish import Goldfish
from goldfish.audit.figures import (
    SAMPLES,
    extracted,
    hazard_ratio,
    notes,
    probability_within,
    setting_name,
    token_counts,
)

PROBABILITIES = (0.5, 0.9, 0.999)


def exactly(logarithm, n):
    """1 - (1 - e^logarithm)^n."""
    with mpmath.workdps(400):
        return 1 - (1 - mpmath.exp(logarithm)) ** n


@pytest.mark.parametrize(
    "logarithm", [0.0, -1e-12, -0.1, -0.6931, -0.7, -5.0, -36.0, -37.0, -400.0, -700.0]
)
@pytest.mark.parametrize("n", [1, 7, 1_000_000])
def test_probability_within_n_samples_to_rounding(logarithm, n):
    expected = float(exactly(logarithm, n))
    assert float(probability_within(logarithm, n)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("logarithm", [-0.01, -0.5, -3.0, -10.0])
@pytest.mark.parametrize("p", PROBABILITIES)
def test_extracted_with_the_fewest_samples_that_do(logarithm, p):
    with mpmath.workdps(60):
        n = int(
            mpmath.ceil(
                mpmath.log1p(-mpmath.mpf(p)) / mpmath.log1p(-mpmath.exp(logarithm))
            )
        )
    assert extracted(logarithm, n, p)
    assert n == 1 or not extracted(logarithm, n - 1, p)


def test_ends_of_the_scale():
    assert probability_within(-1e4, 10**6) == 0.0
    assert probability_within(-np.inf, 10**9) == 0.0
    assert not extracted(-np.inf, 10**6)
    assert extracted(0.0, 1, 0.999)
    assert extracted(np.log(0.5), 1), "p_z = p needs one sample, whatever the rounding"
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
    assert np.exp(logarithm) == pytest.approx(
        hits.mean(), abs=4 * np.sqrt(0.224 * 0.776 / trials)
    )
    for n in (2, 5):
        within = hits[: trials // n * n].reshape(-1, n).any(1)
        tolerance = 4 * 0.5 / np.sqrt(len(within))
        assert probability_within(logarithm, n) == pytest.approx(
            within.mean(), abs=tolerance
        )


def test_curves_of_a_setting():
    records = made_up_records("members", 5, 0.5)
    for record, log_p in zip(
        records, [*np.log([0.6, 0.05, 1e-30, 1.0]), -np.inf], strict=True
    ):
        record["log_p"] = [float(log_p)]
    rows = made_up_audit(records).rows
    found = rows.select(split="members", figure="extractable", setting="T=1")
    k = {each.x: each.k for each in found}
    assert list(k) == list(SAMPLES)
    assert (k[1], k[10], k[100]) == (2, 2, 3)  # 1 - 0.95^10 = 0.40
    expected = (1 + (1 - 0.4**10) + (1 - 0.95**10)) / 5
    assert rows.get("members", "expected", "T=1", 10).value == pytest.approx(expected)
    assert (
        setting_name({"temperature": 1.0, "top_k": None, "top_p": 0.9})
        == "T=1,top_p=0.9"
    )
    assert (
        setting_name({"temperature": 0.8, "top_k": 40, "top_p": None})
        == "T=0.8,top_k=40"
    )


def test_means_are_of_questions_as_in_training_and_rates_of_all():
    """A chat that is asked from the generation prompt too is one document, and one in the means."""
    records = made_up_records("members", 4, 0.0)
    again = [
        {**record, "asked": "generation", "exact_match": True, "nll": [9.0] * 8}
        for record in records
    ]
    found, alone = made_up_audit(records + again), made_up_audit(records)
    assert found["members.exact_match"].point() == "4 of 4"
    assert found["members.nll"] == alone["members.nll"]
    assert found["members.extractable"] == alone["members.extractable"]


def counted(*windows):
    """Of (dropped, correct, first divergence)."""
    names = ("dropped", "correct", "first_divergence")
    rows = [dict(zip(names, map(plain, each), strict=True)) for each in windows]
    return token_counts(pa.Table.from_pylist(rows))


def plain(value):
    return value if isinstance(value, int) else [bool(each) for each in value]


def test_tokens_reached_by_hand():
    """stopped and reached on dropped, on kept; right and all on dropped, on kept."""
    dropped, correct = [False, True, False, True], [True, True, False, False]
    windows = [(dropped, correct, first) for first in (1, 2, 4)]  # 4: never diverged
    windows.insert(1, ([True], [False], 0))
    assert counted(*windows).tolist() == [
        [1, 1, 0, 1, 1, 2, 1, 2],
        [1, 1, 0, 0, 0, 1, 0, 0],
        [0, 1, 1, 2, 1, 2, 1, 2],
        [0, 2, 0, 2, 1, 2, 1, 2],
    ]


def test_hazard_ratio_by_hand():
    """20 windows: 12 break at a dropped token, 8 at a kept one, 30 dropped and 80 kept reached."""
    hazards = np.array([[1, 2, 0, 4]] * 12 + [[0, 0.75, 1, 4]] * 8)
    found = hazard_ratio(hazards, np.arange(20))
    assert found.value == pytest.approx((12 / 30) / (8 / 80))
    assert found.low < found.value < found.high
    assert found.n == 20


def test_no_divergence_on_a_kept_token_bounds_the_ratio_from_below():
    found = hazard_ratio(np.array([[1, 2, 0, 6]] * 15), np.arange(15))
    low = binomtest(15, 15).proportion_ci(0.95, "exact").low
    assert (found.value, found.high) == (None, None)
    assert found.low == pytest.approx(low / (1 - low) * 90 / 30, rel=1e-9)
    assert "no upper bound" in found.reason
    none = hazard_ratio(np.array([[0, 2, 0, 6]] * 15), np.arange(15))
    assert (none.value, none.low, none.reason) == (None, None, "no window diverges")


def test_the_interval_holds_the_true_ratio():
    """150 runs of 60 windows whose hazards are 0.3 on dropped and 0.1 on kept tokens."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(150):
        hazards = []
        for _ in range(60):
            dropped = generator.random(30) < 0.25
            broken = np.flatnonzero(generator.random(30) < np.where(dropped, 0.3, 0.1))
            hazards.append((dropped, dropped, int(broken[0]) if len(broken) else 30))
        found = hazard_ratio(counted(*hazards)[:, :4], np.arange(60))
        held += found.low <= 3 <= found.high
    assert 0.88 <= held / 150 <= 0.99


def test_a_rule_that_works_and_one_that_does_not():
    rule = Goldfish(k=3, h=4)
    works = made_up_audit(
        made_up_records("members", 80, 1.0, rule=rule, recall_dropped=0.3)
    )
    idle = made_up_audit(made_up_records("members", 80, 0.8, rule=rule))
    assert works["members.hazard_ratio"].low > 5
    assert works["members.teacher_forced_accuracy_kept"].value == 1.0
    ratio = idle["members.hazard_ratio"]
    assert ratio.low < 1 < ratio.high
    assert works["members.dropped_share"].value == pytest.approx(1 / 3, abs=0.06)
    unruled = made_up_audit(made_up_records("members", 3, 0.8))["members.hazard_ratio"]
    assert (unruled.value, unruled.reason) == (
        None,
        "no rule is known for this checkpoint",
    )


def test_what_the_receipt_tells():
    rule = Goldfish().to_dict()
    assert notes(None) == []
    assert notes({"rule": rule}) == []
    assert "trained before under another rule" in notes({"rule": rule, "before": {}})[0]
    assert (
        "drops other tokens in every epoch"
        in notes({"rule": {**rule, "strategy": "random"}})[0]
    )
    assert (
        "other tokens were dropped"
        in notes({"rule": {**rule, "strategy": "static"}})[0]
    )
    sources = {"a": {"rule": rule}, "b": {"rule": None}}
    assert "rules differ between sources" in notes({"sources": sources})[0]
