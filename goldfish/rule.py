"""The goldfish rule: which tokens are dropped. Vectorised, CPU and GPU, integers only; `goldfish.spec` defines it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from goldfish import spec
from goldfish.hashing import below, mix, prefix_hashes, signed, window_hashes
from goldfish.text import Vocabulary, contexts
from goldfish.vocabulary import token_bytes

Strategy = Literal["hash", "text", "letters", "static", "random", "reference"]
Window = Literal["preceding", "inclusive"]
Head = Literal["short", "keep"]
READS_TEXT = ("text", "letters")  # decide from what a tokenizer's entries say


@dataclass(frozen=True)
class Goldfish:
    """Says which tokens are dropped: seen as context, never a target (Hans et al. 2024, section 3).

    Args:
        k: one token in k is dropped, on average; any finite number above 1. 3 or 4 is the paper's strong setting.
        h: how many preceding tokens ("hash", "reference") decide, 13 in the paper; for "text" and "letters" how many
            words, counted as 5 letters each.
        strategy: "hash": from the h tokens before it, so that a passage has the same holes wherever it stands.
            "letters": from the 5 h letters and digits before it, as they read without case, accents, punctuation,
            spacing and line breaks, so that near-duplicates get the same holes. Needs `rule.bind(tokenizer)`.
            "text": from the 5 h letters before its word; whole words are dropped, whatever tokens they are cut into.
            "static": every k-th position of the document. "random": with probability 1/k in every draw; weak, for
            comparison: a passage seen often is seen whole. "reference": bit-exact with the authors' code on CPU,
            defects included; knows no documents, padding, seed, head or window.
        seed: another seed, another set of holes; 0 <= seed < 2**64.
        window: "preceding": the h tokens before the target. "inclusive": the last of the h tokens is the target itself.
        head: what happens to tokens with fewer than h tokens before them in their document. "short": decide from
            those there are. "keep": never drop them (the paper), which leaves every document's opening bare.
        exempt: ids that are never dropped, such as special tokens. They still are context.
        document_end: an id after which a new document starts, for rows packed without position_ids.
        vocabulary: what `bind` adds for "text" and "letters"; no part of the rule's identity.

    A document's first token is never dropped. Equal rules compare equal and hash equal.

    Raises:
        TypeError, ValueError: for an argument out of range; the message says what came and what was expected.
    """

    k: float = 4
    h: int = 13
    strategy: Strategy = "hash"
    seed: int = 0
    window: Window = "preceding"
    head: Head = "short"
    exempt: tuple[int, ...] = ()
    document_end: int | None = None
    vocabulary: Vocabulary | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, Real):
            raise TypeError(f"k must be a number above 1, got {self.k!r}")
        object.__setattr__(self, "k", int(self.k) if isinstance(self.k, Integral) else float(self.k))  # numpy's too
        if not (self.k > 1 and math.isfinite(self.k)):
            raise ValueError(
                f"k must be a finite number above 1 (one token in k is dropped), got {self.k!r}; "
                "to drop nothing, train without a rule"
            )
        object.__setattr__(self, "h", _integer("h", self.h, 1, "the number of tokens that decide"))
        object.__setattr__(self, "seed", _integer("seed", self.seed, 0, "an integer below 2**64"))
        if self.seed >= 2**64:
            raise ValueError(f"seed must be below 2**64, got {self.seed}")
        for name, value, choices in (
            ("strategy", self.strategy, get_args(Strategy)),
            ("window", self.window, get_args(Window)),
            ("head", self.head, get_args(Head)),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        if isinstance(self.exempt, (str, bytes)) or not isinstance(self.exempt, Iterable):
            raise TypeError(f"exempt must be a collection of token ids such as (1, 2), got {self.exempt!r}")
        exempt = {_integer("every id in exempt", token, 0, "a token id") for token in self.exempt}
        object.__setattr__(self, "exempt", tuple(sorted(exempt)))
        if self.document_end is not None:
            end = _integer("document_end", self.document_end, 0, "a token id or None")
            object.__setattr__(self, "document_end", end)
        if self.strategy in READS_TEXT and self.window == "inclusive":
            raise ValueError(
                f'strategy="{self.strategy}" decides before a token is read: window must be "preceding", '
                'got "inclusive"'
            )

    def bind(self, tokenizer: Any) -> "Goldfish":
        """This rule for the ids of one tokenizer; what "text" and "letters" need, and nothing to the others.

        Args:
            tokenizer: a Hugging Face fast tokenizer (what AutoTokenizer returns) or a `tokenizers.Tokenizer`.

        Raises:
            TypeError, ValueError: a tokenizer whose entries do not say what text they stand for.
        """
        return replace(self, vocabulary=Vocabulary(token_bytes(tokenizer))) if self.strategy in READS_TEXT else self

    def dropped(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        draw: int = 0,
    ) -> Tensor:
        """Which tokens are dropped, as targets: labels[dropped] = -100 in Hugging Face's (unshifted) alignment.

        Args:
            input_ids: integers, (T,) or (B, T). The ids themselves, never labels, which hold -100.
            position_ids: integers of the same shape, or (1, T) or (T,) for all rows; 0 starts a document.
            attention_mask: same shape; 0 is padding, which is never dropped, ends nothing and shifts nothing.
            draw: for strategy "random": another draw, other holes.

        Returns:
            bool, the shape and device of input_ids.

        Raises:
            TypeError: ids that are not integers.
            ValueError: a shape or a device that does not fit; "text" or "letters" not bound to a tokenizer.
        """
        if self.strategy == "reference":  # knows no padding and no documents
            drop = self._in_rows(self._decide_like_reference, input_ids, position_ids)
            attention_mask = _check_beside("attention_mask", attention_mask, drop)
            return drop if attention_mask is None else drop & (attention_mask != 0)

        def decide(ids: Tensor, positions: Tensor | None) -> Tensor:
            return self._decide(ids, positions, draw)

        return self._in_rows(decide, input_ids, position_ids, attention_mask)

    def keys(
        self, input_ids: Tensor, position_ids: Tensor | None = None, *, attention_mask: Tensor | None = None
    ) -> Tensor:
        """`spec.key` of the up to h tokens before every token in its document, whatever the strategy and the seed.

        Arguments and errors as for `dropped`. Returns int64 of the shape of input_ids; 0 where attention_mask is 0.
        """

        def keys(ids: Tensor, positions: Tensor | None) -> Tensor:
            column, start = self._documents(ids, positions)
            return self._context_keys(ids, column, column - start, seed=0)

        return self._in_rows(keys, input_ids, position_ids, attention_mask)

    def _in_rows(
        self,
        function: Callable[[Tensor, Tensor | None], Tensor],
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """function(ids, position_ids), both int64 (B, T) and without padding, in the shape of input_ids."""
        input_ids = _check_ids(input_ids)
        position_ids = _check_beside("position_ids", position_ids, input_ids, one_row=True)
        attention_mask = _check_beside("attention_mask", attention_mask, input_ids)
        if input_ids.numel() == 0:  # (0,), (B, 0), (0, T): asked with one token, for the dtype of the answer
            return function(input_ids.new_zeros((1, 1), dtype=torch.int64), None).new_zeros(input_ids.shape)
        length = input_ids.shape[-1]
        ids = input_ids.to(torch.int64).reshape(-1, length)
        positions = None if position_ids is None else position_ids.reshape(-1, length).expand_as(ids)
        if attention_mask is None:
            return function(ids, positions).view(input_ids.shape)
        # Attended tokens move to the front of their row, in order; padding goes to a spare last column.
        attended = attention_mask.reshape(ids.shape) != 0
        slot = torch.where(attended, attended.cumsum(-1) - 1, length)
        ids = torch.nn.functional.pad(ids, (0, 1)).scatter(-1, slot, ids)
        if positions is not None:
            positions = torch.nn.functional.pad(positions, (0, 1)).scatter(-1, slot, positions)
        return (function(ids, positions).gather(-1, slot) * attended).view(input_ids.shape)

    def _decide(self, ids: Tensor, position_ids: Tensor | None, draw: int) -> Tensor:
        """The decisions for int64 ids (B, T) without padding."""
        column, start = self._documents(ids, position_ids)
        offset = column - start
        limit = spec.threshold(self.k)
        if self.strategy == "static":
            drop = ((offset * limit) & 0xFFFFFFFF) < limit
        elif self.strategy == "random":
            row = torch.arange(ids.shape[0], device=ids.device)[:, None]
            drop = below(mix(signed(spec.mix(draw + spec.mix(self.seed))) + (row << 32) + column), limit)
        elif self.strategy in READS_TEXT:
            if self.vocabulary is None:
                raise ValueError(
                    f'strategy="{self.strategy}" reads text, so it must know the tokenizer: rule = rule.bind(tokenizer)'
                )
            letters = spec.LETTERS * self.h
            state, n = contexts(self.vocabulary.on(ids.device), ids, start, letters, self.strategy == "text")
            drop = below(mix(state + n + _seed_term(self.seed)), limit) & (n > 0)
            if self.head == "keep":
                drop = drop & (n == letters)
        else:
            end = column if self.window == "preceding" else column + 1
            drop = below(self._context_keys(ids, end, offset, self.seed), limit)
            if self.head == "keep":
                drop = drop & (offset >= self.h)
        drop = drop & (offset > 0)
        if self.exempt:
            drop = drop & ~torch.isin(ids, torch.tensor(self.exempt, device=ids.device))
        return drop

    def _context_keys(self, ids: Tensor, end: Tensor, offset: Tensor, seed: int) -> Tensor:
        """`spec.key` of the min(h, offset) tokens that end before the column `end`, for every token."""
        n = offset.clamp(max=self.h)
        state = window_hashes(prefix_hashes(mix(ids)), end - n, end)
        return mix(state + n + _seed_term(seed))

    def _documents(self, ids: Tensor, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """For every token its column, and the column at which its document starts; int64 (B, T)."""
        column = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
        if position_ids is None and self.document_end is None:
            return column, torch.zeros_like(column)
        starts = torch.zeros_like(ids, dtype=torch.bool)
        if position_ids is not None:
            starts = position_ids == 0
        if self.document_end is not None:
            ended = torch.nn.functional.pad(ids[:, :-1] == self.document_end, (1, 0))
            starts = starts | ended
        return column, (starts * column).cummax(-1).values

    def _decide_like_reference(self, ids: Tensor, position_ids: Tensor | None) -> Tensor:
        drop = torch.zeros_like(ids, dtype=torch.bool)
        if ids.shape[-1] <= self.h:  # the original crashes on such rows; it never drops a head
            return drop
        # The original is given the shifted targets ids[:, 1:]; its first h - 1 targets are never dropped.
        windows = ids[:, 1:].unfold(-1, self.h, 1)
        product = windows[..., 0]
        for i in range(1, self.h):  # prod(dtype=int64) wraps too, but is several times slower on strided windows
            product = product * windows[..., i]
        table = _reference_table().to(ids.device)
        drop[:, self.h :] = table[product % spec.TABLE_SIZE] < 1 / self.k
        return drop

    def to_dict(self) -> dict[str, Any]:
        """The rule as JSON-ready values: `Goldfish(**rule.to_dict()) == rule`."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.compare}
        return {**values, "exempt": list(self.exempt)}


def _seed_term(seed: int) -> int:
    """What a seed adds to the state of a context in `spec.key`."""
    return signed(spec.mix(spec.mix(seed)))


@cache
def _reference_table() -> Tensor:
    """The reference implementation's table as its CPU build makes it; made on the CPU whatever the ids' device."""
    return torch.rand(spec.TABLE_SIZE, generator=torch.Generator().manual_seed(2971215073))


def _integer(name: str, value: object, least: int, what: str) -> int:
    """value as Python's int: numpy's are accepted, and would not go into JSON."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be {what}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least} ({what}), got {value}")
    return int(value)


def _check_ids(input_ids: Tensor) -> Tensor:
    input_ids = torch.as_tensor(input_ids)
    if input_ids.dtype.is_floating_point or input_ids.dtype.is_complex or input_ids.dtype == torch.bool:
        hint = "" if input_ids.numel() else "; for an empty row pass torch.empty(0, dtype=torch.int64)"
        raise TypeError(f"input_ids must be integer token ids, got {input_ids.dtype}{hint}")
    if input_ids.ndim not in (1, 2):
        raise ValueError(f"input_ids must have shape (T,) or (B, T), got {tuple(input_ids.shape)}")
    return input_ids


def _check_beside(name: str, tensor: Tensor | None, input_ids: Tensor, one_row: bool = False) -> Tensor | None:
    """`tensor`, known to lie on the ids' device and to have their shape (or, with one_row, one row for all)."""
    if tensor is None:
        return None
    if not isinstance(tensor, Tensor):
        tensor = torch.as_tensor(tensor, device=input_ids.device)
    if tensor.device != input_ids.device:
        raise ValueError(
            f"input_ids is on {input_ids.device} and {name} on {tensor.device}; "
            f"move one of them, e.g. {name}.to(input_ids.device)"
        )
    fits_one_row = one_row and tensor.shape in (input_ids.shape[-1:], (1, *input_ids.shape[-1:]))
    if tensor.shape != input_ids.shape and not fits_one_row:
        raise ValueError(
            f"{name} must have the shape of input_ids, {tuple(input_ids.shape)}, got {tuple(tensor.shape)}"
        )
    return tensor
