"""What a tokenizer's entries say: their bytes, and the normal form of characters, for "text" and "letters"."""

import json
from functools import cache
from typing import Any
from unicodedata import category, normalize

# Scripts written without spaces between words: here every character is a word. First and last code points.
UNSPACED = (
    (0x0E00, 0x109F),  # Thai, Lao, Tibetan, Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0xA4CF),  # Han, Kana, Bopomofo, Yi
    (0x20000, 0x3FFFF),  # Han
)


def fold(character: str) -> str:
    """The normal form of one character: letters and digits, and a space wherever a word ends; may be empty.

    Compatibility-decomposed (NFKD), case folded, decomposed again. Letters and digits (Unicode categories L and N)
    stay; marks and invisible format characters (M, Cf: accents, soft hyphen, zero-width space) vanish; everything
    else, white space and punctuation, is a space. A character of a script without spaces is a word of its own.
    Working on decomposed characters, one by one, gives composed and decomposed spellings the same normal form.
    """
    if category(character) in ("Cn", "Co", "Cs"):  # not assigned, private or half a character
        return " " if category(character) != "Cs" else ""
    result = ""
    for c in normalize("NFKD", normalize("NFKD", character).casefold()):
        kind = category(c)
        if kind[0] in "LN":
            result += f" {c} " if any(first <= ord(c) <= last for first, last in UNSPACED) else c
        elif kind[0] != "M" and kind != "Cf":
            result += " "
    return result


@cache
def characters() -> list[str]:
    """The normal form of every code point; `text.translate(characters())` is that of a text."""
    return [fold(chr(c)) for c in range(0x110000)]


def token_bytes(tokenizer: Any) -> list[bytes]:
    """For every id of the vocabulary the UTF-8 bytes that it stands for, parts of characters included.

    Special tokens, and ids without text, stand for one space: they separate words. So does the beginning of a
    WordPiece entry without its continuation prefix.

    Args:
        tokenizer: a Hugging Face fast tokenizer, or a `tokenizers.Tokenizer`.

    Raises:
        TypeError: not such a tokenizer.
        ValueError: a tokenizer whose entries do not say where words begin.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        raise TypeError(
            "bind needs a Hugging Face fast tokenizer (what AutoTokenizer.from_pretrained returns) or a "
            f"tokenizers.Tokenizer, got {type(tokenizer).__name__}"
        )
    described = json.loads(backend.to_str())
    model, added = described["model"], described["added_tokens"] or []
    vocabulary = backend.get_vocab(with_added_tokens=True)
    to_bytes = _reader(described)
    entries = [b" "] * (max(vocabulary.values(), default=-1) + 1)
    for token, i in vocabulary.items():
        entries[i] = to_bytes(token)
    for token in added:
        entries[token["id"]] = b" " if token["special"] else token["content"].replace("▁", " ").encode()
    unknown = vocabulary.get(model.get("unk_token"), model.get("unk_id"))
    for i in {unknown, *getattr(tokenizer, "all_special_ids", ())} - {None}:
        entries[i] = b" "
    return [entry or b" " for entry in entries]


def _reader(described: dict[str, Any]) -> Any:
    """From a tokenizer's JSON description the function that turns an entry into bytes."""
    model = described["model"]
    parts = [*_parts(described["normalizer"]), *_parts(described["pre_tokenizer"]), *_parts(described["decoder"])]
    kinds = {part["type"] for part in parts}
    prefix, suffix = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
    if "ByteLevel" in kinds:
        table = _byte_level()
        return lambda token: bytes(table[c] for c in token) if table.keys() >= set(token) else token.encode()
    if prefix or model["type"] == "WordPiece":
        return lambda token: token.removeprefix(prefix).encode() if token.startswith(prefix) else b" " + token.encode()
    if suffix:
        return lambda token: token.removesuffix(suffix).encode() + (b" " if token.endswith(suffix) else b"")
    spaces = {part.get("replacement", "▁") for part in parts if part["type"] == "Metaspace"}
    spaces |= {
        "▁" for part in parts if part["type"] == "Replace" and "▁" in (part["content"], *part["pattern"].values())
    }
    if not spaces:
        raise ValueError(
            f"the entries of this tokenizer ({model['type']}, pre-tokenizer {described['pre_tokenizer']}) do not say "
            'where words begin; "text" and "letters" read byte-level BPE, SentencePiece (Metaspace, byte fallback) and '
            'WordPiece; for others use strategy="hash"'
        )
    (space,) = spaces
    fallback = bool(model.get("byte_fallback")) or "ByteFallback" in kinds

    def read(token: str) -> bytes:
        if fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace(space, " ").encode()

    return read


def _parts(node: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The parts of a normalizer, pre-tokenizer or decoder, sequences unrolled."""
    if node is None:
        return []
    if node["type"] != "Sequence":
        return [node]
    inner = node.get("normalizers") or node.get("pretokenizers") or node.get("decoders") or []
    return [part for child in inner for part in _parts(child)]


@cache
def _byte_level() -> dict[str, int]:
    """The byte behind each character of a byte-level vocabulary: printable Latin-1 stands for itself, the rest of
    the 256 bytes, in order, for the characters from U+0100 on (Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
