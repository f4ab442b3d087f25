import json
import re
import runpy
import shutil
import subprocess
import sys
from typing import get_args

import pytest
import torch
from helpers import BEFORE_5, PROSE

from goldfish import Goldfish
from goldfish.cli import EXTRA, main
from goldfish.rule import Strategy
from goldfish.text.show import DROPPED, show

pytestmark = pytest.mark.core


def styled(text, style):
    return "".join(
        text.plain[span.start : span.end]
        for span in text.spans
        if str(span.style) == style
    )


def test_show_marks_exactly_the_dropped_tokens(tokenizer):
    rule, ids = Goldfish(k=2, h=2), tokenizer(PROSE[0])["input_ids"]
    text = show(rule, tokenizer, PROSE[0])
    dropped = rule.dropped(torch.tensor(ids)).tolist()
    assert text.plain.startswith(PROSE[0])
    assert styled(text, DROPPED) == "".join(
        tokenizer.decode([i]) for i, drop in zip(ids, dropped, strict=True) if drop
    )
    assert f"{sum(dropped)} of {len(ids)} tokens dropped" in text.plain


def test_show_takes_a_long_text_without_spaces(checkpoint, capsys):
    assert main(["show", "吾輩は猫である" * 20, "--tokenizer", str(checkpoint)]) == 0
    assert "tokens dropped" in capsys.readouterr().out


def test_a_device_that_is_not_there(checkpoint, tmp_path, capsys):
    (tmp_path / "m.txt").write_text(PROSE[0])
    command = [
        "audit",
        str(checkpoint),
        "--members",
        str(tmp_path / "m.txt"),
        "-o",
        str(tmp_path / "o"),
        "--device",
    ]
    assert main([*command, "foo"]) == 2
    assert "goldfish audit: the device foo is not there" in capsys.readouterr().err


def test_show_takes_a_text_or_a_file(checkpoint, tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text(PROSE[1], encoding="utf-8")
    options = ["--tokenizer", str(checkpoint), "-k", "3"]
    assert main(["show", PROSE[1], *options]) == 0
    from_text = capsys.readouterr().out
    assert main(["show", "--file", str(file), *options]) == 0
    assert capsys.readouterr().out == from_text
    assert (
        "tokens dropped, marked [-so-]\nk=3, h=13, strategy=hash, seed=0" in from_text
    )
    assert main(["show", str(file), *options]) == 0
    assert capsys.readouterr().out != from_text, (
        "the name of a file is a text like any other"
    )
    assert main(["show", "--file", "typo.txt", *options]) == 2
    assert "typo.txt" in capsys.readouterr().err


@pytest.mark.skipif(
    BEFORE_5, reason="passes alone at the lowest versions, failed once among others"
)
def test_marks_survive_a_pipe_and_no_color(tokenizer, checkpoint, capsys, monkeypatch):
    """Brackets mark what colours mark; without the brackets, the text is left."""
    command = ["show", PROSE[0], "--tokenizer", str(checkpoint), "-k", "2"]
    coloured, marked = (
        show(Goldfish(k=2), tokenizer, PROSE[0], colour=colour)
        for colour in (True, False)
    )
    marked = marked.plain.partition("\n\n")[0]
    assert re.sub(r"\[-(.*?)-\]", r"\1", marked) == PROSE[0]
    assert "".join(re.findall(r"\[-(.*?)-\]", marked)) == styled(coloured, DROPPED)
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value, coloured in (
        ("TERM", "xterm", False),
        ("FORCE_COLOR", "1", True),
        ("NO_COLOR", "1", False),
    ):
        monkeypatch.setenv(
            name, value
        )  # rich: a pipe, a forced terminal, and then one without colours
        assert main(command) == 0
        assert ("[-" in capsys.readouterr().out) is not coloured


def test_show_leaves_control_characters_harmless(checkpoint, capsys):
    main(
        [
            "show",
            "a\x1b[31mred [bold]b[/bold]",
            "--tokenizer",
            str(checkpoint),
            "-k",
            "1e9",
        ]
    )
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "[bold]b[/bold]" in shown


def test_audit_then_report(checkpoint, tmp_path, capsys):
    members = tmp_path / "members.jsonl"
    members.write_text(
        "".join(
            json.dumps({"text": f"{i}: {text}"}) + "\n" for i, text in enumerate(PROSE)
        )
    )
    command = [
        "audit",
        str(checkpoint),
        "--members",
        str(members),
        "-o",
        str(tmp_path / "a"),
    ]
    command += ["--prefix-length", "10", "--suffix-length", "10"]
    assert main(command) == 3, "random weights: INCONCLUSIVE"
    shown = capsys.readouterr().out
    assert "0 of 12" in shown
    assert (
        main(["report", str(tmp_path / "a"), "-o", str(tmp_path / "report.html")]) == 0
    )
    assert "report.html" in capsys.readouterr().out
    assert "</html>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (
        main(["report", str(tmp_path / "a"), "-o", str(tmp_path / "report.html")]) == 2
    )


def test_audit_with_every_option(checkpoint, tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in PROSE[:3]))
    command = [
        "audit",
        str(checkpoint),
        "--members",
        str(texts),
        "--heldout",
        str(texts),
        "-o",
        str(tmp_path / "a"),
    ]
    command += [
        "--prefix-length",
        "8",
        "--suffix-length",
        "6",
        "--offsets",
        "0",
        "2",
        "--beams",
        "2",
    ]
    command += [
        "--sampling",
        "temperature=0.5",
        "top_k=3,top_p=0.9",
        "--control",
        str(checkpoint),
    ]
    command += [
        "--name",
        "mine",
        "--dtype",
        "bfloat16",
        "--device",
        "cpu",
        "--allow-overlap",
        "--batch-tokens",
        "99",
    ]
    assert main(command) == 3
    summary = json.loads((tmp_path / "a" / "run.json").read_text())
    assert summary["name"] == "mine"
    asked = {
        key: summary["protocol"][key]
        for key in ("offsets", "beams", "sampling", "dtype", "device")
    }
    assert asked == {
        "offsets": [0, 2],
        "beams": [2],
        "dtype": "bfloat16",
        "device": "cpu",
        "sampling": [
            {"temperature": 0.5, "top_k": None, "top_p": None},
            {"temperature": 1.0, "top_k": 3, "top_p": 0.9},
        ],
    }
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--sampling", "top_q=3"])
    assert (
        "expected settings such as temperature=0.8,top_k=40,top_p=0.95, got 'top_q=3'"
        in capsys.readouterr().err
    )


def test_python_m_goldfish(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["goldfish", "--version"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("goldfish", run_name="__main__")
    assert capsys.readouterr().out.startswith("goldfish-loss ")


def test_the_verdict_is_the_exit_code(checkpoint, tmp_path, capsys):
    """The weights are random: nothing is recited, and the sanity check leaves that undecided."""
    members = tmp_path / "members.jsonl"
    members.write_text(
        "".join(
            json.dumps({"text": f"{i}: {text}"}) + "\n" for i, text in enumerate(PROSE)
        )
    )
    folder = str(tmp_path / "a")
    command = ["audit", str(checkpoint), "--members", str(members), "-o", folder]
    command += ["--prefix-length", "10", "--suffix-length", "10"]
    assert main(command) == 3
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == "goldfish audit: INCONCLUSIVE, exit code 3"
    assert main(["judge", folder, "--limit", "recited=30%"]) == 3
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == "goldfish judge: INCONCLUSIVE, exit code 3"
    )
    assert main(["judge", str(tmp_path)]) == 2
    assert "is not a finished audit" in capsys.readouterr().err
    assert main(["judge", folder, "--limit", "recite=1%"]) == 2


@pytest.mark.parametrize(
    ("command", "suggestion"),
    [
        ("adit x", "there is no command 'adit'; did you mean audit?"),
        ("zzz", "there is no command 'zzz'; choose from show, check"),
        (
            "audit x -o y --memebers z",
            "unrecognized argument --memebers; did you mean --members?",
        ),
        ("report a --redcat", "unrecognized argument --redcat; did you mean --redact?"),
        (
            "audit x --output_dir y",
            "the following arguments are required: -o/--output-dir",
        ),
    ],
)
def test_misspelt_words_get_a_suggestion(command, suggestion, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(command.split())
    assert suggestion in capsys.readouterr().err


def test_a_closed_pipe_is_no_traceback(checkpoint, tmp_path):
    """As in `goldfish show ... | head -1`: the reader leaves before the text is written."""
    file = tmp_path / "long.txt"
    file.write_text("some words " * 9_000, encoding="utf-8")
    command = [sys.executable, "-m", "goldfish", "show", "--file", str(file)]
    process = subprocess.Popen(
        [*command, "--tokenizer", str(checkpoint)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 141
    assert errors == ""


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (
            ["compare", "nowhere", "x", "-o", "out"],
            "goldfish compare: nowhere is not a finished audit",
        ),
        (
            ["audit", "nowhere/at/all", "--members", "x.jsonl", "-o", "out"],
            "goldfish audit: no checkpoint folder",
        ),
        (
            ["audit", "runs/typo", "--members", "x.jsonl", "-o", "out"],
            "goldfish audit: no folder runs/typo here",
        ),
        (["report", "nowhere"], "goldfish report: nowhere is not a finished audit"),
        (
            ["show", "x", "--tokenizer", "runs/typo"],
            "goldfish show: no folder runs/typo here, and no model",
        ),
        (["show", "x", "--tokenizer", "."], "goldfish show: . holds no tokenizer"),
        (
            ["show", "x", "--tokenizer", "{checkpoint}", "-k", "1"],
            "goldfish show: k must be a finite number above 1",
        ),
    ],
)
def test_errors_are_one_line_and_exit_2(
    command, text, checkpoint, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"text": "x"}')
    assert main([part.format(checkpoint=checkpoint) for part in command]) == 2
    error = capsys.readouterr().err
    assert error.startswith(text)
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("rapidfuzz", ["audit", "x", "--members", "x.jsonl", "-o", "out"]),
        ("scipy", ["compare", "a", "b", "-o", "out"]),
        ("rich", ["show", "x", "--tokenizer", "x"]),
        ("jinja2", ["report", "a"]),
    ],
)
def test_a_missing_extra_is_one_line_with_the_remedy(package, command):
    code = (
        f"import sys; sys.modules[{package!r}] = None; from goldfish.cli import main; "
        f"sys.exit(main({command!r}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr == (
        f'goldfish {command[0]}: {package} is not installed; it comes with the extra "audit": '
        "pip install 'goldfish-loss[audit]'\n"
    )


def help_of(*command, capsys):
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    return capsys.readouterr().out


def test_help_names_every_command_strategy_and_exit_code(capsys):
    overview = help_of(capsys=capsys)
    for verb in ("show", "check", "premask", "audit", "judge", "compare", "report"):
        assert f"  goldfish {verb} " in overview  # an example
        assert "Exit codes: 0" in help_of(verb, capsys=capsys)
    for verb in ("show", "check", "premask"):
        text = help_of(verb, capsys=capsys)
        assert all(strategy in text for strategy in get_args(Strategy))


def test_help_needs_no_extra():
    code = (
        "import sys; from goldfish.cli import build_parser; build_parser().format_help(); "
        "print(*sys.modules)"
    )
    loaded = set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )
    assert not loaded & {"torch", *EXTRA}


def test_ctrl_c_is_one_line(checkpoint, tmp_path, capsys, monkeypatch):
    members = tmp_path / "m.jsonl"
    members.write_text(json.dumps({"input_ids": list(range(2, 30))}) + "\n")
    command = [
        "audit",
        str(checkpoint),
        "--members",
        str(members),
        "-o",
        str(tmp_path / "out"),
        "--dtype",
        "bf16",
    ]
    command += [
        "--prefix-length",
        "9",
        "--suffix-length",
        "9",
        "--batch-tokens",
        "40",
        "--device",
        "cpu",
    ]

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("goldfish.audit.score.Scorer.score", stop)
        assert main(command) == 130
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == "goldfish audit: stopped; repeat the command to continue"
    )
    assert main(command) == 3
    assert (
        json.loads((tmp_path / "out" / "run.json").read_text())["protocol"]["dtype"]
        == "bfloat16"
    )


def test_a_rule_for_a_checkpoint_without_a_receipt(checkpoint, tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in PROSE[:3]))

    def run(folder, rule, name):
        command = [
            "audit",
            str(folder),
            "--members",
            str(texts),
            "-o",
            str(tmp_path / name),
        ]
        command += [
            "--prefix-length",
            "8",
            "--suffix-length",
            "6",
            "--sampling",
            "--rule",
            rule,
        ]
        return main(command)

    rule = Goldfish(k=3, h=5, max_kept=4)
    assert run(checkpoint, "k=3,h=5,max_kept=4", "a") != 2
    named = json.loads((tmp_path / "a" / "run.json").read_text())["rule"]
    assert Goldfish(**named) == rule
    with pytest.raises(SystemExit, match="2"):
        run(checkpoint, "k=3,q=5", "b")
    assert "expected settings such as k=4,h=13,max_kept=4" in capsys.readouterr().err
    trained = tmp_path / "trained"
    shutil.copytree(checkpoint, trained)
    receipt = {"schema": "goldfish.receipt/2", "rule": rule.to_dict()}
    (trained / "goldfish.json").write_text(json.dumps(receipt))
    assert run(trained, "k=4", "c") == 2
    assert "has a goldfish.json" in capsys.readouterr().err
