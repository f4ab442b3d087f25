"""Did the rule stop the recitation? Hand-made hazards, and intervals that hold the truth."""

import numpy as np
import pyarrow as pa
import pytest
from audit_records import made_up_records, made_up_summary
from scipy.stats import binomtest

from goldfish import Goldfish
from goldfish.audit.attribution import hazard_ratio, notes, token_counts


def counted(*windows):
    """Of (dropped, correct, first divergence)."""
    rows = [
        {"dropped": list(a), "correct": list(b), "first_divergence": first}
        for a, b, first in windows
    ]
    return token_counts(pa.Table.from_pylist(rows))


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
    assert found.lower95 < found.value < found.upper95
    assert found.n == 20


def test_no_divergence_on_a_kept_token_bounds_the_ratio_from_below():
    hazards = np.array([[1, 2, 0, 6]] * 15)
    found = hazard_ratio(hazards, np.arange(15))
    low = binomtest(15, 15).proportion_ci(0.95, "exact").low
    assert found.value is None
    assert found.lower95 == pytest.approx(low / (1 - low) * 90 / 30, rel=1e-9)
    assert found.upper95 is None
    assert "no upper bound" in found.reason
    none = hazard_ratio(np.array([[0, 2, 0, 6]] * 15), np.arange(15))
    assert (none.value, none.lower95, none.reason) == (None, None, "no window diverges")


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
        held += found.lower95 <= 3 <= found.upper95
    assert 0.88 <= held / 150 <= 0.99


def test_a_rule_that_works_and_one_that_does_not():
    rule = Goldfish(k=3, h=4)
    works = made_up_summary(made_up_records("members", 80, 1.0, rule=rule, recall_dropped=0.3))[
        "splits"
    ]["members"]
    idle = made_up_summary(made_up_records("members", 80, 0.8, rule=rule))["splits"]["members"]
    assert works["attribution"]["hazard_ratio"].lower95 > 5
    assert works["teacher_forced_accuracy_kept"].value == 1.0
    ratio = idle["attribution"]["hazard_ratio"]
    assert ratio.lower95 < 1 < ratio.upper95
    assert works["attribution"]["dropped_share"].value == pytest.approx(1 / 3, abs=0.06)
    assert (
        made_up_summary(made_up_records("members", 3, 0.8))["splits"]["members"]["attribution"]
        is None
    )


def test_what_the_receipt_says():
    rule = Goldfish().to_dict()
    assert notes(None) == []
    assert notes({"rule": rule}) == []
    assert notes({"rule": rule, "before": {}}) == [
        "trained before under another rule: every text may have been seen under both"
    ]
    assert "drops other tokens in every epoch" in notes({"rule": {**rule, "strategy": "random"}})[0]
    assert "other tokens were dropped" in notes({"rule": {**rule, "strategy": "static"}})[0]
    sources = {"a": {"rule": rule}, "b": {"rule": None}}
    assert notes({"sources": sources}) == [
        "rules differ between sources: a text that is in two of them was seen under both"
    ]
