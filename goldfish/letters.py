"""Decisions that survive reformatting: for every token a key of the letters before it. Integers only.

A document's normal form (`vocabulary.fold`) is its letters and digits, in words; the context of a decision is letters
alone. A token adds the same letters wherever it stands, except for a leading part of a character, which completes what
earlier tokens began. So the letters of each vocabulary entry are hashed once, and prefix sums combine these hashes over
a batch. The hash of letters c0, c1, ... is the sum of mix(c[j]) * M**-(j + 1), as in `hashing.prefix_hashes`.

Consequences:
- Spaces, punctuation and line breaks never count, in code too: "don't", "dont" and a word hyphenated at the end of a
  line leave all later decisions as they were.
- Strategy "text" decides whole words. Punctuation separates words: "don't" is two. In scripts without spaces every
  character is a word. A token of several words takes the decision of its first.
- A character that is cut by tokens counts for the token that completes it.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from goldfish import spec
from goldfish.hashing import INVERSE, MULTIPLIER, powers, signed
from goldfish.vocabulary import characters

_CONTINUATION = bytes(range(0x80, 0xC0))
_COMPLETE = 1 << 24  # see `_tail`
_INSIDE = 1 << 37  # see `_parts`
_SAYS, _LEADS, _OPEN = 1 << 32, 1 << 33, 1 << 34  # see `_outline`


class Codes(NamedTuple):
    """The normal forms of a vocabulary as integers, int64. Each distinct form has a number, its code; "" has 0."""

    of_id: Tensor  # (V + 1,) the code of each id's text; the last is a space, for ids outside the vocabulary
    of_character: Tensor  # (0x110001,) 0, then the code of each character; (1,) where no entry cuts a character
    parts: (
        Tensor  # (V + 1,) the parts of characters that an entry begins and ends with, see `_parts`
    )
    outline: Tensor  # (C,) six small numbers about each form, see `_outline`
    hash: Tensor  # (K,) of each form the hashes of its first 0, 1, 2, ... all letters
    up: Tensor  # powers of the multiplier M
    down: Tensor  # and of its inverse, enough for the longest form


class Vocabulary:
    """The codes of a tokenizer's vocabulary, copied to each device once."""

    def __init__(self, entries: list[bytes]) -> None:
        self._on = {torch.device("cpu"): encode(entries)}

    def on(self, device: torch.device) -> Codes:
        if device not in self._on:
            self._on[device] = Codes(*(table.to(device) for table in self._on[torch.device("cpu")]))
        return self._on[device]


def encode(entries: list[bytes]) -> Codes:
    """The codes of a vocabulary, given the bytes of each id (`vocabulary.token_bytes`)."""
    entries = [*entries, b" "]
    code = {"": 0}
    of_id = [
        code.setdefault(e.decode("utf-8", "ignore").translate(characters()), len(code))
        for e in entries
    ]
    cut = any(map(_tail, entries))
    of_character = [
        code.setdefault(form, len(code)) for form in ("", *(characters() if cut else ()))
    ]
    outlines: list[int] = []
    hashes: list[int] = []
    inverse_powers = [1]
    for form in code:
        outlines.append(_outline(form, len(hashes)))
        state = 0
        hashes.append(state)
        for position, letter in enumerate(form.replace(" ", ""), 1):
            if position == len(inverse_powers):
                inverse_powers.append((inverse_powers[-1] * INVERSE) & spec.WORD)
            state = (state + spec.mix(ord(letter)) * inverse_powers[position]) & spec.WORD
            hashes.append(state)
    columns = (of_id, of_character, list(map(_parts, entries)), outlines, list(map(signed, hashes)))
    tables = (torch.tensor(column, dtype=torch.int64) for column in columns)
    return Codes(
        *tables,
        *(powers(base, len(inverse_powers), torch.device("cpu")) for base in (MULTIPLIER, INVERSE)),
    )


def contexts(
    codes: Codes, ids: Tensor, document_start: Tensor, letters: int, whole_words: bool
) -> tuple[Tensor, Tensor]:
    """Of the context of every token, the last `letters` letters before it (or before its word) in its document, the
    polynomial hash and the length. All int64 (B, T); document_start: the column at which a token's document starts.
    """
    last = codes.of_id.shape[0] - 1
    ids = torch.where((ids < 0) | (ids > last), last, ids)
    starts = document_start == torch.arange(ids.shape[-1], device=ids.device)
    # Every token is two pieces: the character that it completes, and the rest of its text.
    pieces = torch.stack((_completed(codes, ids, starts), _look_up(codes.of_id, ids)), -1).flatten(
        -2
    )
    outline = _look_up(codes.outline, pieces)
    length, first = outline & 0xFFFF, outline >> 35

    # Of every piece: its place in letters, M**place, M**-place, and the hash of all letters before it.
    step = pad(length[..., :-1], (1, 0))
    place, scale, weight = (
        step.cumsum(-1),
        _look_up(codes.up, step).cumprod(-1),
        _look_up(codes.down, step).cumprod(-1),
    )
    before = pad((_look_up(codes.hash, first + length) * weight)[..., :-1], (1, 0)).cumsum(-1)

    def hash_before(letter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The hash of all letters of the row before some letter; the piece that holds it, and its place there."""
        piece = torch.searchsorted(place, letter, right=True) - 1
        within = letter - place.gather(-1, piece)
        inside = _look_up(codes.hash, first.gather(-1, piece) + within)
        return before.gather(-1, piece) + inside * weight.gather(-1, piece), piece, within

    end, end_hash, power = (
        place[..., ::2],
        before[..., ::2],
        scale[..., ::2],
    )  # where every token begins
    if whole_words:
        end = _word_starts(outline, place, starts)
        end_hash, piece, within = hash_before(end)
        power = scale.gather(-1, piece) * _look_up(codes.up, within)
    begin = torch.maximum(end - letters, place.gather(-1, 2 * document_start))
    return (end_hash - hash_before(begin)[0]) * power, end - begin


def _word_starts(outline: Tensor, place: Tensor, starts: Tensor) -> Tensor:
    """At which letter of the row the word begins that a token begins with or continues."""
    column = torch.arange(outline.shape[-1], device=outline.device)
    starts = torch.stack((starts, torch.zeros_like(starts)), -1).flatten(-2)
    says = ((outline & _SAYS) != 0) | starts
    leads = (
        (outline & _LEADS) != 0
    ) | starts  # a document's start ends the word before it, like a separator
    # Is a word open where a piece begins? The last piece before it with any text knows.
    is_open = (says * (2 * column + ((outline & _OPEN) != 0))).cummax(-1).values & 1
    anew = leads | (pad(is_open[..., :-1], (1, 0)) == 0)
    within = (outline >> 16) & 0xFFFF
    begins = (within > 0) | (anew & ((outline & 0xFFFF) > 0))
    last = (
        (begins * (place + within)).cummax(-1).values
    )  # where the last word begins, up to a piece
    own = column[::2] + ~says[..., ::2]  # the piece that a token begins with
    return torch.where(anew, place, pad(last[..., :-1], (1, 0))).gather(-1, own)


def _completed(codes: Codes, ids: Tensor, starts: Tensor) -> Tensor:
    """The code of the character whose last byte is among a token's leading continuation bytes, or 0.

    A character has at most four bytes, so at most two tokens lie between its first token and its last.
    """
    parts = _look_up(codes.parts, ids)
    tail, payload, shift = parts >> 38, (parts >> 19) & 0x3FFFF, parts & 0x7FFFF
    inside = ((parts & _INSIDE) != 0) & ~starts
    pending = tail
    for _ in range(2):
        earlier = pad(pending[..., :-1], (1, 0))
        longer = earlier * shift + payload
        pending = tail + (inside & (earlier != 0) & (longer < _COMPLETE)) * longer
    earlier = pad(pending[..., :-1], (1, 0))
    value = earlier * shift + payload
    for _ in range(
        2
    ):  # an entry with more continuation bytes than are missing: the others mean nothing
        value = torch.where(value < _COMPLETE << 6, value, value >> 6)
    character = value & 0x1FFFFF
    least = (value >= 1 << 25) * 0x800 + (
        value >= 1 << 26
    ) * 0xF800  # in more bytes than it needs it is no character
    valid = (
        (earlier != 0)
        & (value >= _COMPLETE)
        & (character >= least)
        & (character < 0x110000)
        & ~starts
    )
    return _look_up(codes.of_character, (character + 1) * valid)


def _look_up(table: Tensor, indices: Tensor) -> Tensor:
    """table[indices], three times as fast on CPU."""
    return table.index_select(0, indices.reshape(-1)).view(indices.shape)


def _parts(entry: bytes) -> int:
    """In one integer: 64**n and, from bit 19, the payload of the entry's n <= 3 leading continuation bytes; bit 37:
    whether it has nothing but such bytes; from bit 38 its `_tail`."""
    rest, payload = entry.lstrip(_CONTINUATION), 0
    leading = entry[: len(entry) - len(rest)][:3]
    for byte in leading:
        payload = payload << 6 | byte & 63
    return _tail(entry) << 38 | (not rest) << 37 | payload << 19 | 1 << 6 * len(leading)


def _tail(entry: bytes) -> int:
    """The unfinished character at an entry's end, or 0: the payload so far, and before it a bit that arrives at bit
    24, 25 or 26 (a character of two, three or four bytes) when the missing bytes have pushed it on by 6 bits each."""
    for start in range(len(entry) - 1, max(len(entry) - 4, -1), -1):
        lead = entry[start]
        if lead not in _CONTINUATION:
            size = 2 + (lead >= 0xE0) + (lead >= 0xF0)
            if not (0xC2 <= lead <= 0xF4 and len(entry) - start < size):
                return 0
            value = 1 << (22 + size - 6 * (size - 1)) | lead & (0x7F >> size)
            for byte in entry[start + 1 :]:
                value = value << 6 | byte & 63
            return value
    return 0


def _outline(form: str, first: int) -> int:
    """In one integer, from the lowest bit: the letters of a form (16 bits), those before its last word where that
    does not begin the form (16), whether the form is not empty (1), begins with a space (1), ends inside a word (1),
    and the place of its first hash."""
    letters = len(form.replace(" ", ""))
    if letters > 0xFFFF:
        raise ValueError(
            f"an entry of the vocabulary has {letters} letters and digits; at most 65535 fit"
        )
    *earlier, _ = form.rstrip(" ").split(" ")
    before_last_word = len("".join(earlier))
    is_open = form[-1:] not in ("", " ")
    return (
        first << 35
        | is_open << 34
        | form.startswith(" ") << 33
        | (form != "") << 32
        | before_last_word << 16
        | letters
    )
