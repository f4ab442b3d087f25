"""Finetuning on chat data with secrets, in miniature: alone, in two processes, killed and resumed."""

import json
import shutil

import common
import pytest
import runs
import torch
from launch import SFT
from safetensors.torch import load_file
from transformers import TrainerCallback

pytest.importorskip("trl", reason="the extra `trl` is not installed")
pytest.importorskip("peft", reason="the extra `peft` is not installed")
import sft_lora as recipe

TRAININGS = [("full", "standard"), ("full", "hash-4-13"), ("lora", "standard"), ("lora", "hash-4-13")]


@pytest.fixture(scope="module")
def small(topics):
    return ["--text", str(topics), *SFT]


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
    assert common.words(answer)[-2:] == ["bcdf", "2345"]
    varied = recipe.Person("Ada Abel", "BCDF-2345", "varied")
    assert len({recipe.plain(varied.conversation(i))[1] for i in range(6)}) == 6


def test_two_processes_train_what_one_does(finished, in_two):
    (two,) = runs.read_results(in_two[0] / "sft_lora" / "results.jsonl")
    (one,) = (r for r in finished[1] if (r["method"], r["rule"]) == (two["method"], two["rule"]) == TRAININGS[-1])
    assert two["processes"] == 2
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
    assert two["heldout_loss"] == pytest.approx(one["heldout_loss"], rel=1e-4)
    assert two["rouge_l_same"] == one["rouge_l_same"]
    assert two["decisions"] == one["decisions"]


def test_interrupted_and_resumed_ends_where_it_would_have(small, finished, tmp_path, monkeypatch):
    """Interrupted in step 5 of 8 of LoRA with goldfish; checkpoints are written every three steps."""
    run = [*small, "--methods", "lora", "--rules", "hash-4-13", "--output_dir", str(tmp_path / "run")]
    name = "seed0-lora-hash-4-13"
    folder, theirs = tmp_path / "run" / name, finished[0] / name
    shutil.copytree(finished[0] / "seed0-base", tmp_path / "run" / "seed0-base")
    shutil.copy(finished[0] / "arguments.json", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(runs, "train_or_resume", interrupted_in_step_5_of(name, runs.train_or_resume))
        with pytest.raises(KeyboardInterrupt):
            recipe.main(run)
    assert runs.last_checkpoint(folder) == folder / "checkpoint-3"
    recipe.main(run)
    assert (folder / "goldfish.json").read_text() == (theirs / "goldfish.json").read_text()
    ours, expected = (load_file(each / "adapter_model.safetensors") for each in (folder, theirs))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def interrupted_in_step_5_of(name, train):
    def interrupted(trainer, folder):
        if folder.name == name:
            trainer.add_callback(Interrupt())
        train(trainer, folder)

    return interrupted


class Interrupt(TrainerCallback):
    def on_step_end(self, arguments, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_table_by_hand():
    results = [
        {
            "method": "full", "rule": "standard", "recited_same": [True, seed == 0], "recited_varied": [False, True],
            "recited_control": [False] * 4, "rouge_l_same": [0.5, 1.0], "rouge_l_varied": [0.25, 0.25],
            "heldout_loss": 1.0 + seed,
        }
        for seed in (0, 1)
    ]  # fmt: skip
    row = recipe.table(results).splitlines()[1]
    for cell in ("3 of 4 (2,1)", "2 of 4 (1,1)", "0 of 8 (0,0)", "24.5–91.5%", "0.50", "1.50 (1.00-2.00)"):
        assert cell in row


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--people", "0"], "--people must be at least 1, got 0"),
        (["--people", "100"], "--people must be at most 72, got 100"),
        (["--chats", "3"], "--chats must be at least 4, got 3"),
        (["--methods", "qlora"], "--methods are full or lora, got qlora"),
        (["--rules", "hash-4"], r"strategy-k-h\[-max_kept\] such as hash-4-13, got 'hash-4'"),
        (["--batch_size", "3", "--accumulation", "2"], "does not divide by 1 processes x --accumulation 2"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_training(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        recipe.main([*wrong, "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
