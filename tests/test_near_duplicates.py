"""The near-duplicate recipe in miniature, and that its versions are what they are called."""

import json
import random

import near_duplicates as recipe
import pytest
from launch import words

TEXT = (
    "An assignment (statement) evaluates the Expression list; then, it assigns “it”.\n"
    "Naïve? 12 words or more here."
)


def test_reformatted_versions_keep_their_words_and_differ():
    versions = {recipe.reformat(TEXT, random.Random(seed)) for seed in range(30)}
    assert len(versions) > 15
    for version in versions:
        assert recipe.words(version) == [
            "an",
            "assignment",
            "statement",
            *recipe.words(TEXT)[3:],
        ]


def test_edits_change_the_share_of_words_that_was_asked():
    text = " ".join(f"word{i}" for i in range(4000))
    assert recipe.edit(TEXT, ["new"], 0.0, random.Random(0)) == TEXT, (
        "also its line breaks"
    )
    edited = recipe.edit(text, ["new"], 0.1, random.Random(0)).split()
    kept = sum(word != "new" for word in edited)
    expected = 4000 * (1 - 0.1 * 2 / 3)
    assert kept == pytest.approx(
        expected, abs=60
    )  # of three kinds of edits, insertion keeps the word


def test_exact_versions_are_exact():
    assert recipe.make_versions(["a\n  b", "c d"], "exact", 0.0, 2, seed=0) == [
        "a\n  b",
        "a\n  b",
        "c d",
        "c d",
    ]
    first, again = (
        recipe.make_versions([TEXT], "reformatted", 0.1, 3, seed=5) for _ in range(2)
    )
    assert first == again
    assert len(set(first)) == 3


def test_miniature(topics, tmp_path, monkeypatch, capsys):
    options = words(
        text=topics,
        vocab_size=512,
        documents=2,
        versions=2,
        epochs=1,
        hidden_size=32,
        window=64,
        seeds=0,
        rules="standard hash-4-3-5",
        copies="reformatted",
        edits=0.1,
    )
    command = [*options, "--output_dir", str(tmp_path / "run")]
    results = recipe.main(command)
    assert [(r["edits"], r["rule"]) for r in results] == [
        (0.1, "standard"),
        (0.1, "hash-4-3-5"),
    ]
    assert [result["epochs"] for result in results] == [1, 1]
    assert 0.1 < results[1]["drop_rate"] < 0.45
    assert results[1]["tokens_dropped"] + results[1]["tokens_kept"] == 2 * 32, (
        "of two suffixes"
    )
    assert "accuracy_dropped" not in results[0], "the standard loss drops nothing"
    assert results[0]["commit"]
    written = (tmp_path / "run" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == results
    assert "hash-4-3-5" in capsys.readouterr().out
    monkeypatch.setattr(recipe, "train", lambda *_: pytest.fail("trained again"))
    assert recipe.main(command) == results


def test_table_by_hand():
    results = [
        {
            "copies": "exact",
            "edits": 0.0,
            "rule": rule,
            "rouge_l_members": r,
            "rouge_l_heldout": 0.1,
            "nll_heldout": 5.0,
        }
        for rule, values in (("standard", (0.5, 0.7)), ("hash-4-13", (0.2, 0.4)))
        for r in values
    ]
    head, standard, row = (line.split() for line in recipe.table(results).splitlines())
    cells = dict(zip(head, row, strict=True))
    assert cells == {
        "copies": "exact",
        "edits": "0.00",
        "rule": "hash-4-13",
        "drop": "-",
        "ROUGE-L": "0.30",
        "least": "0.20",
        "greatest": "0.40",
        "floor": "0.10",
        "left": "0.40",
        "kept": "-",
        "dropped": "-",
        "nll": "5.00",
        "seeds": "2",
    }, "left: (0.3 - 0.1) / (0.6 - 0.1)"
    assert standard[8] == "1.00", "left of standard itself"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            ["--rules", "standard", "hash-4"],
            r"strategy-k-h\[-max_kept\] such as hash-4-13-4, got 'hash-4'",
        ),
        (
            ["--rules", "letters-1-8"],
            "got 'letters-1-8': k must be a finite number above 1",
        ),
        (["--copies", "exakt"], "--copies are reformatted or exact, got exakt"),
        (["--versions", "0"], "--versions must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_training(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        recipe.main([*wrong, "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
