"""The recurrence table and the masks of benchmarks/recurrence.py, against counting strings in dictionaries."""

import ast
import random
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import recurrence as benchmark

from goldfish import Goldfish

TEXT = "the fish Swims; round and (round) its bowl’s edge, forgets ﬁne naïve 42 things: each-turn."


def test_benchmarks_import_about_before_the_recipes():
    """It puts the recipes on the path; pytest has them there already, so that no import here would fail."""
    root = Path(benchmark.__file__).parents[1]
    recipes = {path.stem for path in (root / "recipes").glob("*.py")}
    users = set()
    for path in set((root / "benchmarks").glob("*.py")) - {root / "benchmarks" / "about.py"}:
        modules = []
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if used := recipes.intersection(modules):
            users.add(path.stem)
            assert modules.index("about") < min(map(modules.index, used)), path
    assert users == {"recurrence"}


def shingles_of(text):
    """The 30 letters before each word, or None."""
    words = [word.replace("ï", "i") for word in benchmark.words(text.replace("’", " "))]  # marks are no letters
    begins = [sum(map(len, words[:i])) for i in range(len(words))]
    return ["".join(words)[begin - 30 : begin] if begin >= 30 else None for begin in begins]


def test_words_recur_where_three_documents_hold_their_letters():
    draw = random.Random(0)
    text = lambda number: " ".join(draw.choice(TEXT.split()) for _ in range(number))  # noqa: E731
    passage = text(40)
    edited = " ".join("zebra" if place == 20 else word for place, word in enumerate(passage.split()))
    documents = [passage, f"{text(30)}\n{passage}", text(60), "", passage.upper() + text(5), edited, "short one"]
    shingles = list(map(shingles_of, documents))
    holders = Counter(shingle for held in shingles for shingle in set(held) - {None})
    recurs, later = benchmark.count([benchmark.read_words(document) for document in documents])
    assert 20 < sum(map(sum, recurs)) < sum(map(len, recurs)) - 20
    for number, held in enumerate(shingles):
        earlier = {shingle for others in shingles[:number] for shingle in others} - {None}
        around = [held[max(0, place - 8) : place + 19] for place in range(len(held))]
        expected = [sum(holders[s] >= 3 for s in near) >= 2 for near in around]
        assert recurs[number].tolist() == expected
        expected = [flag and sum(s in earlier for s in near) >= 2 for flag, near in zip(expected, around, strict=True)]
        assert later[number].tolist() == expected
    assert not later[0].any(), "the first copy is no later copy"
    assert later[1].any()


def test_tokens_take_the_flag_of_their_word(tokenizer):
    text = "  Naïve (fish) don’t"
    document = benchmark.read_words(text)
    assert document.starts.tolist() == [0, 5, 9, 12], "naive, fish, don, t"
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    marks = benchmark.on_tokens(torch.tensor([False, True, False, True]).numpy(), document, offsets)
    word = [0] * 9 + [1] * 6 + [2] * 4 + [3]  # of every character: its word or the one before it
    for (begin, end), mark in zip(offsets, marks, strict=True):
        first = next((i for i in range(begin, end) if text[i].isalnum()), begin)
        assert mark == word[first] % 2, text[begin:end]


def test_masks(tokenizer):
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(2, len(tokenizer), (6, benchmark.ROW), generator=draw)
    recurs = torch.rand(ids.shape, generator=draw) < 0.5
    later = torch.zeros_like(recurs)
    later[1, :70], later[4, :40] = True, True
    reads, lengths = torch.tensor([1, 0, 4, 1, 2]), torch.full((5,), benchmark.ROW)
    planted = torch.tensor([False, True, False, False, True, False])
    data = benchmark.Data(ids, reads, lengths, planted, recurs, later, [5, 3], {}, ([], []), [], ids, reads)
    two, four = (Goldfish(k=k, h=8, strategy="letters").bind(tokenizer).dropped(ids) for k in (2, 4))
    masks = {rule: benchmark.arrange(rule, data, tokenizer) for rule in benchmark.RULES}
    assert masks["dedup"][0].tolist() == [5, 0, 4, 3, 2], "row 1 is mostly a later copy, row 4 less than half"
    for row, column in [(row, column) for row in range(6) for column in range(0, benchmark.ROW, 3)]:
        here = {rule: bool(mask[1][row, column]) for rule, mask in masks.items()}
        assert not here["standard"]
        assert (here["letters-2"], here["letters-4"]) == (two[row, column], four[row, column])
        assert here["recur-2"] == (bool(two[row, column]) and bool(recurs[row, column]))
        assert here["recur-2-4"] == bool((two if recurs[row, column] else four)[row, column])
        assert here["oracle-2"] == (bool(two[row, column]) and row in (1, 4))
        assert here["dedup-labels"] == later[row, column]
