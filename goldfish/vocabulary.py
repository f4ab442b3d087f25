"""The bytes of a tokenizer's entries, and the normal form of characters, for "letters"."""

import json
from collections.abc import Callable
from functools import cache, partial
from typing import Any
from unicodedata import category, normalize


def fold(character: str) -> str:
    """The normal form of one character: its letters and digits; may be empty.

    Compatibility-decomposed (NFKD), case folded, decomposed again; of that, letters and digits
    (Unicode categories L and N). So composed and decomposed spellings have the same normal form.

    >>> [fold(character) for character in ("É", "ß", "ﬁ", "½", " ", "-")]
    ['e', 'ss', 'fi', '12', '', '']
    """
    folded = normalize("NFKD", character).casefold()
    # Decomposed again: case folding composes some characters.
    decomposed = normalize("NFKD", folded)
    return "".join(c for c in decomposed if category(c)[0] in "LN")


@cache
def characters() -> list[str]:
    """The normal form of every code point; `text.translate(characters())` is that of a text."""
    return [fold(chr(c)) for c in range(0x110000)]


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The UTF-8 bytes of every id of the vocabulary; they may be parts of characters.

    Special tokens and ids without text are one space, which completes no character. A WordPiece
    entry without the continuation prefix begins with a space.

    Args:
        tokenizer: a Hugging Face fast tokenizer, or a `tokenizers.Tokenizer`.

    Raises:
        TypeError: not such a tokenizer.
        ValueError: a tokenizer whose entries do not show which bytes they stand for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        raise TypeError(
            "bind needs a Hugging Face fast tokenizer (what AutoTokenizer.from_pretrained returns) "
            f"or a tokenizers.Tokenizer, got {type(tokenizer).__name__}"
        )
    description = json.loads(backend.to_str())
    model = description["model"]
    vocabulary = backend.get_vocab(with_added_tokens=True)
    to_bytes = _reader(description)
    # Vocabularies have gaps: an id without an entry is a space, too.
    size = max(vocabulary.values(), default=-1) + 1
    entries = [b" "] * size
    for token, i in vocabulary.items():
        entries[i] = to_bytes(token) or b" "
    # Added tokens are matched in the text as they are, so they are not in the model's own code.
    for token in description["added_tokens"] or []:
        content = token["content"].replace("▁", " ").encode()
        entries[token["id"]] = b" " if token["special"] else content or b" "
    # Some tokens are special only to transformers, and the unknown one has no text of its own.
    unknown = vocabulary.get(model.get("unk_token"), model.get("unk_id"))
    special = {unknown, *getattr(tokenizer, "all_special_ids", ())}
    for i in special - {None}:
        entries[i] = b" "
    return entries


def _reader(description: dict[str, Any]) -> Callable[[str], bytes]:
    """The function that turns an entry into bytes, from a tokenizer's JSON description."""
    model = description["model"]
    parts = []
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        parts += _parts(description[name])
    kinds = {part["type"] for part in parts}
    prefix = model.get("continuing_subword_prefix")
    suffix = model.get("end_of_word_suffix")
    if "ByteLevel" in kinds:
        return _byte_level_reader()
    if prefix or model["type"] == "WordPiece":
        return partial(_read_wordpiece, prefix)
    if suffix:
        return partial(_read_with_suffix, suffix)
    space = _space_of(parts)
    if not space:
        raise ValueError(
            f"the entries of this tokenizer ({model['type']}, pre-tokenizer "
            f"{description['pre_tokenizer']}) do not show where words begin; supported are "
            "byte-level BPE, SentencePiece (Metaspace, byte fallback) and WordPiece; "
            'for others use strategy="hash" without secrets'
        )
    # An entry such as <0x0A> is that byte, if the model falls back to bytes.
    fallback = {}
    if model.get("byte_fallback") or "ByteFallback" in kinds:
        fallback = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}

    def read(token: str) -> bytes:
        """With the space "▁": "▁walk" is b" walk"."""
        return fallback.get(token) or token.replace(space, " ").encode()

    return read


def _byte_level_reader() -> Callable[[str], bytes]:
    r"""Byte-level BPE: each character of an entry stands for one byte.

    The printable bytes of Latin-1 stand for themselves, the 68 others have characters from U+0100
    on: "Ġ" is a space and "Ċ" a line feed, so "ĠcafÃ©" is b" caf\xc3\xa9", that is " café".
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # slow to import

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}

    def read(token: str) -> bytes:
        if not byte_of.keys() >= set(token):  # an added token
            return token.encode()
        return bytes(byte_of[character] for character in token)

    return read


def _read_wordpiece(prefix: str, token: str) -> bytes:
    """With the prefix "##": "##ing" is b"ing", "walk" is b" walk"."""
    if token.startswith(prefix):
        return token.removeprefix(prefix).encode()
    return b" " + token.encode()


def _read_with_suffix(suffix: str, token: str) -> bytes:
    """With the suffix "</w>": "ing</w>" is b"ing ", "walk" is b"walk"."""
    if token.endswith(suffix):
        return token.removesuffix(suffix).encode() + b" "
    return token.encode()


def _space_of(parts: list[dict[str, Any]]) -> str:
    """The character that stands for a space in SentencePiece's entries, or ""."""
    for part in parts:
        if part["type"] == "Metaspace":
            return str(part.get("replacement", "▁"))
        if part["type"] == "Replace":
            # Either way: " " by "▁" in a normalizer, "▁" by " " in a decoder.
            strings = [part["content"], *part["pattern"].values()]
            if "▁" in strings:
                return "▁"
    return ""


def _parts(node: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The parts of a normalizer, pre-tokenizer or decoder, with sequences flattened."""
    if node is None:
        return []
    if node["type"] != "Sequence":
        return [node]
    parts = []
    # A sequence has one of these lists, by what it is a sequence of.
    for name in ("normalizers", "pretokenizers", "decoders"):
        for child in node.get(name, ()):
            parts += _parts(child)
    return parts
