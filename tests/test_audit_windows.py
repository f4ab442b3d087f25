"""Files -> windows: streamed, with every bad line named and every short text counted."""

import hashlib
import itertools
import json

import pytest
from conftest import PROSE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from goldfish.audit.windows import Skipped, Window, cut_windows, lowercase_ids, read_rows, sha256, survey

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
        (b'{"text": "", "count": 0}', "line 3: count must be a whole number from 1, or be left out, got 0"),
        (b'{"text": "", "count": 1.5}', "line 3: count must be a whole number from 1, or be left out, got 1.5"),
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
    found = list(cut_windows(rows, "members", tokenizer, 5, 3, offsets=(0, 4, 5)))
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
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = survey(cut_windows(read_rows(path), "members", tokenizer, 5, 3))
    assert (found.rows, found.windows, found.largest_id, found.largest_at) == (4, 3, 90, 2)
    assert found.skipped == {"fewer than 8 tokens": {"reason": "fewer than 8 tokens", "count": 1, "rows": [1]}}
    many = survey(cut_windows([{"input_ids": []}] * 9, "members", tokenizer, 5, 3))
    assert [each["rows"] for each in many.skipped.values()] == [[0, 1, 2, 3, 4]]
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_lowercase_ids_keep_the_bos(framing, tokenizer):
    ids = framing.encode("Naïve QUESTION", add_special_tokens=False)
    lower = framing.encode("naïve question", add_special_tokens=False)
    assert ids != lower
    assert lowercase_ids(Window("members", 0, "", [1, *ids], 2), framing) == [1, *lower]
    assert lowercase_ids(Window("members", 0, "", ids, 2), tokenizer) == lower
