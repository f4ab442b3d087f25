"""Four kinds of tokenizers, trained on the help texts that come with Python; for the tests of
"letters".
"""

import json
import unicodedata
from functools import cache
from pydoc_data.topics import topics

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from goldfish.vocabulary import fold

TEXTS = [topics[name] for name in sorted(topics)][:40]
SCRIPTS = (
    "Straße ÉCOLE naïve ΟΔΟΣ οδός Ωμέγα don’t ﬁne co\u00adop zero\u200bwidth 𝒜lpha １２３ ½ "
    "吾輩は猫である。名前はまだ無い。ｶﾞｷﾞ 我们在北京大学学习自然语言处理。 iPhone手机 "
    "한국어 문장 हिन्दी भाषा ภาษาไทย 🙂👍🏽 e\u0301te\u0301 "
)


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return train(
        tokenizer,
        trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, **QUIET),
    )


def sentencepiece_bpe() -> Tokenizer:
    tokenizer = Tokenizer(
        models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    return train(
        tokenizer,
        trainers.BpeTrainer(vocab_size=1200, special_tokens=SPECIAL + BYTES, **QUIET),
        special=SPECIAL,
    )


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.Metaspace(),
        decoders.Metaspace(),
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=1500,
        special_tokens=SPECIAL,
        unk_token="<unk>",
        initial_alphabet=[*"\t\r\n\u00a0\u3000"],
        **QUIET,
    )
    return train(tokenizer, trainer)


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    )
    return train(
        tokenizer,
        trainers.WordPieceTrainer(vocab_size=1500, special_tokens=SPECIAL, **QUIET),
    )


QUIET = {"show_progress": False}
SPECIAL = ["<s>", "<unk>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
DECOMPOSED = [unicodedata.normalize("NFKD", SCRIPTS + SCRIPTS.upper())] * 9
KINDS = {
    f.__name__: cache(f) for f in (byte_level, sentencepiece_bpe, unigram, wordpiece)
}


def train(tokenizer: Tokenizer, trainer, special=None) -> Tokenizer:
    tokenizer.train_from_iterator(
        [*TEXTS, *[t.upper() for t in TEXTS[:10]], *[SCRIPTS] * 9, *DECOMPOSED], trainer
    )
    if special is None:
        return tokenizer
    # The trainer knows no bytes, so it made them special tokens; in a SentencePiece vocabulary they
    # are plain entries.
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = [
        token for token in described["added_tokens"] if token["content"] in special
    ]
    return Tokenizer.from_str(json.dumps(described))


def letters_of(text: str) -> str:
    return "".join(map(fold, text))


# Every word is of one token or more, in every tokenizer; in scripts without spaces a token may hold
# several words.
ALPHABETIC = "Straße ÉCOLE naïve ΟΔΟΣ οδός Ωμέγα don't co\u00adop 한국어 문장 "
