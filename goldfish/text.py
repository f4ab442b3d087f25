"""Near-duplicate-proof decisions: for every token a key of the last h words before its word. Integers only.

A document's normal form (`vocabulary.fold`) is letters and digits, in words that each end in one space. What a token
appends to it is the same wherever the token stands, but for two things that earlier tokens decide: whether a leading
separator has a word to end, and which character a leading part of a character completes. So the normal form of each
vocabulary entry is hashed once, and prefix sums put the hashes of a batch together. The hash of bytes b0, b1, ... is
here the sum of mix(b[j]) * M**-(j + 1), what `hashing.prefix_hashes` sums up, and a hash at position p weighs M**-p.

What follows from deciding by words, and from a token having one decision:
- Punctuation separates, in code too: "don't" is two words, snake_case and a.b(c) are as many as their names. So spaces
  around it change nothing; deleting it between letters joins words, and the h words after it are decided anew.
- In scripts without spaces every character is a word. A token of several words takes the decision of its first; all of
  them count as context, so that the next words' decisions do not depend on the tokenizer.
- A character split over tokens is read with its last byte. The tokens before that go with the word that is open before
  them, where there is one: in "AB手", with 手 split, the first part is decided with "ab".
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from goldfish import spec
from goldfish.hashing import INVERSE, MULTIPLIER, powers, signed
from goldfish.vocabulary import characters

_MIXED = [spec.mix(byte) for byte in range(256)]
_SPACE = signed(_MIXED[0x20])
_COMPLETE = 1 << 24  # see `_tail`
_INSIDE = 1 << 37  # see `_parts`
_SAYS, _LEADS = 1 << 32, 1 << 33  # see `_outline`


class Codes(NamedTuple):
    """The normal forms of a vocabulary as integers, int64. Each distinct form has a number, its code; "" has 0.

    What a form appends is cut where it ends a word: the first cut is its beginning, the others follow the spaces
    inside it and at its end.
    """

    of_id: Tensor  # (V + 1,) the code of each id's text; the last is a space, for ids outside the vocabulary
    of_character: (
        Tensor  # (0x110001,) 0, then the code of each character; (0,) where no entry ends in part of a character
    )
    parts: Tensor  # (V + 1,) the parts of characters that an entry begins and ends with, see `_parts`
    outline: Tensor  # (C,) five small numbers about each form, see `_outline`
    hash: Tensor  # (C,) the hash of what a form appends
    cut_hash: Tensor  # (K,) the same, up to each cut
    cut_length: Tensor  # (K,) and its length in bytes
    up: Tensor  # powers of the multiplier M
    down: Tensor  # and of its inverse, enough for the longest form and a space
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
    outlines, hashes, cut_hashes, cut_lengths = [], [], [0], [0]
    inverse_powers = [1]
    for form in code:
        *ended, unfinished = form.split(" ")
        ended = [word for word in ended if word]
        appended = "".join(f"{word} " for word in ended) + unfinished
        data = appended.encode()
        first_cut = len(cut_hashes) if ended else 0
        if ended:
            cut_hashes.append(0)
            cut_lengths.append(0)
        state = 0
        for position, byte in enumerate(data, 1):
            if position == len(inverse_powers):
                inverse_powers.append((inverse_powers[-1] * INVERSE) & spec.WORD)
            state = (state + _MIXED[byte] * inverse_powers[position]) & spec.WORD
            if byte == 0x20:
                cut_hashes.append(state)
                cut_lengths.append(position)
        hashes.append(state)
        outlines.append(_outline(form, first_cut, len(ended), len(data)))
    longest, cpu = len(inverse_powers), torch.device("cpu")
    return Codes(
        of_id=_tensor(of_id),
        of_character=_tensor(of_character),
        parts=_tensor(map(_parts, entries)),
        outline=_tensor(outlines),
        hash=_tensor(hashes),
        cut_hash=_tensor(cut_hashes),
        cut_length=_tensor(cut_lengths),
        up=powers(MULTIPLIER, longest + 1, cpu),
        down=powers(INVERSE, longest + 1, cpu),
        two_pieces=any(_head(entry)[0] and form for entry, form in zip(entries, forms, strict=True)),
    )


def contexts(codes: Codes, ids: Tensor, document_start: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """The context of every token's word: the h words before it in its document, or those there are.

    Args:
        ids: int64 (B, T). document_start: for every token the column at which its document starts, int64 (B, T).

    Returns:
        The polynomial hash of the context plus its length in bytes, and its length in words; int64 (B, T).
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
            column = torch.arange(pieces.shape[-1], device=ids.device)
        else:
            pieces = completed + (completed == 0) * pieces
    outline, text = _look_up(codes.outline, pieces), _look_up(codes.hash, pieces)
    length, cuts, first_cut = outline & 0xFFFF, (outline >> 16) & 0xFFFF, outline >> 35
    says = ((outline & _SAYS) != 0) | starts
    leads = ((outline & _LEADS) != 0) | starts  # a document's start ends the word before it, like a separator

    # Is a word open where a piece begins? The last piece before it that says anything knows. Then `ends` is 1 where a
    # piece begins by ending it: with one more space.
    is_open = (says * (2 * column + ((outline >> 34) & 1))).cummax(-1).values & 1
    ends = leads * pad(is_open[..., :-1], (1, 0))

    # Of every piece, after that space: its place in bytes, M**place, M**-place, the hash of all before it.
    step = ends + pad(length[..., :-1], (1, 0))
    place, weight, scale = step.cumsum(-1), _look_up(codes.down, step).cumprod(-1), _look_up(codes.up, step).cumprod(-1)
    before = (ends * _SPACE * weight + pad((text * weight)[..., :-1], (1, 0))).cumsum(-1)
    words = cuts + ends
    words_after = words.cumsum(-1)
    word = words_after - cuts  # the number of the word that a piece begins with, or goes on with
    zeroth_cut = first_cut - word  # so that `zeroth_cut + number` is the cut where word `number` begins

    # The piece in which that word begins, and the word h before it.
    ended_in = ((words > 0) * column).cummax(-1).values
    home = pad(ended_in[..., :-1], (1, 0))
    home = home + ends * (column - home)
    if two_pieces:
        own = torch.arange(0, pieces.shape[-1], 2, device=ids.device) + ~says[..., ::2]
        word, home = word.gather(-1, own), home.gather(-1, own)
    count = (word - word.gather(-1, document_start)).clamp(max=h)
    oldest = word - count

    def cut(piece: Tensor, number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where word `number` begins, in `piece`: the hash of all before it, its place, its distance in the piece."""
        at = zeroth_cut.gather(-1, piece) + number
        within = _look_up(codes.cut_length, at)
        hashed = before.gather(-1, piece) + _look_up(codes.cut_hash, at) * weight.gather(-1, piece)
        return hashed, place.gather(-1, piece) + within, within

    end_hash, end, within = cut(home, word)
    begin_hash, begin, _ = cut(_where_ended(words, words_after, oldest), oldest)
    return (end_hash - begin_hash) * scale.gather(-1, home) * _look_up(codes.up, within) + (end - begin), count


def _where_ended(words: Tensor, words_after: Tensor, number: Tensor) -> Tensor:
    """The first piece after which `number` words have ended, for every element of number."""
    if not _may_look(words):
        return torch.searchsorted(words_after, number)
    # The same, three times as fast: every piece leaves its column at the first word that it ends.
    some = words > 0
    column = torch.arange(words.shape[-1], device=words.device)
    table = words.new_zeros(words.shape[0], int(words_after[:, -1].max()) + 1)
    table.scatter_(-1, (words_after - words + 1) * some, column * some)
    return table.cummax(-1).values.gather(-1, number)


def _may_look(tensor: Tensor) -> bool:
    """Whether shapes may depend on values: where that makes no device wait and breaks no graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _completed(codes: Codes, ids: Tensor, starts: Tensor) -> Tensor:
    """The code of the character whose last byte is among a token's leading continuation bytes, or 0.

    A character has at most four bytes, so at most two tokens lie between the first and the last of its tokens.
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


def _outline(form: str, first_cut: int, cuts: int, length: int) -> int:
    """In one integer, from the lowest bit: the bytes that a form appends (16 bits), the words that it ends (16),
    whether it is not empty (1), begins with a space (1), ends inside a word (1), and the place of its first cut."""
    if length > 0xFFFF:
        raise ValueError(f"an entry of the vocabulary has {length} bytes of letters and digits; at most 65535 fit")
    is_open = form[-1:] not in ("", " ")
    return first_cut << 35 | is_open << 34 | form.startswith(" ") << 33 | (form != "") << 32 | cuts << 16 | length


def _tensor(numbers: Iterable[int]) -> Tensor:
    return torch.tensor([signed(number) for number in numbers], dtype=torch.int64)
