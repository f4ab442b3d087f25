"""Near-duplicate-proof decisions: for every token a key of the last h words before its word. Integers only, O(N).

A token's text appends to its document's normal form (`vocabulary.fold`): letters and digits, in words that each end
in one space. What a token appends is the same wherever it stands, but for two things that earlier tokens decide:
whether a leading separator has a word to end, and which character a leading part of a character completes. So per
vocabulary entry its normal form is hashed once, and per batch the hashes are put together with prefix sums.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from goldfish import spec
from goldfish.hashing import INVERSE, MULTIPLIER, mix, powers, signed
from goldfish.vocabulary import characters, fold

_MIXED = [spec.mix(byte) for byte in range(256)]
_SPACE = signed(_MIXED[0x20])
_NOTHING, _SEPARATOR = 0, 1  # the codes of no text and of a space


class Codes(NamedTuple):
    """The normal forms of a vocabulary as integers. Each distinct form has one code c, an index of `form`.

    The form's cuts are the places where it ends a word: the first cut is its beginning, the others follow the spaces
    inside and at its end. All int64.
    """

    of_id: Tensor  # (V + 1,) the code of each id's text; the last is a space, for ids outside the vocabulary
    hash: Tensor  # (C,) the polynomial hash of what a form appends, a leading space not counted
    form: Tensor  # (C,) five numbers in one, see `_pack`
    cut_hash: Tensor  # (K,) the hash of what a form appends up to its cut
    cut_length: Tensor  # (K,) and its length in bytes
    of_character: Tensor  # (0x110001,) the code of each character, or (0,) where no entry holds part of a character
    head: Tensor  # (V + 1,) the continuation bytes that an entry begins with, at most three, see `_head`
    tail: Tensor  # (V + 1,) the beginning of a character that it ends in, see `_tail`
    forward: Tensor  # powers of the multiplier,
    backward: Tensor  # and of its inverse, enough for the longest form and a space

    def to(self, device: torch.device) -> "Codes":
        return Codes(*(tensor.to(device) for tensor in self))


class Vocabulary:
    """The codes of a vocabulary, moved to each device once; of a rule that is bound to a tokenizer."""

    def __init__(self, entries: list[bytes]) -> None:
        self._on = {torch.device("cpu"): encode(entries)}

    def on(self, device: torch.device) -> Codes:
        if device not in self._on:
            self._on[device] = self._on[torch.device("cpu")].to(device)
        return self._on[device]


def encode(entries: list[bytes]) -> Codes:
    """The codes of a vocabulary, given the bytes of each id (`vocabulary.token_bytes`)."""
    entries = [*entries, b" "]
    heads, tails = [_head(entry) for entry in entries], [_tail(entry) for entry in entries]
    index = {"": _NOTHING, " ": _SEPARATOR}

    def number(form: str) -> int:
        return index.setdefault(form, len(index))

    of_id = [number("".join(map(fold, entry.decode("utf-8", "ignore")))) for entry in entries]
    of_character = [number(form) for form in (*characters(), "")] if any(tails) else []
    hashes, packed, cut_hashes, cut_lengths = [], [], [0], [0]
    for form in index:
        words = form.split(" ")
        ended, unfinished = [f"{word} ".encode() for word in words[:-1] if word], words[-1].encode()
        state, length, first_cut = 0, 0, len(cut_hashes) if ended else 0
        if ended:
            cut_hashes.append(0)
            cut_lengths.append(0)
        for word in ended:
            state, length = _extend(state, word), length + len(word)
            cut_hashes.append(state)
            cut_lengths.append(length)
        hashes.append(_extend(state, unfinished))
        packed.append(_pack(form, first_cut, len(ended), length + len(unfinished)))
    longest = max(number & 0xFFFF for number in packed) + 2
    cpu = torch.device("cpu")
    return Codes(
        *map(_tensor, (of_id, hashes, packed, cut_hashes, cut_lengths, of_character, heads, tails)),
        powers(MULTIPLIER, longest, cpu),
        powers(INVERSE, longest, cpu),
    )


def contexts(codes: Codes, ids: Tensor, document_start: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """The context of every token's word: the h words before it in its document, or those there are.

    Args:
        ids: int64 (B, T). document_start: for every token the column at which its document starts, int64 (B, T).

    Returns:
        The polynomial hash of the context plus its length in bytes, and its length in words; int64 (B, T).
    """
    known = (ids >= 0) & (ids < codes.of_id.shape[0] - 1)
    ids = torch.where(known, ids, codes.of_id.shape[0] - 1)
    starts = document_start == torch.arange(ids.shape[-1], device=ids.device)
    pieces = codes.of_id[ids]
    if codes.of_character.shape[0]:  # two pieces a token: the character that it completes, then the rest of its text
        pieces = torch.stack((_completed(codes, ids, starts), pieces), -1).flatten(-2)
        starts = torch.stack((starts, torch.zeros_like(starts)), -1).flatten(-2)
    form = codes.form[pieces]
    length, cuts, first_cut = form & 0xFFFF, (form >> 16) & 0xFFFF, form >> 35
    says = ((form >> 32) & 1 != 0) | starts
    leads = ((form >> 33) & 1 != 0) | starts  # a document's start ends the word before it, like a separator

    # Is a word open where a piece begins? The last piece before it that says anything knows.
    column = torch.arange(pieces.shape[-1], device=ids.device)
    is_open = torch.where(says, 2 * column + ((form >> 34) & 1), 0).cummax(-1).values & 1
    ends = (leads & (pad(is_open[..., :-1], (1, 0)) != 0)).long()  # 1 where a piece ends it, by one more space

    # Prefix sums over the pieces. A piece appends (a space and) its form; its own hash counts at its end.
    words, bytes_, down, up = cuts + ends, length + ends, codes.backward, codes.forward
    inverse = down[bytes_].cumprod(-1)
    text = codes.hash[pieces] + ends * _SPACE * up[length]
    prefix = pad((text * inverse).cumsum(-1), (1, 0))
    words_after, bytes_before = words.cumsum(-1), bytes_.cumsum(-1) - bytes_
    words_before = words_after - words
    scale_before = pad(up[bytes_].cumprod(-1)[..., :-1], (1, 0), value=1)
    inverse_before = pad(inverse[..., :-1], (1, 0), value=1)

    def cut(number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where the document's word of that number begins: prefix hash, position in bytes, multiplier ** position."""
        piece = torch.searchsorted(words_after, number)
        end = ends.gather(-1, piece)
        within = first_cut.gather(-1, piece) + (number - words_before.gather(-1, piece) - end).clamp(min=0)
        size = codes.cut_length[within]
        state = codes.cut_hash[within] + end * _SPACE * up[size]
        size = size + end
        state = prefix.gather(-1, piece) + state * inverse_before.gather(-1, piece) * down[size]
        return state, bytes_before.gather(-1, piece) + size, scale_before.gather(-1, piece) * up[size]

    word = words_before + ends
    if codes.of_character.shape[0]:
        word, says = word.unflatten(-1, (-1, 2)), says.unflatten(-1, (-1, 2))
        word = torch.where(says[..., 0], word[..., 0], word[..., 1])
    count = (word - word.gather(-1, document_start)).clamp(max=h)
    end_state, end, scale = cut(word)
    begin_state, begin, _ = cut(word - count)
    return (end_state - begin_state) * scale + (end - begin), count


def _completed(codes: Codes, ids: Tensor, starts: Tensor) -> Tensor:
    """The code of the character whose last byte stands at a token's beginning, `_NOTHING` where there is none.

    A character has at most four bytes, so at most two tokens lie between its first and its last.
    """
    head, tail = codes.head[ids], codes.tail[ids]
    count, inside = head & 3, (head >> 2) & 1 != 0

    def before(pending: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pending = torch.where(starts, 0, pad(pending[..., :-1], (1, 0)))
        return pending >> 24, (pending >> 22) & 3, pending & 0x3FFFFF

    pending = tail
    for _ in range(2):
        missing, kind, value = before(pending)
        value = (value << (6 * count)) | (head >> (21 - 6 * count))
        longer = ((missing - count) << 24) | (kind << 22) | value
        pending = torch.where(inside & (missing > count), longer, tail)
    missing, kind, value = before(pending)
    value = (value << (6 * missing)) | (head >> (21 - 6 * missing))
    valid = (missing > 0) & (missing <= count) & (value >= (0x40 << (5 * kind)))  # no longer than it need be
    return torch.where(valid, codes.of_character[value.clamp(max=0x110000)], _NOTHING)


def _head(entry: bytes) -> int:
    """The payloads of up to three leading continuation bytes, 6 bits each from bit 20 down; bit 2: there is nothing
    else in the entry; bits 0 and 1: how many there are."""
    rest = entry.lstrip(bytes(range(0x80, 0xC0)))
    first = entry[: len(entry) - len(rest)][:3]
    return sum((byte & 63) << shift for byte, shift in zip(first, (15, 9, 3), strict=False)) | (not rest) << 2 | len(first)


def _tail(entry: bytes) -> int:
    """The unfinished character at an entry's end: bits 24 and up: how many bytes are missing; 22 and 23: the
    character's length in bytes, less two; below: the payload so far. 0 where there is none."""
    for start in range(len(entry) - 1, max(len(entry) - 4, -1), -1):
        lead = entry[start]
        if 0xC2 <= lead <= 0xF4:
            length = 2 + (lead >= 0xE0) + (lead >= 0xF0)
            value = lead & (0x7F >> length)
            for byte in entry[start + 1 :]:
                value = value << 6 | byte & 63
            missing = length - (len(entry) - start)
            return missing << 24 | length - 2 << 22 | value if missing > 0 else 0
        if not 0x80 <= lead < 0xC0:
            return 0
    return 0


def _pack(form: str, first_cut: int, cuts: int, length: int) -> int:
    """A form in one integer; from the lowest bit: its length in bytes (16), the words that it ends (16), whether it
    says anything (1), begins with a space (1), ends inside a word (1), and the place of its first cut."""
    says, leads, is_open = bool(form), form[:1] == " ", form[-1:] not in ("", " ")
    return first_cut << 35 | is_open << 34 | leads << 33 | says << 32 | cuts << 16 | length


def _extend(state: int, text: bytes) -> int:
    for byte in text:
        state = (state * spec.MULTIPLIER + _MIXED[byte]) & spec.WORD
    return state


def _tensor(numbers: Iterable[int]) -> Tensor:
    return torch.tensor([signed(number) for number in numbers], dtype=torch.int64)
