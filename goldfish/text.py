"""Near-duplicate-proof decisions: for every token a key of the letters before it, or before its word. Integers only.

A document's normal form (`vocabulary.fold`) is letters and digits, in words; its context is letters alone. What a token
adds to the letters is the same wherever the token stands, but for a leading part of a character, which completes what
earlier tokens began. So the letters of each vocabulary entry are hashed once, and prefix sums put the hashes of a batch
together. The hash of letters c0, c1, ... is here the sum of mix(c[j]) * M**-(j + 1), what `hashing.prefix_hashes` sums
up, and a hash at position p weighs M**-p.

What follows from deciding by letters, and from a token having one decision:
- Spaces, punctuation and line breaks never count, in code too: "don't" and "dont" and a word that is broken with a
  hyphen at a line's end leave all that follows as it was.
- "text" knows where words begin. Punctuation separates words: "don't" is two. In scripts without spaces every character
  is one. A token of several words takes the decision of its first.
- A token with a part of a character is decided with that character.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from goldfish import spec
from goldfish.hashing import INVERSE, MULTIPLIER, powers, signed
from goldfish.vocabulary import characters

_COMPLETE = 1 << 24  # see `_tail`
_INSIDE = 1 << 37  # see `_parts`
_SAYS, _LEADS, _OPEN = 1 << 32, 1 << 33, 1 << 34  # see `_outline`


class Codes(NamedTuple):
    """The normal forms of a vocabulary as integers, int64. Each distinct form has a number, its code; "" has 0."""

    of_id: Tensor  # (V + 1,) the code of each id's text; the last is a space, for ids outside the vocabulary
    of_character: (
        Tensor  # (0x110001,) 0, then the code of each character; (0,) where no entry ends in part of a character
    )
    parts: Tensor  # (V + 1,) the parts of characters that an entry begins and ends with, see `_parts`
    outline: Tensor  # (C,) six small numbers about each form, see `_outline`
    hash: Tensor  # (K,) of each form the hashes of its first 0, 1, 2, ... all letters
    up: Tensor  # powers of the multiplier M
    down: Tensor  # and of its inverse, enough for the longest form
    two_pieces: bool  # whether an entry that begins with part of a character has more to say

    def to(self, device: torch.device) -> "Codes":
        moved: dict[str, Any] = {n: x.to(device) for n, x in self._asdict().items() if isinstance(x, Tensor)}
        return self._replace(**moved)


class Vocabulary:
    """The codes of a tokenizer's vocabulary, moved to each device once."""

    def __init__(self, entries: list[bytes]) -> None:
        self._on = {torch.device("cpu"): encode(entries)}

    def on(self, device: torch.device) -> Codes:
        if device not in self._on:
            self._on[device] = self._on[torch.device("cpu")].to(device)
        return self._on[device]


def encode(entries: list[bytes]) -> Codes:
    """The codes of a vocabulary, given the bytes of each id (`vocabulary.token_bytes`)."""
    entries = [*entries, b" "]
    code = {"": 0}
    forms = [entry.decode("utf-8", "ignore").translate(characters()) for entry in entries]
    of_id = [code.setdefault(form, len(code)) for form in forms]
    split = any(_tail(entry) for entry in entries)
    of_character = [code.setdefault(form, len(code)) for form in ("", *characters())] if split else []
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
    longest, cpu = len(inverse_powers), torch.device("cpu")
    return Codes(
        of_id=_tensor(of_id),
        of_character=_tensor(of_character),
        parts=_tensor(map(_parts, entries)),
        outline=_tensor(outlines),
        hash=_tensor(hashes),
        up=powers(MULTIPLIER, longest, cpu),
        down=powers(INVERSE, longest, cpu),
        two_pieces=any(_head(entry)[0] and form for entry, form in zip(entries, forms, strict=True)),
    )


def contexts(
    codes: Codes, ids: Tensor, document_start: Tensor, letters: int, whole_words: bool
) -> tuple[Tensor, Tensor]:
    """The context of every token: the letters before it (or before its word) in its document, at most so many.

    Args:
        ids: int64 (B, T). document_start: for every token the column at which its document starts, int64 (B, T).

    Returns:
        The polynomial hash of the context, and its length; int64 (B, T).
    """
    last = codes.of_id.shape[0] - 1
    ids = ids.clamp(-1, last)
    ids = ids + (ids < 0) * (last + 1)
    column = torch.arange(ids.shape[-1], device=ids.device)
    starts, two_pieces = document_start == column, False
    pieces = _look_up(codes.of_id, ids)
    if codes.of_character.shape[0]:
        completed = _completed(codes, ids, starts)
        two_pieces = codes.two_pieces and not (_may_look(ids) and not ((completed != 0) & (pieces != 0)).any())
        if two_pieces:  # of every token: the character that it completes, then the rest of its text
            pieces = torch.stack((completed, pieces), -1).flatten(-2)
            starts = torch.stack((starts, torch.zeros_like(starts)), -1).flatten(-2)
            document_start = 2 * document_start
            column = torch.arange(pieces.shape[-1], device=ids.device)
        else:
            pieces = completed + (completed == 0) * pieces
    outline = _look_up(codes.outline, pieces)
    length, first = outline & 0xFFFF, outline >> 35

    # Of every piece: its place in letters, M**place, M**-place, the hash of all before it.
    step = pad(length[..., :-1], (1, 0))
    place, scale, weight = step.cumsum(-1), _look_up(codes.up, step).cumprod(-1), _look_up(codes.down, step).cumprod(-1)
    before = pad((_look_up(codes.hash, first + length) * weight)[..., :-1], (1, 0)).cumsum(-1)

    # Where the context ends: so many letters into such a piece.
    own = column[:: 1 + two_pieces].expand_as(ids)
    if whole_words:
        own, within = _word_starts(outline, length, starts, column, two_pieces)
    end, end_hash, end_scale = (x.gather(-1, own) for x in (place, before, scale))
    if whole_words:
        end_hash = end_hash + _look_up(codes.hash, first.gather(-1, own) + within) * weight.gather(-1, own)
        end, end_scale = end + within, end_scale * _look_up(codes.up, within)

    begin = torch.maximum(end - letters, place.gather(-1, document_start))
    piece = _piece_at(place, length, begin)
    within = begin - place.gather(-1, piece)
    begin_hash = before.gather(-1, piece)
    begin_hash = begin_hash + _look_up(codes.hash, first.gather(-1, piece) + within) * weight.gather(-1, piece)
    return (end_hash - begin_hash) * end_scale, end - begin


def _word_starts(
    outline: Tensor, length: Tensor, starts: Tensor, column: Tensor, two_pieces: bool
) -> tuple[Tensor, Tensor]:
    """Where the word begins that a token begins with, or goes on with: in which piece, and how many letters into it."""
    says = ((outline & _SAYS) != 0) | starts
    leads = ((outline & _LEADS) != 0) | starts  # a document's start ends the word before it, like a separator
    # Is a word open where a piece begins? The last piece before it that says anything knows.
    is_open = (says * (2 * column + ((outline & _OPEN) != 0))).cummax(-1).values & 1
    anew = leads | (pad(is_open[..., :-1], (1, 0)) == 0)
    within = (outline >> 16) & 0xFFFF
    began_in = (((within > 0) | (anew & (length > 0))) * column).cummax(-1).values
    home = pad(began_in[..., :-1], (1, 0))
    if two_pieces:
        own = torch.arange(0, outline.shape[-1], 2, device=outline.device) + ~says[..., ::2]
        anew, home = anew.gather(-1, own), home.gather(-1, own)
    else:
        own = column
    return home + anew * (own - home), within.gather(-1, home) * ~anew


def _piece_at(place: Tensor, length: Tensor, letter: Tensor) -> Tensor:
    """The last piece with letters that begins at most so many letters into its row, for every element of letter."""
    if not _may_look(place):
        return torch.searchsorted(place, letter, right=True) - 1
    # The same, three times as fast: every piece with letters leaves its column at its first one.
    some = length > 0
    column = torch.arange(place.shape[-1], device=place.device)
    table = place.new_zeros(place.shape[0], int(place[:, -1].max()) + 2)
    table.scatter_(-1, (place + 1) * some, column * some)
    return table.cummax(-1).values.gather(-1, letter + 1)


def _may_look(tensor: Tensor) -> bool:
    """Whether shapes may depend on values: where that makes no device wait and breaks no graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _completed(codes: Codes, ids: Tensor, starts: Tensor) -> Tensor:
    """The code of the character whose last byte is among a token's leading continuation bytes, or 0."""
    if not _may_look(ids):
        return _complete(codes, ids, starts)
    # The same, many times as fast in most texts: only for the three tokens after one that ends in part of a character.
    flat = ids.reshape(-1)
    unfinished = (_look_up(codes.parts, flat) >> 38).nonzero()
    near = (unfinished + torch.arange(4)).reshape(-1).clamp(max=len(flat) - 1)
    four = (near[:, None] + torch.arange(-3, 1)).clamp(min=0)  # which may reach into the row before: a start between
    found = torch.zeros_like(flat)
    found[near] = _complete(codes, flat[four], starts.reshape(-1)[four])[:, -1]
    return found.view_as(ids)


def _complete(codes: Codes, ids: Tensor, starts: Tensor) -> Tensor:
    """A character has at most four bytes, so at most two tokens lie between the first and the last of its tokens."""
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
    for _ in range(2):  # an entry with more continuation bytes than are missing: the others mean nothing
        value = value - (value >= _COMPLETE << 6) * (value - (value >> 6))
    character = value & 0x1FFFFF
    least = (value >= 1 << 25) * 0x800 + (value >= 1 << 26) * 0xF800  # in more bytes than it needs it is no character
    valid = (earlier != 0) & (value >= _COMPLETE) & (character >= least) & (character < 0x110000) & ~starts
    return _look_up(codes.of_character, (character + 1) * valid)


def _look_up(table: Tensor, indices: Tensor) -> Tensor:
    """table[indices], three times as fast on CPU; so is a product with a bool, for torch.where, in this file."""
    return table.index_select(0, indices.reshape(-1)).view(indices.shape)


def _parts(entry: bytes) -> int:
    """`_tail` from bit 38; bit 37: nothing but continuation bytes; `_head`'s payload from bit 19, below 64**count."""
    count, payload = _head(entry)
    inside = not entry.strip(bytes(range(0x80, 0xC0)))
    return _tail(entry) << 38 | inside << 37 | payload << 19 | 1 << 6 * count


def _head(entry: bytes) -> tuple[int, int]:
    """How many continuation bytes an entry begins with, at most three, and their payloads, 6 bits each."""
    count, payload = 0, 0
    for byte in entry[:3]:
        if not 0x80 <= byte < 0xC0:
            break
        count, payload = count + 1, payload << 6 | byte & 63
    return count, payload


def _tail(entry: bytes) -> int:
    """The unfinished character at an entry's end, or 0: the payload so far, and before it a bit that arrives at bit
    24, 25 or 26 (a character of two, three or four bytes) when the missing bytes have pushed it on by 6 bits each."""
    for start in range(len(entry) - 1, max(len(entry) - 4, -1), -1):
        lead = entry[start]
        if not 0x80 <= lead < 0xC0:
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
        raise ValueError(f"an entry of the vocabulary has {letters} letters and digits; at most 65535 fit")
    *earlier, _ = form.rstrip(" ").split(" ")
    before_last_word = len("".join(earlier))
    is_open = form[-1:] not in ("", " ")
    return (
        first << 35 | is_open << 34 | form.startswith(" ") << 33 | (form != "") << 32 | before_last_word << 16 | letters
    )


def _tensor(numbers: Iterable[int]) -> Tensor:
    return torch.tensor([signed(number) for number in numbers], dtype=torch.int64)
