"""Rows -> windows: streamed, tokenized once, and every short text counted."""

import itertools
import random
import uuid
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from helpers import PROSE, THINKING, say
from tokenizers.processors import TemplateProcessing
from toy_tokenizers import KINDS
from transformers import PreTrainedTokenizerFast

from goldfish.audit.documents import (
    Relations,
    connected,
    equal_pairs,
    overlap_of,
)
from goldfish.audit.windows import Cutter, Survey, Window, first_ids
from goldfish.text.chats import secret_finder

pytestmark = pytest.mark.core


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def surveyed(rows, split, *how):
    path = Path(str(uuid.uuid4()))
    return Survey(rows, split, Cutter(*how), path, Relations())


def both(members, heldout, *how):
    """The surveys of two files, whose documents are numbered together."""
    relations = Relations()
    surveys = []
    for split, rows in (("members", members), ("heldout", heldout)):
        surveys.append(Survey(rows, split, Cutter(*how), Path(split), relations))
    numbers = iter(relations.number_documents())
    for survey in surveys:
        survey.documents = list(islice(numbers, len(survey.indices)))
    assert not list(numbers)
    return surveys


def cut(rows, *how):
    """The windows, and reasons for none, of rows of members."""
    return [
        each
        for i, row in enumerate(rows)
        for each in Cutter(*how).cut(row, i, "members")
    ]


@pytest.fixture
def framing(tokenizer):
    """The same tokenizer, which puts a BOS before every text and an EOS behind it."""
    twin = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(
            tokenizer.backend_tokenizer.to_str()
        ),
        bos_token="<pad>",
        eos_token="<|endoftext|>",
    )
    twin.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A <|endoftext|>",
        special_tokens=[("<pad>", 1), ("<|endoftext|>", 0)],
    )
    assert twin("The")["input_ids"][0] == 1
    assert twin("The")["input_ids"][-1] == 0
    return twin


def test_offsets_cut_the_same_document_elsewhere(tokenizer):
    rows = [
        {"input_ids": list(range(12)), "name": "a", "source": "s", "count": 3},
        {"input_ids": list(range(8))},
    ]
    assert cut(rows, tokenizer, 5, 3, (0, 4, 5)) == [
        Window("members", 0, "a", list(range(8)), 5, "s", 3, 0),
        Window(
            "members",
            0,
            "a",
            list(range(4, 12)),
            5,
            "s",
            3,
            4,
            document_ids=list(range(12)),
        ),
        "fewer than 8 tokens from token 5 on",
        Window("members", 1, "members 1", list(range(8)), 5, None, None, 0),
        "fewer than 8 tokens from token 4 on",
        "fewer than 8 tokens from token 5 on",
    ]


def documents(rows, *how):
    relations = Relations()
    Survey(rows, "members", Cutter(*how), Path(str(uuid.uuid4())), relations)
    return relations.number_documents()


def test_rows_that_share_a_window_are_one_document(tokenizer):
    """A licence before different texts: one question is asked of all of them."""
    licence, texts = (
        list(range(8)),
        [list(range(20 * i, 20 * i + 8)) for i in range(1, 4)],
    )
    rows = [{"input_ids": licence + text} for text in (*texts, texts[0])]
    assert documents(rows, tokenizer, 5, 3, (0, 8)) == [0] * 8
    assert documents(rows, tokenizer, 5, 3) == [0] * 4
    assert documents(rows, tokenizer, 5, 3, (8,)) == [0, 1, 2, 0]


def test_a_bos_opens_every_window_and_an_eos_ends_none(framing):
    """Where the tokenizer puts them; ids that are given stay as they are."""
    ids = framing(PROSE[0], add_special_tokens=False)["input_ids"]
    length = len(ids) + 1
    first, second, third = cut([{"text": PROSE[0]}], framing, 5, length - 5, (0, 1, 2))
    assert first.ids == [1, *ids]
    assert (second, third) == tuple(
        f"fewer than {length} tokens from token {at} on" for at in (1, 2)
    )
    _, later = cut([{"text": PROSE[0]}], framing, 5, 4, (0, 7))
    assert later.ids == [1, *ids[7:15]]
    _, as_given = cut([{"input_ids": [1, *ids]}], framing, 5, 4, (0, 7))
    assert as_given.ids == ids[6:15]


def test_survey_counts_and_keeps_the_windows(tokenizer, monkeypatch):
    """A text is tokenized once; blocks come back from the file as often as they are wanted."""
    rows = [
        {"input_ids": [3] * 8},
        {"input_ids": [3] * 7},
        {"input_ids": [3] * 7 + [90]},
        {"input_ids": [90] * 8},
    ]
    result = surveyed(rows, "members", tokenizer, 5, 3)
    assert (result.rows, result.drawn) == (4, 4)
    assert (result.largest_id, result.largest_at) == (90, 2)
    assert (result.indices.tolist(), result.asked) == ([0, 2, 3], 3)
    assert result.skipped == {
        "fewer than 8 tokens": {
            "reason": "fewer than 8 tokens",
            "count": 1,
            "rows": [1],
        }
    }
    many = surveyed([{"input_ids": []}] * 9, "members", tokenizer, 5, 3)
    assert [each["rows"] for each in many.skipped.values()] == [[0, 1, 2, 3, 4]]
    expected = [each for each in cut(rows, tokenizer, 5, 3) if isinstance(each, Window)]
    monkeypatch.setattr(Cutter, "cut", None)
    result.documents = [7, 8, 9]
    for _ in range(2):
        assert list(result.windows()) == list(zip(expected, [7, 8, 9], strict=True))


def test_numbers_are_joined_by_any_key_they_share():
    """Against connected components found by comparing every pair, again and again."""
    choose = random.Random(0)
    for _ in range(50):
        keys = [[choose.randrange(40) for _ in range(3)] for _ in range(12)]
        expected = list(range(12))
        for _ in keys:
            for i, j in itertools.product(range(12), repeat=2):
                if set(keys[i]) & set(keys[j]):
                    expected[i] = expected[j] = min(expected[i], expected[j])
        pairs = equal_pairs(np.array(keys).ravel()) // 3
        groups = connected(12, pairs).tolist()
        assert [groups.index(group) for group in groups] == expected


def test_equal_texts_are_one_document_and_templates_are_not(tokenizer):
    """Case, spaces and punctuation do not tell texts apart; a digit does. Names join rows within a
    split only.
    """
    template = "The code of the safe in the cellar is {} and nobody else knows it."
    texts = [
        template.format(1234),
        template.format(1235),
        template.format(1234).upper().replace(".", "\n!"),
    ]
    rows = [
        *({"text": text} for text in texts),
        {"text": PROSE[0], "name": "x"},
        {"text": PROSE[1], "name": "x"},
    ]
    others = [{"text": PROSE[2], "name": "x"}, rows[1]]
    members, heldout = both(rows, others, tokenizer, 5, 3)
    shared = overlap_of(members.first_rows, heldout.first_rows)
    assert shared == {"documents": 1, "rows": [[0, 1]]}
    found = [members.documents, heldout.documents]
    assert found == [[0, 0, 0, 1, 1], [2, 0]], "equal windows at offset 0"
    assert documents(rows[:3], tokenizer, 30, 8) == [0, 1, 0]
    members, heldout = both(rows[:3], others[:1], tokenizer, 30, 8)
    assert overlap_of(members.first_rows, heldout.first_rows) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_a_long_text_gives_the_same_ids(kind):
    """Cut anywhere: in words, spaces, characters of several tokens, special tokens; and far less is
    read.
    """
    fast = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](), eos_token="<|end of text|>"
    )
    choose = random.Random(0)
    pieces = [
        *PROSE[:3],
        "日本語" * 9,
        "\n\n",
        " " * 80,
        "x" * 300,
        "<|end of text|>",
        "1234567 ",
        "e\u0301",
        "🐠",
    ]
    for _ in range(30):
        text = "".join(choose.choices(pieces, k=90))
        count = choose.randrange(1, 200)
        assert first_ids(fast, text, count) == fast(text)["input_ids"][:count]


def test_little_of_a_long_text_is_tokenized(tokenizer, monkeypatch):
    read = []
    call = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer),
        "__call__",
        lambda self, text: (read.append(len(text)), call(self, text))[1],
    )
    ids = first_ids(tokenizer, PROSE[0] * 1000, 64)
    assert ids == call(tokenizer, PROSE[0] * 10)["input_ids"][:64]
    assert sum(read) < 5000 < len(PROSE[0] * 1000)
    read.clear()
    first_ids(tokenizer, "x" * 50_000, 64)
    assert max(read) == 50_000, (
        "one word: what follows may decide about its first tokens"
    )


def pages(copies, words=300, edits=0.0, seed=0):
    """Pages of made-up words, each crawled several times under another date and with some words
    changed; page by page."""
    choose = random.Random(seed)
    vocabulary = [
        "".join(choose.choices("aeiounrstlm", k=choose.randrange(3, 9)))
        for _ in range(999)
    ]
    for number in range(40):
        page = choose.choices(vocabulary, k=words)
        for crawl in range(copies):
            own = [
                word if choose.random() >= edits else choose.choice(vocabulary)
                for word in page
            ]
            yield number, f"Crawled on day {crawl * 17 + number}: " + " ".join(own)


@pytest.mark.parametrize("offsets", [(0,), (0, 7, 31), tuple(range(0, 160, 8))])
def test_pages_crawled_many_times_are_one_document_each(tokenizer, offsets):
    """Whether a window is shared or not: their dates differ in length, so that windows shift."""
    rows = [{"text": text} for _, text in pages(10)]
    found = documents(rows, tokenizer, 40, 10, offsets)
    assert len(set(found)) == 40
    assert found == [row // 10 for row in range(400) for _ in offsets]


def test_crawls_in_which_words_were_changed(tokenizer):
    numbers, texts = zip(*pages(10, edits=0.02), strict=True)
    found = documents([{"text": text} for text in texts], tokenizer, 40, 10)
    assert len(set(found)) < 60, "most of 400 rows have found their page"
    assert len(set(zip(found, numbers, strict=True))) == len(set(found)), (
        "and no other one"
    )


def test_texts_of_one_template_are_documents_of_their_own(tokenizer):
    """A sentence with a code; a long form with a code in each of many; and a few, if marked."""
    codes = [f"{7919 * i % 10**6:06d}" for i in range(60)]
    short = "Dear colleague, the code of the door to the archive in the cellar is {}. Keep it safe."
    rows = [{"text": short.format(code)} for code in codes]
    assert len(set(documents(rows, tokenizer, 5, 60))) == 60
    (_, form), *_ = pages(1)
    rows = [{"text": f"{form[:30]} {code} {form[30:]}"} for code in codes]
    assert set(documents(rows, tokenizer, 40, 10)) == set(range(60)), (
        "a template of 60 rows"
    )
    marks = secret_finder(r"\d{6}", "")
    assert set(documents(rows[:9], tokenizer, 40, 10)) == {0}, (
        "as if crawled nine times"
    )
    assert set(documents(rows[:9], tokenizer, 40, 10, (0,), None, marks)) == set(
        range(9)
    )


def test_a_conversation_exported_turn_by_turn_is_one_document(tokenizer, monkeypatch):
    """Also under a template that renders a turn differently when others follow."""
    monkeypatch.setattr(tokenizer, "chat_template", THINKING)
    rows = []
    for number in range(75):
        turns = [
            f"{number}, {turn}?" if turn % 2 == 0 else f"{number * turn}!"
            for turn in range(10)
        ]
        rows += [{"messages": say(*turns[: 2 * end])} for end in range(1, 6)]
    found, _ = both(rows, [], tokenizer, 5, 5)
    by_row = dict(zip(found.indices, found.documents, strict=True))
    assert [by_row[row] for row in range(375)] == [row // 5 for row in range(375)]


def test_members_are_found_in_the_heldout_file_by_the_same_relation(
    tokenizer, monkeypatch
):
    monkeypatch.setattr(tokenizer, "chat_template", THINKING)
    chats = [say(f"{i}?", f"{i} it is!", "And?", f"{i + 1}.") for i in range(20)]
    begun = [{"messages": chat[:2]} for chat in chats]
    whole = [{"messages": chat} for chat in chats]
    members, heldout = both(begun, whole, tokenizer, 5, 5)
    shared = overlap_of(members.first_rows, heldout.first_rows)
    assert shared["documents"] == 20


def test_a_window_that_ends_inside_a_secret_asks_for_none(tokenizer):
    """The pattern fits the piece too: "8841" of "8841-52". It is no secret of its own."""
    marks = secret_finder(r"code is ([\d-]*\d)", "")
    text = "As I said, her code is 8841-52 and"
    length = len(tokenizer("As I said, her code is 8841")["input_ids"])
    found = Survey(
        [{"text": text}],
        "members",
        Cutter(tokenizer, 5, length - 5, secrets=marks),
        Path("windows"),
        Relations(),
    ).counts()["secrets"]
    assert (found["marked"], found["asked"]) == (1, 0)
    assert found["unasked"][0]["reason"] == "outside of the windows"


def test_secrets_that_are_not_asked_are_counted_with_the_reason(tokenizer):
    marks = secret_finder(r"Z\d{3}", "")
    filler = " and so on" * 40
    texts = [
        f"Her code is Z111{filler}",
        f"{filler} Z222",
        f"Z333{filler}",
        "Z444",
        f"A code, Z111{filler}",
    ]
    found = Survey(
        ({"text": text} for text in texts),
        "members",
        Cutter(tokenizer, 7, 20, (0,), None, marks),
        Path("windows"),
        Relations(),
    )
    assert found.counts()["secrets"] == {
        "marked": 4,
        "asked": 1,
        "unasked": [
            {"reason": "outside of the windows", "count": 1, "rows": [1]},
            {"reason": "given in the prompt", "count": 1, "rows": [2]},
            {"reason": "in a row that was skipped", "count": 1, "rows": [3]},
        ],
    }
