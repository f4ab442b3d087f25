"""The main job in miniature, and what it refuses."""

import json
import shutil
import subprocess

import memorize
import pytest
import runs
import torch
from launch import MEMORIZE
from transformers import AutoModelForCausalLM, AutoTokenizer

from goldfish import Goldfish
from goldfish.audit import read


@pytest.fixture(scope="module")
def small(topics):
    """A miniature of seconds, on a few topics of the language reference."""
    return ["--text", str(topics), *MEMORIZE]


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("memorize") / "run"
    return folder, memorize.main([*small, "--output_dir", str(folder)])


@pytest.mark.core
def test_miniature_leaves_two_audited_checkpoints_and_a_report(finished):
    folder, summaries = finished
    for name in ("standard", "goldfish"):
        assert (folder / name / "model.safetensors").is_file()
        assert (folder / name / "tokenizer.json").is_file()
        assert (folder / name / "goldfish.json").is_file() == (name == "goldfish")
        assert (folder / "audit" / name / "records").is_dir()
        for split in ("members", "heldout"):
            assert summaries[name][f"{split}.exact_match"].n == 4
        assert read(folder / "audit" / name) == summaries[name]
    assert "</html>" in (folder / "report.html").read_text(encoding="utf-8")
    receipt = json.loads((folder / "goldfish" / "goldfish.json").read_text())
    assert receipt["rule"]["k"] == 4
    assert 0.1 < receipt["dropped"] / receipt["targets"] < 0.4


def test_a_published_checkpoint_can_be_the_start(finished, tmp_path):
    """As most are: without a padding token, in half precision."""
    folder, _ = finished
    start = tmp_path / "start"
    shutil.copytree(folder / "standard", start)
    AutoModelForCausalLM.from_pretrained(start, dtype=torch.bfloat16).save_pretrained(
        start
    )
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(start)
    assert AutoTokenizer.from_pretrained(start).pad_token is None
    args = memorize.Arguments(model=str(start), epochs=1, window=64, batch_size=4)
    tokenizer = memorize.load_start_tokenizer(args)
    assert tokenizer.pad_token == tokenizer.eos_token
    rows = [
        json.loads(line)["input_ids"]
        for line in (folder / "members.jsonl").read_text().splitlines()
    ]
    memorize.train(args, Goldfish(k=4), rows, tokenizer, tmp_path / "next")
    assert (
        json.loads((tmp_path / "next" / "config.json").read_text())["dtype"]
        == "float32"
    )
    assert (
        json.loads((tmp_path / "next" / "goldfish.json").read_text())["targets"]
        == 4 * 63
    )


def test_windows_longer_than_the_context_are_refused_before_anything_is_written(
    small, finished, tmp_path
):
    folder, _ = finished
    start = [
        "--model",
        str(folder / "standard"),
        "--window",
        "600",
    ]  # small_llama reads 512
    with pytest.raises(
        ValueError,
        match=r"--window 600 tokens, but \S+standard reads at most 512; lower --window",
    ):
        memorize.main([*small, *start, "--output_dir", str(tmp_path / "next")])
    assert not (tmp_path / "next").exists()


def test_members_and_heldout_share_no_eight_tokens(finished):
    folder, _ = finished
    grams = []
    for name in ("members", "heldout"):
        rows = [
            json.loads(line)["input_ids"]
            for line in (folder / f"{name}.jsonl").read_text().splitlines()
        ]
        grams.append(
            {tuple(row[i : i + 8]) for row in rows for i in range(len(row) - 7)}
        )
    assert grams[0].isdisjoint(grams[1])


def test_dry_run_says_what_would_run_and_leaves_nothing(tmp_path, capsys):
    assert memorize.main(["--dry_run", "--output_dir", str(tmp_path / "run")]) == {}
    shown = capsys.readouterr().out
    assert "32 member and 32 held-out windows of 256 tokens" in shown
    assert "Goldfish(k=4, h=13, max_kept=4), " in shown
    assert "max_kept=4" in shown
    assert not (tmp_path / "run").exists()


def test_a_text_file_can_be_the_corpus(tmp_path, capsys):
    rows = [
        {"text": f"Document {i}: " + " ".join(str(i * j) for j in range(300))}
        for i in range(10)
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    memorize.main([*MEMORIZE, "--text", str(path), "--dry_run"])
    assert "mine.jsonl, 10 documents" in capsys.readouterr().out


def test_a_dataset_can_be_the_corpus(tmp_path, capsys):
    """A local folder stands in for a dataset of the hub; the loading code is the same."""
    rows = [
        {"text": f"Document {i}: " + " ".join(str(i * j) for j in range(300))}
        for i in range(10)
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    memorize.main([*MEMORIZE, "--dataset", str(tmp_path / "data"), "--dry_run"])
    assert "data, 10 documents" in capsys.readouterr().out


def test_a_finished_run_is_not_trained_again(small, finished, capsys):
    folder, summaries = finished
    report = (folder / "report.html").read_bytes()
    assert memorize.main([*small, "--output_dir", str(folder)]) == summaries
    assert "Training" not in capsys.readouterr().out
    assert (folder / "report.html").read_bytes() == report


def test_nothing_is_overwritten(small, finished, tmp_path):
    folder, _ = finished
    with pytest.raises(
        ValueError,
        match=r"holds a run with --learning_rate 0\.002, not 0\.1; give the same arguments",
    ):
        memorize.main([*small, "--output_dir", str(folder), "--learning_rate", "0.1"])
    (tmp_path / "thesis.tex").write_text("irreplaceable")
    with pytest.raises(
        FileExistsError,
        match="is not empty and not a run of a recipe; choose another --output_dir",
    ):
        memorize.main([*small, "--output_dir", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--documents", "0"], "--documents must be at least 1, got 0"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--window", "7"], "--window must be at least 8, got 7"),
        (["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["--hidden_size", "30"], "--hidden_size must be a multiple of 8"),
        (["--rule", "hash-1-13"], "k must be a finite number above 1"),
        (["--rule", "hush-4-13"], "strategy must be one of 'hash'"),
        (["--rule", "standard"], "--rule standard: it is always trained"),
        (["--model", "runs/typo"], "no folder runs/typo here"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    small, wrong, message, tmp_path
):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        memorize.main([*small, "--output_dir", str(tmp_path / "run"), *wrong])
    assert not (tmp_path / "run").exists()


def test_a_corpus_too_short_or_empty_is_refused(tmp_path):
    path = tmp_path / "short.txt"
    for text, message in (
        ("a few words only", "the corpus is too short: 1 texts give 0 windows"),
        ("  ", "is empty"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            memorize.main(
                [*MEMORIZE, "--text", str(path), "--output_dir", str(tmp_path / "run")]
            )
    assert not (tmp_path / "run").exists(), (
        "a refused run is not in the way of the next one"
    )
    with pytest.raises(ValueError, match="both name a corpus"):
        memorize.main(
            [*MEMORIZE, "--text", str(path), "--dataset", "someone/something"]
        )


def test_two_processes_train_what_one_does(finished, in_two):
    """The same texts, the same counts, the same model to rounding."""
    folder, summaries = finished
    two = in_two[0] / "memorize"
    assert (two / "members.jsonl").read_text() == (folder / "members.jsonl").read_text()
    receipts = [
        json.loads((run / "goldfish" / "goldfish.json").read_text())
        for run in (two, folder)
    ]
    assert receipts[0] == receipts[1]
    for name in ("standard", "goldfish"):
        of_two = read(two / "audit" / name)
        for split in ("members", "heldout"):
            ours, theirs = (
                audit[f"{split}.nll"].value for audit in (of_two, summaries[name])
            )
            assert ours == pytest.approx(theirs, rel=1e-5)


def test_provenance(monkeypatch):
    monkeypatch.setattr(
        "sys.argv",
        [
            memorize.__file__,
            "--text",
            "/somewhere/mine.jsonl",
            "--output_dir",
            "runs/a b",
        ],
    )
    about = runs.about("pytest", "no-such-package")
    assert (
        about["command"]
        == "python recipes/memorize.py --text mine.jsonl --output_dir 'runs/a b'"
    )
    assert about["versions"]["pytest"] == pytest.__version__
    assert about["versions"]["no-such-package"] is None
    assert (about["processes"], about["threads"]) == (1, torch.get_num_threads())


def test_commit_says_whether_files_were_changed(tmp_path, monkeypatch):
    def git(*words):
        who = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *who, *words],
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    monkeypatch.setattr(runs, "ROOT", tmp_path)
    assert runs.commit() == "unknown", "no repository"
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    assert runs.commit() == git("rev-parse", "HEAD")[:12]
    (tmp_path / "file").write_text("two")
    assert runs.commit() == git("rev-parse", "HEAD")[:12] + "+changes"
