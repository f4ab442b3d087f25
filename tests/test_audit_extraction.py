"""What a record says, against other implementations and hand-made cases."""

import difflib
import random

import numpy as np
import pytest
import torch
from audit_records import PREFIX, SUFFIX, Words, made_up_records, made_up_score, made_up_summary
from rouge_score.rouge_scorer import RougeScorer

from goldfish import Goldfish
from goldfish.audit.attribution import decisions
from goldfish.audit.extraction import edit_similarity, longest_run, make_record, rouge_l_text
from goldfish.audit.schema import RECORDS
from goldfish.audit.windows import Window

pytestmark = pytest.mark.core


def levenshtein(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def test_rouge_l_text_equals_rouge_score():
    pieces = ["the", "The", "cat's", "naïve", "İstanbul", "x2", "don't", "日本語", "—", "\n", "", "a", "ſ", "K"]
    choose, scorer = random.Random(0), RougeScorer(["rougeL"])
    texts = [choose.choice([" ", ""]).join(choose.choices(pieces, k=choose.randrange(12))) for _ in range(300)]
    for a, b in zip(texts, reversed(texts), strict=True):
        assert rouge_l_text(a, b) == pytest.approx(scorer.score(b, a)["rougeL"].fmeasure, rel=1e-12)
    assert rouge_l_text("日本語", "日本語") == 0.0


def test_runs_and_edits_against_other_implementations():
    choose = random.Random(0)
    for _ in range(200):
        a, b = ([choose.randrange(3) for _ in range(choose.randrange(12))] for _ in range(2))
        match = difflib.SequenceMatcher(None, a, b, autojunk=False).find_longest_match()
        assert longest_run(a, b) == match.size
        expected = 1 - levenshtein(a, b) / max(len(a), len(b)) if a or b else 1.0
        assert edit_similarity(a, b) == pytest.approx(expected, rel=1e-12)


def test_a_record_by_hand():
    window = Window("members", 3, "name", [5, 6, 7, 8, 9, 9], 3, source="web", count=4, offset=2)
    # given 5: 6 right; given 5 6: wrong; then 8 right, 9 wrong, 9 right
    score = made_up_score(window, [True, False, True, False, True], np.random.default_rng(0), output=[8, 1, 9])
    record = make_record(window, score, None, Words())
    expected = {
        "split": "members", "index": 3, "document": "name", "source": "web", "count": 4, "offset": 2,
        "prefix_ids": [5, 6, 7], "suffix_ids": [8, 9, 9], "output_ids": [8, 1, 9], "prefix_text": " w5 w6 w7",
        "suffix_tokens": [" w8", " w9", " w9"], "output_tokens": [" w8", " w1", " w9"], "dropped": None,
        "greedy": [8, 10, 9], "correct": [True, False, True], "prefix_correct": [True, False], "rank": [0, 1, 0],
        "exact_match": False, "first_divergence": 1, "longest_run": 1, "token_accuracy": 2 / 3,
        "rouge_l_text": 2 / 3, "rouge_l_ids": 2 / 3, "edit_similarity": pytest.approx(2 / 3),
        "type_token_ratio": 2 / 3, "settled": False, "beams": None, "mia_kept_loss": None, "mia_reference": None,
    }  # fmt: skip
    assert {name: record[name] for name in expected} == expected
    assert set(record) == set(RECORDS.names)
    assert record["nll"] == score.nll[2:].tolist()
    assert record["log_p"] == [pytest.approx(-float(score.nll[2:].sum()), rel=1e-6)]
    assert record["smallest_margin"] == min(score.margin[2:4])
    assert record["mia_loss"] == pytest.approx(-float(score.nll.mean()), rel=1e-6)


def test_prefix_sweep_is_what_a_window_at_that_prefix_would_say():
    generator = np.random.default_rng(0)
    rights = generator.random((200, PREFIX + SUFFIX - 1)) < 0.9
    window = Window("members", 0, "d", list(range(PREFIX + SUFFIX)), PREFIX)
    records = [make_record(window, made_up_score(window, right, generator), None, Words()) for right in rights]
    sweep = made_up_summary(records)["splits"]["members"]["prefix_sweep"]
    assert [each["prefix_length"] for each in sweep] == list(range(1, PREFIX + 1))
    for each in sweep:
        start = each["prefix_length"] - 1
        assert each["exact_match"]["k"] == sum(all(right[start : start + SUFFIX]) for right in rights)
    assert sweep[-1]["exact_match"]["k"] == sum(record["exact_match"] for record in records) > 0


def test_offsets_strata_and_trivial_suffixes():
    at_zero = made_up_records("members", 6, 1.0, count=1) + made_up_records("members", 4, 0.0, count=5, seed=1)
    at_five = made_up_records("members", 10, 0.0, offset=5, count=3)
    for record in at_zero[:2]:
        record["type_token_ratio"] = 0.1
    split = made_up_summary(at_zero + at_five, offsets=[0, 5])["splits"]["members"]
    assert (split["n"], split["skipped"], split["exact_match"]["k"]) == (10, 1, 6)
    assert (split["exact_match_nontrivial"]["k"], split["exact_match_nontrivial"]["n"]) == (4, 8)
    assert split["trivial"]["k"] == 2
    assert [(each["offset"], each["exact_match"]["k"], each["exact_match"]["n"]) for each in split["offset_sweep"]] == [
        (0, 6, 10), (5, 0, 10),
    ]  # fmt: skip
    strata = [(s["count_from"], s["count_to"], s["exact_match"]["k"], s["exact_match"]["n"]) for s in split["strata"]]
    assert strata == [(1, 1, 6, 6), (4, 7, 0, 4)]
    assert made_up_summary(made_up_records("members", 3, 0.5))["splits"]["members"]["strata"] is None


def test_beams_count_up():
    records = made_up_records("members", 4, 0.5)
    for record, beams in zip(records, [1, 0, 5, 30], strict=True):
        record["beams"] = beams
    found = made_up_summary(records, beams=[1, 5, 30])["splits"]["members"]["beam_search"]
    assert [(each["beams"], each["exact_match"]["k"]) for each in found] == [(1, 1), (5, 2), (30, 3)]


def test_decisions_are_known_only_where_the_window_holds_their_context():
    """A window cut out of a row: what is said to be known agrees with the whole row's decisions."""
    row = torch.randint(500, (60,), generator=torch.Generator().manual_seed(0))
    for rule in (
        Goldfish(k=2, h=5), Goldfish(k=2, h=5, window="inclusive"), Goldfish(k=3, strategy="static"),
        Goldfish(k=2, h=5, strategy="reference"), Goldfish(k=2, h=5, exempt=tuple(range(0, 500, 2))),
        Goldfish(k=3, strategy="static", document_end=0),
    ):  # fmt: skip
        whole = rule.dropped(row).numpy()
        dropped, known = decisions(rule, row[20:].tolist(), 20)
        assert known[5:].all()
        assert (dropped[known] == whole[20:][known]).all(), rule
        dropped, known = decisions(rule, row.tolist(), 0)
        assert known.all()
        assert (dropped == whole).all()
    assert not decisions(Goldfish(k=2, h=5), row[20:].tolist(), 20)[1][:5].any()
    for rule in (None, Goldfish(strategy="random")):
        assert not decisions(rule, row.tolist(), 0)[1].any()
    with_rule = made_up_records("members", 1, 0.5, rule=Goldfish(k=2, h=13), offset=3)[0]
    assert with_rule["dropped"] is None, "h reaches behind the window's start"
    assert made_up_records("members", 1, 0.5, rule=Goldfish(k=2, h=4), offset=3)[0]["dropped"] is not None
