"""The audit against generate at batch 1, against hand-made cases and other implementations of its numbers."""

import json

import pytest
import torch
from rouge_score.rouge_scorer import _score_lcs

from goldfish import Goldfish
from goldfish.audit.extraction import first_divergence, make_record, rouge_l
from goldfish.audit.score import Scorer
from goldfish.audit.windows import Window

pytestmark = pytest.mark.core


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_divergence_and_rouge_by_hand():
    assert first_divergence([1, 2, 3], [1, 2, 3]) == 3
    assert first_divergence([9, 2, 3], [1, 2, 3]) == 0
    assert first_divergence([1, 2, 4], [1, 2, 3]) == 2
    assert rouge_l([1, 2, 3, 4], [2, 4]) == pytest.approx(2 * 2 / 6)
    assert rouge_l([], []) == 0.0
    assert rouge_l([1], [2]) == 0.0


def test_rouge_equals_rouge_score():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        a, b = (torch.randint(0, 9, (n,), generator=generator).tolist() for n in (30, 25))
        assert rouge_l(a, b) == pytest.approx(_score_lcs(b, a).fmeasure, rel=1e-12)


def test_a_random_rule_has_no_holes_to_tell(tokenizer, model):
    """It drew anew in every epoch, so no token of the window was dropped or kept throughout."""
    window = Window("members", 0, "", list(range(2, 18)), 7)
    (found,) = Scorer(model).score([window])
    assert make_record(window, found, Goldfish(strategy="random"), tokenizer)["dropped"] is None
    assert make_record(window, found, Goldfish(), tokenizer)["dropped"] is not None
