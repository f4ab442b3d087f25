"""The columns of the records, against other implementations and hand-made cases; and the records
read back.
"""

import copy
import difflib
import json
import random

import numpy as np
import pytest
import torch
from audit_records import (
    PREFIX,
    SUFFIX,
    Words,
    made_up_audit,
    made_up_records,
    made_up_score,
    write_run,
)
from helpers import PROSE
from rouge_score.rouge_scorer import RougeScorer, _score_lcs
from tokenizers.processors import TemplateProcessing

from goldfish import Goldfish
from goldfish.audit.questions.membership import word_buckets
from goldfish.audit.records import (
    COLUMNS,
    common_runs,
    decisions,
    make_record,
    read_records,
    read_run,
    rouge_l,
    rouge_l_text,
)
from goldfish.audit.windows import Cutter, Window, first_divergence

pytestmark = pytest.mark.core


def levenshtein(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = (
                row[j],
                min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y)),
            )
    return row[-1]


def test_rouge_l_text_equals_rouge_score():
    pieces = [
        "the",
        "The",
        "cat's",
        "naïve",
        "İstanbul",
        "x2",
        "don't",
        "日本語",
        "—",
        "\n",
        "",
        "a",
        "ſ",
        "K",
    ]
    choose, scorer = random.Random(0), RougeScorer(["rougeL"])
    texts = [
        choose.choice([" ", ""]).join(choose.choices(pieces, k=choose.randrange(12)))
        for _ in range(300)
    ]
    for a, b in zip(texts, reversed(texts), strict=True):
        assert rouge_l_text(a, b) == pytest.approx(
            scorer.score(b, a)["rougeL"].fmeasure, rel=1e-12
        )
    assert rouge_l_text("日本語", "日本語") == 0.0
    for _ in range(50):
        a, b = ([choose.randrange(9) for _ in range(n)] for n in (30, 25))
        assert rouge_l(a, b) == pytest.approx(_score_lcs(b, a).fmeasure, rel=1e-12)
    assert rouge_l([], []) == rouge_l([1], [2]) == 0.0


def test_first_divergence_by_hand():
    assert first_divergence([1, 2, 3], [1, 2, 3]) == 3
    assert first_divergence([9, 2, 3], [1, 2, 3]) == 0
    assert first_divergence([1, 2, 4], [1, 2, 3]) == 2


def test_common_runs_are_all_that_cannot_be_longer():
    """Against a search of every pair of starts, and the longest of them against difflib's."""
    choose = random.Random(0)
    for _ in range(200):
        a, b = (
            [choose.randrange(3) for _ in range(choose.randrange(12))] for _ in range(2)
        )
        expected = []
        for i in range(len(a)):
            for j in range(len(b)):
                length = next(
                    (
                        n
                        for n in range(len(a) + 1)
                        if a[i : i + n + 1][n:] != b[j : j + n + 1][n:]
                        or i + n == len(a)
                    ),
                    0,
                )
                if length and (not i or not j or a[i - 1] != b[j - 1]):
                    expected.append([i, j, length])
        found = common_runs(a, b)
        assert sorted(found) == sorted(expected)
        longest = (
            difflib.SequenceMatcher(None, a, b, autojunk=False)
            .find_longest_match()
            .size
        )
        assert max((length for _, _, length in found), default=0) == longest


def test_common_runs_of_a_record_are_long():
    window = Window("members", 0, "d", [*range(3), *range(10, 40)], 3)
    score = made_up_score(
        window,
        [True] * 32,
        np.random.default_rng(0),
        output=[*range(28, 40), 1, *range(10, 22), 2, 3, 4, 5, 6],
    )
    record = make_record(window, score, None, Words(), 7)
    assert record["common_runs"] == [[13, 0, 12], [0, 18, 12]]
    assert (record["longest_run"], record["token_accuracy"], record["document"]) == (
        12,
        0,
        7,
    )


def test_a_record_by_hand():
    window = Window(
        "members", 3, "name", [5, 6, 7, 8, 9, 9], 3, source="web", count=4, offset=2
    )
    # given 5: 6 right; given 5 6: wrong; then 8 right, 9 wrong, 9 right
    score = made_up_score(
        window,
        [True, False, True, False, True],
        np.random.default_rng(0),
        output=[8, 1, 9],
    )
    record = make_record(window, score, None, Words(), 5)
    expected = {
        "split": "members",
        "index": 3,
        "name": "name",
        "prompt_kind": "training",
        "count": 4,
        "offset": 2,
        "prefix_ids": [5, 6, 7],
        "suffix_ids": [8, 9, 9],
        "output_ids": [8, 1, 9],
        "prompt": " w5 w6 w7",
        "suffix_tokens": [" w8", " w9", " w9"],
        "output_tokens": [" w8", " w1", " w9"],
        "dropped": None,
        "correct": [True, False, True],
        "rank": [0, 1, 0],
        "exact_match": False,
        "first_divergence": 1,
        "longest_run": 1,
        "token_accuracy": 2 / 3,
        "rouge_l_text": 2 / 3,
        "rouge_l_ids": 2 / 3,
        "edit_similarity": pytest.approx(2 / 3),
        "settled": False,
        "beams": None,
        "mia_kept_loss": None,
        "mia_reference": None,
        "document": 5,
        "characters": 18,
        "common_runs": [],
        "prefix_sweep": [False, False, False],
        "words": word_buckets("w9 w8 w7 w6 W5"),
    }
    assert {name: record[name] for name in expected} == expected
    assert set(record) == set(COLUMNS.names)
    assert record["nll"] == score.nll[2:].tolist()
    assert record["log_p"] == [pytest.approx(-float(score.nll[2:].sum()), rel=1e-6)]
    assert record["mia_loss"] == pytest.approx(-float(score.nll.mean()), rel=1e-6)


def test_prefix_sweep_is_what_a_window_at_that_prefix_would_say():
    generator = np.random.default_rng(0)
    rights = generator.random((200, PREFIX + SUFFIX - 1)) < 0.9
    window = Window("members", 0, "d", list(range(PREFIX + SUFFIX)), PREFIX)
    records = [
        make_record(window, made_up_score(window, right, generator), None, Words(), i)
        for i, right in enumerate(rights)
    ]
    sweep = made_up_audit(records).rows.select(split="members", figure="prefix_sweep")
    assert [each.x for each in sweep] == list(range(1, PREFIX + 1))
    for start, figure in enumerate(sweep):
        recited = sum(all(right[start : start + SUFFIX]) for right in rights)
        assert figure.k == recited
    assert sweep[-1].k == sum(record["exact_match"] for record in records) > 0


def test_offsets_are_windows_of_the_same_documents():
    missed = made_up_records("members", 4, 0.0, seed=1)
    at_zero = made_up_records("members", 6, 1.0)
    at_zero += [{**record, "document": 6 + i} for i, record in enumerate(missed)]
    at_five = made_up_records("members", 10, 0.0, offset=5)
    found = made_up_audit(at_zero + at_five, offsets=[0, 5])
    assert (found["members.settled"].n, found["members.exact_match"].point()) == (
        20,
        "6 of 10",
    )
    sweep = found.rows.select(figure="offset_sweep")
    assert [(each.x, each.point()) for each in sweep] == [
        (0, "6 of 10"),
        (5, "0 of 10"),
    ]


def test_no_sampling_beats_the_ranks():
    """Softmax by hand: no temperature, top-k or top-p makes the suffix more probable than the
    product of 1/rank.
    """
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, (SUFFIX, 30))
    order = np.argsort(-logits)
    ranks = np.array([0, 1, 0, 4, 2, 0, 0, 9])
    window = Window(
        "members",
        0,
        "d",
        [*range(PREFIX), *order[range(SUFFIX), ranks].tolist()],
        PREFIX,
    )
    every = np.concatenate([np.zeros(PREFIX - 1, dtype=int), ranks])
    bits = make_record(
        window,
        made_up_score(window, every == 0, generator, rank=every),
        None,
        Words(),
        0,
    )["rank_bits"]
    assert 2**-bits == pytest.approx(1 / (2 * 5 * 3 * 10))
    best = 0.0
    for _ in range(2_000):
        temperature, top_k, top_p = (
            10 ** generator.uniform(-2, 2),
            generator.integers(1, 31),
            generator.uniform(0.1, 1),
        )
        p = 1.0
        for row, rank in zip(logits, ranks, strict=True):
            likely = np.exp((np.sort(row)[::-1] - row.max()) / temperature)[:top_k]
            likely = likely[
                : 1 + int(np.searchsorted(np.cumsum(likely / likely.sum()), top_p))
            ]
            p *= likely[rank] / likely.sum() if rank < len(likely) else 0.0
        best = max(best, p)
    assert 0 < best <= 2**-bits
    each = np.prod(
        [
            1 / len(np.flatnonzero(row >= row[i]))
            for row, i in zip(logits, window.suffix, strict=True)
        ]
    )
    assert 2**-bits == pytest.approx(each), (
        "reached by top-k = rank and a high temperature at every token"
    )


def test_texts_that_sampling_may_extract_under_some_setting():
    """In 1,000 samples with a probability of 50%: ln 2 / 1,000 is 10.49 bits."""
    records = made_up_records("members", 4, 0.5)
    for record, bits in zip(records, [0.0, 10.0, 10.5, 99.0], strict=True):
        record |= {"rank_bits": bits, "log_p": [-np.log(2) * (bits + 1)]}
    found = made_up_audit(records)
    assert [
        found[f"members.{name}"].k for name in ("extractable_bound", "extractable")
    ] == [2, 1]


def test_beams_count_up():
    records = made_up_records("members", 4, 0.5)
    for record, beams in zip(records, [1, 0, 5, 30], strict=True):
        record["beams"] = beams
    rows = made_up_audit(records, beams=[1, 5, 30]).rows.select(figure="beam_search")
    assert [(each.x, each.k) for each in rows] == [(None, 3), (1, 1), (5, 2), (30, 3)]


def test_decisions_are_those_of_the_whole_document(tokenizer):
    """A window cut out of a text, behind a BOS or not: what the rule drops in the whole text."""
    twin = copy.deepcopy(tokenizer)
    twin.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", 1)]
    )
    twin.bos_token = "<pad>"
    for own in (tokenizer, twin):
        ids = torch.tensor(own(PROSE[0])["input_ids"])
        framed = int(own is twin)
        for rule in (
            Goldfish(k=2, h=5),
            Goldfish(k=3, strategy="static"),
            Goldfish(k=2, h=5, strategy="reference"),
            Goldfish(k=2, h=5, max_kept=3),
        ):
            whole = rule.dropped(ids).tolist()
            for offset, window in zip(
                (0, 3, 11),
                Cutter(own, 6, 9, (0, 3, 11)).cut({"text": PROSE[0]}, 0, "members"),
                strict=True,
            ):
                assert (
                    window.ids[framed:] == ids[framed + offset : offset + 15].tolist()
                )
                assert (
                    decisions(rule, window).tolist() == whole[offset + 1 : offset + 15]
                ), (
                    rule,
                    offset,
                )
    for strategy in ("random", "entropy"):
        rule = Goldfish(strategy=strategy)
        assert decisions(rule, window) is None
        rows = made_up_records("members", 1, 0.5, rule=rule)
        assert rows[0]["dropped"] is None
        share = made_up_audit(rows, run={"rule": rule.to_dict()})
        assert strategy in share["members.dropped_share"].reason
    assert decisions(None, window) is None


def test_records_are_read_back(tmp_path):
    rows = made_up_records("members", 5, 0.9)
    write_run(tmp_path, rows)
    assert read_records(tmp_path).to_pylist() == rows
    assert read_records(tmp_path, ["nll", "split"]).column_names == ["nll", "split"]
    (tmp_path / "records" / "000001.parquet").write_bytes(
        (tmp_path / "records" / "000000.parquet").read_bytes()
    )
    with pytest.raises(
        ValueError, match=r"holds 10 records, expected 5: .*repeat its command"
    ):
        read_records(tmp_path)
    (tmp_path / "records" / "000001.parquet").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"000001.parquet is damaged .*; repeat the audit"
    ):
        read_records(tmp_path)


def test_a_folder_that_is_no_audit(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"holds no audit: it has no run.json; give the folder"
    ):
        read_records(tmp_path)
    for text, message in (
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"schema": 2}', "the schema is 2, this version"),
    ):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_run(tmp_path)
    write_run(tmp_path, made_up_records("members", 1, 0.5))
    assert read_run(tmp_path) == json.loads((tmp_path / "run.json").read_text())
