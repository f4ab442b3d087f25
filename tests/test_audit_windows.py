"""Files -> windows: streamed, with every bad line named and every short text counted."""

import hashlib
import itertools
import json
import random

import pytest
from conftest import PROSE
from tokenizers.processors import TemplateProcessing
from toy_tokenizers import KINDS
from transformers import PreTrainedTokenizerFast

from goldfish.audit.windows import (
    Documents,
    Skipped,
    Survey,
    Window,
    cut_windows,
    first_ids,
    lowercase_ids,
    overlap_of,
    read_rows,
    sha256,
    survey,
)  # fmt: skip

pytestmark = pytest.mark.core


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def framing(tokenizer):
    """The same tokenizer, which puts a BOS before every text and an EOS behind it."""
    twin = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token="<pad>", eos_token="<|endoftext|>",
    )  # fmt: skip
    twin.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A <|endoftext|>", special_tokens=[("<pad>", 1), ("<|endoftext|>", 0)]
    )
    assert twin("The")["input_ids"][0] == 1
    assert twin("The")["input_ids"][-1] == 0
    return twin


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"{", "line 3: not JSON"),
        (b"[" * 100_000, "line 3: not JSON"),
        (b"[]", 'line 3: expected an object such as {"text": "..."}, got list'),
        (b'{"body": ""}', r"line 3: expected a string `text` or a list `input_ids`, got the fields \['body'\]"),
        (b'{"input_ids": [1, -1]}', "line 3: input_ids must be a list of token ids"),
        (b'{"input_ids": [1, true]}', "line 3: input_ids must be a list of token ids"),
        (b'{"text": "", "count": 0}', r"line 3: count must be a whole number from 1 to 2\*\*63 - 1 .*, got 0"),
        (b'{"text": "", "count": 1.5}', "line 3: count must be a whole number from 1 to .*, got 1.5"),
        (b'{"text": "", "count": 1' + 30 * b"0" + b"}", "line 3: count must be a whole number from 1 to .*, got 1000"),
        (b'{"text": "", "count": ' + 5000 * b"9" + b"}", "line 3: not JSON"),
        (b'{"text": "", "name": NaN}', r"line 3: not JSON \(NaN is no JSON number\)"),
        (b'{"text": "", "source": ["web"]}', r"line 3: source must be a string, or be left out, got \['web'\]"),
        (b'{"text": "\\ud83d"}', "line 3: text holds half a character"),
        (b'{"text": "", "name": "\\ud83d"}', "line 3: name holds half a character"),
        (b'{"text": "caf\xe9"}', r"line 3 is not UTF-8 text .*; convert the file first"),
    ],
)
def test_bad_lines_are_named_and_what_came_before_is_read(tmp_path, line, text):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "never seen"}\n')
    rows = read_rows(path)
    assert next(rows) == {"text": "fine"}
    with pytest.raises(ValueError, match=text):
        next(rows)


def test_files_that_are_not_there_or_of_another_kind(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*x\.jsonl; expected \.jsonl"):
        list(read_rows(tmp_path / "x.jsonl"))
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"x.csv: expected .jsonl with an object a line, or plain text \(.txt"):
        list(read_rows(tmp_path / "x.csv"))
    (tmp_path / "x.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"x\.txt is not UTF-8 text"):
        list(read_rows(tmp_path / "x.txt"))


def test_rows_are_streamed(tmp_path, tokenizer):
    """The first windows are there although the file has no end that could be waited for."""
    rows = ({"input_ids": [i] * 9, "count": i + 1} for i in itertools.count())
    found = list(itertools.islice(cut_windows(rows, "members", tokenizer, 5, 3), 3))
    assert found == [Window("members", i, f"members {i}", [i] * 8, 5, count=i + 1) for i in range(3)]


def test_a_byte_order_mark_and_empty_lines_are_no_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n   \n{"text": "b"}')
    assert [row["text"] for row in read_rows(path)] == ["a", "b"]


def test_a_text_file_is_one_row(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(PROSE[0])
    assert list(read_rows(path)) == [{"text": PROSE[0], "name": "a.txt"}]
    (window,) = cut_windows(read_rows(path), "heldout", tokenizer, 4, 3)
    assert (window.document, len(window.ids), window.suffix) == ("a.txt", 7, window.ids[4:])


def test_offsets_cut_the_same_document_elsewhere(tokenizer):
    rows = [{"input_ids": list(range(12)), "name": "a", "source": "s", "count": 3}, {"input_ids": list(range(8))}]
    found = list(cut_windows(rows, "members", tokenizer, 5, 3, (0, 4, 5)))
    assert found == [
        Window("members", 0, "a", list(range(8)), 5, "s", 3, 0),
        Window("members", 0, "a", list(range(4, 12)), 5, "s", 3, 4),
        Skipped(0, "fewer than 8 tokens from token 5 on"),
        Window("members", 1, "members 1", list(range(8)), 5, None, None, 0),
        Skipped(1, "fewer than 8 tokens from token 4 on"),
        Skipped(1, "fewer than 8 tokens from token 5 on"),
    ]


def test_a_bos_opens_every_window_and_an_eos_ends_none(framing):
    """Where the tokenizer puts them; ids that are given stay as they are."""
    ids = framing(PROSE[0], add_special_tokens=False)["input_ids"]
    length = len(ids) + 1
    first, second, third = cut_windows([{"text": PROSE[0]}], "members", framing, 5, length - 5, (0, 1, 2))
    assert first.ids == [1, *ids]
    assert (second, third) == tuple(Skipped(0, f"fewer than {length} tokens from token {at} on") for at in (1, 2))
    _, later = cut_windows([{"text": PROSE[0]}], "members", framing, 5, 4, (0, 7))
    assert later.ids == [1, *ids[7:15]]
    _, as_given = cut_windows([{"input_ids": [1, *ids]}], "members", framing, 5, 4, (0, 7))
    assert as_given.ids == ids[6:15]


def test_survey_counts_and_finds_the_largest_id(tmp_path, tokenizer):
    rows = [{"input_ids": [3] * 8}, {"input_ids": [3] * 7}, {"input_ids": [3] * 7 + [90]}, {"input_ids": [90] * 8}]
    found = survey(rows, "members", Documents(), tokenizer, 5, 3)
    assert (found.rows, found.largest_id, found.largest_at) == (4, 90, 2)
    assert (found.numbers.tolist(), found.indices.tolist(), found.names) == ([0, 1, 2], [0, 2, 3], 3)
    assert found.skipped == {"fewer than 8 tokens": {"reason": "fewer than 8 tokens", "count": 1, "rows": [1]}}
    many = survey([{"input_ids": []}] * 9, "members", Documents(), tokenizer, 5, 3)
    assert [each["rows"] for each in many.skipped.values()] == [[0, 1, 2, 3, 4]]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_documents_are_joined_by_any_key_they_share():
    """Against connected components found by comparing every pair, again and again."""
    choose = random.Random(0)
    for _ in range(50):
        windows = [[(kind, choose.randrange(6)) for kind in "abc"] for _ in range(12)]
        documents, expected = Documents(), list(range(12))
        numbers = [documents.add(keys) for keys in windows]
        for _ in windows:
            for i, j in itertools.product(range(12), repeat=2):
                if set(windows[i]) & set(windows[j]):
                    expected[i] = expected[j] = min(expected[i], expected[j])
        order = list(dict.fromkeys(expected))
        found = documents.clusters({"members": Survey(numbers=numbers)})["members"]
        assert found == [order.index(number) for number in expected]


def test_equal_texts_are_one_document_and_templates_are_not(tokenizer):
    """Case, spaces and punctuation do not tell texts apart; a digit does. Names join rows within a split only."""
    template = "The code of the safe in the cellar is {} and nobody else knows it."
    texts = [template.format(1234), template.format(1235), template.format(1234).upper().replace(".", "\n!")]
    rows = [*({"text": text} for text in texts), {"text": PROSE[0], "name": "x"}, {"text": PROSE[1], "name": "x"}]
    documents = Documents()
    surveys = {
        "members": survey(rows, "members", documents, tokenizer, 5, 3),
        "heldout": survey([{"text": PROSE[2], "name": "x"}, rows[1]], "heldout", documents, tokenizer, 5, 3),
    }
    clusters = documents.clusters(surveys)
    assert clusters == {"members": [0, 0, 0, 1, 1], "heldout": [2, 0]}, "equal windows at offset 0"
    long = {"members": survey(rows[:3], "members", Documents(), tokenizer, 30, 8)}
    assert long["members"].numbers.tolist() == [0, 1, 0]
    assert overlap_of(surveys, clusters) == {"clusters": 1, "rows": [[0, 1]]}
    assert overlap_of(long, {"members": [0, 1, 0]}) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_a_long_text_gives_the_same_ids(kind):
    """Cut anywhere: in words, spaces, characters of several tokens, special tokens; and far less is read."""
    fast = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](), eos_token="<|end of text|>")
    choose = random.Random(0)
    pieces = [*PROSE[:3], "日本語" * 9, "\n\n", " " * 80, "x" * 300, "<|end of text|>", "1234567 ", "e\u0301", "🐠"]
    for _ in range(30):
        text = "".join(choose.choices(pieces, k=90))
        count = choose.randrange(1, 200)
        assert first_ids(fast, text, count) == fast(text)["input_ids"][:count]


def test_little_of_a_long_text_is_tokenized(tokenizer, monkeypatch):
    read = []
    call = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, text: (read.append(len(text)), call(self, text))[1])
    ids = first_ids(tokenizer, PROSE[0] * 1000, 64)
    assert ids == call(tokenizer, PROSE[0] * 10)["input_ids"][:64]
    assert sum(read) < 5000 < len(PROSE[0] * 1000)
    read.clear()
    first_ids(tokenizer, "x" * 50_000, 64)
    assert max(read) == 50_000, "one word: what follows may decide about its first tokens"


def test_lowercase_ids_keep_the_bos(framing, tokenizer):
    ids = framing.encode("Naïve QUESTION", add_special_tokens=False)
    lower = framing.encode("naïve question", add_special_tokens=False)
    assert ids != lower
    assert lowercase_ids(Window("members", 0, "", [1, *ids], 2), framing) == [1, *lower]
    assert lowercase_ids(Window("members", 0, "", ids, 2), tokenizer) == lower
