"""The goldfish rule: which tokens are dropped. Vectorised, CPU and GPU, integers only; `goldfish.spec` defines it."""

import math
import warnings
from collections.abc import Iterable
from dataclasses import InitVar, dataclass, field, fields, replace
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from goldfish import spec
from goldfish.hashing import below, mix, prefix_hashes, signed, window_hashes
from goldfish.letters import Vocabulary, contexts
from goldfish.vocabulary import token_bytes

Strategy = Literal["hash", "letters", "text", "static", "random", "reference"]
Window = Literal["preceding", "inclusive"]
Opening = Literal["short", "keep"]
READS_TEXT = ("letters", "text")  # decide from what a tokenizer's entries say
MOST_KEPT = 1000
_SEED_0 = signed(spec.mix(spec.mix(0)))


@dataclass(frozen=True)
class Goldfish:
    """Says which tokens are dropped: seen as context, never a target of the loss (Hans et al. 2024, section 3).

    Args:
        k: one token in k is dropped, on average; any finite number above 1. 3 or 4 is the paper's strong setting.
        h: how many preceding tokens decide, 13 in the paper; for "letters" in words of 5 letters.
        strategy: "hash": decides from the h tokens before a token, so a passage has the same dropped tokens wherever
            it occurs. "letters": decides from the 5 h letters and digits before a token, ignoring case, accents,
            punctuation, spacing and line breaks, so near-duplicates have the same dropped tokens too; needs
            `rule.bind(tokenizer)`. "text": deprecated, as "letters" but for whole words.
            For comparison: "static": every k-th position of a document. "random": each token with probability 1/k,
            drawn anew every time, so text that is seen often is learned completely. "reference": bit-exact with the
            authors' code on CPU, defects included; ignores documents, padding, seed, opening and window.
        seed: rules with different seeds drop different tokens; 0 <= seed < 2**64.
        window: "preceding": the h tokens before the target. "inclusive": the last of the h tokens is the target itself.
        opening: what happens to tokens with fewer than h tokens before them in their document. "short": decide from
            those there are. "keep": never drop them (the paper), so the opening of every document is learned.
        exempt: ids that are never dropped, such as special tokens. They still count as context.
        max_kept: the largest number of targets kept in a row in a document, exempt ids not counted; for "hash" and
            "letters", at least k. Natural drops become rarer, and every (max_kept + 1)-th target after one is dropped,
            so that one in k still is. A passage that moves has the same dropped tokens after its first natural drop.
        document_end: an id after which a new document starts, for rows packed without position_ids.
        vocabulary: what `bind` adds for "letters" and "text"; not part of the rule's identity.
        head: the former name of `opening`, and still its name in files; where given, it replaces `opening`.

    A document's first token is never dropped. Equal rules compare equal and hash equal. An argument out of range raises
    TypeError or ValueError.
    """

    k: float = 4
    h: int = 13
    strategy: Strategy = "hash"
    seed: int = 0
    window: Window = "preceding"
    opening: Opening = "short"
    exempt: tuple[int, ...] = ()
    document_end: int | None = None
    max_kept: int | None = None
    vocabulary: Vocabulary | None = field(default=None, repr=False, compare=False)
    head: InitVar[Opening | None] = None
    _limit: int = field(
        init=False, repr=False, compare=False
    )  # contexts whose key is below it drop a token

    def __post_init__(self, head: Opening | None) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, Real):
            raise TypeError(f"k must be a number above 1, got {self.k!r}")
        self._set(
            k=int(self.k) if isinstance(self.k, Integral) else float(self.k)
        )  # numpy's numbers too
        if not (self.k > 1 and math.isfinite(self.k)):
            raise ValueError(
                f"k must be a finite number above 1 (one token in k is dropped), got {self.k!r}; "
                "to drop nothing, train without a rule"
            )
        self._set(h=_integer("h", self.h, 1, "the number of tokens that decide"))
        self._set(seed=_integer("seed", self.seed, 0, "an integer below 2**64"))
        if self.seed >= 2**64:
            raise ValueError(f"seed must be below 2**64, got {self.seed}")
        if head is not None:
            self._set(opening=head)
        for name, kind in (("strategy", Strategy), ("window", Window), ("opening", Opening)):
            value, choices = getattr(self, name), get_args(kind)
            if value not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}"
                )
        if isinstance(self.exempt, (str, bytes)) or not isinstance(self.exempt, Iterable):
            raise TypeError(
                f"exempt must be a collection of token ids such as (1, 2), got {self.exempt!r}"
            )
        self._set(
            exempt=tuple(
                sorted({_integer("every id in exempt", i, 0, "a token id") for i in self.exempt})
            )
        )
        if self.document_end is not None:
            self._set(
                document_end=_integer("document_end", self.document_end, 0, "a token id or None")
            )
        if self.max_kept is not None:
            self._set(max_kept=_integer("max_kept", self.max_kept, 1, "a number of tokens or None"))
            if not self.k <= self.max_kept <= MOST_KEPT:
                raise ValueError(
                    f"max_kept must be at least k={self.k:g} and at most {MOST_KEPT}, got {self.max_kept}"
                )
            if self.strategy not in ("hash", "letters") or self.opening == "keep":
                got = f'strategy="{self.strategy}", opening="{self.opening}"'
                raise ValueError(
                    f'max_kept needs strategy "hash" or "letters" and opening="short", got {got}'
                )
        natural = self.max_kept and spec.natural_threshold(self.k, self.max_kept)
        self._set(_limit=natural or spec.threshold(self.k))
        if self.strategy in READS_TEXT and self.window == "inclusive":
            raise ValueError(
                f'strategy="{self.strategy}" needs window="preceding", got window="inclusive"'
            )
        if self.strategy == "text" and self.vocabulary is None:  # a bound copy does not warn again
            warnings.warn(
                'strategy="text" is deprecated, the next release removes it; use strategy="letters": it is faster, '
                "punctuation does not change its decisions, and less is recited after training",
                FutureWarning,
                stacklevel=3,
            )

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def bind(self, tokenizer: Any) -> "Goldfish":
        """This rule for the ids of one tokenizer; "letters" and "text" need it, other strategies do not change.

        Args:
            tokenizer: a Hugging Face fast tokenizer (what AutoTokenizer returns) or a `tokenizers.Tokenizer`.

        Raises:
            TypeError, ValueError: a tokenizer whose entries do not say what text they stand for.
        """
        return (
            replace(self, vocabulary=Vocabulary(token_bytes(tokenizer)))
            if self.strategy in READS_TEXT
            else self
        )

    def short(self) -> str:
        """The settings of the command line, for people."""
        spread = f", max_kept={self.max_kept}" if self.max_kept else ""
        return f"k={self.k:g}, h={self.h}, strategy={self.strategy}{spread}, seed={self.seed}"

    def natural(self) -> "Goldfish":
        """The rule of the natural drops of a rule with `max_kept`."""
        return replace(self, max_kept=None, k=math.nextafter(2**32 / self._limit, math.inf))

    def dropped(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        draw: int = 0,
    ) -> Tensor:
        """Which tokens are no targets: labels[dropped] = -100 in Hugging Face's (unshifted) alignment.

        Args:
            input_ids: integers, (T,) or (B, T). The ids themselves, never labels, which hold -100.
            position_ids: integers of the same shape, or (1, T) or (T,) for all rows; 0 starts a document. Of the
                (3, B, T) or (4, B, T) of multimodal models (mrope) the first row counts, that of text or time.
            attention_mask: same shape; 0 is padding, which is never dropped, ends nothing and shifts nothing.
            draw: for strategy "random" only, the number of the draw.

        Returns:
            bool, the shape and device of input_ids.

        Raises:
            TypeError: ids that are not integers.
            ValueError: a shape or a device that does not fit; "letters" or "text" not bound to a tokenizer.
        """
        return self.drops_and_keys(
            input_ids, position_ids, attention_mask=attention_mask, draw=draw
        )[0]

    def drops_and_keys(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        draw: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """`dropped`, and what the receipt's fingerprint needs: the key of every token's context.

        Arguments and errors as for `dropped`. A key is the `spec.key` of the up to h ids before a token in its
        document with seed 0, whatever the strategy; int64, the shape of input_ids; 0 where attention_mask is 0.
        """
        input_ids = torch.as_tensor(input_ids)
        if (
            input_ids.dtype.is_floating_point
            or input_ids.dtype.is_complex
            or input_ids.dtype == torch.bool
        ):
            hint = (
                ""
                if input_ids.numel()
                else "; for an empty row pass torch.empty(0, dtype=torch.int64)"
            )
            raise TypeError(f"input_ids must be integer token ids, got {input_ids.dtype}{hint}")
        if input_ids.ndim not in (1, 2):
            raise ValueError(
                f"input_ids must have shape (T,) or (B, T), got {tuple(input_ids.shape)}"
            )
        if position_ids is not None and getattr(position_ids, "ndim", 2) == 3:
            position_ids = position_ids[0]
        position_ids = check_beside("position_ids", position_ids, input_ids, one_row=True)
        attention_mask = check_beside("attention_mask", attention_mask, input_ids)
        if input_ids.numel() == 0:
            return torch.zeros_like(input_ids, dtype=torch.bool), torch.zeros_like(
                input_ids, dtype=torch.int64
            )
        length = input_ids.shape[-1]
        ids = input_ids.to(torch.int64).reshape(-1, length)
        positions = (
            None if position_ids is None else position_ids.reshape(-1, length).expand_as(ids)
        )
        if attention_mask is None:
            drop, keys = self._decide(ids, positions, draw)
        else:  # attended tokens move to the front of their row, in order; padding goes to a spare last column
            attended = attention_mask.reshape(ids.shape) != 0
            slot = torch.where(attended, attended.cumsum(-1) - 1, length)
            front = pad(ids, (0, 1)).scatter(-1, slot, ids)
            if positions is not None:
                positions = pad(positions, (0, 1)).scatter(-1, slot, positions)
            drop, keys = (
                x.gather(-1, slot) * attended for x in self._decide(front, positions, draw)
            )
        if self.strategy == "reference":  # ignores padding and documents
            drop = self._decide_like_reference(ids)
            drop = drop if attention_mask is None else drop & attended
        return drop.view(input_ids.shape), keys.view(input_ids.shape)

    def _decide(self, ids: Tensor, position_ids: Tensor | None, draw: int) -> tuple[Tensor, Tensor]:
        """The decisions and keys for int64 ids (B, T) without padding."""
        column, start = self._documents(ids, position_ids)
        offset = column - start
        limit, seed_term = self._limit, signed(spec.mix(spec.mix(self.seed)))
        complete: Tensor | bool = True  # whether a context has its full length
        n = offset.clamp(max=self.h)
        prefix = prefix_hashes(mix(ids))
        state = window_hashes(prefix, column - n, column) + n
        if self.strategy == "hash":
            if self.window == "inclusive":
                drop = below(
                    mix(window_hashes(prefix, column + 1 - n, column + 1) + n + seed_term), limit
                )
            else:
                drop = below(mix(state + seed_term), limit)
            complete = n == self.h
        elif self.strategy in READS_TEXT:
            if self.vocabulary is None:
                raise ValueError(
                    f'strategy="{self.strategy}" reads text and needs the tokenizer: rule = rule.bind(tokenizer)'
                )
            letters = spec.LETTERS * self.h
            text, n = contexts(
                self.vocabulary.on(ids.device), ids, start, letters, self.strategy == "text"
            )
            drop = below(mix(text + n + seed_term), limit) & (n > 0)
            complete = n == letters
        elif self.strategy == "static":
            drop = ((offset * limit) & 0xFFFFFFFF) < limit
        else:
            row = torch.arange(ids.shape[0], device=ids.device)[:, None]
            drop = below(
                mix(signed(spec.mix(draw + spec.mix(self.seed))) + (row << 32) + column), limit
            )
        if self.opening == "keep":
            drop = drop & complete
        target = offset > 0
        if self.exempt:
            target = target & ~torch.isin(ids, torch.tensor(self.exempt, device=ids.device))
        drop = drop & target
        if self.max_kept is not None:
            number = target.cumsum(-1)
            last = (
                (number * (drop | (offset == 0))).cummax(-1).values
            )  # natural drop, or the document's start
            drop = target & ((number - last) % (self.max_kept + 1) == 0)
        return drop, mix(state + _SEED_0)

    def _documents(self, ids: Tensor, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """For every token its column, and the column at which its document starts; int64 (B, T)."""
        column = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
        if position_ids is None and self.document_end is None:
            return column, torch.zeros_like(column)
        starts = torch.zeros_like(ids, dtype=torch.bool)
        if position_ids is not None:
            starts = position_ids == 0
        if self.document_end is not None:
            starts = starts | pad(ids[:, :-1] == self.document_end, (1, 0))
        return column, (starts * column).cummax(-1).values

    def _decide_like_reference(self, ids: Tensor) -> Tensor:
        drop = torch.zeros_like(ids, dtype=torch.bool)
        if ids.shape[-1] <= self.h:  # the original crashes on such rows; it never drops an opening
            return drop
        # The original reads the shifted targets ids[:, 1:] and never drops the first h - 1 of them.
        product = ids[:, 1:].unfold(-1, self.h, 1).prod(-1)
        drop[:, self.h :] = (
            _reference_table().to(ids.device)[product % spec.TABLE_SIZE] < 1 / self.k
        )
        return drop

    def to_dict(self) -> dict[str, Any]:
        """The rule as JSON-ready values: `Goldfish(**rule.to_dict()) == rule`."""
        names = {
            f.name: "head" if f.name == "opening" else f.name for f in fields(self) if f.compare
        }
        values = {key: getattr(self, name) for name, key in names.items()} | {
            "exempt": list(self.exempt)
        }
        if self.max_kept is None:  # version 0.1.0 does not know it
            del values["max_kept"]
        return values


@cache
def _reference_table() -> Tensor:
    """The reference implementation's table as its CPU build makes it; made on the CPU whatever the ids' device."""
    return torch.rand(spec.TABLE_SIZE, generator=torch.Generator().manual_seed(2971215073))


def _integer(name: str, value: object, least: int, what: str) -> int:
    """value as Python's int: numpy's integers are accepted, but JSON does not take them."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be {what}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least} ({what}), got {value}")
    return int(value)


def check_beside(
    name: str, tensor: Tensor | None, input_ids: Tensor, one_row: bool = False
) -> Tensor | None:
    """`tensor` on the ids' device and of their shape (or, with one_row, one row for all); ValueError otherwise."""
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
        shapes = f"{tuple(input_ids.shape)}, got {tuple(tensor.shape)}"
        raise ValueError(f"{name} must have the shape of input_ids, {shapes}")
    return tensor
