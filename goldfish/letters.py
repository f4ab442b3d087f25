"""Decisions that survive reformatting: for every token a hash of the letters before it.

Integers only. The context of a decision is letters and digits alone (`vocabulary.fold`), so spaces,
punctuation and line breaks never count: "don't", "dont" and a word hyphenated at the end of a line
leave all later decisions as they were.

A token adds the same letters wherever it stands, except for a leading part of a character, which
completes what earlier tokens began. So the letters of each vocabulary entry are hashed once, and
prefix sums combine these hashes over a batch. The hash of the letters c0, c1, ... is the sum of
mix(c[j]) * M**-(j + 1), as in `hashing.prefix_hashes`.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from goldfish import spec
from goldfish.hashing import INVERSE, MULTIPLIER, powers, previous, signed
from goldfish.vocabulary import characters

_CONTINUATION = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that begin no character
_COMPLETE = 1 << 24  # see `_tail`
_MOST_LETTERS = 0xFFFF  # of an entry


class Codes(NamedTuple):
    """The letters of a vocabulary as integers, int64.

    Each distinct string of letters is a form and has a number, its code; "" has 0.
    """

    # (V + 1,) the code of each id's letters; the last is for ids outside the vocabulary
    of_id: Tensor
    # (0x110001,) 0, then the code of each character; (1,) if no entry cuts a character
    of_character: Tensor
    # (V + 1,) the parts of characters that an entry begins and ends with, see `_parts`
    parts: Tensor
    # (C,) for each form, its number of letters, and where its hashes begin: first << 16 | letters
    outline: Tensor
    # (K,) for each form, the hashes of its first 0, 1, 2, ... all letters
    hash: Tensor
    # Powers of the multiplier M and of its inverse, enough for the longest form.
    up: Tensor
    down: Tensor


class Vocabulary:
    """The bytes of a tokenizer's entries; their codes, copied to each device once."""

    def __init__(self, entries: list[bytes]) -> None:
        self.entries = entries
        self._on: dict[torch.device, Codes] = {}

    def entries_of(self, ids: NDArray[np.int64]) -> list[bytes]:
        """The bytes of each id; one space for ids outside the vocabulary."""
        entries = []
        for i in ids.tolist():
            known = 0 <= i < len(self.entries)
            entries.append(self.entries[i] if known else b" ")
        return entries

    def on(self, device: torch.device) -> Codes:
        """The codes on a device. Made when they are needed: secrets= reads the bytes only."""
        cpu = torch.device("cpu")
        if cpu not in self._on:
            self._on[cpu] = encode(self.entries)
        if device not in self._on:
            copies = [table.to(device) for table in self._on[cpu]]
            self._on[device] = Codes(*copies)
        return self._on[device]


def encode(entries: list[bytes]) -> Codes:
    """The codes of a vocabulary, given the bytes of each id (`vocabulary.token_bytes`)."""
    entries = [*entries, b" "]
    code = {"": 0}
    of_id = []
    for entry in entries:
        form = entry.decode("utf-8", "ignore").translate(characters())
        of_id.append(code.setdefault(form, len(code)))
    of_character = [0]
    # Byte-level vocabularies cut characters, others do not, and do without the large table.
    if any(_tail(entry) for entry in entries):
        for form in characters():
            of_character.append(code.setdefault(form, len(code)))

    # For the forms "", "ab" and "c": hashes [0, 0, h(a), h(ab), 0, h(c)], and outlines with
    # (first, letters) of (0, 0), (1, 2) and (4, 1).
    outlines: list[int] = []
    hashes: list[int] = []
    longest = max(map(len, code))
    if longest > _MOST_LETTERS:
        raise ValueError(
            f"an entry of the vocabulary has {longest} letters and digits; "
            f"at most {_MOST_LETTERS} fit"
        )
    cpu = torch.device("cpu")
    down = powers(INVERSE, longest + 1, cpu)
    inverse_powers = down.tolist()
    for form in code:
        outlines.append(len(hashes) << 16 | len(form))
        state = 0
        hashes.append(state)
        for position, letter in enumerate(form, 1):
            term = spec.mix(ord(letter)) * inverse_powers[position]
            state = signed(state + term)
            hashes.append(state)
    return Codes(
        of_id=_table(of_id),
        of_character=_table(of_character),
        parts=_table([_parts(entry) for entry in entries]),
        outline=_table(outlines),
        hash=_table(hashes),
        up=powers(MULTIPLIER, longest + 1, cpu),
        down=down,
    )


def _table(column: list[int]) -> Tensor:
    return torch.tensor(column, dtype=torch.int64)


def contexts(
    codes: Codes, ids: Tensor, document_start: Tensor, letters: int
) -> tuple[Tensor, Tensor]:
    """The last `letters` letters before every token in its document: their hash and number.

    For three tokens "Hel", "lo W" and "orld", whose letters are hel, low and orld, the token "orld"
    has the context h e l l o w; with letters=4, it is l l o w, which begins inside the first token.

    Args:
        ids: int64 (B, T).
        document_start: int64 (B, T), the column at which a token's document starts.

    Returns:
        int64 (B, T) each: the polynomial hash, and the number of letters.
    """
    last = codes.of_id.shape[0] - 1
    unknown = (ids < 0) | (ids > last)
    ids = torch.where(unknown, last, ids)
    column = torch.arange(ids.shape[-1], device=ids.device)
    starts = document_start == column
    # Every token is two pieces: the character that it completes, and the rest of its letters.
    completed = _completed(codes, ids, starts)
    own = _look_up(codes.of_id, ids)
    pieces = torch.stack((completed, own), -1).flatten(-2)
    outline = _look_up(codes.outline, pieces)
    length = outline & 0xFFFF
    first = outline >> 16

    # For every piece: its place in letters, M**place, M**-place, and the hash of all letters of the
    # row before it. Powers are products over pieces, because a row may have more letters than the
    # longest form. For "Hel", "lo W", "orld" (each after an empty piece, as no character is cut):
    #     piece    ""  Hel  ""  lo W  ""  orld
    #     length    0    3   0     3   0     4
    #     place     0    0   3     3   6     6
    step = previous(length)
    place = step.cumsum(-1)
    scale = _look_up(codes.up, step).cumprod(-1)
    weight = _look_up(codes.down, step).cumprod(-1)
    whole_hash = _look_up(codes.hash, first + length)
    before = previous(whole_hash * weight).cumsum(-1)

    # A context ends where its token begins: at the first of the token's two pieces.
    end = place[..., ::2]
    end_hash = before[..., ::2]
    power = scale[..., ::2]
    document_begin = place.gather(-1, 2 * document_start)
    begin = torch.maximum(end - letters, document_begin)
    # It begins at some letter, in some piece, after `within` letters of that piece: for "orld" with
    # letters=4 at letter 6 - 4 = 2, which is in the piece "Hel" after 2 of its letters.
    piece = torch.searchsorted(place, begin, right=True) - 1
    within = begin - place.gather(-1, piece)
    first_letters = first.gather(-1, piece) + within
    inside = _look_up(codes.hash, first_letters) * weight.gather(-1, piece)
    begin_hash = before.gather(-1, piece) + inside
    return (end_hash - begin_hash) * power, end - begin


def _completed(codes: Codes, ids: Tensor, starts: Tensor) -> Tensor:
    """The code of the character whose last byte is among a token's leading bytes, or 0.

    For example U+20AC, "€", is e2 82 ac. Cut as [.. e2] [82] [ac ..], the first token's tail is
    what e2 begins, the second token is inside and passes it on with 82, the third completes it.
    A character has at most four bytes, so at most two tokens lie between its first and its last.
    """
    parts = _look_up(codes.parts, ids)
    tail = parts >> 38
    payload = (parts >> 19) & 0x3FFFF
    shift = parts & 0x7FFFF
    inside = ((parts & _INSIDE) != 0) & ~starts
    # What is pending after each token: its own tail, or what it passes on.
    pending = tail
    for _ in range(2):
        earlier = previous(pending)
        # The bits so far, moved on, and the new ones.
        longer = earlier * shift + payload
        passed_on = inside & (earlier != 0) & (longer < _COMPLETE)
        pending = tail + passed_on * longer
    earlier = previous(pending)
    value = earlier * shift + payload
    # An entry may have more continuation bytes than are missing: those mean nothing.
    for _ in range(2):
        too_long = value >= _COMPLETE << 6
        value = torch.where(too_long, value >> 6, value)
    character = value & 0x1FFFFF
    # A code point in more bytes than it needs is no character: bit 25 is set for three bytes, which
    # begin at U+0800, and bit 26 for four, which begin at U+10000.
    least = (value >= 1 << 25) * 0x800
    least = least + (value >= 1 << 26) * (0x10000 - 0x800)
    in_range = (character >= least) & (character < 0x110000)
    complete = (earlier != 0) & (value >= _COMPLETE)
    valid = complete & in_range & ~starts
    # Row 0 of the table is "no character".
    return _look_up(codes.of_character, (character + 1) * valid)


def _look_up(table: Tensor, indices: Tensor) -> Tensor:
    """table[indices], three times as fast on CPU."""
    return table.index_select(0, indices.reshape(-1)).view(indices.shape)


# What an entry begins and ends with, packed into one integer (`_parts`):
#
#     bits 38 and up   19..36      37              0..18
#     tail             payload     inside          shift
#
# The continuation bytes that it begins with (at most 3 count) are n groups of 6 bits, 10xxxxxx:
# `payload` is these 6n bits and `shift` is 64**n, so that earlier * shift + payload appends them.
# `inside` is set if the entry has nothing but continuation bytes. For the entry 82 ac: payload
# 000010_101100, shift 64**2, inside 1, tail 0. For "a" + e2: payload 0, shift 1, inside 0.
_INSIDE = 1 << 37


def _parts(entry: bytes) -> int:
    rest = entry.lstrip(_CONTINUATION)
    leading = len(entry) - len(rest)
    payload = 0
    shift = 1
    for byte in entry[: min(leading, 3)]:
        payload = payload << 6 | byte & 63
        shift <<= 6
    inside = 0 if rest else _INSIDE
    return _tail(entry) << 38 | inside | payload << 19 | shift


def _tail(entry: bytes) -> int:
    """The unfinished character at an entry's end, or 0.

    Its bits so far, with a marker bit in front. Each missing byte will move them by 6 bits; the
    marker is placed so that it arrives at bit 24, 25 or 26 (for characters of two, three or four
    bytes) when none is missing: a value of _COMPLETE or more is complete. For e2, which begins a
    character of three bytes: 0010 with the marker at bit 25 - 12 = 13. After 82 and ac it is
    0010_000010_101100 = 0x20ac with the marker at bit 25.
    """
    # The last byte that is no continuation leads the character: at most three may follow it.
    begun = entry.rstrip(_CONTINUATION)
    if not begun:
        return 0
    lead = begun[-1]
    following = entry[len(begun) :]
    size = 2 + (lead >= 0xE0) + (lead >= 0xF0)
    # c0, c1 and f5 to ff lead no character; ASCII is one already.
    is_lead = 0xC2 <= lead <= 0xF4
    if not is_lead or len(following) + 1 >= size:
        return 0
    marker = 1 << (22 + size - 6 * (size - 1))
    value = marker | lead & (0x7F >> size)
    for byte in following:
        value = value << 6 | byte & 63
    return value
