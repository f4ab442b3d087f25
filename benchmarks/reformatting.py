"""Does a document keep its dropped tokens when it is reformatted, or tokenized otherwise?

    python benchmarks/reformatting.py --text documents.jsonl

For documents of a JSONL file with a `text` field: the share of words that get the decision that they get in the
original, for "letters" and, over token ids, "hash". A word is a run of letters and digits; its decision is that
of the token with its first letter; words of original and version are matched by the letters before them. In the rows
named after tokenizers the text is the original and the tokenizer another than the first.
"""

import argparse
import json
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from about import RESULTS, about, byte_level_bpe
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from goldfish import Goldfish
from goldfish.vocabulary import characters

FOLD = characters()
STRATEGIES = ("letters", "hash")


def byte_level(texts: list[str], size: int) -> Tokenizer:
    return byte_level_bpe(texts, size).backend_tokenizer


def sentencepiece_bpe(texts: list[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = metaspace(), decoders.Metaspace()
    special = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, limit_alphabet=500, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    described = json.loads(tokenizer.to_str())  # the trainer makes the bytes special; here they are plain entries
    described["added_tokens"] = [token for token in described["added_tokens"] if token["content"] == "<unk>"]
    return Tokenizer.from_str(json.dumps(described))


def metaspace() -> pre_tokenizers.PreTokenizer:
    """As SentencePiece trains by default: no entry mixes letters with punctuation (split_by_unicode_script)."""
    space = pre_tokenizers.Metaspace(prepend_scheme="first")
    return pre_tokenizers.Sequence([pre_tokenizers.UnicodeScripts(), space])


def unigram(texts: list[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False,
        initial_alphabet=[*string.printable, "\u00a0"],
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def wordpiece(texts: list[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=["<unk>"], limit_alphabet=1500, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


TOKENIZERS = {
    "byte-level BPE": (byte_level, 8000),
    "SentencePiece BPE": (sentencepiece_bpe, 6000),
    "Unigram": (unigram, 6000),
    "WordPiece": (wordpiece, 6000),
}


def spaces(choices: tuple[str, ...], share: float = 1.0) -> Callable[[str, random.Random], str]:
    return lambda text, rng: "".join(rng.choice(choices) if c == " " and rng.random() < share else c for c in text)


def wrapped(text: str, rng: random.Random) -> str:
    return "".join(rng.choice(" \n") if c.isspace() else c for c in text)


def indented(text: str, rng: random.Random) -> str:
    return "".join(rng.choice(("", "    ", "\t")) + line.strip() + "\n" for line in text.splitlines())


def recased(text: str, rng: random.Random) -> str:
    word = lambda w: rng.choice((w, w.upper(), w.lower(), w.capitalize()))  # noqa: E731
    return "".join(word(w) for w in text.replace(" ", "\0 \0").replace("\n", "\0\n\0").split("\0"))


def edges_stripped(text: str, rng: random.Random) -> str:
    words = text.replace("\n", " \n ").split(" ")
    return " ".join(w if w == "\n" else w.strip(string.punctuation) for w in words)


VERSIONS: dict[str, Callable[[str, random.Random], str]] = {
    "re-wrapped": wrapped,
    "re-indented": indented,
    "re-cased": recased,
    "doubled spaces": spaces((" ", "  ")),
    "no-break spaces, a fifth": spaces(("\u00a0",), 0.2),
    "no-break spaces, all": spaces(("\u00a0",)),
    "CRLF": lambda text, rng: text.replace("\n", "\r\n"),
    "punctuation stripped from words": edges_stripped,
    "punctuation to spaces": lambda text, rng: text.translate({ord(c): " " for c in string.punctuation}),
    "punctuation deleted": lambda text, rng: text.translate({ord(c): None for c in string.punctuation}),
    "all but deleted punctuation": lambda text, rng: spaces((" ", "  ", "\u00a0"))(
        indented(recased(wrapped(edges_stripped(text, rng), rng), rng), rng).replace("\n", "\r\n"), rng
    ),
}


def starts(text: str, drop: list[bool], offsets: list[tuple[int, int]]) -> Iterator[tuple[int, bool]]:
    """For every letter of the normal form: whether a word starts there, and its token's decision."""
    at = {c: d for (begin, end), d in zip(offsets, drop, strict=True) for c in range(begin, end)}
    inside = False
    for i, character in enumerate(text):
        for c in FOLD[ord(character)]:
            if c != " ":
                yield not inside, at.get(i, False)
            inside = c != " "


def decide(rule: Goldfish, tokenizer: Tokenizer, text: str) -> tuple[list[tuple[int, bool]], list[bool]]:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    drop = rule.dropped(torch.tensor(encoding.ids, dtype=torch.int64)).tolist()
    return list(starts(text, drop, encoding.offsets)), drop


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="JSONL file; the field `text` of each line is used")
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--characters", type=int, default=4000, help="of each document")
    parser.add_argument("--k", type=float, default=4)
    parser.add_argument("--h", type=int, default=8, help="words of 5 letters for letters, tokens for hash")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "reformatting.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)

    lines = args.text.read_text(encoding="utf-8").splitlines()
    chosen = random.Random(args.seed).sample(lines, min(args.documents, len(lines)))
    texts = [json.loads(line)["text"][: args.characters] for line in chosen]
    trained = {name: make(texts, size) for name, (make, size) in TOKENIZERS.items()}
    rules = {
        name: {
            strategy: Goldfish(k=args.k, h=args.h, seed=args.seed, strategy=strategy).bind(tokenizer)  # type: ignore[arg-type]
            for strategy in STRATEGIES
        }
        for name, tokenizer in trained.items()
    }

    rows = []
    first = next(iter(trained))
    original = {
        (name, s): [decide(rules[name][s], trained[name], text) for text in texts]
        for name in trained
        for s in rules[name]
    }

    def row(change: str, name: str, base: str, versions: list[str]) -> None:
        result: dict[str, object] = {"change": change, "tokenizer": name}
        for strategy in STRATEGIES:
            same = total = dropped = tokens = 0
            for before, text in zip(original[base, strategy], versions, strict=True):
                letters, drop = decide(rules[name][strategy], trained[name], text)
                dropped, tokens = dropped + sum(drop), tokens + len(drop)
                if len(letters) != len(before[0]):
                    raise ValueError(f"{change} changed the letters of a document: not a reformatting")
                pairs = [(a, b) for (start, a), (_, b) in zip(before[0], letters, strict=True) if start]
                same, total = same + sum(a == b for a, b in pairs), total + len(pairs)
            result[strategy] = {"same": same, "words": total, "dropped": dropped, "tokens": tokens}
        rows.append(result)
        shares = [f"{result[s]['same'] / result[s]['words']:8.2%}" for s in STRATEGIES]  # type: ignore[index]
        rates = [f"{result[s]['dropped'] / result[s]['tokens']:.4f}" for s in STRATEGIES]  # type: ignore[index]
        print(f"{change:34}{name:20}", *shares, "  drop rate", *rates, flush=True)

    print(f"{'change':34}{'tokenizer':20}", *(f"{strategy:>8}" for strategy in STRATEGIES))
    for name in trained:
        row("another tokenizer" if name != first else "nothing", name, first, texts)
    for change, reformat in VERSIONS.items():
        rng = random.Random(args.seed)
        versions = [reformat(text, rng) for text in texts]
        for name in trained:
            row(change, name, name, versions)

    args.output.parent.mkdir(parents=True, exist_ok=True)
    result = about("tokenizers") | {"documents": len(texts), "k": args.k, "h": args.h, "seed": args.seed}
    result |= {"agreement": rows}
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
