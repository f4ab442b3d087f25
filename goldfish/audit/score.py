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
from torch.nn.utils.rnn import pad_sequence
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
# How many tokens a batch may hold in the pass, and in a greedy search. Larger batches were no
# faster.
PASS_TOKENS = {"cpu": 2**12, "other": 2**16}
SEARCH_TOKENS = {"cpu": 2**14, "other": 2**16}
# A token is ambiguous if two logits are this close, relative to the largest: rounding can then
# decide between them, as batch size and cache change the order of the sums. Margins differ by up to
# twice what logits do.
AMBIGUOUS = {
    torch.float32: 2.0**-14,  # logits of small models differed by 1.3e-6
    torch.float16: 2.0**-7,  # by .0023
    torch.bfloat16: 2.0**-4,  # by .020
}
# Columns by name, each (positions, ...): of a window, and on the device of a part of a batch.
Columns = dict[str, np.ndarray]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Sampling:
    """How an adversary draws tokens: temperature, then top-k, then top-p, in the order of
    transformers' `generate`.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        """ValueError for a setting that makes no sense."""
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be above 0 and finite, got {self.temperature!r}; greedy needs "
                "none"
            )
        self.processors()  # these check the other two

    def processors(self) -> LogitsProcessorList:
        """What transformers applies to logits before it draws."""
        temperature = TemperatureLogitsWarper(float(self.temperature))
        processors: list[LogitsProcessor] = [temperature]
        if self.top_k is not None:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            processors.append(TopPLogitsWarper(self.top_p))
        return LogitsProcessorList(processors)


@dataclass(frozen=True)
class Score:
    """What a model does with a window of T ids, the last S of which are its suffix.

    Arrays of length T - 1 are about ids[1:], each given all ids before it.

    greedy: int64 (T-1,) teacher-forced argmax.
    nll: float32 (T-1,) -log P(token), nats.
    rank: int64 (T-1,) how many entries of the vocabulary have a larger logit; 0 = most probable.
    entropy_mean, entropy_std: float32 (T-1,) mean and standard deviation of log P over the
        vocabulary under P (mu and sigma of Min-K%++, Zhang et al. 2404.02936, section 4).
    log_q: float32 (settings, S) log-probability of each suffix token under each Sampling; -inf if
        it is cut off.
    output: the free-running greedy continuation of the prefix, S tokens or more. It goes on after
        an EOS.
    settled: whether rounding could decide, so that generate decided at batch size 1. `greedy`
        agrees with it up to the first divergence.
    control_nll: float64, nll of ids[first_scored:] under another model; None if there is none.
    beams: the smallest number of beams among those tried that recites the suffix, 0 if none does;
        None if none was tried.
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


@dataclass(eq=False)
class _Row:
    """A window while it is scored.

    columns: the arrays of Score that come from the pass.
    output: that of Score. At first it is what the pass predicts for the suffix, which is right up
        to the first divergence.
    end: how many tokens the prefix and the finished output have together.
    undecided: whether rounding may decide the output.
    settled: see Score.
    """

    window: Window
    columns: Columns
    output: list[int]
    end: int
    undecided: bool = False
    settled: bool = False

    @property
    def known(self) -> list[int]:
        """The prefix, and the output up to the token that first differs from the suffix.

        The prefix 1 2, the suffix 3 4 5 and the output 3 9 7 give 1 2 3 9.
        """
        window = self.window
        agreed = first_divergence(self.output, window.suffix)
        begin = self.output[: agreed + 1]
        ids = window.prefix + begin
        return ids[: len(window.ids)]


class Scorer:
    """Scores windows under one model.

    Args:
        model: a causal language model of transformers, on its device.
        samplings: the settings for log_q.
        beams: numbers of beams to try. A beam search is run, at batch size 1, only if it can find
            the suffix by the ranks of its tokens.
        control: another model, for control_nll.
        batch_tokens: how many tokens a batch may hold; by default PASS_TOKENS, and SEARCH_TOKENS or
            what memory allows for a search.
        output_length: the least number of tokens of an output, as far as the context goes. The
            output for a longer suffix is as long as the suffix.
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
        # In 16 bits only exact match and the first divergence are settled, not the text behind it.
        self._exact = model.dtype == torch.float32
        kind = "cpu" if self.device.type == "cpu" else "other"
        self._pass_tokens = batch_tokens or PASS_TOKENS[kind]
        self._search_tokens = batch_tokens or cache_tokens(model, SEARCH_TOKENS[kind])
        self._halved = False

    def score(self, windows: Sequence[Window]) -> list[Score]:
        """One Score for each window, in their order.

        Exact match, first divergence, likelihoods and ranks come from one forward pass. Rows that
        diverge get a greedy continuation; the output of all others is their suffix. Rows whose
        answer depends on rounding are settled by generate at batch size 1. In float32 every output
        equals that of generate at batch size 1. In 16 bits exact match and the first divergence do;
        the text behind it may depend on the batch.

        If memory runs out, batches are halved.

        Raises:
            ValueError: logits that are not finite; names the window.
        """
        lengths = [len(window.ids) for window in windows]
        longest = max(lengths, default=0)
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
            everything = sum(lengths)
            of_pass = min(self._pass_tokens, everything)
            of_search = min(self._search_tokens, everything)
            self._pass_tokens = max(longest, of_pass // 2)
            self._search_tokens = max(longest, of_search // 2)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @torch.inference_mode()
    def mean_nll(self, windows: Sequence[Window]) -> float:
        """The mean loss of the suffixes of several windows, in nats per token."""
        losses = []
        rows = self._teacher_forced(self.model, windows, _loss)
        for window, columns in zip(windows, rows, strict=True):
            of_suffix = _of_suffix(window, columns["nll"])
            losses.append(of_suffix)
        nll = np.concatenate(losses, dtype=np.float64)
        return float(nll.mean())

    @torch.inference_mode()
    def recited(self, windows: Sequence[Window]) -> list[bool]:
        """Whether each suffix is predicted token for token, teacher-forced.

        Ambiguous tokens are not settled.
        """
        recited = []
        rows = self._teacher_forced(self.model, windows, _predicted)
        for window, columns in zip(windows, rows, strict=True):
            right = _of_suffix(window, columns["right"])
            recited.append(bool(right.all()))
        return recited

    @torch.inference_mode()
    def _score(self, windows: Sequence[Window]) -> list[Score]:
        reduce = partial(_reduce, samplings=self.samplings, exact=self._exact)
        passed = self._teacher_forced(self.model, windows, reduce)
        # Up to the first divergence the output is what the pass predicts.
        rows = list(map(self._row, windows, passed))
        # Then the text behind it, and what remains to be decided row by row.
        self._continue(rows)
        controls = self._control_nll(windows)
        scores = []
        for row, control_nll in zip(rows, controls, strict=True):
            if row.undecided:
                self._settle(row)
            score = Score(
                **row.columns,
                output=row.output,
                settled=row.settled,
                control_nll=control_nll,
                beams=self._least_beams(row),
            )
            scores.append(score)
        return scores

    def _row(self, window: Window, columns: Columns) -> _Row:
        """A row that begins with the output that the pass predicts.

        columns: of `_reduce`. In 16 bits an ambiguous first divergence is settled at once.
        """
        greedy = _of_suffix(window, columns["greedy"])
        margins = _of_suffix(window, columns.pop("margin"))
        log_q = _of_suffix(window, columns["log_q"])
        columns["log_q"] = log_q.T
        output = greedy.tolist()
        row = _Row(window, columns, output, self._end(window))
        threshold = AMBIGUOUS[self.model.dtype]
        close = margins < threshold
        decisive = len(row.known) - window.prefix_length
        ambiguous = bool(close[:decisive].any())
        crosses = False
        if self._switch is not None:
            # The pass used the rotary factors of its own length. Those of the prefix differ.
            crosses = window.prefix_length <= self._switch < row.end
        if ambiguous and not crosses and not self._exact:
            # Behind the last ambiguous token the pass is right again.
            (places,) = close.nonzero()
            last = int(places[-1])
            self._settle(row, until=last + 1)
            ambiguous = False
        row.undecided = ambiguous or crosses
        return row

    def _end(self, window: Window) -> int:
        """How many tokens a window's prefix and its output have together."""
        end = window.prefix_length + self._output_length
        if self._context is not None:
            end = min(end, self._context)
        return max(end, len(window.ids))

    def _control_nll(self, windows: Sequence[Window]) -> list[np.ndarray | None]:
        if self._control is None:
            return [None] * len(windows)
        losses: list[np.ndarray | None] = []
        rows = self._teacher_forced(self._control, windows, _loss)
        for window, columns in zip(windows, rows, strict=True):
            nll = columns["nll"]
            scored = nll[window.first_scored - 1 :]
            losses.append(scored.astype(np.float64))
        return losses

    def _least_beams(self, row: _Row) -> int | None:
        if not self.beams:
            return None
        window = row.window
        ranks = _of_suffix(window, row.columns["rank"])
        return least_beams(
            self.model,
            window.prefix,
            window.suffix,
            ranks.tolist(),
            self.beams,
        )

    def _teacher_forced(
        self,
        model: Any,
        windows: Sequence[Window],
        reduce: Callable[[Tensor, Tensor], Tensors],
    ) -> list[Columns]:
        """One forward pass over windows.

        Args:
            reduce: logits (rows, V) and the ids that follow, (rows,) -> columns (rows, ...). One of
                them is "nll".

        Returns:
            The columns of each window, (T-1, ...).

        Raises:
            ValueError: logits that are not finite.
        """
        results: list[Columns] = [{}] * len(windows)
        for batch in self._batches(windows):
            rows = [windows[i].ids for i in batch]
            ids, attention_mask = _padded(rows, self.device)
            following = ids[:, 1:]
            targets = following.flatten()
            parts = []
            for positions, logits in logits_of(model, ids, attention_mask):
                part = reduce(logits, targets[positions])
                parts.append(part)
            columns = {}
            for name in parts[0]:
                flat = torch.cat([part[name] for part in parts])
                shape = following.shape + flat.shape[1:]
                padded = flat.view(shape)
                columns[name] = padded.cpu().numpy()
            for place, i in enumerate(batch):
                window = windows[i]
                length = len(window.ids) - 1
                own = {}
                for name, column in columns.items():
                    own[name] = column[place, :length]
                is_nan = np.isnan(own["nll"])
                if is_nan.any():
                    raise self._not_finite(window)
                results[i] = own
        return results

    def _batches(self, windows: Sequence[Window]) -> Iterator[list[int]]:
        """Places of windows, those of similar length together.

        The longest come first, so that a batch that is too large fails at once.
        """
        lengths = [len(window.ids) for window in windows]
        places = range(len(windows))
        batch: list[int] = []
        for place in sorted(places, key=lambda i: -lengths[i]):
            longest = lengths[batch[0]] if batch else 0
            needed = (len(batch) + 1) * longest
            full = needed > self._pass_tokens
            # The longest row of a batch decides which rotary factors all of its rows get.
            switches = False
            if self._switch is not None:
                switches = lengths[place] <= self._switch < longest
            if batch and (full or switches):
                yield batch
                batch = []
            batch.append(place)
        if batch:
            yield batch

    def _continue(self, rows: Sequence[_Row]) -> None:
        """Generate the rest of each output from where the pass leaves off.

        Rows are generated in groups, without padding, so all of a group start at one length: that
        of what is known of its first row. What is known of the others beyond that is forced,
        because in 16 bits a batch could decide it differently from `_settle`.
        """
        waiting = []
        for row in rows:
            complete = len(row.known) >= row.end
            if not complete and not row.undecided:
                waiting.append(row)
        waiting.sort(key=lambda row: len(row.known))
        while waiting:
            group = self._group(waiting)
            waiting = [row for row in waiting if row not in group]
            start = len(group[0].known)
            end = max(row.end for row in group)
            begins = []
            forced = []
            for row in group:
                known = row.known
                begins.append(known[:start])
                forced.append(known[start:])
            outputs, margins = continue_greedily(
                self.model,
                torch.tensor(begins, device=self.device),
                end - start,
                forced,
            )
            found = zip(group, outputs.tolist(), margins.tolist(), strict=True)
            for row, output, margin in found:
                window = row.window
                if math.isnan(margin):
                    raise self._not_finite(window)
                ids = row.known[:start] + output
                # The search went on to the end of the longest row.
                row.output = ids[window.prefix_length : row.end]
                # In 16 bits this text may depend on the batch.
                if self._exact:
                    row.undecided = margin < AMBIGUOUS[torch.float32]

    def _group(self, waiting: Sequence[_Row]) -> list[_Row]:
        """The rows that are generated together, the first of `waiting` among them.

        Others join if their prefix is no longer than what is known of the first one, as long as the
        keys and values of all rows fit.
        """
        start = len(waiting[0].known)
        group: list[_Row] = []
        longest = 0
        for row in waiting:
            end = max(longest, row.end)
            needed = (len(group) + 1) * end
            fits = not group or needed <= self._search_tokens
            can_start = row.window.prefix_length <= start
            if can_start and fits:
                group.append(row)
                longest = end
        return group

    def _settle(self, row: _Row, until: int | None = None) -> None:
        """Let generate decide a row at batch size 1.

        Not in batches: those of 2 and of 8 prefixes of one length differed from batch size 1 by up
        to .028 of the largest logit, and in 1 of 96 tokens (SmolLM2-135M, bfloat16, on a CPU).

        until: decide at most so many tokens of the suffix, up to the first divergence, which is
        usually among the first two. By default the whole output is generated.
        """
        window = row.window
        prefix = torch.tensor([window.prefix], device=self.device)
        if until is None:
            tokens = row.end - window.prefix_length
            output = generate(self.model, prefix, tokens)
        else:
            stop = StoppingCriteriaList([Diverged(window.ids)])
            output = generate(self.model, prefix, until, stopping_criteria=stop)
        decided = output[0].tolist()
        rest = row.output[len(decided) :]
        row.output = decided + rest
        row.settled = True
        # Behind the divergence `greedy` stays as the pass predicts it.
        known = row.known[window.prefix_length :]
        greedy = _of_suffix(window, row.columns["greedy"])
        greedy[: len(known)] = known

    def _not_finite(self, window: Window) -> ValueError:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return ValueError(
            f"the logits of {window.split} row {window.index} ({window.name!r:.80}) are not "
            f"finite: the weights are damaged, or too large for {dtype}. Try bfloat16 or float32 "
            "(--dtype)"
        )


def _of_suffix(window: Window, column: np.ndarray) -> np.ndarray:
    """(T-1, ...), about ids[1:] -> (S, ...), about the suffix."""
    return column[window.prefix_length - 1 :]


def _padded(
    rows: Sequence[list[int]],
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    """Rows of ids -> int64 (B, T), and an attention mask of that kind if there is padding.

    Padding is on the right, so no token sees it.
    """
    tensors = [torch.tensor(row) for row in rows]
    ids = pad_sequence(tensors, batch_first=True)
    ones = [torch.ones_like(row) for row in tensors]
    attention_mask = pad_sequence(ones, batch_first=True)
    # Without a mask the model may take a faster path.
    if attention_mask.all():
        return ids.to(device), None
    return ids.to(device), attention_mask.to(device)


def _of_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits (rows, V) -> those of one target in each row, (rows,)."""
    gathered = logits.gather(-1, targets[:, None])
    return gathered[:, 0]


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.logsumexp(-1) - _of_targets(logits, targets)


def _loss(logits: Tensor, targets: Tensor) -> Tensors:
    return {"nll": _nll(logits, targets)}


def _predicted(logits: Tensor, targets: Tensor) -> Tensors:
    right = logits.argmax(-1) == targets
    return {"right": right, "nll": _nll(logits, targets)}


def _reduce(
    logits: Tensor,
    targets: Tensor,
    samplings: Sequence[Sampling],
    exact: bool,
) -> Tensors:
    """Float32 logits (rows, V) -> the columns of Score, (rows,); log_q is (rows, settings).

    One more column is "margin", how clear each decision is. exact: every token of the output
    matters, so it compares the two largest logits. Otherwise only agreement with the target
    matters, so it compares the largest logit with the target's, or with the second largest if the
    target is predicted.
    """
    target = _of_targets(logits, targets)
    rank = (logits > target[:, None]).sum(-1)
    top, places = logits.topk(2)
    largest, second = top.unbind(-1)
    greedy = places[:, 0]
    tied = largest == second
    if tied.any():
        greedy[tied] = logits[tied].argmax(-1)  # the first of equals, as in generate
    rival = second
    if not exact:
        rival = torch.where(rank == 0, second, target)

    # Moments of s = logit - largest logit under P. log P is s - log(sum of exp(s)). exp(-1000) is 0
    # in float32, while s = -inf would make exp(s) * s NaN.
    s = logits - largest[:, None]
    s.clamp_(min=-1000)
    weights = s.exp()
    total = weights.sum(-1)
    log_total = total.log()
    # One tensor of this size is enough: it becomes exp(s) * s, then exp(s) * s * s.
    weights *= s
    mean = weights.sum(-1) / total
    weights *= s
    mean_square = weights.sum(-1) / total
    # Rounding may make the variance negative if one token has nearly all of P.
    variance = mean_square - mean.square()
    entropy_mean = mean - log_total
    entropy_std = variance.clamp_(min=0).sqrt()
    nll = log_total + (largest - target)

    log_q = nll.new_empty(len(nll), len(samplings))
    for column, sampling in enumerate(samplings):
        if sampling == Sampling():
            log_q[:, column] = -nll
        else:
            processors = sampling.processors()
            log_q[:, column] = -_nll(processors(None, logits), targets)
    return {
        "greedy": greedy,
        "nll": nll,
        "rank": rank,
        "margin": relative_margin(largest, rival),
        "entropy_mean": entropy_mean,
        "entropy_std": entropy_std,
        "log_q": log_q,
    }
