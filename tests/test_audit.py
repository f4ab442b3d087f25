"""The audit against generate at batch 1, against hand-made cases and other implementations of its numbers."""

import json

import pytest
import torch
from conftest import PROSE
from rouge_score.rouge_scorer import _score_lcs
from toy_tokenizers import KINDS
from transformers import PreTrainedTokenizerFast

from goldfish import Goldfish
from goldfish.audit.extraction import first_divergence, make_record, rouge_l, text_pieces
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


def test_text_pieces_join_to_the_text(tokenizer):
    for text in [*PROSE, "naïve 日本語 “quotes” \x00 <script>"]:
        ids = tokenizer(text)["input_ids"]
        pieces = text_pieces(tokenizer, [], ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == text
        assert "".join(text_pieces(tokenizer, ids[:5], ids[5:])) in text


@pytest.mark.parametrize("kind", KINDS)
def test_text_pieces_of_a_long_text_take_linear_work(kind):
    """Counted in decoded tokens; with characters of several tokens wherever decoding may start anew."""
    fast = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind]())
    ids = fast("Words, “日本語” naïve 🐠 and more. " * 40, add_special_tokens=False)["input_ids"]

    class Counting:
        decoded = 0

        def decode(self, ids, **options):
            self.decoded += len(ids)
            return fast.decode(ids, **options)

    counting = Counting()
    pieces = text_pieces(counting, [], ids)
    assert len(pieces) == len(ids) > 300
    assert "".join(pieces) == fast.decode(ids, clean_up_tokenization_spaces=False)
    assert counting.decoded < 70 * len(ids)


def test_a_random_rule_has_no_holes_to_tell(tokenizer, model):
    """It drew anew in every epoch, so no token of the window was dropped or kept throughout."""
    window = Window("members", 0, "", list(range(2, 18)), 7)
    (found,) = Scorer(model).score([window])
    assert make_record(window, found, Goldfish(strategy="random"), tokenizer)["dropped"] is None
    assert make_record(window, found, Goldfish(), tokenizer)["dropped"] is not None
