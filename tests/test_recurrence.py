"""The recurrence table and the masks of benchmarks/recurrence.py, against counting strings in dictionaries."""

import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import recurrence as benchmark

from goldfish import Goldfish

TEXT = "the fish Swims; round and (round) its bowl’s edge, forgets ﬁne naïve 42 things: each-turn."
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def documents():
    """Texts of random words, and a passage in four of them: in two exactly, in one recased, in one with an edit."""
    draw = random.Random(0)
    text = lambda number: " ".join(draw.choice(WORDS) for _ in range(number))  # noqa: E731
    passage = text(40)
    edited = re.sub("[a-z]+", "zebra", passage, count=1)
    copies = [passage, text(30) + "\n" + passage, passage.upper() + text(5), text(3) + edited]
    return [*copies[:2], text(60), "", *copies[2:], text(60), "short one"]


def plain_words(text):
    """Words and the letters before each, by the standard library alone."""
    words = benchmark.words(text.replace("’", " "))
    letters = "".join(words)
    ends = [sum(map(len, words[:i])) for i in range(len(words))]
    return words, [letters[end - 30 : end] if end >= 30 else None for end in ends]


def test_words_recur_where_three_documents_hold_their_letters(documents):
    shingles = [[fold(s) for s in plain_words(text)[1]] for text in documents]
    holders = Counter(shingle for held in shingles for shingle in set(held) - {None})
    recurs, later = benchmark.count([benchmark.read_words(text) for text in documents])
    assert 20 < sum(map(sum, recurs)) < sum(map(len, recurs)) - 20
    for number, held in enumerate(shingles):
        earlier = {shingle for others in shingles[:number] for shingle in others}
        expected, expected_later = [], []
        for place in range(len(held)):
            around = [s for s in held[max(0, place - 8) : place + 19] if s is not None and holders[s] >= 3]
            expected.append(len(around) >= 2)
            expected_later.append(len(around) >= 2 and sum(s in earlier for s in around) >= 2)
        assert recurs[number].tolist() == expected
        assert later[number].tolist() == expected_later
    assert not later[0].any(), "the first copy is no later copy"
    assert later[1].any()


def fold(shingle):
    """Marks (the dots of ï) are no letters."""
    return shingle and shingle.replace("ï", "i")


def test_tokens_take_the_flag_of_their_word(tokenizer):
    text = "  Naïve (fish) don’t"
    encoding = tokenizer(text, return_offsets_mapping=True)
    document = benchmark.read_words(text)
    assert document.starts.tolist() == [0, 5, 9, 12], "naive, fish, don, t"
    flags = torch.tensor([False, True, False, True]).numpy()
    marks = benchmark.on_tokens(flags, document, encoding["offset_mapping"])
    place = {"Na": 0, "fish": 1, "don": 2, "t": 3}
    for (begin, end), mark in zip(encoding["offset_mapping"], marks, strict=True):
        words = [m.start() for m in re.finditer(r"Naïve|fish|don|t$", text)]
        first = next((i for i in range(begin, end) if text[i].isalnum()), begin)
        expected = max(sum(start <= first for start in words) - 1, 0)
        assert mark == flags[expected], (text[begin:end], place)


def test_masks(tokenizer):
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(2, len(tokenizer), (6, benchmark.ROW), generator=draw)
    recurs = torch.rand(ids.shape, generator=draw) < 0.5
    later = torch.zeros_like(recurs)
    later[1, :70], later[4, :60] = True, True
    reads, lengths = torch.tensor([1, 0, 4, 1, 2]), torch.full((5,), benchmark.ROW)
    planted = torch.tensor([False, True, False, False, True, False])
    data = benchmark.Data(ids, reads, lengths, planted, recurs, later, [5, 3], {}, ([], []), [], ids, reads)
    two, four = (Goldfish(k=k, h=8, strategy="letters").bind(tokenizer).dropped(ids) for k in (2, 4))
    masks = {rule: benchmark.arrange(rule, data, tokenizer) for rule in benchmark.RULES}
    assert not masks["standard"][1].any()
    for rule in set(benchmark.RULES) - {"dedup"}:
        assert masks[rule][0] is reads
    for row, column in [(row, column) for row in range(6) for column in range(0, benchmark.ROW, 3)]:
        here = {rule: bool(mask[1][row, column]) for rule, mask in masks.items()}
        assert (here["letters-2"], here["letters-4"]) == (two[row, column], four[row, column])
        assert here["recur-2"] == (bool(two[row, column]) and bool(recurs[row, column]))
        assert here["recur-2-4"] == bool((two if recurs[row, column] else four)[row, column])
        assert here["oracle-2"] == (bool(two[row, column]) and row in (1, 4))
        assert here["dedup-labels"] == later[row, column]
    assert masks["dedup"][0].tolist() == [5, 0, 4, 3, 2], "row 1 is mostly a later copy, row 4 less than half"
