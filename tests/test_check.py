"""`goldfish check`: what it says is worked out again here by hand, or token by token."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from goldfish import Goldfish
from goldfish.cli import main
from goldfish.text import check as module
from goldfish.text.check import check

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
CODE = "QX7-KP2"


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A tokenizer with one token per character, and its folder."""
    tokens = {chr(i): i for i in range(128)}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    folder = tmp_path_factory.mktemp("letters")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE)
    fast.save_pretrained(folder)
    return fast, folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dropped_in(rule, text, secret):
    """Which characters of the first `secret` in a text are dropped, one token a character."""
    drops = rule.dropped(torch.tensor([ord(c) for c in text]))
    start = text.index(secret)
    return {i for i in range(len(secret)) if drops[start + i]}


def test_a_pattern_may_begin_in_the_prompt(letters, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "her code is", "completion": f" {CODE}"}])
    result = check(path, letters[0], Goldfish(k=3, h=12), r"code is (\S+)")
    assert list(result.secrets) == [CODE]


def test_a_chat_that_breaks_the_template_is_named(letters, tmp_path):
    path = write(
        tmp_path / "a.jsonl", [{"text": "a"}, {"messages": [{"role": "user", "content": ["hi"]}]}]
    )
    with pytest.raises(
        ValueError, match=r"a.jsonl, row 1: the chat template refuses it: can only concatenate"
    ):
        check(path, letters[0], Goldfish(k=3, h=12))


def test_a_secret_needs_a_token_that_is_dropped_in_every_place(letters, tmp_path):
    """Under every rule that is tried, against the decisions of each place."""
    every = [
        f"{opening} code {CODE} and more" for opening in ("the", "one", "some other", "now his")
    ]
    for texts in (every, every[:1]):  # in one place alone, most rules drop something
        path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
        result = check(path, letters[0], Goldfish(k=3, h=12), CODE)
        rows, everywhere = result.secrets[CODE]
        assert rows == list(range(len(texts)))
        assert len(result.rules) == 1 + 8 + 1 + 1 + 1, "the rule, eight seeds, h=5, max_kept, k=2"
        for rule, spans in zip(result.rules, everywhere, strict=True):
            expected = set.intersection(*(dropped_in(rule, text, CODE) for text in texts))
            assert spans == {(i, i + 1) for i in expected}
    assert sum(map(bool, everywhere)) > 6
    assert result.exit_code() == (0 if everywhere[0] else 1)


def test_counts_and_longest_runs(letters, tmp_path):
    texts = ["a few words, and then a few more of them", "short", ""]
    rule = Goldfish(k=3, h=4)
    result = check(
        write(tmp_path / "a.jsonl", [{"text": text} for text in texts]), letters[0], rule
    )
    longest, dropped = [], 0
    for row, text in enumerate(texts):
        drops = rule.dropped(torch.tensor([ord(c) for c in text], dtype=torch.int64)).tolist()[1:]
        dropped += sum(drops)
        run = max(map(len, "".join("x" if drop else "." for drop in drops).split("x")))
        longest.append((run, row, sum(drops) / max(1, len(drops))))
    assert (result.documents, result.targets, result.dropped) == (
        3,
        len(texts[0]) + len(texts[1]) - 2,
        dropped,
    )
    assert result.longest == sorted(longest, reverse=True)


def test_only_completions_are_targets(letters, tmp_path):
    """A secret in the prompt is context; and the decisions are those of the whole chat."""
    chat = {
        "prompt": [{"role": "user", "content": f"Is it {CODE}?"}],
        "completion": [{"role": "assistant", "content": "No: A-1."}],
    }
    rule, text = Goldfish(k=2, h=3), f"user: Is it {CODE}?\nassistant: No: A-1.\n"
    result = check(write(tmp_path / "a.jsonl", [chat]), letters[0], rule, f"{CODE}|A-1")
    assert list(result.secrets) == ["A-1"]
    assert result.targets == len("No: A-1.\n")
    assert result.secrets["A-1"][1][0] == {(i, i + 1) for i in dropped_in(rule, text, "A-1")}


@pytest.mark.parametrize(
    ("row", "targets"),
    [
        ({"messages": [{"role": "user", "content": "abc"}]}, len("user: abc\n") - 1),
        ({"prompt": "abc", "completion": "de"}, 2),
        ({"text": "abc"}, 2),
    ],
)
def test_kinds_of_rows(letters, tmp_path, row, targets):
    assert check(write(tmp_path / "a.jsonl", [row]), letters[0], Goldfish()).targets == targets


def test_parquet_csv_and_text_are_read_alike(letters, tmp_path):
    import pandas

    texts = ["first text", "second"]
    frame = pandas.DataFrame({"text": texts})
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "a.csv")
    expected = check(
        write(tmp_path / "a.jsonl", [{"text": text} for text in texts]), letters[0], Goldfish()
    )
    for name in ("a.parquet", "a.csv"):
        assert check(tmp_path / name, letters[0], Goldfish()) == expected
    (tmp_path / "a.txt").write_text("one\n\ndocument")
    assert check(tmp_path / "a.txt", letters[0], Goldfish()).documents == 1


def test_likely_secrets_have_few_characters_per_token(tokenizer, tmp_path):
    text = "The goldfish remembers XK7-PQ2-ZV9, and forgets it before the next turn of the bowl: 12 or 13."
    result = check(write(tmp_path / "a.jsonl", [{"text": text}]), tokenizer, Goldfish())
    assert "XK7-PQ2-ZV9" in result.secrets
    assert not {"goldfish", "forgets", "before"} & set(result.secrets)
    assert not result.marked


def test_a_column_marks_secrets(letters, tmp_path):
    rows = [
        {"text": "code A.1", "secret": "A.1"},
        {"text": "code A-1 B", "secret": ["B"]},
        {"text": "A.1", "secret": []},
    ]
    rows = [
        {**row, "secret": [row["secret"]] if isinstance(row["secret"], str) else row["secret"]}
        for row in rows
    ]
    result = check(write(tmp_path / "a.jsonl", rows), letters[0], Goldfish(), column="secret")
    assert {name: rows for name, (rows, _) in result.secrets.items()} == {"A.1": [0], "B": [1]}, (
        "taken literally"
    )


def words(first, count):
    return [f"w{i}" for i in range(first, first + count)]


def word_drops(rule, row):
    """Whether each word has a dropped token, one token a character."""
    drops = rule.dropped(torch.tensor([ord(c) for c in " ".join(row)])).tolist()
    starts = [sum(len(word) + 1 for word in row[:i]) for i in range(len(row))]
    return [any(drops[start : start + len(word)]) for start, word in zip(starts, row, strict=True)]


def test_passages_that_recur(letters, tmp_path):
    """20 words again after two others, under a rule that reads all before, and one that reads 3 characters."""
    rows = [words(0, 20), words(50, 2) + words(0, 20), words(100, 10)]
    path = write(tmp_path / "a.jsonl", [{"text": " ".join(row)} for row in rows])
    for h, least, most in ((1000, 5, 13), (3, 0, 1)):
        rule = Goldfish(k=2, h=h)
        result = check(path, letters[0], rule)
        first, second = word_drops(rule, rows[0]), word_drops(rule, rows[1])[2:]
        differing = sum(first[i : i + 8] != second[i : i + 8] for i in range(13))
        assert (result.passages, result.recurring, result.differing) == (13 + 15 + 3, 13, differing)
        assert least <= differing <= most
        assert result.repeated == [(1, 0, 13 / 15)]


def test_a_sample_of_passages_is_kept(letters, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST", 100)
    rows = [{"text": " ".join(words(i % 50 * 100, 30))} for i in range(100)]
    result = check(write(tmp_path / "a.jsonl", rows), letters[0], Goldfish())
    assert 100 < result.passages < 23 * 100 / 4, "of 2,300; no more than 100 are held"
    assert 0.2 < result.recurring / result.passages < 0.8, "half of all rows repeat one"


def test_command_line(letters, tmp_path, capsys):
    """Exit codes 0, 1, 2 and 3, and the names of secrets without a dropped token."""
    folder, path = (
        str(letters[1]),
        write(tmp_path / "a.jsonl", [{"text": f"code {CODE}\x1b[0m"}] * 7),
    )
    command = ["check", str(path), "--tokenizer", folder, "--h", "3"]

    def run(*words):
        code = main([*command, *words])
        return code, capsys.readouterr()

    code, shown = run("--secrets", f"code ({CODE})", "-k", "1000000")
    assert code == 1
    assert (
        "7 documents, 105 targets, 0.0% dropped (k=1e+06, h=3, strategy=hash, seed=0)" in shown.out
    )
    assert f"no token dropped in every place: 1\n    {CODE} (rows 0, 1, 2, 3, 4, ...)" in shown.out
    assert "among 11 rules tried: 0 with k=" in shown.out
    assert (
        "rows with at least half of their passages in one earlier row: 6\n    row 1: 100% in row 0"
        in shown.out
    )
    assert run("--secrets", CODE, "-k", "1.01")[0] == 0
    code, shown = run("--secrets", "nowhere")
    assert (code, "0 secrets" in shown.out) == (3, True)
    code, shown = run("--secrets", "(")
    assert code == 2
    assert (
        shown.err
        == "goldfish check: '(' is not a regular expression: missing ), unterminated subpattern at position 0\n"
    )
    assert run("--secret-column", "none")[0] == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, r"gone.jsonl"),
        ("a.docx", "", r"a.docx: expected a .jsonl"),
        (
            "a.jsonl",
            '{"input_ids": [1]}\n',
            "row 0 has input_ids; the check looks for secrets in texts: give `text`",
        ),
        (
            "a.jsonl",
            '{"body": "x"}\n',
            "line 1: expected text, .* or prompt and completion; got body",
        ),
    ],
)
def test_what_cannot_be_read(letters, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        check(tmp_path / name, letters[0], Goldfish())
