import json

import pytest
import torch
from conftest import PROSE

from goldfish import Goldfish
from goldfish.cli import main, show_text

pytestmark = pytest.mark.core


def test_show_marks_exactly_the_dropped_tokens(tokenizer):
    rule, ids = Goldfish(k=2, h=2), tokenizer(PROSE[0])["input_ids"]
    shown = show_text(rule, tokenizer, ids)
    dropped = rule.dropped(torch.tensor(ids)).tolist()
    assert shown.plain.startswith(PROSE[0])
    marked = sum(span.end - span.start for span in shown.spans if "dark_red" in str(span.style))
    expected = sum(len(tokenizer.decode([i])) for i, gone in zip(ids, dropped, strict=True) if gone)
    assert marked == expected
    assert f"{sum(dropped)} of {len(ids)} tokens dropped (k=2, h=2" in shown.plain


def test_show_takes_a_text_or_a_file(checkpoint, tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text(PROSE[1], encoding="utf-8")
    assert main(["show", PROSE[1], "--tokenizer", str(checkpoint), "-k", "3"]) == 0
    from_text = capsys.readouterr().out
    assert main(["show", str(file), "--tokenizer", str(checkpoint), "-k", "3"]) == 0
    assert capsys.readouterr().out == from_text
    assert "tokens dropped (k=3, h=13, strategy=hash, seed=0)" in from_text


def test_show_leaves_control_characters_harmless(checkpoint, capsys):
    main(["show", "a\x1b[31mred [bold]b[/bold]", "--tokenizer", str(checkpoint)])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "[bold]b[/bold]" in shown


def test_audit_then_report(checkpoint, tmp_path, capsys):
    members = tmp_path / "members.jsonl"
    members.write_text("".join(json.dumps({"text": text}) + "\n" for text in PROSE))
    command = ["audit", str(checkpoint), "--members", str(members), "-o", str(tmp_path / "a")]
    command += ["--prefix_length", "10", "--suffix_length", "10"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "0 of 12" in shown
    assert main(["report", str(tmp_path / "a"), "-o", str(tmp_path / "report.html")]) == 0
    assert "report.html" in capsys.readouterr().out
    assert "</html>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert main(["report", str(tmp_path / "a"), "-o", str(tmp_path / "report.html")]) == 2


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (["audit", "nowhere/at/all", "--members", "x.jsonl", "-o", "out"], "goldfish audit: no checkpoint folder"),
        (["report", "nowhere"], "goldfish report: "),
        (["show", "x", "--tokenizer", "{checkpoint}", "-k", "1"], "goldfish show: k must be a finite number above 1"),
    ],
)
def test_errors_are_one_line_and_exit_2(command, text, checkpoint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([part.format(checkpoint=checkpoint) for part in command]) == 2
    error = capsys.readouterr().err
    assert error.startswith(text)
    assert error.count("\n") == 1
