"""Does a document keep its dropped tokens when it is reformatted, or tokenized otherwise?

    python benchmarks/reformatting.py --text documents.jsonl

For documents of a JSONL file with a `text` field: the share of words that get the decision that
they get in the original, for "letters" and, over token ids, "hash". A word is a run of letters and
digits; its decision is that of the token with its first letter; words of original and version are
matched by the letters before them. In the rows named after tokenizers the text is the original and
the tokenizer another than the first.
"""

import json
import random
import re
import string
from collections.abc import Callable
from pathlib import Path
from unicodedata import category

import numpy as np
import torch
from about import RESULTS, about, byte_level_bpe, load_texts, parser
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from goldfish import Goldfish
from goldfish.vocabulary import characters

STRATEGIES = ("letters", "hash")
PUNCTUATION = dict.fromkeys(map(ord, string.punctuation))


def byte_level(texts: list[str], size: int) -> Tokenizer:
    return byte_level_bpe(texts, size).backend_tokenizer


def sentencepiece_bpe(texts: list[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = metaspace(), decoders.Metaspace()
    special = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, limit_alphabet=500, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer makes the bytes special tokens; SentencePiece has them as plain entries.
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = [
        token for token in described["added_tokens"] if token["content"] == "<unk>"
    ]
    return Tokenizer.from_str(json.dumps(described))


def metaspace() -> pre_tokenizers.PreTokenizer:
    """As SentencePiece trains by default: no entry mixes letters with punctuation.

    Its option is split_by_unicode_script.
    """
    space = pre_tokenizers.Metaspace(prepend_scheme="first")
    return pre_tokenizers.Sequence([pre_tokenizers.UnicodeScripts(), space])


def unigram(texts: list[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size,
        special_tokens=["<unk>"],
        unk_token="<unk>",
        show_progress=False,
        initial_alphabet=[*string.printable, "\u00a0"],
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def wordpiece(texts: list[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    )
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        special_tokens=["<unk>"],
        limit_alphabet=1500,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


TOKENIZERS = {
    "byte-level BPE": (byte_level, 8000),
    "SentencePiece BPE": (sentencepiece_bpe, 6000),
    "Unigram": (unigram, 6000),
    "WordPiece": (wordpiece, 6000),
}


def wrapped(text: str, rng: random.Random) -> str:
    return "".join(rng.choice(" \n") if c.isspace() else c for c in text)


def indented(text: str, rng: random.Random) -> str:
    return "".join(
        rng.choice(("", "    ", "\t")) + line.strip() + "\n"
        for line in text.splitlines()
    )


def recased(text: str, rng: random.Random) -> str:
    cases = (str, str.upper, str.lower, str.capitalize)
    return "".join(rng.choice(cases)(piece) for piece in re.split(r"([ \n])", text))


def edges_stripped(text: str, rng: random.Random) -> str:
    words = text.replace("\n", " \n ").split(" ")
    return " ".join(
        word if word == "\n" else word.strip(string.punctuation) for word in words
    )


VERSIONS: dict[str, Callable[[str, random.Random], str]] = {
    "re-wrapped": wrapped,
    "re-indented": indented,
    "re-cased": recased,
    "doubled spaces": lambda text, rng: "".join(
        rng.choice((" ", "  ")) if c == " " else c for c in text
    ),
    "no-break spaces": lambda text, rng: text.replace(" ", "\u00a0"),
    "CRLF": lambda text, rng: text.replace("\n", "\r\n"),
    "punctuation stripped from words": edges_stripped,
    "punctuation deleted": lambda text, rng: text.translate(PUNCTUATION),
}


def decide(
    rule: Goldfish, tokenizer: Tokenizer, text: str
) -> tuple[np.ndarray, np.ndarray, list[bool]]:
    """What a rule decides in a text.

    Returns for every letter of the normal form whether a word starts there, bool (L,), and whether
    its token is dropped, bool (L,); and the decision of every token.
    """
    encoding = tokenizer.encode(text, add_special_tokens=False)
    drop = rule.dropped(torch.tensor(encoding.ids, dtype=torch.int64)).tolist()
    of_character = np.zeros(len(text), dtype=bool)
    for (begin, end), dropped in zip(encoding.offsets, drop, strict=True):
        of_character[begin:end] = dropped
    # A character without letters separates words, unless it is a mark or invisible.
    forms = [
        characters()[ord(c)]
        or (" " if category(c) not in ("Mn", "Mc", "Me", "Cf") else "")
        for c in text
    ]
    letter = np.array([c != " " for form in forms for c in form], dtype=bool)
    starts = letter & ~np.append(False, letter)[:-1]
    return (
        starts[letter],
        of_character.repeat([len(form) for form in forms])[letter],
        drop,
    )


def compare(before: list, after: list) -> dict[str, int]:
    """How many words of the original keep their decision in a version or with a tokenizer."""
    counts = {"same": 0, "words": 0, "dropped": 0, "tokens": 0}
    for (starts, original, _), (_, version, drop) in zip(before, after, strict=True):
        if len(original) != len(version):
            raise ValueError(
                "a version has other letters than its document: not a reformatting"
            )
        counts["same"] += int((original == version)[starts].sum())
        counts["words"] += int(starts.sum())
        counts["dropped"] += sum(drop)
        counts["tokens"] += len(drop)
    return counts


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument(
        "--text",
        required=True,
        help="JSONL file; the field `text` of each line is used",
    )
    options.add_argument("--documents", type=int, default=500)
    options.add_argument(
        "--characters", type=int, default=4000, help="of each document"
    )
    options.add_argument("--k", type=float, default=4)
    options.add_argument(
        "--h", type=int, default=8, help="h tokens for hash, 5h letters for letters"
    )
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path, default=RESULTS / "reformatting.json")
    args = options.parse_args(argv)
    torch.set_num_threads(1)
    texts = load_texts(args.text)
    texts = random.Random(args.seed).sample(texts, min(args.documents, len(texts)))
    texts = [text[: args.characters] for text in texts]
    documents = {"another tokenizer": texts}
    for change, reformat in VERSIONS.items():
        rng = random.Random(args.seed)
        documents[change] = [reformat(text, rng) for text in texts]

    rows, first = [], {}
    for name, (make, size) in TOKENIZERS.items():
        tokenizer = make(texts, size)
        results = {
            change: {"change": change, "tokenizer": name} for change in documents
        }
        for strategy in STRATEGIES:
            rule = Goldfish(k=args.k, h=args.h, seed=args.seed, strategy=strategy).bind(
                tokenizer
            )  # type: ignore[arg-type]
            plain = [decide(rule, tokenizer, text) for text in texts]
            first.setdefault(strategy, plain)  # of the first tokenizer
            for change, versions in documents.items():
                another = change == "another tokenizer"
                after = (
                    plain
                    if another
                    else [decide(rule, tokenizer, text) for text in versions]
                )
                results[change][strategy] = compare(
                    first[strategy] if another else plain, after
                )
        for change, result in results.items():
            shares = [
                f"{result[s]['same'] / result[s]['words']:8.2%}" for s in STRATEGIES
            ]
            rates = [
                f"{result[s]['dropped'] / result[s]['tokens']:.4f}" for s in STRATEGIES
            ]
            print(f"{change:34}{name:20}", *shares, "  drop rate", *rates, flush=True)
        rows += results.values()
    result = about("tokenizers") | {
        "documents": len(texts),
        "k": args.k,
        "h": args.h,
        "seed": args.seed,
    }
    args.output.write_text(
        json.dumps(result | {"agreement": rows}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
