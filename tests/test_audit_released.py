"""The released checkpoints' audit on stand-ins: folders of the same names and files, with tiny models in them."""

import json

import audit_released as recipe
import pytest
from conftest import PROSE, tiny_llama

from goldfish.audit import Estimate


@pytest.fixture(scope="module")
def root(tmp_path_factory, tokenizer):
    """What the hub has, as local folders: a model, its configuration and tokenizer each, and the dataset."""
    root = tmp_path_factory.mktemp("released")
    for name in ("standard", "control", "k=4"):
        folder = root / recipe.MODELS[name]
        tiny_llama().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    data = root / recipe.DATA
    data.mkdir()
    rows = [{"text": " ".join(PROSE[i:] + PROSE[:i])} for i in range(5)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "heldout.jsonl").write_text(json.dumps({"text": "No sentence of this text occurs in the others."}) + "\n")
    return root


def test_stand_ins(root, tmp_path, capsys):
    command = ["--root", str(root), "--models", "standard", "control", "k=4", "--samples", "4"]
    command += ["--prefix_length", "10", "--suffix_length", "20", "--heldout", str(root / "heldout.jsonl")]
    results = recipe.main([*command, "--output_dir", str(tmp_path / "run")])
    assert [result["model"] for result in results] == ["standard", "control", "k=4"]
    for result in results:
        assert result["n"] == 4
        assert 0 <= result["matching length"] <= 20
        assert 0 < result["Levenshtein"] <= 1
        assert result["held-out nats"] == pytest.approx(results[0]["held-out nats"]), "the same weights in all three"
    shown = capsys.readouterr().out
    assert "(73.9)" in shown
    assert "(14.7)" in shown
    assert recipe.main([*command, "--output_dir", str(tmp_path / "run")]) == results, "and no model is audited again"
    assert len((tmp_path / "run" / "results.jsonl").read_text().splitlines()) == 3
    with pytest.raises(ValueError, match="holds a run with --samples 4, not 3; give the same arguments"):
        recipe.main([*command, "--output_dir", str(tmp_path / "run"), "--samples", "3"])


def test_measures_by_hand():
    def record(output, suffix, first, split="members"):
        same = output == suffix
        return {
            "split": split, "output_tokens": output, "suffix_tokens": suffix, "first_divergence": first,
            "exact_match": same,
        }  # fmt: skip

    records = [
        record([" the", " cat"], [" the", " cat"], 2),
        record([" The", " dog"], [" the", " cat"], 0),
        record(["x"], ["y"], 0, split="heldout"),
    ]
    found = recipe.measure(records, {"splits": {"heldout": {"nll": Estimate(3.5)}}})
    assert found["matching length"] == 1
    assert found["exact match"] == 0.5
    assert found["ROUGE-L"] == 0.75, "1, and one word of two whatever its case"
    assert found["Levenshtein"] == 0.25, "0, and 4 of 8 characters: T, d, o, g"
    assert found["held-out nats"] == 3.5
    assert recipe.measure(records, {"splits": {}})["held-out nats"] is None


def test_refusals(root, tmp_path):
    with pytest.raises(ValueError, match=r"--models are standard, control, k=3.*; got k=5"):
        recipe.main(["--models", "k=5"])
    with pytest.raises(ValueError, match="--samples must be at least 1, got 0"):
        recipe.main(["--samples", "0"])
    (tmp_path / recipe.DATA).mkdir()
    (tmp_path / recipe.DATA / "train.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match="has the columns body; expected text or input_ids"):
        recipe.main(["--root", str(tmp_path), "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
