"""Windows -> scores: one teacher-forced pass, and `generate` only for the rows that need it."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from goldfish.audit.model import (
    Diverged,
    cache_tokens,
    continue_greedily,
    generate,
    least_beams,
    logits_of,
    relative_margin,
)
from goldfish.audit.windows import Window, first_divergence
from goldfish.unwrap import context_of, device_of, rotary_switch

_log = logging.getLogger(__name__)
# Tokens that a batch may hold in the pass, and in a greedy search, whose steps have few rows; more
# was no faster.
PASS_TOKENS = {"cpu": 2**12, "other": 2**16}
SEARCH_TOKENS = {"cpu": 2**14, "other": 2**16}
# A token is ambiguous if two logits are this close, relative to the largest: the order of the sums
# (batch size, cache) can then decide. Small models differed by 1.3e-6 (float32), .0023 (float16)
# and .020 (bfloat16), margins by twice that. In float32 the two are the largest; in 16 bits, in
# which only the first divergence is settled, the target's and the largest other one.
AMBIGUOUS = {torch.float32: 2.0**-14, torch.float16: 2.0**-7, torch.bfloat16: 2.0**-4}


@dataclass(frozen=True)
class Sampling:
    """How an adversary draws tokens: temperature, then top-k, then top-p, as transformers'
    `generate` applies them.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        """ValueError for a setting that means nothing."""
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be above 0 and finite, got {self.temperature!r}; greedy needs "
                "none"
            )
        self.processors()

    def processors(self) -> LogitsProcessorList:
        processors: list[LogitsProcessor] = [
            TemperatureLogitsWarper(float(self.temperature))
        ]
        if self.top_k is not None:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            processors.append(TopPLogitsWarper(self.top_p))
        return LogitsProcessorList(processors)


@dataclass(frozen=True)
class Score:
    """What a model does with a window of T ids.

    Arrays of length T - 1 are about ids[1:], each given all ids before it.

    greedy: int64 (T-1,) teacher-forced argmax.
    nll: float32 (T-1,) -log P(token), nats.
    rank: int64 (T-1,) how many entries of the vocabulary have a larger logit; 0 = most probable.
    entropy_mean, entropy_std: float32 (T-1,) mean and standard deviation of log P over the
        vocabulary under P (mu and sigma of Min-K%++, Zhang et al. 2404.02936, section 4).
    log_q: float32 (settings, S) log-probability of each suffix token under each Sampling; -inf if
        it is cut off.
    output: the free-running greedy continuation of the prefix, of S tokens or more; it goes on
        through an EOS.
    settled: an ambiguous row decided by generate at batch size 1; `greedy` agrees with it up to the
        first divergence.
    control_nll: float64, nll of ids[first_scored:] under another model; None if not asked for.
    beams: the least number of beams among those tried that recites the suffix; 0: none; None if not
        asked for.
    """

    greedy: np.ndarray
    nll: np.ndarray
    rank: np.ndarray
    entropy_mean: np.ndarray
    entropy_std: np.ndarray
    log_q: np.ndarray
    output: list[int]
    settled: bool = False
    control_nll: np.ndarray | None = None
    beams: int | None = None


class Scorer:
    """Scores windows under one model.

    Args:
        model: a causal language model of transformers, on its device.
        samplings: the settings whose log_q is wanted.
        beams: numbers of beams to try, or none. A beam search is run, at batch size 1, only if the
            ranks allow it.
        control: another model, for control_nll.
        batch_tokens: how many tokens a batch may hold; by default PASS_TOKENS, and for a search
            what the memory allows.
        output_length: the least number of tokens of an output, as far as the context goes; longer
            suffixes have outputs of their own length.
    """

    def __init__(
        self,
        model: Any,
        samplings: Sequence[Sampling] = (Sampling(),),
        beams: Sequence[int] = (),
        control: Any = None,
        batch_tokens: int | None = None,
        output_length: int = 0,
    ) -> None:
        self.model = model
        self.device = device_of(model)
        self.samplings = samplings
        self.beams = beams
        self._control = control
        self._output_length = output_length
        self._context = context_of(model.config)
        self._switch = rotary_switch(model.config)
        kind = "cpu" if self.device.type == "cpu" else "other"
        self._pass_tokens = batch_tokens or PASS_TOKENS[kind]
        self._search_tokens = batch_tokens or cache_tokens(model, SEARCH_TOKENS[kind])
        self._halved = False

    def score(self, windows: Sequence[Window]) -> list[Score]:
        """One Score for each window, in their order.

        Exact match, first divergence, likelihoods and ranks come from one forward pass. A greedy
        continuation is generated for the rows that diverge, all other rows are their own; rows
        whose answer depends on rounding are settled by generate at batch size 1. In float32 every
        output equals that of generate at batch size 1; in 16 bits exact match and the first
        divergence do, the text from there on may depend on the batch.

        Where memory runs out, batches are halved.

        Raises:
            ValueError: logits that are not finite; names the window.
        """
        longest = max((len(window.ids) for window in windows), default=0)
        while True:
            try:
                return self._score(windows)
            except torch.OutOfMemoryError:
                if max(self._pass_tokens, self._search_tokens) <= longest:
                    raise
            if not self._halved:
                _log.warning(
                    "Out of memory: smaller batches are tried; --batch-tokens sets how many "
                    "tokens one holds."
                )
            self._halved = True
            # Half of what was tried, which may be less than what was allowed.
            everything = sum(len(window.ids) for window in windows)
            of_pass = min(self._pass_tokens, everything)
            of_search = min(self._search_tokens, everything)
            self._pass_tokens = max(longest, of_pass // 2)
            self._search_tokens = max(longest, of_search // 2)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @torch.inference_mode()
    def mean_nll(self, windows: Sequence[Window]) -> float:
        """The mean loss of the suffixes of several windows, in nats per token."""
        rows = self._teacher_forced(self.model, windows, _loss)
        losses = []
        for window, row in zip(windows, rows, strict=True):
            of_suffix = row["nll"][window.prefix_length - 1 :]
            losses.append(of_suffix)
        return float(np.concatenate(losses).astype(np.float64).mean())

    @torch.inference_mode()
    def recited(self, windows: Sequence[Window]) -> list[bool]:
        """Whether each suffix is predicted token for token, teacher-forced; close calls are not
        settled.
        """
        rows = self._teacher_forced(self.model, windows, _predicted)
        recited = []
        for window, row in zip(windows, rows, strict=True):
            of_suffix = row["right"][window.prefix_length - 1 :]
            recited.append(bool(of_suffix.all()))
        return recited

    @torch.inference_mode()
    def _score(self, windows: Sequence[Window]) -> list[Score]:
        reduce = partial(_reduce, samplings=self.samplings)
        rows = self._teacher_forced(self.model, windows, reduce)
        # First what the pass says; it is the output up to the first divergence.
        for window, row in zip(windows, rows, strict=True):
            start = window.prefix_length - 1
            row["log_q"] = row["log_q"][start:].T
            row["output"] = row["greedy"][start:].tolist()
            margin = row.pop("relative_margin")
            gap = row.pop("relative_gap")
            exact = self.model.dtype == torch.float32
            distance = (margin if exact else gap)[start:]
            close = distance < AMBIGUOUS[self.model.dtype]
            end = first_divergence(row["output"], window.suffix) + 1
            row["ambiguous"] = bool(close[:end].any())
            # The pass used the rotary factors of its own length, which those of a prefix may not
            # be.
            if self._crosses(window):
                row["ambiguous"] = True
            elif row["ambiguous"] and not exact:
                # Behind the last close call the pass is right again.
                last = int(close.nonzero()[0][-1])
                self._settle(window, row, until=last + 1)
                row["ambiguous"] = False
        # Then the text behind it, and what remains to be decided by itself.
        self._continue(windows, rows)
        for window, row in zip(windows, rows, strict=True):
            if row.pop("ambiguous"):
                self._settle(window, row)
            if self.beams:
                ranks = row["rank"][window.prefix_length - 1 :].tolist()
                row["beams"] = least_beams(
                    self.model,
                    window.prefix,
                    window.suffix,
                    ranks,
                    self.beams,
                )
        if self._control is not None:
            controls = self._teacher_forced(self._control, windows, _loss)
            for window, row, of_control in zip(windows, rows, controls, strict=True):
                nll = of_control["nll"][window.first_scored - 1 :]
                row["control_nll"] = nll.astype(np.float64)
        return [Score(**row) for row in rows]

    def _teacher_forced(
        self,
        model: Any,
        windows: Sequence[Window],
        reduce: Callable[[Tensor, Tensor], dict[str, Tensor]],
    ) -> list[dict[str, Any]]:
        """The columns that `reduce` makes of logits (rows, V) and the ids that follow.

        Returns:
            For each window its columns, (T-1, ...).
        """
        results: list[dict[str, Any]] = [{}] * len(windows)
        for batch in self._batches(windows):
            longest = len(windows[batch[0]].ids)
            # Padded on the right, which no token before sees.
            ids, attended = torch.zeros(2, len(batch), longest, dtype=torch.int64)
            for place, i in enumerate(batch):
                length = len(windows[i].ids)
                ids[place, :length] = torch.tensor(windows[i].ids)
                attended[place, :length] = 1
            ids = ids.to(self.device)
            # Without padding the model may take its faster path.
            attention_mask = None if attended.all() else attended.to(self.device)
            targets = ids[:, 1:].flatten()
            parts = [
                reduce(logits, targets[rows])
                for rows, logits in logits_of(model, ids, attention_mask)
            ]
            columns = {}
            for name in parts[0]:
                column = torch.cat([part[name] for part in parts])
                columns[name] = column.cpu().numpy()
            for place, i in enumerate(batch):
                # The rows of a window among those of the batch, without its padding.
                first = place * (longest - 1)
                own = slice(first, first + len(windows[i].ids) - 1)
                results[i] = {name: column[own] for name, column in columns.items()}
                is_nan = bool(np.isnan(results[i]["nll"]).any())
                self._require_finite(windows[i], is_nan)
        return results

    def _batches(self, windows: Sequence[Window]) -> Iterator[list[int]]:
        """Places of windows, those of like length together.

        Longest first: a batch that is too large fails at once.
        """
        lengths = [len(window.ids) for window in windows]
        batch: list[int] = []
        for place in sorted(range(len(windows)), key=lambda i: -lengths[i]):
            longest = lengths[batch[0]] if batch else 0
            full = (len(batch) + 1) * longest > self._pass_tokens
            # The longest row of a batch decides about the rotary factors of all.
            switches = False
            if self._switch is not None:
                switches = lengths[place] <= self._switch < longest
            if batch and (full or switches):
                yield batch
                batch = []
            batch.append(place)
        if batch:
            yield batch

    def _continue(self, windows: Sequence[Window], rows: list[dict[str, Any]]) -> None:
        """Generate the outputs of rows that diverge, from behind the divergence.

        Up to it, they are known. Rows are generated together, without padding, if each can begin at
        the same number of tokens. What is known of a row beyond it is forced: in 16 bits the batch
        could decide otherwise than `_settle` did.
        """
        # Where the search of each row may begin, and its place.
        waiting: list[tuple[int, int]] = []
        for i, (window, row) in enumerate(zip(windows, rows, strict=True)):
            known = first_divergence(row["output"], window.suffix) + 1
            known = min(known, len(window.suffix))
            if known < self._length(window) and not row["ambiguous"]:
                waiting.append((window.prefix_length + known, i))
        waiting.sort()
        while waiting:
            start = waiting[0][0]
            group, longest = self._group(windows, waiting)
            waiting = [each for each in waiting if each[1] not in group]
            starts = []
            forced = []
            for i in group:
                window = windows[i]
                output = rows[i]["output"]
                end = first_divergence(output, window.suffix) + 1
                ids = window.prefix + output[:end]
                starts.append(ids[:start])
                forced.append(ids[start:])
            outputs, margins = continue_greedily(
                self.model,
                torch.tensor(starts, device=self.device),
                longest - start,
                forced,
            )
            found = zip(group, outputs.tolist(), margins.tolist(), strict=True)
            for i, output, margin in found:
                window = windows[i]
                self._require_finite(window, math.isnan(margin))
                known = start - window.prefix_length
                whole = rows[i]["output"][:known] + output
                rows[i]["output"] = whole[: self._length(window)]
                # In 16 bits this text may depend on the batch.
                exact = self.model.dtype == torch.float32
                rows[i]["ambiguous"] = exact and margin < AMBIGUOUS[torch.float32]

    def _group(
        self,
        windows: Sequence[Window],
        waiting: Sequence[tuple[int, int]],
    ) -> tuple[list[int], int]:
        """The rows to be generated with the first that waits, and the length of the longest.

        A row joins if its prefix ends before the common start, and as long as the keys and values
        of all of them fit; the first one always does.
        """
        start = waiting[0][0]
        group: list[int] = []
        longest = 0
        for _, i in waiting:
            window = windows[i]
            length = max(longest, window.prefix_length + self._length(window))
            fits = (len(group) + 1) * length <= max(self._search_tokens, length)
            if window.prefix_length <= start and fits:
                group.append(i)
                longest = length
        return group, longest

    def _settle(
        self,
        window: Window,
        row: dict[str, Any],
        until: int | None = None,
    ) -> None:
        """Let generate decide a row at batch size 1.

        Not in batches: those of 2 and of 8 prefixes of one length differed from batch size 1 by up
        to .028 of the largest logit, and in 1 of 96 tokens (SmolLM2-135M, bfloat16, on a CPU).

        Args:
            until: how many tokens of the suffix are decided, fewer if an earlier one diverges.
                Usually it is the first or second. Without it the whole output is generated.
        """
        prefix = torch.tensor([window.prefix], device=self.device)
        if until is None:
            output, _ = continue_greedily(self.model, prefix, self._length(window))
        else:
            stop = StoppingCriteriaList([Diverged(window.ids)])
            output = generate(self.model, prefix, until, stopping_criteria=stop)
        decided = output[0].tolist()
        row["output"] = decided + row["output"][len(decided) :]
        known = first_divergence(decided, window.suffix) + 1
        known = min(known, len(decided), len(window.suffix))
        start = window.prefix_length - 1
        row["greedy"] = row["greedy"].copy()
        row["greedy"][start : start + known] = decided[:known]
        row["settled"] = True

    def _length(self, window: Window) -> int:
        """How many tokens the output of a window has."""
        room = self._output_length
        if self._context is not None:
            room = min(room, self._context - window.prefix_length)
        return max(len(window.suffix), room)

    def _crosses(self, window: Window) -> bool:
        """Whether the model changes its rotary factors between a window's prefix and its end."""
        end = window.prefix_length + self._length(window)
        return self._switch is not None and window.prefix_length <= self._switch < end

    def _require_finite(self, window: Window, is_nan: bool) -> None:
        if is_nan:
            dtype = str(self.model.dtype).removeprefix("torch.")
            raise ValueError(
                f"the logits of {window.split} row {window.index} ({window.name!r:.80}) are not "
                f"finite: the weights are damaged, or too large for {dtype}. Try bfloat16 or "
                "float32 (--dtype)"
            )


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    of_target = logits.gather(-1, targets[:, None])[:, 0]
    return logits.logsumexp(-1) - of_target


def _loss(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"nll": _nll(logits, targets)}


def _predicted(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"right": logits.argmax(-1) == targets, "nll": _nll(logits, targets)}


def _reduce(
    logits: Tensor,
    targets: Tensor,
    samplings: Sequence[Sampling],
) -> dict[str, Tensor]:
    """Float32 logits (rows, V) -> the columns of Score, (rows,); log_q is (rows, settings)."""
    target = logits.gather(-1, targets[:, None])
    top, places = logits.topk(2)
    greedy = places[:, 0]
    tied = top[:, 0] == top[:, 1]
    if tied.any():
        greedy[tied] = logits[tied].argmax(-1)  # the first of equals, as in generate
    rank = (logits > target).sum(-1)

    # Moments of s = logit - largest logit under P; log P is s shifted by -log(sum of exp(s)).
    # -1000 is far below what exp tells from 0, and 0 * -inf would be NaN.
    s = (logits - top[:, :1]).clamp_(min=-1000)
    weights = s.exp()
    total = weights.sum(-1)
    mean = weights.mul_(s).sum(-1) / total
    square = weights.mul_(s).sum(-1) / total
    nll = total.log() + (top[:, 0] - target[:, 0])
    log_q = []
    for each in samplings:
        if each == Sampling():
            log_q.append(-nll)
        else:
            log_q.append(-_nll(each.processors()(None, logits), targets))
    nothing = nll.new_empty(len(nll), 0)
    # The target's rival: the second, if the target is the most probable.
    rival = torch.where(rank == 0, top[:, 1], target[:, 0])
    return {
        "greedy": greedy,
        "nll": nll,
        "rank": rank,
        "relative_margin": relative_margin(top[:, 0], top[:, 1]),
        "relative_gap": relative_margin(top[:, 0], rival),
        "entropy_mean": mean - total.log(),
        "entropy_std": (square - mean.square()).clamp_(min=0).sqrt(),
        "log_q": torch.stack(log_q, -1) if log_q else nothing,
    }
