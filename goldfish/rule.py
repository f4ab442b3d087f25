"""The goldfish rule: which tokens are dropped.

Vectorised, on CPU and GPU, integers only; `goldfish.spec` defines it. To add a strategy: define it
in spec.py and docs/specification.md, add its name to `Strategy` and a function to `_STRATEGIES`.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from goldfish import spec
from goldfish.hashing import (
    hits,
    mix,
    prefix_hashes,
    previous,
    signed,
    window_hashes,
)
from goldfish.letters import Vocabulary, contexts
from goldfish.secret_spans import Find, compiled, secret_tokens, spans
from goldfish.vocabulary import token_bytes

Strategy = Literal["hash", "letters", "entropy", "static", "random", "reference"]
Window = Literal["preceding", "inclusive"]
Opening = Literal["short", "keep"]
MOST_KEPT = 1000
_NEVER_FIRST = 2**62  # a position that starts no document
NEEDS_GUIDE = (
    'strategy="entropy" needs a model that reads the data first: attach(trainer, rule), which '
    "takes the trainer's own, or premask(dataset, rule, guide=model)"
)


@dataclass(frozen=True)
class Goldfish:
    """Decides which tokens are dropped: seen as context, never a target of the loss.

    Hans et al. 2024, section 3. The defaults are the paper's rule; we recommend
    `Goldfish(k=4, h=13, max_kept=4)`, which spreads the dropped tokens evenly.

    >>> import torch
    >>> rule = Goldfish(k=4, h=13, max_kept=4)
    >>> rule.dropped(torch.arange(100, 112)).int().tolist()
    [0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0]

    Args:
        k: one token in k is dropped, on average; any finite number above 1. 3 or 4 is the paper's
            strong setting.
        h: the length of the context that decides about a token, 13 tokens in the paper; for
            "letters" in words of 5 letters.
        strategy: "hash" decides from the h tokens before a token, so a passage has the same dropped
            tokens wherever it occurs. "letters" decides from the 5h letters and digits before a
            token, ignoring case, accents, punctuation, spacing and line breaks, so near-duplicates
            have the same dropped tokens too; it needs `rule.bind(tokenizer)`. "entropy" drops, of
            every 2k - 1 targets in a row, the one of which a model is most uncertain before it is
            trained; it needs `attach` or `premask(guide=model)`.
            For comparison: "static" drops every k-th position of a document. "random" drops each
            token with probability 1/k, drawn anew every time, so text that is seen often is
            learned completely. "reference" is bit-exact with the authors' code on CPU, defects
            included; it ignores documents, padding, seed, opening, window and exempt.
        seed: rules with different seeds drop different tokens; 0 <= seed < 2**64.
        window: "preceding" is the h tokens before the target. With "inclusive", the last of the h
            tokens is the target itself.
        opening: what happens to tokens with less than a full context before them in their document.
            "short" decides from what there is. "keep" never drops them (the paper), so the opening
            of every document is learned.
        exempt: ids that are never dropped, such as special tokens. They still count as context.
        document_end: an id after which a new document starts, for rows packed without position_ids.
        max_kept: the largest number of targets kept in a row in a document, exempt ids not counted;
            for "hash" and "letters", at least k. Natural drops become rarer, and every
            (max_kept + 1)-th target after one is dropped, so that one in k still is. A passage that
            moves has the same dropped tokens after its first natural drop.
        secrets: a regular expression (of Python's `re`). Every token that overlaps a match in the
            text of its document is dropped, on top of the rule and whatever the other arguments;
            if the expression has groups, the first one that has a part in the match. It needs
            `rule.bind(tokenizer)`, which trainers do. The receipt contains the expression, so it
            must not contain a secret itself. Not for "reference".
        guide: for "entropy", the fingerprint of the model that decides (`Guide`); set by `attach`
            and `premask`.
        vocabulary, decisions: set by `bind` and by the guide; not part of the rule's identity.

    A document's first token is never dropped. Equal rules compare equal and hash equal.

    Raises:
        TypeError, ValueError: an argument out of range.
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
    secrets: str | None = None
    guide: str | None = None
    vocabulary: Vocabulary | None = field(default=None, repr=False, compare=False)
    # Sorted int64: `place_keys` of the documents that a guide read, and of their dropped tokens.
    decisions: Tensor | None = field(default=None, repr=False, compare=False)
    # A context drops its token if its key is below this; `spec.threshold` or `natural_threshold`.
    _limit: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # A frozen dataclass is filled by object.__setattr__; values are stored as Python's own
        # numbers, so that equal rules have equal JSON.
        self._set(k=_checked_k(self.k))
        self._set(h=_integer("h", self.h, 1, "the length of the context"))
        self._set(seed=_integer("seed", self.seed, 0, "an integer", below=2**64))
        _check_choice("strategy", self.strategy, Strategy)
        _check_choice("window", self.window, Window)
        _check_choice("opening", self.opening, Opening)
        self._set(exempt=_checked_exempt(self.exempt))
        if self.document_end is not None:
            end = _integer("document_end", self.document_end, 0, "a token id or None")
            self._set(document_end=end)
        if self.strategy == "letters" and self.window == "inclusive":
            raise ValueError(
                'strategy="letters" needs window="preceding", got window="inclusive"'
            )
        if self.secrets is not None:
            if not isinstance(self.secrets, str):
                raise TypeError(
                    f"secrets must be a regular expression, got {self.secrets!r}"
                )
            compiled(self.secrets)
            if self.strategy == "reference":
                raise ValueError(
                    'strategy="reference" is the authors\' code, which has no secrets'
                )
        self._check_entropy()
        if self.max_kept is None:
            self._set(_limit=spec.threshold(self.k))
        else:
            self._check_max_kept()
            self._set(_limit=spec.natural_threshold(self.k, self.max_kept))

    def _check_entropy(self) -> None:
        if self.strategy == "entropy":
            if 2 * self.k % 1 != 0:
                raise ValueError(
                    'strategy="entropy" has windows of 2k - 1 targets, so k must be a multiple of '
                    f"1/2, got {self.k:g}"
                )
        elif self.guide is not None:
            raise ValueError(
                f'a guide is for strategy="entropy", got strategy="{self.strategy}"'
            )

    def _check_max_kept(self) -> None:
        most = _integer("max_kept", self.max_kept, 1, "a number of tokens or None")
        self._set(max_kept=most)
        if not self.k <= most <= MOST_KEPT:
            raise ValueError(
                f"max_kept must be at least k={self.k:g} and at most {MOST_KEPT}, got {most}"
            )
        if self.strategy not in ("hash", "letters") or self.opening == "keep":
            raise ValueError(
                'max_kept needs strategy "hash" or "letters" and opening="short", '
                f'got strategy="{self.strategy}", opening="{self.opening}"'
            )

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        r"""The rule to copy into a script: k, h, and the arguments that are not the defaults.

        >>> Goldfish(k=4.0, max_kept=4, secrets=r"code (\d+)")
        Goldfish(k=4, h=13, max_kept=4, secrets=r'code (\d+)')
        """
        parts = []
        for each in fields(self):
            value = getattr(self, each.name)
            is_usual = value == each.default and each.name not in ("k", "h")
            # A vocabulary and decisions are found anew where the script runs.
            if is_usual or not each.compare:
                continue
            literal = _literal(value)
            if each.name == "secrets":
                literal = _literal_expression(value)
            parts.append(f"{each.name}={literal}")
        return f"Goldfish({', '.join(parts)})"

    @property
    def reads_text(self) -> bool:
        """Whether the rule decides from the text of the ids, and so needs `bind`."""
        return self.strategy == "letters" or self.secrets is not None

    def bind(self, tokenizer: Any) -> "Goldfish":
        """This rule for the ids of one tokenizer; unchanged if the rule does not read text.

        Args:
            tokenizer: a Hugging Face fast tokenizer (what AutoTokenizer returns), a processor that
                has one, or a `tokenizers.Tokenizer`.

        Raises:
            TypeError, ValueError: a tokenizer whose entries do not show what text they stand for.
            ValueError: a rule that is bound to another tokenizer, or to this one before it got more
                tokens.
        """
        if not self.reads_text:
            return self
        # A processor has a tokenizer.
        entries = token_bytes(getattr(tokenizer, "tokenizer", tokenizer))
        if self.vocabulary is None:
            return replace(self, vocabulary=Vocabulary(entries))
        if self.vocabulary.entries != entries:
            raise ValueError(
                "this rule is bound to another tokenizer, or to this one before tokens were added; "
                "bind a new rule: Goldfish(**rule.to_dict()).bind(tokenizer)"
            )
        return self

    def short(self) -> str:
        """The settings of the command line, for people."""
        spread = f", max_kept={self.max_kept}" if self.max_kept else ""
        secrets = f", secrets={self.secrets}" if self.secrets else ""
        rule = f"k={self.k:g}, h={self.h}, strategy={self.strategy}"
        return f"{rule}{spread}, seed={self.seed}{secrets}"

    def to_dict(self) -> dict[str, Any]:
        """The rule as JSON-ready values.

        >>> rule = Goldfish(k=4, h=13, max_kept=4)
        >>> Goldfish(**rule.to_dict()) == rule
        True
        """
        # `vocabulary` and `_limit` are no settings, and do not count in a comparison either.
        names = [each.name for each in fields(self) if each.compare]
        values = {name: getattr(self, name) for name in names}
        return {**values, "exempt": list(self.exempt)}

    def dropped(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        draw: int = 0,
    ) -> Tensor:
        """Which tokens are no targets: `labels[dropped] = -100` in Hugging Face's alignment.

        >>> import torch
        >>> ids = torch.tensor([[11, 12, 13, 14, 15, 11, 12, 13, 14, 15]])
        >>> rule = Goldfish(k=2, h=4)
        >>> rule.dropped(ids).int().tolist()
        [[0, 0, 1, 0, 1, 1, 1, 0, 0, 1]]
        >>> two_documents = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])
        >>> rule.dropped(ids, two_documents).int().tolist()
        [[0, 0, 1, 0, 1, 0, 0, 1, 0, 1]]

        Args:
            input_ids: integers, (T,) or (B, T). The ids themselves, never labels, which hold -100.
            position_ids: integers of the same shape, or (1, T) or (T,) for all rows. A document
                starts where the position is the least of the row (0, as a rule), or less than the
                one before. Of the (3, B, T) or (4, B, T) of multimodal models (mrope) the first row
                counts, that of text or time.
            attention_mask: same shape; 0 is padding, which is never dropped, ends nothing and
                shifts nothing. Other numbers are those of documents packed into one row, as in
                LLaMA-Factory: a document starts where the number changes.
            draw: for strategy "random" only, the number of the draw.

        Returns:
            bool, the shape and device of input_ids.

        Raises:
            TypeError: ids that are not integers.
            ValueError: a shape or a device that does not fit; a rule that reads text and is not
                bound to a tokenizer.
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
        """`dropped`, and the key of every token's context, for the fingerprint in the receipt.

        Arguments and errors as for `dropped`. A key is the `spec.key` of the up to h ids before a
        token in its document with seed 0, whatever the strategy; int64, the shape of input_ids; 0
        where attention_mask is 0.
        """
        input_ids = _checked_ids(input_ids)
        rows = self.rows(input_ids, position_ids, attention_mask=attention_mask)
        if input_ids.numel() == 0:
            nothing = torch.zeros_like(input_ids, dtype=torch.int64)
            return nothing.bool(), nothing

        tokens = tokens_of(rows.ids, rows.starts, self.h)
        drop = self._drop(tokens, draw)
        if self.secrets is not None:
            find = partial(spans, compiled(self.secrets))
            drop = drop | rows.overlapping(find, self._bound_vocabulary())
        drop, keys = rows.back(drop), rows.back(mix(tokens.state + _SEED_0))
        if self.strategy == "reference":
            # The authors' code knows neither documents nor padding.
            drop = _like_reference(self, input_ids.long().view(drop.shape))
            drop = drop & rows.attended
        return drop.view(input_ids.shape), keys.view(input_ids.shape)

    def rows(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
    ) -> "Rows":
        """The rows of a batch without their padding; arguments and errors as for `dropped`."""
        input_ids = _checked_ids(input_ids)
        if position_ids is not None and getattr(position_ids, "ndim", 2) == 3:
            position_ids = position_ids[0]
        position_ids = check_beside(
            "position_ids", position_ids, input_ids, one_row=True
        )
        attention_mask = check_beside("attention_mask", attention_mask, input_ids)

        length = input_ids.shape[-1]
        ids = input_ids.long()
        if ids.ndim == 1:
            ids = ids[None]
        attended = torch.ones_like(ids, dtype=torch.bool)
        if ids.numel() == 0:
            return Rows(ids, attended, attended, None)
        positions = numbers = slot = None
        if position_ids is not None:
            positions = position_ids.long().reshape(-1, length).expand_as(ids)
        if attention_mask is not None:
            # Padding moves to the end of each row; `slot` is the new column of each token.
            numbers = attention_mask.long().reshape(ids.shape)
            attended = numbers != 0
            slot = torch.where(attended, attended.cumsum(-1) - 1, length)
            ids = _attended_first(ids, slot, 0)
            numbers = _attended_first(numbers, slot, 0)
            if positions is not None:
                positions = positions.masked_fill(~attended, _NEVER_FIRST)
                positions = _attended_first(positions, slot, _NEVER_FIRST)
        starts = self._document_starts(ids, positions, numbers)
        return Rows(ids, starts, attended, slot)

    def _document_starts(
        self, ids: Tensor, positions: Tensor | None, document_numbers: Tensor | None
    ) -> Tensor:
        """bool (B, T): whether a token is the first of a document."""
        starts = torch.zeros_like(ids, dtype=torch.bool)
        starts[:, 0] = True
        if positions is not None:
            least = positions.amin(-1, keepdim=True)
            falls = positions < previous(positions)
            starts = starts | falls | (positions == least)
        if document_numbers is not None:
            changes = document_numbers != previous(document_numbers)
            # Padding is behind the documents; each of its tokens is one of its own.
            starts = starts | changes | (document_numbers == 0)
        if self.document_end is not None:
            ends = ids == self.document_end
            starts = starts | previous(ends)
        return starts

    def _drop(self, tokens: "Tokens", draw: int) -> Tensor:
        """The decisions for rows without padding, bool (B, T)."""
        if self.strategy == "reference":
            return torch.zeros_like(tokens.ids, dtype=torch.bool)
        drop, complete = _STRATEGIES[self.strategy](self, tokens, draw)
        if self.opening == "keep":
            drop = drop & complete
        target = self.candidates(tokens)
        drop = drop & target
        if self.max_kept is None:
            return drop
        # Targets are numbered, and `last` is the number of the last natural drop, or of the
        # document's start. For max_kept = 2, one document, and natural drops at D:
        #     natural drops         .  .  D  .  .  .  .
        #     number                0  1  2  3  4  5  6
        #     last                  0  0  2  2  2  2  2
        #     number - last         0  1  0  1  2  3  4
        #     dropped (0, 3, ...)   -  .  D  .  .  D  .
        number = target.cumsum(-1)
        restarts = drop | (tokens.offset == 0)
        last = (number * restarts).cummax(-1).values
        due = (number - last) % (self.max_kept + 1) == 0
        return target & due

    def candidates(self, tokens: "Tokens") -> Tensor:
        """The tokens that the rule may drop if they are targets, bool (B, T)."""
        may_drop = tokens.offset > 0
        if self.exempt:
            exempt = _ids_on(tokens.ids.device, self.exempt)
            may_drop = may_drop & ~torch.isin(tokens.ids, exempt)
        return may_drop

    def _bound_vocabulary(self) -> Vocabulary:
        if self.vocabulary is None:
            what = "secrets" if self.secrets is not None else 'strategy="letters"'
            raise ValueError(
                f"{what} reads text and needs the tokenizer: rule = rule.bind(tokenizer)"
            )
        return self.vocabulary


def _attended_first(values: Tensor, slot: Tensor, fill: int) -> Tensor:
    """Rows in which attended tokens come first, in order; one column longer, for padding.

    For the row [p, a, p, b], whose p is padding: slot is [4, 0, 4, 1], and the result is
    [a, b, fill, fill, p].
    """
    rows, length = values.shape
    result = values.new_full((rows, length + 1), fill)
    return result.scatter(-1, slot, values)


class Rows(NamedTuple):
    """Rows whose attended tokens come first, in order: (B, T), or (B, T + 1) with padding."""

    # int64
    ids: Tensor
    # bool, the first tokens of documents; every token of padding too.
    starts: Tensor
    # bool (B, T), of the rows as they were given, and the columns to which their tokens moved.
    attended: Tensor
    slot: Tensor | None

    def move(self, values: Tensor) -> Tensor:
        """Values (B, T) of the tokens as they were given, at their new columns."""
        return values if self.slot is None else _attended_first(values, self.slot, 0)

    def back(self, values: Tensor) -> Tensor:
        """The reverse of `move`; 0 for padding."""
        if self.slot is None:
            return values
        return values.gather(-1, self.slot) * self.attended

    def overlapping(self, find: Find, vocabulary: Vocabulary) -> Tensor:
        """Which tokens overlap what is found in the text of their document, bool as ids."""
        # One copy from the device; the text is read on the CPU.
        ids = self.ids.cpu().numpy()
        starts = self.starts.cpu().numpy()
        result = np.zeros(ids.shape, dtype=bool)
        for i, end in enumerate(self.attended.sum(-1).tolist()):
            entries = vocabulary.entries_of(ids[i, :end])
            result[i, :end] = secret_tokens(find, entries, starts[i, :end])
        return torch.from_numpy(result).to(self.ids.device)


class Tokens(NamedTuple):
    """Rows without padding, and what strategies decide from; int64 (B, T)."""

    ids: Tensor
    column: Tensor
    # The number of tokens before a token in its document.
    offset: Tensor
    # The length of its context in ids, min(h, offset).
    n: Tensor
    # The hash of that context, before it is mixed with a seed.
    state: Tensor
    # (B, T + 1), see `hashing.prefix_hashes`.
    prefix: Tensor


def tokens_of(ids: Tensor, starts: Tensor, h: int) -> Tokens:
    column = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    # The last start at or before each column, as starts . . S . . become 0 0 2 2 2.
    last_start = (starts * column).cummax(-1).values
    offset = column - last_start
    n = offset.clamp(max=h)
    prefix = prefix_hashes(mix(ids))
    state = window_hashes(prefix, column - n, column) + n
    return Tokens(ids, column, offset, n, state, prefix)


def place_keys(tokens: Tokens) -> Tensor:
    """A key for every token: of all ids of its document, and of its place in it; int64 (B, T)."""
    length = tokens.ids.shape[-1]
    # The first start after each column, or the end: starts S . . S . become 3 3 3 5 5.
    next_start = torch.where(tokens.offset == 0, tokens.column, length)
    next_start = next_start.roll(-1, -1)
    next_start[:, -1] = length
    end = next_start.flip(-1).cummin(-1).values.flip(-1)
    begin = tokens.column - tokens.offset
    document = window_hashes(tokens.prefix, begin, end) + (end - begin)
    return mix(mix(document + _SEED_0) + tokens.offset)


# Each strategy returns whether a token is hit, and whether its context has its full length.


def _hash(rule: Goldfish, tokens: Tokens, draw: int) -> tuple[Tensor, Tensor]:
    state = tokens.state
    if rule.window == "inclusive":
        end = tokens.column + 1
        state = window_hashes(tokens.prefix, end - tokens.n, end) + tokens.n
    keys = mix(state + _seed_term(rule.seed))
    return hits(keys, rule._limit), tokens.n == rule.h


def _letters(rule: Goldfish, tokens: Tokens, draw: int) -> tuple[Tensor, Tensor]:
    most = spec.LETTERS * rule.h
    codes = rule._bound_vocabulary().on(tokens.ids.device)
    document_start = tokens.column - tokens.offset
    state, n = contexts(codes, tokens.ids, document_start, most)
    keys = mix(state + n + _seed_term(rule.seed))
    drop = hits(keys, rule._limit) & (n > 0)
    return drop, n == most


def _entropy(rule: Goldfish, tokens: Tokens, draw: int) -> tuple[Tensor, Tensor]:
    if rule.decisions is None:
        raise ValueError(NEEDS_GUIDE)
    decisions, keys = rule.decisions.to(tokens.ids.device), place_keys(tokens)
    place = torch.searchsorted(decisions, keys).clamp(max=len(decisions) - 1)
    found = decisions[place] == keys
    # The key of a document's first token is there if the guide read the document.
    was_read = found.gather(-1, tokens.column - tokens.offset)
    if not was_read[tokens.offset > 0].all():
        raise ValueError(
            "a row has a document that the guide did not read, so nothing was decided about it. "
            "A run that is resumed needs the data with which it began. Rows must be the same "
            "whenever they are drawn (not cut or edited at random); if they are not, write the "
            "labels with premask(dataset, rule, guide=model)"
        )
    return found, torch.ones_like(found)


def _static(rule: Goldfish, tokens: Tokens, draw: int) -> tuple[Tensor, Tensor]:
    # offset * limit / 2**32 passes a whole number: for k = 4, at every fourth offset.
    fraction = (tokens.offset * rule._limit) & 0xFFFFFFFF
    drop = fraction < rule._limit
    return drop, torch.ones_like(drop)


def _random(rule: Goldfish, tokens: Tokens, draw: int) -> tuple[Tensor, Tensor]:
    row = torch.arange(len(tokens.ids), device=tokens.ids.device)
    # A number for each token of the batch, as long as rows have less than 2**32 tokens.
    number = (row[:, None] << 32) + tokens.column
    drawn = spec.mix((draw + spec.mix(rule.seed)) & spec.WORD)
    drop = hits(mix(signed(drawn) + number), rule._limit)
    return drop, torch.ones_like(drop)


_STRATEGIES: dict[str, Callable[[Goldfish, Tokens, int], tuple[Tensor, Tensor]]] = {
    "hash": _hash,
    "letters": _letters,
    "entropy": _entropy,
    "static": _static,
    "random": _random,
}


def _seed_term(seed: int) -> int:
    return signed(spec.mix(spec.mix(seed)))


_SEED_0 = _seed_term(0)


def _like_reference(rule: Goldfish, ids: Tensor) -> Tensor:
    """The decisions of the authors' code, (B, T).

    It reads the shifted targets ids[:, 1:], and never drops the first h - 1 of them.
    """
    drop = torch.zeros_like(ids, dtype=torch.bool)
    # The original fails on rows this short; it never drops an opening.
    if ids.shape[-1] <= rule.h:
        return drop
    windows = ids[:, 1:].unfold(-1, rule.h, 1)
    product = windows.prod(-1)  # wraps, as in the original
    drawn = _reference_table().to(ids.device)[product % spec.TABLE_SIZE]
    drop[:, rule.h :] = drawn < 1 / rule.k
    return drop


@cache
def _reference_table() -> Tensor:
    """The reference implementation's table as its CPU build makes it, whatever the ids' device."""
    # The seed in the authors' code, a prime Fibonacci number.
    generator = torch.Generator().manual_seed(2971215073)
    return torch.rand(spec.TABLE_SIZE, generator=generator)


def _literal(value: object) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, float) and value.is_integer():
        return repr(int(value))
    return repr(value)


def _literal_expression(expression: str) -> str:
    """A raw string where it can be one: it has no way to write a quote, nor a backslash at its end,
    and shows control characters as they are."""
    raw = "'" not in expression and not expression.endswith("\\")
    if raw and expression.isprintable():
        return f"r'{expression}'"
    return repr(expression)


def _checked_k(k: object) -> float:
    """k as Python's int or float: numpy's numbers are accepted, but JSON does not take them."""
    if isinstance(k, bool) or not isinstance(k, Real):
        raise TypeError(f"k must be a number above 1, got {k!r}")
    number = int(k) if isinstance(k, Integral) else float(k)
    if not 1 < number <= sys.float_info.max:
        raise ValueError(
            f"k must be a finite number above 1 (one token in k is dropped), got {k!r}; "
            "to drop nothing, train without a rule"
        )
    return number


@cache
def _ids_on(device: torch.device, ids: tuple[int, ...]) -> Tensor:
    """A tensor of ids, copied to each device once: copying makes a GPU wait."""
    return torch.tensor(ids, device=device)


def _checked_exempt(exempt: object) -> tuple[int, ...]:
    if isinstance(exempt, (str, bytes)) or not isinstance(exempt, Iterable):
        raise TypeError(
            f"exempt must be a collection of token ids such as (1, 2), got {exempt!r}"
        )
    ids = {_integer("every id in exempt", i, 0, "a token id") for i in exempt}
    return tuple(sorted(ids))


def _check_choice(name: str, value: object, kind: Any) -> None:
    choices = get_args(kind)
    if value not in choices:
        expected = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {expected}, got {value!r}")


def _integer(
    name: str, value: object, least: int, what: str, below: int = 2**48
) -> int:
    """value as Python's int. Lengths and ids are far below 2**48, and so is 5h below 2**63."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be {what}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least} ({what}), got {value}")
    number = int(value)
    if number >= below:
        power = below.bit_length() - 1
        raise ValueError(f"{name} must be below 2**{power} ({what}), got {number}")
    return number


def _checked_ids(input_ids: Any) -> Tensor:
    """The ids as a tensor of integers, (T,) or (B, T)."""
    ids = torch.as_tensor(input_ids)
    kind = ids.dtype
    if kind.is_floating_point or kind.is_complex or kind == torch.bool:
        hint = ""
        if ids.numel() == 0:  # torch.tensor([]) is float32
            hint = "; for an empty row pass torch.empty(0, dtype=torch.int64)"
        raise TypeError(f"input_ids must be integer token ids, got {ids.dtype}{hint}")
    if ids.ndim not in (1, 2):
        raise ValueError(
            f"input_ids must have shape (T,) or (B, T), got {tuple(ids.shape)}"
        )
    return ids


def check_beside(
    name: str, tensor: Any, input_ids: Tensor, one_row: bool = False
) -> Tensor | None:
    """`tensor` (or a list) if it is on the ids' device and of their shape; ValueError otherwise.

    With one_row, it may also be one row for all rows of the ids.
    """
    if tensor is None:
        return None
    beside = tensor
    if not isinstance(tensor, Tensor):
        beside = torch.as_tensor(tensor, device=input_ids.device)
    assert isinstance(beside, Tensor)
    if beside.device != input_ids.device:
        raise ValueError(
            f"input_ids is on {input_ids.device} and {name} on {beside.device}; "
            f"move one of them, e.g. {name}.to(input_ids.device)"
        )
    allowed = [input_ids.shape]
    if one_row:
        length = input_ids.shape[-1]
        allowed += [torch.Size([length]), torch.Size([1, length])]
    if beside.shape not in allowed:
        shapes = f"{tuple(input_ids.shape)}, got {tuple(beside.shape)}"
        raise ValueError(f"{name} must have the shape of input_ids, {shapes}")
    return beside
