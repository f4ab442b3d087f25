"""What a tokenizer's entries say, and the normal form of characters."""

import string
import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from toy_tokenizers import QUIET, SPECIAL, TEXTS, letters_of
from transformers import PreTrainedTokenizerFast

from goldfish import Goldfish
from goldfish.letters import Vocabulary
from goldfish.vocabulary import characters, fold, token_bytes

FOLD = characters()


# --- the normal form


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=20))
def test_normal_form_is_that_of_every_unicode_form(text):
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert letters_of(unicodedata.normalize(form, text)) == letters_of(text)
    assert letters_of("".join(map(fold, text))) == letters_of(text)  # and of itself


def test_normal_form_of_what_people_write():
    assert letters_of("Straße STRASSE ﬁne ＡＢＣ x² ½") == "strassestrassefineabcx212"
    assert letters_of("é e\u0301 ΟΔΟΣ οδος") == "eeοδοσοδοσ"
    assert letters_of("co\u00adop zero\u200bwidth a\ufeffb") == "coopzerowidthab"
    assert letters_of("don't don’t snake_case a.b(c)->d") == "dontdontsnakecaseabcd"
    assert letters_of("中文 iPhone手机") == "中文iphone手机"
    assert letters_of("ｶﾞ が") == "カか"
    assert all(letters_of(FOLD[c]) == FOLD[c] for c in range(0x110000))
    assert letters_of("\ud800\ue000\U0010ffff") == "", (
        "half a character, private, unassigned"
    )


def test_alphabet_is_complete():
    """Every ASCII character is what one would think."""
    for c in map(chr, range(128)):
        assert fold(c) == (
            c.lower() if c in string.ascii_letters + string.digits else ""
        )


# --- tokenizers


def test_entries_are_read_as_bytes(tokenizers):
    text = "Ünï\u00a0code 手 don't\n" * 2
    for kind in ("byte_level", "sentencepiece_bpe"):
        entries = token_bytes(tokenizers[kind])
        assert (
            b"".join(entries[i] for i in tokenizers[kind].encode(text).ids).strip()
            == text.strip().encode()
        )
    entries = token_bytes(tokenizers["wordpiece"])
    ids = tokenizers["wordpiece"].encode("unwrapping tokens, twice").ids
    assert b"".join(entries[i] for i in ids).decode().split() == [
        "unwrapping",
        "tokens",
        ",",
        "twice",
    ]


def test_special_tokens_separate_and_unknown_ids_too(tokenizers):
    tokenizer = Tokenizer.from_str(tokenizers["byte_level"].to_str())
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens(["<|user name|>"])
    entries = token_bytes(tokenizer)
    assert entries[tokenizer.token_to_id("<|end|>")] == b" "
    assert entries[tokenizer.token_to_id("<|user name|>")] == b"<|user name|>"
    rule = Goldfish(strategy="letters", k=2).bind(tokenizer)
    ids = tokenizer.encode("one two<|end|>three four").ids
    beyond = [i if i != tokenizer.token_to_id("<|end|>") else 10**9 for i in ids]
    negative = [i if i != tokenizer.token_to_id("<|end|>") else -100 for i in ids]
    expected = rule.dropped(torch.tensor(ids))
    assert torch.equal(rule.dropped(torch.tensor(beyond)), expected)
    assert torch.equal(rule.dropped(torch.tensor(negative)), expected)


def test_unknown_tokens_separate():
    tokenizer = Tokenizer(
        models.WordPiece(
            {"one": 0, "two": 1, "##two": 2, "[UNK]": 3}, unk_token="[UNK]"
        )
    )
    assert token_bytes(tokenizer) == [b" one", b" two", b"two", b" "]


@pytest.mark.core
def test_transformers_tokenizer(tokenizers, rules):
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers["byte_level"], eos_token="!"
    )
    assert (
        token_bytes(wrapped)[wrapped.eos_token_id] == b" "
    )  # special to transformers only
    rule = Goldfish(strategy="letters", h=4, k=3).bind(
        PreTrainedTokenizerFast(tokenizer_object=tokenizers["byte_level"])
    )
    ids = torch.tensor(tokenizers["byte_level"].encode(TEXTS[0]).ids)
    assert torch.equal(rule.dropped(ids), rules["byte_level"].dropped(ids))


def test_end_of_word_suffix_is_read():
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.Whitespace(),
        decoders.BPEDecoder(),
    )
    tokenizer.train_from_iterator(
        TEXTS[:5],
        trainers.BpeTrainer(
            vocab_size=400, end_of_word_suffix="</w>", special_tokens=SPECIAL, **QUIET
        ),
    )
    entries = token_bytes(tokenizer)
    ids = tokenizer.encode("return the value").ids
    assert b"".join(entries[i] for i in ids).decode().split() == [
        "return",
        "the",
        "value",
    ]


def test_what_cannot_be_read_is_refused():
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(
        ValueError, match=r'do not show where words begin.*use strategy="hash"'
    ):
        Goldfish(strategy="letters").bind(plain)
    with pytest.raises(TypeError, match=r"fast tokenizer.*got str"):
        Goldfish(strategy="letters").bind("gpt2")
    with pytest.raises(
        ValueError, match=r"an entry of the vocabulary has 65536 letters.*at most 65535"
    ):
        Vocabulary([b"a" * 65536]).on(torch.device("cpu"))
