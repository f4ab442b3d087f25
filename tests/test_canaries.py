"""The canary experiment in miniature: alone, in two processes, killed and resumed, and what it
refuses.
"""

import itertools
import json
import shutil
from pathlib import Path

import canaries
import common
import pretrain_canaries as recipe
import pyarrow
import pytest
import runs
import torch
from launch import launch, words

RULE = "hash-4-13-6"
RUNS = ["standard", "control", RULE, f"{RULE}, equal"]


@pytest.fixture(scope="module")
def small(topics):
    """Arguments of a run of seconds, on a few topics of the language reference."""
    sizes = words(
        documents=2,
        repeats=6,
        background=28,
        validation=8,
        rules=RULE,
        equal_supervised=RULE,
        seeds=0,
        hidden_size=32,
        vocab_size=512,
        save_steps=3,
    )
    return ["--text", str(topics), *sizes]


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("canaries") / "run"
    return folder, recipe.main([*small, "--output_dir", str(folder)])


def same_results(folder, other, **tolerance):
    ours, theirs = (
        {r["run"]: r for r in runs.read_results(each / "results.jsonl")}
        for each in (folder, other)
    )
    assert ours.keys() == theirs.keys() == set(RUNS)
    for name in ours:
        for key in ("validation_loss", "nll_members", "nll_heldout"):
            assert ours[name][key] == pytest.approx(theirs[name][key], **tolerance), (
                name,
                key,
            )
    receipts = [
        (each / f"seed0-{RULE}" / "model" / "goldfish.json").read_text()
        for each in (folder, other)
    ]
    assert receipts[0] == receipts[1]


@pytest.mark.core
def test_miniature(finished):
    folder, results = finished
    assert [result["run"] for result in results] == RUNS
    windows = {result["run"]: result["input_tokens"] // 32 for result in results}
    assert windows == dict(
        zip(RUNS, (40, 40, 40, 52), strict=True)
    )  # 40 * 4 / 3 in batches of 4
    for result in results:
        assert len(result["rouge_l_members"]) == len(result["exact_match_heldout"]) == 2
        assert result["processes"] == 1
        assert result["versions"]["torch"] == torch.__version__
    k4 = results[2]
    assert 0.15 < k4["dropped"] / k4["targets"] < 0.35
    assert k4["targets"] == 40 * 31
    equal = results[3]
    assert (equal["targets"] - equal["dropped"]) / (40 * 31) == pytest.approx(
        1, abs=0.1
    ), "and not 0.75, as at k=4"
    for name in ("rouge.svg", "extraction.svg", "heldout.svg", "choice.json"):
        assert (folder / name).stat().st_size > 50
    assert not list(folder.rglob("checkpoint-*")), (
        "what was only needed to resume is gone"
    )


def test_the_background_holds_nothing_that_is_audited(small):
    (args,) = recipe.HfArgumentParser(recipe.Arguments).parse_args_into_dataclasses(
        small
    )
    texts, corpus = recipe.load_corpus(args)
    tokenizer = common.byte_level_bpe(texts, args.vocab_size)
    data = recipe.load_data(args, 0, texts, corpus, tokenizer)

    def grams(rows):
        return {tuple(row[i : i + 16]) for row in rows for i in range(len(row) - 15)}

    background = grams([*data.background["input_ids"], *data.validation["input_ids"]])
    assert background.isdisjoint(grams(data.planted[0] + data.planted[1]))
    assert len(background) > 1000
    stream = [token for row in data.background["input_ids"] for token in row]
    assert tokenizer.eos_token_id in stream, "documents are told apart"
    again = recipe.load_data(args, 0, texts, corpus, tokenizer)
    assert again.background["input_ids"] == data.background["input_ids"]
    assert recipe.load_data(args, 1, texts, corpus, tokenizer).planted != data.planted


def test_the_default_background_is_long_enough():
    args = recipe.Arguments()
    windows = (
        max(run.background(args) for run in recipe.trainings_of(args, 0))
        + args.validation
    )
    lengths = itertools.accumulate(map(len, recipe.docstrings()))
    assert any(length > windows * args.window * 4 for length in lengths), (
        "at four characters per token"
    )


def test_zero3_trains_what_one_process_does(small, finished, tmp_path):
    """DeepSpeed on two CPU processes, with recipes/configs/zero3.yaml. Its first start compiles for
    minutes.
    """
    pytest.importorskip(
        "deepspeed", reason="DeepSpeed is not installed; it is no dependency of ours"
    )
    done = launch(
        ("pretrain_canaries", [*small, "--output_dir", str(tmp_path / "run")]),
        config="zero3",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    same_results(tmp_path / "run", finished[0], rel=1e-4)


def test_fsdp_killed_and_started_again_ends_where_one_process_does(
    small, finished, tmp_path
):
    """FSDP2 on two CPU processes, with recipes/configs/fsdp2.yaml; its checkpoints are ordinary
    ones.

    Of a run in which only the training under the rule is left to do, one process dies (kill -9) in
    step 8 of it; checkpoints are written every three steps.
    """
    folder, results = finished
    run, model = tmp_path / "run", tmp_path / "run" / f"seed0-{RULE}" / "model"
    run.mkdir()
    shutil.copy(folder / "arguments.json", run)
    for result in results:
        if result["run"] != RULE:
            runs.append(run / "results.jsonl", result)
    command = ("pretrain_canaries", [*small, "--output_dir", str(run)])
    assert launch(command, config="fsdp2", dies=f"seed0-{RULE}:1:8").returncode != 0
    assert runs.last_checkpoint(model) == model / "checkpoint-6"
    assert not runs.finished(model)
    done = launch(command, config="fsdp2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint-6" in done.stdout
    same_results(run, folder, rel=1e-5)
    last = runs.read_results(run / "results.jsonl")[-1]
    assert (last["run"], last["distributed"], last["processes"]) == (RULE, "FSDP", 2)


def test_a_finished_run_is_not_trained_again(small, finished, capsys):
    folder, results = finished
    written = (folder / "results.jsonl").read_text()
    assert recipe.main([*small, "--output_dir", str(folder)]) == results
    assert (folder / "results.jsonl").read_text() == written
    assert "Training" not in capsys.readouterr().out


def test_half_a_checkpoint_is_passed_over(tmp_path):
    for step, state in ((3, "{}"), (20, "{}"), (100, '{"log'), (110, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert runs.last_checkpoint(tmp_path) == tmp_path / "checkpoint-20"
    assert runs.last_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize("name", ["canaries-124m", "canaries-1.1b"])
def test_presets_parse_and_have_the_size_in_their_name(name, capsys):
    preset = Path(recipe.__file__).parent / "configs" / f"{name}.args"
    parser = recipe.HfArgumentParser(recipe.Arguments, fromfile_prefix_chars="@")
    (args,) = parser.parse_args_into_dataclasses([f"@{preset}"])
    head = (
        args.vocab_size if args.tokenizer is None else 2 * 32000
    )  # TinyLlama's own, not tied there
    attention = (
        2 * args.hidden_size**2 * (1 + (args.kv_heads or args.heads) / args.heads)
    )
    layer = attention + 3 * args.hidden_size * args.intermediate_size
    millions = (head * args.hidden_size + args.layers * layer) / 1e6
    assert millions == pytest.approx(
        {"canaries-124m": 124, "canaries-1.1b": 1100}[name], rel=0.01
    )
    assert recipe.main([f"@{preset}", "--dry_run"]) == []
    assert "trainings" in capsys.readouterr().out
    if name == "canaries-1.1b":
        assert (
            args.background + args.documents * args.repeats
        ) * args.window == 20e9, "the paper's 20B tokens"
        assert args.batch_size * args.window == pytest.approx(2.1e6, rel=0.01)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (
            ["--equal_supervised", "hash-8-13"],
            "--equal_supervised hash-8-13: not among --rules",
        ),
        (["--rules", "hash-1-13"], "k must be a finite number above 1"),
        (["--rules", "standard"], "--rules standard: it is always trained"),
        (
            ["--accumulation", "3"],
            "--batch_size 4 does not divide by 1 processes x --accumulation 3",
        ),
        (["--background", "9999999"], "the background is too short"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_training(
    small, wrong, message, tmp_path
):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        recipe.main([*small, "--output_dir", str(tmp_path / "run"), *wrong])
    assert not list(tmp_path.rglob("model"))


def test_canaries_are_random_rows_inserted_as_often_as_said(tmp_path, tokenizer):
    folder = tmp_path / "c"
    canaries.write_canaries(
        folder, tokenizer, counts=(1, 3), references=7, length=20, seed=1
    )
    inserted, planted, references = (
        [
            json.loads(line)
            for line in (folder / f"{name}.jsonl").read_text().splitlines()
        ]
        for name in ("inserted", "canaries", "references")
    )
    assert [(row["name"], row["count"]) for row in planted] == [
        ("canary 0", 1),
        ("canary 1", 3),
    ]
    assert sorted(row["name"] for row in inserted) == ["canary 0"] + ["canary 1"] * 3
    assert all(row in planted for row in inserted)
    ordinary = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    rows = [row["input_ids"] for row in planted + references]
    assert len({tuple(row) for row in rows}) == 9
    assert all(len(row) == 20 and set(row) <= ordinary for row in rows)
    with pytest.raises(
        FileExistsError, match="is not an empty folder; choose another one or remove it"
    ):
        canaries.write_canaries(folder, tokenizer, counts=(1,), references=1, length=2)
    with pytest.raises(ValueError, match="canaries need a count of at least 1 each"):
        canaries.write_canaries(
            tmp_path / "d", tokenizer, counts=(0,), references=1, length=2
        )


def test_exposure_and_its_ceiling(monkeypatch):
    scores = {
        "heldout": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
        "members": [9.0, 5.0, 0.0],
    }
    rows = [
        {
            "split": split,
            "count": None if split == "heldout" else (4, 4, 1)[i],
            "mia_loss": score,
        }
        for split, values in scores.items()
        for i, score in enumerate(values)
    ]
    monkeypatch.setattr(
        canaries, "read_records", lambda *_: pyarrow.Table.from_pylist(rows)
    )
    table = canaries.exposure(Path("an audit"))
    assert table["greatest"].to_dict() == {1: 0, 4: 3}, "ranks 8 and 1 of 8"
    assert table["mean"].to_dict() == {1: 0, 4: 2}, (
        "(3 + 1) / 2: a tie counts against the canary: rank 4"
    )


def test_exposure_of_an_audit(tmp_path, checkpoint, capsys):
    """A model that never saw the canaries: one line per count."""
    canaries.main(
        [
            "write",
            str(tmp_path / "c"),
            "--tokenizer",
            str(checkpoint),
            *words(counts="1 1 3", references=7, length=20),
        ]
    )
    inputs = {
        "members": tmp_path / "c" / "canaries.jsonl",
        "heldout": tmp_path / "c" / "references.jsonl",
    }
    common.audit_halves(checkpoint, tmp_path / "audit", inputs, 20, "untrained")
    table = canaries.exposure(tmp_path / "audit")
    assert table["canaries"].to_dict() == {1: 2, 3: 1}
    assert (table["ceiling"] == 3).all()
    assert (table["mean"] <= table["greatest"]).all()
    canaries.main(["exposure", str(tmp_path / "audit")])
    assert (
        capsys.readouterr().out.rstrip().endswith(table.to_string(float_format="%.2f"))
    )
