"""The bytes of a tokenizer's entries, and the normal form of characters; for strategies "letters" and "text"."""

import json
from functools import cache
from typing import Any
from unicodedata import category, normalize

# Scripts without spaces between words, where every character is a word: first and last code points.
UNSPACED = (
    (0x0E00, 0x109F),  # Thai, Lao, Tibetan, Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0xA4CF),  # Han, Kana, Bopomofo, Yi
    (0x20000, 0x3FFFF),  # Han
)


def fold(character: str) -> str:
    """The normal form of one character: letters and digits, and a space wherever a word ends; may be empty.

    Compatibility-decomposed (NFKD), case folded, decomposed again. Letters and digits (Unicode categories L and N)
    stay; marks and format characters (M, Cf: accents, soft hyphen, zero-width space) are removed; everything else,
    such as white space and punctuation, is a space. A character of a script without spaces is a word of its own.
    Decomposing gives composed and decomposed spellings the same normal form.
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
    """The UTF-8 bytes of every id of the vocabulary; they may be parts of characters.

    Special tokens and ids without text are one space: they separate words. A WordPiece entry without the continuation
    prefix begins with one.

    Args:
        tokenizer: a Hugging Face fast tokenizer, or a `tokenizers.Tokenizer`.

    Raises:
        TypeError: not such a tokenizer.
        ValueError: a tokenizer whose entries do not show where words begin.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        raise TypeError(
            "bind needs a Hugging Face fast tokenizer (what AutoTokenizer.from_pretrained returns) or a "
            f"tokenizers.Tokenizer, got {type(tokenizer).__name__}"
        )
    description = json.loads(backend.to_str())
    model, added = description["model"], description["added_tokens"] or []
    vocabulary = backend.get_vocab(with_added_tokens=True)
    to_bytes = _reader(description)
    entries = [b" "] * (max(vocabulary.values(), default=-1) + 1)
    for token, i in vocabulary.items():
        entries[i] = to_bytes(token)
    for token in added:
        entries[token["id"]] = (
            b" " if token["special"] else token["content"].replace("▁", " ").encode()
        )
    unknown = vocabulary.get(model.get("unk_token"), model.get("unk_id"))
    for i in {unknown, *getattr(tokenizer, "all_special_ids", ())} - {None}:
        entries[i] = b" "
    return [entry or b" " for entry in entries]


def _reader(description: dict[str, Any]) -> Any:
    """The function that turns an entry into bytes, from a tokenizer's JSON description."""
    model = description["model"]
    parts = [
        *_parts(description["normalizer"]),
        *_parts(description["pre_tokenizer"]),
        *_parts(description["decoder"]),
    ]
    kinds = {part["type"] for part in parts}
    prefix, suffix = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
    if "ByteLevel" in kinds:
        from transformers.convert_slow_tokenizer import bytes_to_unicode  # slow to import

        table = {character: byte for byte, character in bytes_to_unicode().items()}
        return lambda token: (
            bytes(table[c] for c in token) if table.keys() >= set(token) else token.encode()
        )
    if prefix or model["type"] == "WordPiece":
        return lambda token: (
            token.removeprefix(prefix).encode()
            if token.startswith(prefix)
            else b" " + token.encode()
        )
    if suffix:
        return lambda token: (
            token.removesuffix(suffix).encode() + (b" " if token.endswith(suffix) else b"")
        )
    spaces = {part.get("replacement", "▁") for part in parts if part["type"] == "Metaspace"}
    replaced = [
        (part["content"], *part["pattern"].values()) for part in parts if part["type"] == "Replace"
    ]
    spaces |= {"▁" for strings in replaced if "▁" in strings}
    if not spaces:
        raise ValueError(
            f"the entries of this tokenizer ({model['type']}, pre-tokenizer {description['pre_tokenizer']}) do not say "
            'where words begin; "letters" and "text" read byte-level BPE, SentencePiece (Metaspace, byte fallback) and '
            'WordPiece; for others use strategy="hash"'
        )
    (space,) = spaces
    fallback = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
    if not (model.get("byte_fallback") or "ByteFallback" in kinds):
        fallback = {}
    return lambda token: fallback.get(token) or token.replace(space, " ").encode()


def _parts(node: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The parts of a normalizer, pre-tokenizer or decoder, with sequences flattened."""
    if node is None:
        return []
    if node["type"] != "Sequence":
        return [node]
    inner = node.get("normalizers") or node.get("pretokenizers") or node.get("decoders") or []
    return [part for child in inner for part in _parts(child)]
