"""Figures by hand: sampling against Monte Carlo and 60 digits (mpmath, which torch brings)."""

import mpmath
import numpy as np
import pyarrow as pa
import pytest
from audit_records import made_up_audit, made_up_records, made_up_run

from goldfish import Goldfish
from goldfish.audit.figures import SAMPLES
from goldfish.audit.intervals import Side, setting_name
from goldfish.audit.questions.proof import token_counts
from goldfish.audit.records import extracted, probability_within
from goldfish.report.page import doubts

PROBABILITIES = (0.5, 0.9, 0.999)


def test_a_side_without_records_has_nothing_to_count():
    """All chats of a split may be asked from the generation prompt alone."""
    run = made_up_run(made_up_records("members", 3, 1.0))
    table = pa.table({"document": pa.array([], pa.int64())})
    side = Side("members", table, run, None, None)
    for found in (
        side.count("a", []),
        side.rate("b", []),
        side.mean("c", []),
        side.token_rate("d", [], []),
    ):
        assert (found.value, found.low, found.reason) == (
            None,
            None,
            "nothing to count",
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
        {**record, "prompt_kind": "generation", "exact_match": True, "nll": [9.0] * 8}
        for record in records
    ]
    found, alone = made_up_audit(records + again), made_up_audit(records)
    assert found["members.exact_match"].point() == "4 of 4"
    assert found["members.nll"] == alone["members.nll"]
    assert found["members.extractable"] == alone["members.extractable"]
    # Drawn with certainty from the prompt that users' questions have.
    for record in again:
        record |= {"exact_match": False, "log_p": [0.0], "rank_bits": 0.0}
    found = made_up_audit(records + again)
    assert found["members.extractable"].point() == "4 of 4"
    assert found["members.extractable_bound"].point() == "4 of 4"
    (expected,) = found.rows.select(figure="expected", x=1000)
    assert expected == alone.rows.select(figure="expected", x=1000)[0]


def counted(*windows):
    """Of (dropped, correct)."""
    rows = [dict(zip(("dropped", "correct"), each, strict=True)) for each in windows]
    return token_counts(pa.Table.from_pylist(rows))


def test_dropped_and_kept_tokens_by_hand():
    """Right and all on dropped, right and all on kept."""
    dropped, correct = [False, True, False, True], [True, True, False, False]
    found = counted((dropped, correct), ([True], [False]))
    assert found.tolist() == [[1, 2, 1, 2], [0, 1, 0, 0]]


def test_what_the_receipt_tells():
    rule = Goldfish().to_dict()
    assert doubts(None) == []
    assert doubts({"rule": rule}) == []
    assert (
        "trained before under another rule" in doubts({"rule": rule, "before": {}})[0]
    )
    assert (
        "drops other tokens in every epoch"
        in doubts({"rule": {**rule, "strategy": "random"}})[0]
    )
    assert (
        "other tokens were dropped"
        in doubts({"rule": {**rule, "strategy": "static"}})[0]
    )
    sources = {"a": {"rule": rule}, "b": {"rule": None}}
    assert "rules differ between sources" in doubts({"sources": sources})[0]
