"""The audit as a whole: what it writes, what it refuses, and that no moment is a bad one to be
killed at.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers import BEFORE_5, PROSE, tiny_llama

from goldfish import Goldfish
from goldfish.audit import audit, run
from goldfish.audit.documents import Relations
from goldfish.audit.questions import sanity
from goldfish.audit.records import read_records
from goldfish.audit.render import skipped
from goldfish.audit.results import Folder
from goldfish.audit.score import Sampling, Scorer
from goldfish.audit.windows import Cutter, Survey
from goldfish.checkpoint import Checkpoint
from goldfish.receipt import DropCounts, write_receipt

pytestmark = pytest.mark.core
ROOT = Path(__file__).parent.parent


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def inputs(tmp_path):
    """Four members of ids; three held-out texts, and one that is too short."""
    ids = torch.randint(
        2, 320, (4, 40), generator=torch.Generator().manual_seed(0)
    ).tolist()
    members = write_jsonl(
        tmp_path / "m.jsonl",
        [{"input_ids": row, "name": f"n{i}", "count": 2} for i, row in enumerate(ids)],
    )
    texts = [PROSE[0], "short", *PROSE[1:3]]
    heldout = write_jsonl(tmp_path / "h.jsonl", [{"text": text} for text in texts])
    return {
        "members": members,
        "heldout": heldout,
        "prefix_length": 10,
        "suffix_length": 8,
    }


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(run, "BLOCK", 3)


def contents(folder):
    """Every file by its path inside; without the times at which it was begun and by which
    command.
    """
    folder, found = Path(folder), {}
    for path in sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name != "lock"
    ):
        found[str(path.relative_to(folder))] = path.read_bytes()
        if path.name in ("run.json", "summary.json"):
            value = json.loads(path.read_text())
            found[path.name] = {
                key: each
                for key, each in value.items()
                if key not in ("date", "command")
            }
        if path.name == "summary.md":
            found[path.name] = re.sub(r"20[-\\0-9T:+]+", "", path.read_text())
    return found


def test_audit_of_a_checkpoint(tmp_path, tokenizer, checkpoint, inputs, small_blocks):
    rule = Goldfish(k=2, h=3)
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    write_receipt(folder, DropCounts(rule, torch.device("cpu")), tokenizer)
    sampling = [Sampling(), Sampling(0.7, 5, 0.9)]
    summary = audit(
        folder,
        tmp_path / "out",
        **inputs,
        offsets=(0, 3),
        sampling=sampling,
        beams=(2,),
        control=checkpoint,
        command="goldfish audit",
    )
    blocks = [
        f"{n:06d}.parquet" for n in range(5)
    ]  # of three windows: eight of members, six of held-out texts
    files = [
        *(f"records/{block}" for block in blocks),
        "run.json",
        "summary.json",
        "summary.md",
    ]
    assert list(contents(tmp_path / "out")) == files
    assert (
        json.loads((tmp_path / "out" / "summary.json").read_text()) == summary.to_json()
    )
    assert summary.run["rule"] == rule.to_dict()
    assert summary["members.settled"].n == 8, "at both offsets"
    assert summary["heldout.settled"].n == 6
    assert summary.run["protocol"]["sampling"][1] == {
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
    }
    rows = read_records(tmp_path / "out").to_pylist()
    assert [(row["split"], row["index"]) for row in rows] == [
        *(("members", i) for i in range(4) for _ in range(2)),
        *(("heldout", i) for i in (0, 2, 3) for _ in range(2)),
    ]
    ids = [
        json.loads(line)["input_ids"]
        for line in inputs["members"].read_text().splitlines()
    ]
    assert rows[2]["name"] == "n1"
    assert rows[2]["prefix_ids"] + rows[2]["suffix_ids"] == ids[1][:18]
    assert rows[3]["prefix_ids"] + rows[3]["suffix_ids"] == ids[1][3:21]
    assert rows[3]["dropped"] == rule.dropped(torch.tensor(ids[1])).tolist()[13:21]
    assert rows[2]["dropped"] == rule.dropped(torch.tensor(ids[1])).tolist()[10:18]
    assert "".join(rows[8]["suffix_tokens"]) in PROSE[0]
    for row in rows:
        assert (
            row["correct"][: row["first_divergence"]]
            == [True] * row["first_divergence"]
        )

    assert [row["document"] for row in rows] == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
        4,
        4,
        5,
        5,
        6,
        6,
    ]
    about = json.loads((tmp_path / "out" / "run.json").read_text())
    assert about["inputs"]["heldout"] | {"sha256": ""} == {
        "path": str(inputs["heldout"]),
        "sha256": "",
        "rows": 4,
        "windows": 6,
        "completions": 0,
        "secrets": {"marked": 0, "asked": 0, "unasked": []},
        "drawn": 4,
        "asked": 3,
        "documents": 3,
        "skipped": [
            {"reason": f"fewer than 18 tokens{at}", "count": 1, "rows": [1]}
            for at in ("", " from token 3 on")
        ],
    }
    sha256 = hashlib.sha256(inputs["heldout"].read_bytes()).hexdigest()
    assert (
        summary.run["inputs"]["heldout"]["sha256"]
        == about["inputs"]["heldout"]["sha256"]
        == sha256
    )
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert about["weights"][0]["model.safetensors"] == weights
    assert summary.run["protocol"]["vocabulary"] == 320
    assert (summary.run["command"], about["receipt"]["rule"], summary.run["date"]) == (
        "goldfish audit",
        rule.to_dict(),
        about["date"],
    )


def test_a_finished_audit_is_summarized_again_without_a_model(
    tmp_path, checkpoint, inputs, monkeypatch
):
    summary = audit(checkpoint, tmp_path / "out", **inputs)
    before = contents(tmp_path / "out")
    monkeypatch.setattr(Checkpoint, "model", None)
    monkeypatch.setattr(run, "Survey", None)
    assert audit(checkpoint, tmp_path / "out", **inputs, command="later") == summary
    with pytest.raises(
        FileExistsError,
        match=r"holds an audit with other settings: prefix_length \(10 there, 9 now\)",
    ):
        audit(checkpoint, tmp_path / "out", **{**inputs, "prefix_length": 9})
    assert contents(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(
        FileExistsError, match="exists and is not an empty folder; choose another"
    ):
        audit(checkpoint, tmp_path / "mine", **inputs)


@pytest.fixture
def whole(tmp_path, checkpoint, inputs, small_blocks):
    """The files of an audit that nobody stopped, and how many files it renamed into place on the
    way.
    """
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        replace = os.replace
        patch.setattr(os, "replace", lambda *args: (steps.append(args), replace(*args)))
        audit(checkpoint, tmp_path / "whole", **inputs)
    return contents(tmp_path / "whole"), len(steps)


def killed(step, call):
    """Run `call` in a child that kills itself, as kill -9 does, before its n-th file is renamed
    into place.
    """
    child = os.fork()
    if child == 0:
        count, replace = 0, os.replace

        def counting(*args):
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(*args)

        os.replace = counting
        try:
            call()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def test_killed_at_any_moment_it_goes_on_where_it_was(
    tmp_path, checkpoint, inputs, whole, monkeypatch
):
    """And the files are the same bytes. Every block is scored once, but for the one that was under
    way.
    """
    expected, steps = whole
    scored = []
    score = Scorer.score
    monkeypatch.setattr(
        Scorer,
        "score",
        lambda self, windows: scored.append(windows[0].index) or score(self, windows),
    )
    assert steps == 6, "run.json, three blocks, summary.md, summary.json"
    for step in range(1, steps + 1):
        output = tmp_path / str(step)
        assert killed(step, lambda output=output: audit(checkpoint, output, **inputs))
        kept = len(list(output.glob("records/*.parquet")))
        scored.clear()
        audit(checkpoint, output, **inputs)
        assert len(scored) == 3 - kept
        assert contents(output) == expected, step


def test_an_unfinished_audit_with_other_settings_is_refused(
    tmp_path, checkpoint, inputs, small_blocks
):
    output = tmp_path / "out"
    assert killed(4, lambda: audit(checkpoint, output, **inputs))
    before = contents(output)
    for changes, text in (
        ({"prefix_length": 11}, r"prefix_length \(10 there, 11 now\)"),
        ({"sampling": ()}, "sampling"),
        ({"heldout": None}, "heldout"),
        ({"max_rows": 3}, r"max_rows \(None there, 3 now\)"),
    ):
        with pytest.raises(
            FileExistsError, match=f"holds an audit with other settings: .*{text}"
        ):
            audit(checkpoint, output, **{**inputs, **changes})
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    tiny_llama(rms_norm_eps=0.1).save_pretrained(other)
    with pytest.raises(FileExistsError, match=r"checkpoint \(.*weights"):
        audit(other, output, **inputs)
    inputs["members"].write_text(inputs["members"].read_text() + "\n")
    with pytest.raises(FileExistsError, match="SHA-256 of members"):
        audit(checkpoint, output, **inputs)
    assert contents(output) == before


def test_a_full_disk_loses_nothing(tmp_path, checkpoint, inputs, whole):
    """/dev/full stands in for the third block's file: the kernel itself says that no space is
    left.
    """
    output = tmp_path / "out"
    assert killed(3, lambda: audit(checkpoint, output, **inputs))
    (output / "records" / "000002.parquet.part").symlink_to("/dev/full")
    with pytest.raises(
        OSError,
        match=r"the disk is full; the blocks in .* are kept: make room and repeat the command",
    ):
        audit(checkpoint, output, **inputs)
    assert (output / "records" / "000001.parquet").exists()
    audit(checkpoint, output, **inputs)
    assert contents(output) == whole[0]


def test_a_block_cut_short_is_scored_again(tmp_path, checkpoint, inputs, whole):
    output = tmp_path / "out"
    assert killed(4, lambda: audit(checkpoint, output, **inputs))
    for number, data in ((0, b""), (1, b"PAR1")):
        (output / "records" / f"{number:06d}.parquet").write_bytes(data)
    audit(checkpoint, output, **inputs)
    assert contents(output) == whole[0]


def test_a_folder_in_use_is_refused_and_says_by_whom(tmp_path, checkpoint, inputs):
    """The file of a killed process does not count; whoever holds it is named."""
    output = tmp_path / "out"
    with Folder(output).held():
        with pytest.raises(
            FileExistsError,
            match=f"is in use by another audit .process {os.getpid()} on .*; wait",
        ):
            audit(checkpoint, output, **inputs)
        assert [path.name for path in output.iterdir()] == ["lock"]
    (output / "lock").write_text("process 1 on elsewhere")
    audit(checkpoint, output, **inputs)
    assert not (output / "lock").exists()


def test_other_weights_do_not_continue_a_run(
    tmp_path, checkpoint, inputs, small_blocks
):
    """Every byte counts: one in the middle of a large file is enough."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    assert killed(3, lambda: audit(folder, tmp_path / "out", **inputs))
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        FileExistsError, match="holds an audit with other settings: weights"
    ):
        audit(folder, tmp_path / "out", **inputs)


def test_repeated_and_shared_texts(tmp_path, checkpoint):
    """One text in many rows is one document, whatever its case and spaces; one in both files is
    refused.
    """
    text = PROSE[0]
    members = [
        text,
        text.upper(),
        "  ".join(text.split()),
        PROSE[1],
        text + " And more.",
        PROSE[2],
    ]
    write_jsonl(tmp_path / "m.jsonl", [{"text": each} for each in members])
    write_jsonl(
        tmp_path / "h.jsonl",
        [{"text": "Something else: " + PROSE[1]}, {"text": PROSE[2].lower()}],
    )
    lengths = {"prefix_length": 10, "suffix_length": 8}
    summary = audit(
        checkpoint, tmp_path / "out", members=tmp_path / "m.jsonl", **lengths
    )
    assert read_records(tmp_path / "out", ["document"])["document"].to_pylist() == [
        0,
        0,
        0,
        1,
        0,
        2,
    ]
    assert {
        key: summary.run["inputs"]["members"][key] for key in ("asked", "documents")
    } == {
        "asked": 6,
        "documents": 3,
    }
    assert skipped(summary) == [
        "members: 3 rows counted as one text with others: repeats, continuations, rows of "
        "one name"
    ]
    both = {"members": tmp_path / "m.jsonl", "heldout": tmp_path / "h.jsonl", **lengths}
    message = (
        r"m.jsonl and .*h.jsonl share 1 document "
        r"\(first: row 5 and row 1\).*--allow-overlap"
    )
    with pytest.raises(ValueError, match=message):
        audit(checkpoint, tmp_path / "both", **both)
    assert not (tmp_path / "both").exists()
    audit(checkpoint, tmp_path / "both", **both, allow_overlap=True)
    overlap = json.loads((tmp_path / "both" / "run.json").read_text())["overlap"]
    assert overlap == {"documents": 1, "rows": [[5, 1]]}


@pytest.mark.parametrize("which", ["checkpoint", "control"])
def test_logits_that_are_not_finite_are_refused(
    tmp_path, tokenizer, checkpoint, inputs, which
):
    """Weights with NaN, and weights that are too large for float16."""
    for name, value, dtype in (
        ("nan", float("nan"), "float32"),
        ("large", 1e4, "float16"),
    ):
        model = tiny_llama()
        with torch.no_grad():
            model.model.norm.weight[0] = value
            model.lm_head.weight[:, 0] = 100.0
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        given = {"checkpoint": checkpoint, "control": None, which: tmp_path / name}
        with pytest.raises(
            ValueError,
            match=r"the logits of members row 0 \('n0'\) are not finite: .* float32 ",
        ):
            audit(**given, output_dir=tmp_path / f"out {name}", **inputs, dtype=dtype)


def test_two_processes_give_the_bytes_of_one(tmp_path, checkpoint, inputs):
    """accelerate launch with gloo: one of them has the members' only block, the other the held-out
    texts'.
    """
    audit(checkpoint, tmp_path / "one", **inputs)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
    ]
    command += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    command += [
        "--main_process_port",
        str(port),
        "-m",
        "goldfish",
        "audit",
        str(checkpoint),
    ]
    command += [
        "--members",
        str(inputs["members"]),
        "--heldout",
        str(inputs["heldout"]),
    ]
    command += [
        "--prefix-length",
        "10",
        "--suffix-length",
        "8",
        "-o",
        str(tmp_path / "two"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300
    )
    # INCONCLUSIVE is 3, which the launcher reports as 1; the last line has the outcome.
    assert done.returncode == 1, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "goldfish audit: INCONCLUSIVE, exit code 3"
    assert done.stdout.count("Next: goldfish report") == 1
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.fixture
def refused(tmp_path, checkpoint):
    """Audits good.jsonl with other arguments, and expects an error."""
    members = write_jsonl(tmp_path / "good.jsonl", [{"text": PROSE[0]}])
    usual = {"members": members, "prefix_length": 5, "suffix_length": 5}

    def refuse(error, text, checkpoint=checkpoint, **arguments):
        with pytest.raises(error, match=text):
            audit(checkpoint, tmp_path / "out", **{**usual, **arguments})
        assert not (tmp_path / "out").exists(), "a refused audit leaves nothing behind"

    return refuse


def test_bad_input_to_an_audit(tmp_path, tokenizer, checkpoint, refused):
    good = tmp_path / "good.jsonl"
    refused(ValueError, "nothing to audit", members=None)
    refused(ValueError, "at least one token each, got 0 and 5", prefix_length=0)
    refused(
        ValueError,
        "offsets count tokens from a text's start and must be 0 or more, got",
        offsets=(0, -1),
    )
    refused(ValueError, r"must be 0 or more, got \[\]", offsets=())
    refused(ValueError, r"a search needs at least one beam, got \[0, 2\]", beams=(2, 0))
    refused(
        ValueError,
        "dtype must be one of float32, bfloat16, float16, got 'int8'",
        dtype="int8",
    )
    refused(
        ValueError,
        "a batch needs at least one token, got batch_tokens=0",
        batch_tokens=0,
    )
    refused(
        FileNotFoundError, "no file .*missing.jsonl", members=tmp_path / "missing.jsonl"
    )
    refused(FileNotFoundError, "no checkpoint folder", checkpoint=tmp_path / "nowhere")
    text = (
        r"short.jsonl has no usable window: 1 row, none with 5 \+ 5 tokens or .* "
        r"\(1 fewer than 10 tokens\)"
    )
    refused(
        ValueError, text, members=write_jsonl(tmp_path / "short.jsonl", [{"text": "a"}])
    )
    refused(
        ValueError,
        "has no usable window: 0 rows",
        members=write_jsonl(tmp_path / "empty.jsonl", []),
    )
    late = tmp_path / "late.jsonl"
    late.write_bytes(good.read_bytes() * 5 + b"{\n" + good.read_bytes())
    refused(ValueError, "late.jsonl, line 6: not JSON", heldout=late)
    long = write_jsonl(tmp_path / "long.jsonl", [{"input_ids": [5] * 200}])
    refused(
        ValueError,
        "windows of 129 tokens do not fit the model's context, 128 tokens",
        members=long,
        prefix_length=124,
    )
    other = write_jsonl(
        tmp_path / "other.jsonl",
        [{"input_ids": [1] * 10}, {"input_ids": [1] * 9 + [320]}],
    )
    refused(
        ValueError,
        "other.jsonl, row 1: token id 320, but the model knows 320 ids; .*`text`",
        members=other,
    )
    refused(
        FileNotFoundError,
        "no checkpoint folder .*elsewhere",
        control=tmp_path / "elsewhere",
    )
    bare = tmp_path / "bare"
    tiny_llama().save_pretrained(bare)
    refused(
        ValueError,
        r"bare holds no tokenizer; save it there with tokenizer.save_pretrained\(",
        checkpoint=bare,
    )
    stranger = tmp_path / "stranger"
    shutil.copytree(checkpoint, stranger)
    described = json.loads((stranger / "tokenizer.json").read_text())
    described["model"]["vocab"] = {
        f"x{token}": i for token, i in described["model"]["vocab"].items()
    }
    described["model"]["merges"] = []
    (stranger / "tokenizer.json").write_text(json.dumps(described))
    refused(
        ValueError,
        "the control .*stranger has another tokenizer than",
        control=stranger,
    )
    pickled = tmp_path / "pickled"
    shutil.copytree(checkpoint, pickled)
    torch.save(tiny_llama().state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    refused(
        ValueError,
        "has no safetensors weights but pytorch_model.bin: pickles can run code",
        checkpoint=pickled,
    )
    audit(
        pickled,
        tmp_path / "out",
        members=good,
        prefix_length=5,
        suffix_length=5,
        allow_pickle=True,
    )


def test_code_of_a_checkpoint_runs_only_where_it_is_trusted(tmp_path, checkpoint):
    folder = tmp_path / "own code"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "own", "auto_map": names})
    )
    (folder / "own.py").write_text("raise SystemExit('ran')")
    members = write_jsonl(tmp_path / "m.jsonl", [{"text": PROSE[0]}])
    with pytest.raises(ValueError, match="trust_remote_code"):
        audit(
            folder, tmp_path / "out", members=members, prefix_length=5, suffix_length=5
        )
    with pytest.raises(SystemExit, match="ran"):
        audit(
            folder,
            tmp_path / "out",
            members=members,
            prefix_length=5,
            suffix_length=5,
            trust_remote_code=True,
        )


def test_a_tokenizer_other_than_in_training_is_told(
    tmp_path, tokenizer, checkpoint, inputs, caplog
):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    path = write_receipt(folder, DropCounts(Goldfish(), torch.device("cpu")), tokenizer)
    audit(folder, tmp_path / "same", **inputs)
    assert not caplog.records
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer": "0" * 64}))
    audit(folder, tmp_path / "other", **inputs)
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        f"The tokenizer of {folder} is not the one that its goldfish.json names"
    ]


@pytest.mark.skipif(
    BEFORE_5,
    reason="transformers 4 reads its cache folder at import and hides what stops it",
)
def test_a_folder_asks_no_network(tmp_path, checkpoint, inputs, monkeypatch):
    class Asked(BaseException):
        """Not an Exception, so that nobody tries again."""

    def refuse(*_, **__):
        raise Asked

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    audit(checkpoint, tmp_path / "out", **inputs)
    with pytest.raises(Asked):
        audit("someone/tiny", tmp_path / "other", **inputs)


@pytest.mark.skipif(BEFORE_5, reason="transformers 4 reads its cache folder at import")
def test_a_hub_name_has_a_receipt_too(
    tmp_path, tokenizer, checkpoint, inputs, monkeypatch
):
    """From a cache as the hub's client keeps it."""
    repository, commit = tmp_path / "hub" / "models--someone--tiny", "0" * 40
    snapshot = repository / "snapshots" / commit
    shutil.copytree(checkpoint, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    write_receipt(snapshot, DropCounts(Goldfish(k=5), torch.device("cpu")), tokenizer)
    monkeypatch.setattr(
        huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub")
    )
    summary = audit("someone/tiny", tmp_path / "out", **inputs)
    assert summary.run["rule"]["k"] == 5
    assert summary.run["name"] == "tiny"


def test_a_damaged_block_is_made_again_or_named(
    tmp_path, checkpoint, inputs, small_blocks, caplog
):
    """Before the audit is finished the block is scored again; a finished one names the file."""
    audit(checkpoint, tmp_path / "out", **inputs)
    before = contents(tmp_path / "out")
    block = tmp_path / "out" / "records" / "000001.parquet"
    data = bytearray(block.read_bytes())
    data[len(data) // 4 :] = b"x" * len(data[len(data) // 4 :])
    block.write_bytes(data)
    with pytest.raises(ValueError, match=r"000001.parquet is damaged"):
        read_records(tmp_path / "out")
    audit(checkpoint, tmp_path / "out", **inputs)
    assert "000001.parquet is damaged; it is made again" in caplog.text
    assert contents(tmp_path / "out") == before
    block.unlink()
    audit(checkpoint, tmp_path / "out", **inputs)
    assert contents(tmp_path / "out") == before


def test_secrets_by_expression_are_not_secrets_by_column(tmp_path, checkpoint):
    rows = [{"text": PROSE[0], "saw": "saw"}, {"text": PROSE[1], "saw": "sat"}]
    options = {"members": write_jsonl(tmp_path / "m.jsonl", rows), "prefix_length": 5}
    options["suffix_length"] = 20
    audit(checkpoint, tmp_path / "out", **options, secrets="saw")
    with pytest.raises(
        FileExistsError, match=r"other settings: secrets .*; secret_column"
    ):
        audit(checkpoint, tmp_path / "out", **options, secret_column="saw")


def test_run_json_tells_how_much_was_asked(tmp_path, checkpoint):
    rows = [{"text": text} for text in (*PROSE[:3], "short")]
    members = write_jsonl(tmp_path / "m.jsonl", rows)
    lengths = {"prefix_length": 10, "suffix_length": 8}
    audit(
        checkpoint,
        tmp_path / "out",
        members=members,
        max_rows=2,
        complete=True,
        **lengths,
    )
    about = json.loads((tmp_path / "out" / "run.json").read_text())
    assert about["protocol"]["complete"] is True
    counts = about["inputs"]["members"]
    assert (counts["rows"], counts["drawn"], counts["asked"] <= 2) == (4, 2, True)
    assert about["sanity"]["members"]["windows"] == counts["windows"]
    assert about["sanity"]["members"]["nll_shuffled"] > 0


def test_the_sanity_check_shuffles_prefixes(tmp_path, tokenizer):
    """It ends at the first split that shows that the model uses its context."""
    losses = iter((2.0, 2.1, 3.0, 3.5))
    read = []

    class Watched:
        def mean_nll(self, windows):
            read.append([(window.split, window.ids) for window in windows])
            return next(losses)

    random = torch.Generator().manual_seed(0)
    surveys = {}
    for split, count in (("members", 4), ("heldout", 3)):
        ids = torch.randint(2, 320, (count, 30), generator=random).tolist()
        rows = [{"input_ids": row} for row in ids]
        surveys[split] = Survey(
            rows, split, Cutter(tokenizer, 10, 20), tmp_path / split, Relations()
        )
        surveys[split].documents = list(range(count))
    found = sanity.measure(Watched(), surveys)
    assert found == {
        "members": {"windows": 4, "nll": 2.0, "nll_shuffled": 2.1},
        "heldout": {"windows": 3, "nll": 3.0, "nll_shuffled": 3.5},
    }
    for ordered, shuffled in (read[:2], read[2:]):
        for (split, ids), (same_split, others) in zip(ordered, shuffled, strict=True):
            assert split == same_split
            # The first token stays, and 16 tokens of the suffix.
            assert len(ids) == len(others) == 10 + 16
            assert others[0] == ids[0]
            assert others[10:] == ids[10:]
            assert sorted(others[:10]) == sorted(ids[:10])
            assert others != ids
    losses = iter((2.0, 2.5))
    assert list(sanity.measure(Watched(), surveys)) == ["members"]
