"""Inputs of every kind -> rows, and chats -> what the assistant says."""

import hashlib
import io
import json
import re
from collections import Counter
from types import SimpleNamespace

import pandas
import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers import PROSE, TEMPLATE, say, write_jsonl

from goldfish.audit.windows import Cutter
from goldfish.text import rows as module
from goldfish.text.chats import completions, secret_finder
from goldfish.text.rows import dataset_of, digest, draw, in_memory, read_rows

pytestmark = pytest.mark.core
TEXTS = [{"text": text} for text in PROSE[:3]]


@pytest.fixture
def everything(tmp_path, monkeypatch):
    """The same rows in every kind of input, by its name; hub names are folders here, as `datasets`
    allows.
    """
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "a.json").write_text(json.dumps(TEXTS))
    frame = pandas.DataFrame(TEXTS)
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "a.csv")
    other = pandas.DataFrame([{"text": "another split"}])
    for folder in ("someone/plain", "someone/several/german", "someone/several/other"):
        (tmp_path / folder).mkdir(parents=True)
        frame.to_parquet(tmp_path / folder / "train.parquet")
        other.to_parquet(tmp_path / folder / "test.parquet")
    configs = (
        "configs:\n- config_name: german\n  data_dir: german\n"
        "- config_name: other\n  data_dir: other\n"
    )
    (tmp_path / "someone/several/README.md").write_text(f"---\n{configs}---\n")
    both = {"train": Dataset.from_list(TEXTS), "test": Dataset.from_pandas(other)}
    both["train"].save_to_disk(tmp_path / "saved")
    DatasetDict(both).save_to_disk(tmp_path / "dictionary")
    DatasetDict({"train": both["train"]}).save_to_disk(tmp_path / "single")
    return [
        "a.jsonl",
        "a.json",
        "a.parquet",
        "a.csv",
        "someone/plain/train",
        "someone/several:german/train",
        "saved",
        "dictionary/train",
        "single",
    ]


def test_every_kind_of_input_gives_the_same_rows(everything):
    for source in everything:
        assert [row["text"] for row in read_rows(source)] == PROSE[:3], source
        assert re.fullmatch("[0-9a-f]{64}", digest(source))


def test_the_digest_is_that_of_the_content(everything, tmp_path):
    assert (
        digest("a.csv") == hashlib.sha256((tmp_path / "a.csv").read_bytes()).hexdigest()
    )
    before = digest("saved"), digest("someone/plain/train")
    pandas.DataFrame(TEXTS[:1]).to_parquet(tmp_path / "someone/plain/train.parquet")
    Dataset.from_list(TEXTS[:2]).save_to_disk(tmp_path / "saved")
    assert len({*before, digest("saved"), digest("someone/plain/train")}) == 4


def test_a_hub_dataset_is_streamed_and_known_by_its_commit(monkeypatch):
    """A stand-in for the hub: no row is read that nobody asked for, and another commit is another
    digest.
    """
    read = []

    class Builder:
        def __init__(self, commit):
            files = {
                "train": [f"hf://datasets/someone/books@{commit}/a.parquet"],
                "test": [],
            }
            self.config = SimpleNamespace(data_files=files)

        def as_streaming_dataset(self, split):
            return (read.append(i) or {"text": f"{split} {i}"} for i in range(10**9))

    asked = []
    monkeypatch.setattr(
        "datasets.load_dataset_builder",
        lambda *names: asked.append(names) or Builder(commit),
    )
    commit = "1"
    rows = read_rows("someone/books:german/train")
    assert [next(rows)["text"], next(rows)["text"]] == ["train 0", "train 1"]
    assert (read, asked) == ([0, 1], [("someone/books", "german")])
    first = digest("someone/books/train")
    commit = "2"
    assert digest("someone/books/train") != first
    assert asked[-1] == ("someone/books", None)


def test_standard_input_is_read_as_often_as_it_is_wanted(monkeypatch):
    data = b'{"text": "a"}\n\n{"text": "b"}\n'
    module._standard_input.cache_clear()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    for _ in range(2):
        assert list(read_rows("-")) == [{"text": "a"}, {"text": "b"}]
        assert digest("-") == hashlib.sha256(data).hexdigest()
    module._standard_input.cache_clear()


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"{", "line 3: not JSON"),
        (b"[" * 100_000, "line 3: not JSON"),
        (b"[]", 'line 3: expected an object such as {"text": "..."}, got list'),
        (
            b'{"body": ""}',
            "line 3: expected text, input_ids, messages, or prompt and completion; got body. "
            ".*--text-column",
        ),
        (b'{"text": 7}', "line 3: expected text"),
        (
            b'{"prompt": "a", "completion": [{"role": "assistant"}]}',
            "line 3: .* are both strings or both such lists",
        ),
        (b'{"messages": "hello"}', "line 3: expected messages such as"),
        (b'{"messages": [{"from": "human"}]}', "line 3: expected messages such as"),
        (b'{"input_ids": [1, -1]}', "line 3: input_ids must be a list of token ids"),
        (b'{"input_ids": [1, true]}', "line 3: input_ids must be a list of token ids"),
        (
            b'{"text": "", "count": 0}',
            r"line 3: count must be a whole number from 1 to 2\*\*63 - 1 .*, got 0",
        ),
        (
            b'{"text": "", "count": 1.5}',
            "line 3: count must be a whole number from 1 to .*, got 1.5",
        ),
        (
            b'{"text": "", "count": 1' + 30 * b"0" + b"}",
            "line 3: count must be a whole number from 1 to .*, got 1000",
        ),
        (b'{"text": "", "count": ' + 5000 * b"9" + b"}", "line 3: not JSON"),
        (
            b'{"text": "", "source": ["web"]}',
            r"line 3: source must be a string, or be left out, got \['web'\]",
        ),
        (b'{"text": "\\ud83d"}', "line 3 has half a character"),
        (
            b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
            "line 3 has half a character",
        ),
        (
            b'{"text": "caf\xe9"}',
            r"line 3 is not UTF-8 text .*; convert the file first",
        ),
    ],
)
def test_bad_lines_are_named_and_what_came_before_is_read(tmp_path, line, text):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "never seen"}\n')
    rows = read_rows(path)
    assert next(rows) == {"text": "fine"}
    with pytest.raises(ValueError, match=text):
        next(rows)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (
            "gone.jsonl",
            FileNotFoundError,
            r"no file gone\.jsonl; expected a \.jsonl, \.json, .* or - for",
        ),
        ("gone", FileNotFoundError, "no file gone; expected"),
        ("a.docx", ValueError, r"a\.docx: expected a \.jsonl"),
        ("caf\u00e9.txt", ValueError, r"\.txt is not UTF-8 text"),
        ("broken.parquet", ValueError, "Parquet"),
        ("column.csv", ValueError, "column.csv, row 1: count must be a whole number"),
        (
            "dictionary",
            ValueError,
            "dictionary has the splits train, test: give one of them, as in dictionary/train",
        ),
        ("someone/plain", ValueError, "someone/plain has the splits train, test"),
        (
            "someone/plain/typo",
            ValueError,
            "someone/plain/typo has the splits train, test",
        ),
        (
            "someone/else/train",
            FileNotFoundError,
            "no file or folder someone/else/train here .*, and no dataset",
        ),
    ],
)
def test_what_cannot_be_read(everything, tmp_path, source, error, message):
    (tmp_path / "a.docx").write_text("")
    (tmp_path / "caf\u00e9.txt").write_bytes(b"caf\xe9")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "column.csv").write_text("text,count\na,1\nb,0\n")
    with pytest.raises(error, match=message):
        list(read_rows(source))


def test_a_byte_order_mark_and_empty_lines_are_no_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n   \n{"text": "b", "name": null}')
    assert list(read_rows(path)) == [{"text": "a"}, {"text": "b"}]


def test_a_text_file_is_one_row(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(PROSE[0])
    assert list(read_rows(path)) == [{"text": PROSE[0], "name": "a.txt"}]
    (window,) = Cutter(tokenizer, 4, 3).cut(next(read_rows(path)), 0, "heldout")
    assert (window.name, len(window.ids), window.suffix) == ("a.txt", 7, window.ids[4:])


def test_a_column_is_read_as_the_text(tmp_path):
    chat = [{"role": "user", "content": "a"}]
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [{"body": "b", "text": "t", "name": "n"}, {"body": chat, "input_ids": [1]}],
    )
    assert list(read_rows(path, "body")) == [
        {"text": "b", "name": "n"},
        {"messages": chat},
    ]
    with pytest.raises(
        ValueError, match=r"a\.jsonl, line 1: no column title; it has body, name, text"
    ):
        next(read_rows(path, "title"))


def test_rows_are_drawn_with_a_seed():
    """In order, each choice of two among five about equally often, and the same ones again."""
    rows = [{"text": str(i)} for i in range(5)]
    assert list(draw(rows, None, 0)) == list(draw(rows, 9, 0)) == list(enumerate(rows))
    drawn = [
        tuple(index for index, _ in draw(iter(rows), 2, seed)) for seed in range(1000)
    ]
    assert all(first < second for first, second in drawn)
    assert len(set(drawn)) == 10
    assert min(Counter(drawn).values()) > 60, "100 are expected"
    assert list(draw(rows, 2, 7)) == list(draw(rows, 2, 7))


@pytest.fixture
def chatty(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    return tokenizer


def test_windows_of_a_chat_are_the_assistants_turns(chatty):
    """Prompt and completion as the tokenizer cuts the whole chat, whatever their lengths."""
    row = {
        "messages": say(
            "Who swims?", " A goldfish, in circles. ", "Why?", "It forgets."
        ),
        "name": "n",
        "count": 2,
    }
    first, second = Cutter(chatty, 50, 50).cut(row, 0, "members")
    assert (
        chatty.decode(first.ids[: first.prefix_length])
        == "<user>Who swims?<|endoftext|><assistant>"
    )
    assert chatty.decode(first.suffix) == "A goldfish, in circles.", (
        "without what ends the turn"
    )
    whole = chatty.apply_chat_template(row["messages"], tokenize=False)
    assert chatty.decode(second.ids) == whole.removesuffix("<|endoftext|>")
    assert chatty(whole)["input_ids"][: len(second.ids)] == second.ids
    assert chatty.decode(second.suffix) == "It forgets."
    assert [
        (w.name, w.count, w.completion, w.first_scored == w.prefix_length)
        for w in (first, second)
    ] == [("n", 2, True, True)] * 2
    pair = {"prompt": row["messages"][:3], "completion": row["messages"][3:]}
    (window,) = Cutter(chatty, 50, 50).cut(pair, 0, "members")
    assert (window.ids, window.prefix_length) == (second.ids, second.prefix_length), (
        "only the completion is asked for"
    )


def test_strings_are_prompt_and_completion(tokenizer):
    """A token that lies across the border belongs to what is asked for: the model must not see the
    answer's start.
    """
    border = next(
        a
        for a, b in tokenizer(PROSE[0], return_offsets_mapping=True)["offset_mapping"][
            2:
        ]
        if b > a + 1
    )
    prompt, completion = PROSE[0][: border + 1], PROSE[0][border + 1 :]
    (window,) = Cutter(tokenizer, 50, 50).cut(
        {"prompt": prompt, "completion": completion}, 0, "members"
    )
    assert window.ids == tokenizer(prompt + completion)["input_ids"]
    assert tokenizer.decode(window.ids[: window.prefix_length]) == PROSE[0][:border]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": say("only a question")}, "no turn of the assistant"),
        ({"messages": say("a", "")}, "an empty completion"),
        ({"messages": say("a", None)}, "an empty completion"),
        ({"prompt": "a", "completion": " "}, "an empty completion"),
        ({"prompt": "", "completion": "words"}, "nothing before the completion"),
        (
            {"messages": [{"role": "system", "content": "s"}, *say("a", "b")]},
            "the chat template refuses it",
        ),
        (
            {"messages": say("a", PROSE[0] * 9)},
            "longer than the model's context of 64 tokens",
        ),
    ],
)
def test_chats_without_a_window_are_skipped_with_the_reason(chatty, row, reason):
    assert list(Cutter(chatty, 5, 5, context=64).cut(row, 0, "members")) == [reason]


def test_templates_that_differ_before_the_answer_or_change_it(chatty, monkeypatch):
    """An answer whose template opens otherwise than its prompt is asked both ways."""
    monkeypatch.setattr(
        chatty,
        "chat_template",
        TEMPLATE.replace("<assistant>{% endif", "<assistant><think>{% endif"),
    )
    trained, generated = completions({"messages": say("a", "b")}, chatty)
    assert trained.text[: trained.start].endswith("<assistant>")
    assert generated.text[: generated.start].endswith("<assistant><think>")
    assert (trained.prompt_kind, generated.prompt_kind) == ("training", "generation")
    monkeypatch.setattr(
        chatty,
        "chat_template",
        TEMPLATE.replace("m.content | trim", "m.content | upper"),
    )
    (each,) = completions({"messages": say("a", "b")}, chatty)
    assert each.text[each.start : each.end] == "B", "as it was trained"
    monkeypatch.setattr(chatty, "chat_template", None)
    with pytest.raises(ValueError, match="has no chat template: save it with the"):
        list(completions({"messages": say("a", "b")}, chatty))


def test_secrets_are_marked_by_expression_or_column(chatty):
    """Those in what is to be recited, and not those that the model reads before it."""

    def secrets(row, pattern="", column=""):
        windows = Cutter(chatty, 6, 30, secrets=secret_finder(pattern, column)).cut(
            row, 0, "members"
        )
        return [window.secrets for window in windows]

    chat = {
        "messages": say("K-1?", "K-1 and K-2, K-2.", "And?", "K-2, K-3"),
        "code": "K-3",
        "codes": ["K-2", "9"],
    }
    assert secrets(chat, r"K-\d") == [("K-2",), ("K-3",)]
    assert secrets(chat, r"and (K-\d)") == [("K-2",), ()]
    assert secrets(chat, column="code") == [(), ("K-3",)]
    assert secrets(chat, column="codes") == [("K-2",), ()]
    assert secrets({"text": PROSE[0]}, "goldfish|saw") == [("saw",)], (
        "goldfish is in the prefix"
    )
    with pytest.raises(
        ValueError, match=r"'\(' is not a regular expression: missing \)"
    ):
        secret_finder("(", "")


@pytest.mark.parametrize("form", [None, "torch", "numpy", "pandas", "arrow"])
def test_rows_in_memory_are_python_whatever_their_form(form):
    """Data sets are handed over in the format of their training."""
    rows = [
        {"input_ids": [1, 2, 3], "count": 2, "name": "a"},
        {"input_ids": [4], "count": 1, "name": "b"},
    ]
    source = in_memory(Dataset.from_list(rows).with_format(form))
    assert list(read_rows(source)) == rows
    assert digest(source) == digest(rows)
    lazy = Dataset.from_list(rows).to_iterable_dataset()
    if form in (None, "torch", "numpy"):
        assert list(read_rows(in_memory(lazy.with_format(form)))) == rows
    # A file with lists, read by pandas, has arrays in its cells.
    frame = Dataset.from_list(rows).with_format("pandas")[:]
    assert list(read_rows(in_memory(frame))) == rows
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    assert list(read_rows(in_memory(columns))) == rows
    long = [{"input_ids": torch.arange(5_000)}, {"input_ids": torch.arange(5_000)}]
    before = digest(long)
    long[1]["input_ids"][2_000] = 7  # in the part of a tensor that print leaves out
    assert digest(long) != before


def test_a_transform_is_applied_as_in_training():
    texts = Dataset.from_dict({"body": ["one", "two"]})
    texts.set_transform(lambda batch: {"text": [f"<{b}>" for b in batch["body"]]})
    assert list(read_rows(in_memory(texts))) == [{"text": "<one>"}, {"text": "<two>"}]


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (7, TypeError, "expected rows such as .* got int"),
        (["a text"], ValueError, "row 0: expected rows .* got str for a row"),
        ([None], ValueError, "got NoneType for a row"),
        ([{"text": "\ud83d"}], ValueError, "row 0 has half a character"),
        ({"text": "a"}, ValueError, "text is no list but str; a single row has to be"),
        ({"text": ["a"], "name": []}, ValueError, r"unequal lengths: \[0, 1\]"),
        (
            DatasetDict({"train": Dataset.from_list(TEXTS)}),
            ValueError,
            "these are the splits train of a data set: give one of them",
        ),
    ],
)
def test_what_is_no_rows_in_memory(source, error, message):
    with pytest.raises(error, match=message):
        list(read_rows(in_memory(source)))


def test_each_file_of_a_folder_of_texts_is_a_row(tmp_path):
    """`datasets` would make a row of each line."""
    for name in ("one/a.txt", "two/a.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(f"{PROSE[0]}\n{name}\n")
    expected = [
        {"text": f"{PROSE[0]}\n{name}\n", "name": name}
        for name in ("one/a.txt", "two/a.txt")
    ]
    assert list(read_rows(tmp_path)) == expected


def test_a_split_of_a_folder_of_files_by_its_whole_path(tmp_path, caplog):
    """The message about several splits says so: give FOLDER/train."""
    folder = tmp_path / "a:b"  # NAME:CONFIG is for the hub
    folder.mkdir()
    for split in ("train", "test"):
        write_jsonl(folder / f"{split}.jsonl", [{"text": split}])
    (folder / "more.txt").write_text("not read")
    assert list(read_rows(folder / "train")) == [{"text": "train"}]
    assert list(read_rows(f"{folder}/test")) == [{"text": "test"}]
    with pytest.raises(ValueError, match=r"splits train, test: .* as in .*a:b/train"):
        list(read_rows(folder))
    with pytest.raises(FileNotFoundError, match=r"no file .*a:b/typo"):
        list(read_rows(folder / "typo"))
    assert caplog.text.count("Not read: more.txt (1 in all).") == 1


def test_a_folder_without_anything_to_read(tmp_path):
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(FileNotFoundError, match="no files that can be read"):
        list(read_rows(tmp_path))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_a_row_of_a_folder_is_that_of_its_file(tmp_path, kind, monkeypatch):
    """`datasets` would make 42 of 0042, nothing of NA, and a point in time of a date."""
    rows = [
        {"text": "one", "pin": "0042", "title": "NA", "day": "2024-01-02"},
        {"text": "two", "pin": "7061", "title": "B", "day": "2024-02-03"},
    ]
    folder = tmp_path / "folder"
    folder.mkdir()
    file = folder / f"train.{kind}"
    if kind == "csv":
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        file.write_text("\n".join(lines))
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        file.write_text(json.dumps(rows))
    assert list(read_rows(file)) == rows
    assert list(read_rows(folder)) == rows
    monkeypatch.chdir(tmp_path)
    assert list(read_rows("folder/train")) == rows
    if kind == "csv":
        for source in (file, folder):
            assert list(dataset_of(str(source))) == rows
            assert dataset_of(str(source), streaming=False).to_list() == rows
