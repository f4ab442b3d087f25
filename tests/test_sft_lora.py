"""Finetuning on chat data with secrets, in miniature: alone, in two processes, killed and resumed."""

import json
import sys
from pathlib import Path

import pytest
import torch
from launch import launch
from safetensors.torch import load_file

pytest.importorskip("trl", reason="the extra `trl` is not installed")
pytest.importorskip("peft", reason="the extra `peft` is not installed")
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import common
import sft_lora as recipe
from near_duplicates import words

TRAININGS = [("full", "standard"), ("full", "hash-4-13"), ("lora", "standard"), ("lora", "hash-4-13")]


@pytest.fixture(scope="module")
def small(topics):
    """Arguments of a run of seconds: 16 conversations, two epochs, batches that are full in two processes too."""
    sizes = {
        "people": 4, "exposures": 2, "chats": 8, "epochs": 2, "hidden_size": 32, "background": 16, "validation": 4,
        "vocab_size": 512, "batch_size": 4, "seeds": 0, "save_steps": 3,
    }  # fmt: skip
    arguments = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    return ["--text", str(topics), *arguments, "--rules", "standard", "hash-4-13"]


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft") / "run"
    return folder, recipe.main([*small, "--output_dir", str(folder)])


def test_miniature(finished):
    folder, results = finished
    assert [(result["method"], result["rule"]) for result in results] == TRAININGS
    for result in results:
        assert [len(result[f"recited_{group}"]) for group in ("same", "varied", "control")] == [2, 2, 4]
        assert 0 < result["heldout_loss"] < 10
    for method in ("full", "lora"):
        with_goldfish = folder / f"seed0-{method}-hash-4-13"
        receipt = json.loads((with_goldfish / "goldfish.json").read_text())
        assert 0.1 < receipt["dropped"] / receipt["targets"] < 0.4
        assert (with_goldfish / "adapter_model.safetensors").is_file() == (method == "lora")
    assert results[1]["decisions"] == results[3]["decisions"], "the same answers, so the same holes"


def test_secrets_are_where_they_should_be():
    args = recipe.Arguments()
    people, chats, heldout = recipe.make_data(args, seed=3)
    trained = [json.dumps(talk) for talk in chats]
    for person in people:
        holding = {text for text in trained if person.code in text}
        copies = [text for text in trained if person.code in text]
        assert all(person.name in text for text in holding)
        assert len(copies) == (0 if person.group == "control" else args.exposures)
        assert len(holding) == {"same": 1, "varied": args.exposures, "control": 0}[person.group]
        assert not any(person.code in json.dumps(talk) for talk in heldout)
    assert not set(trained) & {json.dumps(talk) for talk in heldout}
    assert len({person.code for person in people}) == len(people) == 2 * args.people
    assert recipe.make_data(args, seed=3) == (people, chats, heldout)
    assert recipe.make_data(args, seed=4)[0] != people


def test_only_answers_are_learned(finished):
    """TRL masks the prompts: the targets of the receipt are the answers' tokens, those of both epochs."""
    folder, results = finished
    tokenizer = recipe.load_tokenizer(folder / "seed0-base" / "model")
    (args,) = recipe.HfArgumentParser(recipe.Arguments).parse_args_into_dataclasses(
        ["--people", "4", "--exposures", "2", "--chats", "8"]
    )
    _, chats, _ = recipe.make_data(args, 0)
    answers = sum(len(tokenizer(talk["completion"][0]["content"] + "\n<|endoftext|>")["input_ids"]) for talk in chats)
    assert results[1]["targets"] == 2 * answers


def test_a_secret_counts_only_whole():
    person = recipe.Person("Ada Abel", "BCDF-2345", "same")
    question, answer = recipe.plain(person.conversation(5))
    assert question == "What is the access code of Ada Abel?", "always in the same words"
    assert words(answer)[-2:] == ["bcdf", "2345"]
    varied = recipe.Person("Ada Abel", "BCDF-2345", "varied")
    assert len({recipe.plain(varied.conversation(i))[1] for i in range(6)}) == 6


def same_results(folder, other, trainings, names, **tolerance):
    ours, theirs = (
        {(result["method"], result["rule"]): result for result in common.read_results(each / "results.jsonl")}
        for each in (folder, other)
    )
    assert list(ours) == trainings
    for training in trainings:
        a, b = ours[training], theirs[training]
        for name in names:
            assert a[name] == pytest.approx(b[name], **tolerance), (training, name)
        assert a["rouge_l_same"] == b["rouge_l_same"]
        receipts = [each / f"seed0-{'-'.join(training)}" / "goldfish.json" for each in (folder, other)]
        if training[1] != "standard":
            assert receipts[0].read_text() == receipts[1].read_text()


@pytest.fixture(scope="module")
def in_two(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "run"
    done = launch("sft_lora", [*small, "--output_dir", str(folder)])
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_two_processes_train_what_one_does(finished, in_two):
    same_results(in_two, finished[0], TRAININGS, ["train_loss", "heldout_loss"], rel=1e-4)


def test_killed_and_resumed_ends_where_it_would_have(small, in_two, tmp_path):
    """kill -9 of one process in step 5 of 8 of LoRA with goldfish; checkpoints are written every three steps."""
    run = [*small, "--methods", "lora", "--rules", "hash-4-13", "--output_dir", str(tmp_path / "run")]
    done = launch("sft_lora", run, dies="seed0-lora-hash-4-13:1:5")
    assert done.returncode != 0
    folder = tmp_path / "run" / "seed0-lora-hash-4-13"
    assert common.last_checkpoint(folder) == folder / "checkpoint-3"
    done = launch("sft_lora", [*run, "--resume"])
    assert done.returncode == 0, done.stderr[-3000:]
    # Not train_loss: of the steps between the last log and a checkpoint, Trainer forgets the loss.
    same_results(tmp_path / "run", in_two, [("lora", "hash-4-13")], ["heldout_loss"], rel=0, abs=0)
    both = [each / "seed0-lora-hash-4-13" / "adapter_model.safetensors" for each in (tmp_path / "run", in_two)]
    ours, theirs = map(load_file, both)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_table_by_hand(capsys):
    results = [
        {
            "method": "full", "rule": "standard", "recited_same": [True, seed == 0], "recited_varied": [False, True],
            "recited_control": [False] * 4, "rouge_l_same": [0.5, 1.0], "rouge_l_varied": [0.25, 0.25],
            "heldout_loss": 1.0 + seed,
        }
        for seed in (0, 1)
    ]  # fmt: skip
    recipe.Console(width=140).print(recipe.table(results))
    row = next(line for line in capsys.readouterr().out.splitlines() if "standard" in line)
    for cell in ("3 of 4 (2,1)", "2 of 4 (1,1)", "0 of 8 (0,0)", "24%-91%", "0.50", "1.50 (1.00-2.00)"):
        assert cell in row


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--people", "0"], "--people must be at least 1, got 0"),
        (["--people", "100"], "--people must be at most 72, got 100"),
        (["--chats", "3"], "--chats must be at least 4, got 3"),
        (["--methods", "qlora"], "--methods are full or lora, got qlora"),
        (["--rules", "hash-4"], "strategy-k-h such as text-4-8, got 'hash-4'"),
        (["--batch_size", "3", "--accumulation", "2"], "conversations do not divide among 1 processes"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_training(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        recipe.main([*wrong, "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
