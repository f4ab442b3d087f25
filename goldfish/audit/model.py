"""What an audit runs of a model: its logits, a few rows at a time, and its `generate`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
)

from goldfish.unwrap import device_of, vocabulary_of

# Bytes of float32 logits that are alive at a time.
LOGITS_BUDGET = {"cpu": 2**26, "other": 2**31}


def logits_of(
    model: Any,
    ids: Tensor,
    attention_mask: Tensor | None,
) -> Iterator[tuple[slice, Tensor]]:
    """The logits of a model's own forward, a few rows at a time, so that (B, T, V) is never held.

    Args:
        ids: int64 (B, T); the logits are of positions 0 ... T - 2, which predict ids[:, 1:].
        attention_mask: int64 (B, T), 0 for padding on the right; None where there is none.

    Yields:
        which of the B * (T - 1) positions come, and their logits, float32 (positions, V).
    """
    kind = "cpu" if ids.device.type == "cpu" else "other"
    positions = LOGITS_BUDGET[kind] // (4 * vocabulary_of(model))
    length = ids.shape[1] - 1
    rows = max(1, positions // (length + 1))
    # A quarter at a time in float32: what is done with them fits in the caches.
    step = max(1, positions // 4)
    for first in range(0, len(ids), rows):
        some = slice(first, first + rows)
        attended = None if attention_mask is None else attention_mask[some]
        output = model(input_ids=ids[some], attention_mask=attended, use_cache=False)
        logits = output.logits[:, :-1].flatten(0, 1)
        for start in range(0, len(logits), step):
            part = logits[start : start + step].float()
            place = first * length + start
            yield slice(place, place + len(part)), part


def cache_tokens(model: Any, most: int) -> int:
    """How many tokens of keys and values fit in half of the free memory, at most `most`."""
    config = model.config.get_text_config()
    try:
        heads = getattr(config, "num_key_value_heads", None)
        heads = heads or config.num_attention_heads
        width = getattr(config, "head_dim", None)
        width = width or config.hidden_size // config.num_attention_heads
        # A key and a value of each head in each layer.
        numbers = 2 * config.num_hidden_layers * heads * width
    except AttributeError:  # no attention, so no cache that grows
        return most
    device = device_of(model)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    fit = int(free // 2 // (numbers * model.dtype.itemsize))
    return max(1, min(most, fit))


def generate(
    model: Any,
    prefixes: Tensor,
    tokens: int,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Tensor:
    """What `model.generate` adds to prefixes (B, P), (B, tokens at most); greedy, if settings do
    not say otherwise. The checkpoint's own generation settings are ignored.

    settings: of a GenerationConfig. options: of `model.generate`.
    """
    chosen = {"do_sample": False, "max_new_tokens": tokens, "pad_token_id": 0}
    configuration = GenerationConfig(**{**chosen, **(settings or {})})
    attended = torch.ones_like(prefixes)
    # generate() fills what its configuration leaves open from the model's own, so that one is put
    # aside.
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        output: Tensor = model.generate(
            prefixes,
            attention_mask=attended,
            generation_config=configuration,
            **options,
        )
    finally:
        model.generation_config = own
    return output[:, prefixes.shape[1] :]


def continue_greedily(
    model: Any,
    prefixes: Tensor,
    tokens: int,
    known: Sequence[Sequence[int]] = (),
) -> tuple[Tensor, Tensor]:
    """The greedy continuation (B, tokens) of prefixes (B, P) and each row's least relative margin
    (B,).

    The checkpoint's generation settings (repetition penalty and the like) are ignored, and an EOS
    does not stop it.

    Args:
        known: the first tokens of each continuation, of any number.
    """
    margins = Margins()
    processors = LogitsProcessorList([margins])
    if any(known):
        processors.append(Forced(known, prefixes.device))
    output = generate(model, prefixes, tokens, logits_processor=processors)
    assert margins.least is not None
    return output, margins.least


class Margins(LogitsProcessor):
    """Watches a greedy search: `least` is each row's least (largest logit - second) / max(1,
    |largest|), (B,).
    """

    least: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        largest, second = scores.topk(2).values.unbind(-1)
        now = relative_margin(largest, second)
        self.least = now if self.least is None else torch.minimum(self.least, now)
        return scores


class Forced(LogitsProcessor):
    """Makes the rows of a search begin with tokens that are known.

    For [[7, 8], [5], []] the first step gives 7, 5 and its own choice, the second 8 and two of
    its own.
    """

    def __init__(self, known: Sequence[Sequence[int]], device: torch.device) -> None:
        longest = max(map(len, known))
        padded = []
        for row in known:
            free = longest - len(row)
            padded.append([*row, *[-1] * free])
        # One column for each step, (B,) token ids; -1 is a free choice.
        self._columns = iter(torch.tensor(padded, device=device).unbind(-1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        column = next(self._columns, None)
        if column is None:
            return scores
        chosen = torch.where(column < 0, scores.argmax(-1), column)
        nothing = torch.full_like(scores, -math.inf)
        return nothing.scatter(-1, chosen[:, None], 0.0)


class Diverged(StoppingCriteria):
    """Ends the search of one row at the first token that is not the next of `ids`.

    ids: the prefix of the row, and the tokens that should follow.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = ids

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        expected = self._ids[input_ids.shape[1] - 1]
        return input_ids[:, -1] != expected


def relative_margin(largest: Tensor, second: Tensor) -> Tensor:
    """How far the second largest logit is away, in units of the largest (1 for small ones)."""
    return (largest - second) / largest.abs().clamp(min=1)


def least_beams(
    model: Any,
    prefix: Sequence[int],
    suffix: Sequence[int],
    ranks: Sequence[int],
    tried: Sequence[int],
) -> int:
    """The least number of beams among `tried` whose search says `suffix` first; 0 if none does.

    ranks: of the suffix's tokens, teacher-forced. Each beam's B * max(2, 1 + n_eos) likeliest
    tokens are all that a search with B beams looks at (`generate`; n_eos is 0 here), so a rank
    beyond them answers without a search.
    """
    ids = torch.tensor([prefix], device=device_of(model))
    for beams in sorted(tried):
        if max(ranks) >= 2 * beams:
            continue
        found = generate(model, ids, len(suffix), settings={"num_beams": beams})
        if found[0].tolist() == list(suffix):
            return beams
    return 0
