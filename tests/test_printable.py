"""The text that each token adds, and visible escapes."""

import pytest
from helpers import PROSE
from toy_tokenizers import KINDS
from transformers import PreTrainedTokenizerFast

from goldfish.text.printable import plain, text_pieces


def test_text_pieces_join_to_the_text(tokenizer):
    for text in [*PROSE, "naïve 日本語 “quotes” \x00 <script>"]:
        ids = tokenizer(text)["input_ids"]
        pieces = text_pieces(tokenizer, [], ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == text
        assert "".join(text_pieces(tokenizer, ids[:5], ids[5:])) in text


@pytest.mark.parametrize("kind", KINDS)
def test_text_pieces_of_a_long_text_take_linear_work(kind):
    """Counted in decoded tokens; with cut characters wherever decoding may start anew."""
    fast = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind]())
    ids = fast("Words, “日本語” naïve 🐠 and more. " * 40, add_special_tokens=False)[
        "input_ids"
    ]

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


def test_plain_makes_everything_visible():
    assert plain("naïve 日本語 🐠 a\u200db", 100) == "naïve 日本語 🐠 a\u200db"
    assert plain("a\nb\x00c\u202ed\u200b\ud800") == r"a\nb\x00c\u202ed\u200b\ud800"
    assert plain("abcdef", 3) == "abc…"
