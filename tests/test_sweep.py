"""The choice of k and its certainty, on results made by hand."""

import json

import pytest
import sweep


def result(run, k, rouge, loss, seed=0, equal=False):
    return {
        "seed": seed,
        "run": run,
        "k": k,
        "equal_supervised": equal,
        "input_tokens": 1000,
        "validation_loss": loss,
        "exact_match_members": [value == 1.0 for value in rouge],
        "exact_match_heldout": [False] * len(rouge),
        "rouge_l_members": rouge,
        "rouge_l_heldout": [0.1] * len(rouge),
        "nll_members": 1.0,
        "nll_heldout": 5.0,
    }


def two_seeds(k4, k32):
    results = []
    for seed in (0, 1):
        results += [
            result("standard", None, [1.0] * 6, 5.0, seed),
            result("control", None, [0.1] * 6, 5.1, seed),
            result("k=4", 4.0, k4, 5.2 + seed / 10, seed),
            result("k=32", 32.0, k32, 5.05, seed),
            result("k=4, equal", 4.0, [0.9] * 6, 5.0, seed, equal=True),
        ]
    return results


def groups(k4, k32):
    return sweep.by_training(two_seeds(k4, k32))


def test_the_largest_k_that_protects_enough():
    choice = sweep.choose_k(
        groups(k4=[0.1] * 6, k32=[0.15] * 6), leak=0.1, measure="rouge_l"
    )
    assert choice["k"] == 32
    assert choice["votes"] == {"k=32": 1.0}
    choice = sweep.choose_k(groups(k4=[0.1] * 6, k32=[0.5] * 6), leak=0.1)
    assert choice["k"] == 32, "nothing whole"
    choice = sweep.choose_k(
        groups(k4=[0.1] * 6, k32=[0.5] * 6), leak=0.1, measure="rouge_l"
    )
    assert choice["k"] == 4
    assert "costs +0.250 nats/token held-out (+0.200 to +0.300)" in choice["says"]
    choice = sweep.choose_k(
        groups(k4=[0.5] * 6, k32=[0.5] * 6), leak=0.1, measure="rouge_l"
    )
    assert choice["k"] is None
    assert "none of k=4, k=32; try a smaller k" in choice["says"]


def test_uncertainty_is_that_of_the_documents():
    """k=32 leaves (0.19 - 0.1) / 0.9 = 0.1, by one document in six: some samples have it twice."""
    choice = sweep.choose_k(
        groups(k4=[0.1] * 6, k32=[0.6, 0.1, 0.1, 0.1, 0.1, 0.1]),
        leak=0.1,
        measure="rouge_l",
    )
    assert choice["k"] == 32
    assert 0.3 < choice["votes"]["k=4"] < 0.7
    assert choice["votes"]["k=4"] + choice["votes"]["k=32"] == pytest.approx(1)


def test_nothing_to_choose_where_nothing_is_recited():
    nothing = {"rouge_l_members": [0.1] * 6, "exact_match_members": [False] * 6}
    quiet = [{**r, **nothing} for r in two_seeds([0.1] * 6, [0.1] * 6)]
    choice = sweep.choose_k(sweep.by_training(quiet), leak=0.1)
    assert choice["k"] is None
    assert choice["says"].startswith(
        "Nothing to choose: the standard loss recites hardly more than the control"
    )


def test_unfinished_runs_are_refused():
    with pytest.raises(
        ValueError, match="needs the trainings standard and control, got k=4"
    ):
        sweep.choose_k(sweep.by_training([result("k=4", 4.0, [0.1], 5.0)]), leak=0.1)
    with pytest.raises(ValueError, match="finish the run first"):
        sweep.choose_k(
            sweep.by_training(two_seeds([0.1] * 6, [0.1] * 6)[:-2]), leak=0.1
        )


def test_table_and_pictures(tmp_path, capsys):
    results = two_seeds([0.1, 1.0] * 3, [0.5] * 6)
    (tmp_path / "results.jsonl").write_text(
        "".join(json.dumps(result) + "\n" for result in results)
    )
    first = sweep.main([str(tmp_path)])
    pictures = {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")}
    assert set(pictures) == {"rouge.svg", "extraction.svg", "heldout.svg"}
    assert sweep.main([str(tmp_path)]) == first
    for name, drawn in pictures.items():
        assert (tmp_path / name).read_bytes() == drawn, (
            "the same picture whenever it is drawn"
        )
        assert len(drawn) < 60_000
    assert b"equal supervised tokens" in pictures["heldout.svg"]
    row = next(
        line
        for line in capsys.readouterr().out.splitlines()
        if line.strip().startswith("k=4 ")
    )
    assert "6 of 12" in row
    assert "0.50" in row, "left: (0.55 - 0.1) / (1 - 0.1)"
    with pytest.raises(SystemExit):
        sweep.main([str(tmp_path / "nothing")])
    assert "run pretrain_canaries.py --output-dir" in capsys.readouterr().err
