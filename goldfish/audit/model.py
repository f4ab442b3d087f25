"""What an audit runs on a model: its forward pass, a few rows at a time, and its `generate`."""

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

# Bytes of float32 logits in memory at a time.
LOGITS_BUDGET = {"cpu": 2**26, "other": 2**31}


def logits_of(
    model: Any,
    ids: Tensor,
    attention_mask: Tensor | None,
) -> Iterator[tuple[slice, Tensor]]:
    """The logits of a model's own forward, a few rows at a time, so that (B, T, V) is never held.

    Args:
        ids: int64 (B, T); the logits are of positions 0 ... T - 2, which predict ids[:, 1:].
        attention_mask: int64 (B, T), 0 for padding on the right; None if there is no padding.

    Yields:
        a slice of the B * (T - 1) positions, and their logits, float32 (positions, V).
    """
    kind = "cpu" if ids.device.type == "cpu" else "other"
    bytes_per_position = 4 * vocabulary_of(model)
    positions = LOGITS_BUDGET[kind] // bytes_per_position
    length = ids.shape[1] - 1
    # The forward pass computes the logits of the last position too.
    rows = max(1, positions // (length + 1))
    # Only a quarter is converted to float32 at once, so that what follows stays in the caches.
    step = max(1, positions // 4)
    for first in range(0, len(ids), rows):
        some = slice(first, first + rows)
        attended = None
        if attention_mask is not None:
            attended = attention_mask[some]
        output = model(input_ids=ids[some], attention_mask=attended, use_cache=False)
        logits = output.logits[:, :-1].flatten(0, 1)
        for start in range(0, len(logits), step):
            part = logits[start : start + step].float()
            place = first * length + start
            yield slice(place, place + len(part)), part


def cache_tokens(model: Any, most: int) -> int:
    """How many tokens' keys and values fit in half of the free memory, at most `most`."""
    config = model.config.get_text_config()
    try:
        heads = getattr(config, "num_key_value_heads", None)
        heads = heads or config.num_attention_heads
        width = getattr(config, "head_dim", None)
        width = width or config.hidden_size // config.num_attention_heads
        # Each layer stores a key and a value for each head.
        numbers = 2 * config.num_hidden_layers * heads * width
    except AttributeError:  # no attention, so the cache does not grow
        return most
    device = device_of(model)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = psutil.virtual_memory().available
    bytes_per_token = numbers * model.dtype.itemsize
    fit = int(free // 2 // bytes_per_token)
    return max(1, min(most, fit))


def generate(
    model: Any,
    prefixes: Tensor,
    tokens: int,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Tensor:
    """What `model.generate` adds to prefixes (B, P): int64 (B, at most `tokens`).

    The search is greedy by default. The checkpoint's own generation settings are ignored.

    Args:
        settings: of a GenerationConfig, such as num_beams.
        options: of `model.generate`.
    """
    chosen: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": tokens,
        "pad_token_id": 0,
    }
    chosen |= settings or {}
    # generate() takes what its configuration leaves open from the model's own configuration. That
    # one is put aside meanwhile.
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        output: Tensor = model.generate(
            prefixes,
            attention_mask=torch.ones_like(prefixes),
            generation_config=GenerationConfig(**chosen),
            **options,
        )
    finally:
        model.generation_config = own
    length = prefixes.shape[1]
    return output[:, length:]


def continue_greedily(
    model: Any,
    prefixes: Tensor,
    tokens: int,
    known: Sequence[Sequence[int]],
) -> tuple[Tensor, Tensor]:
    """Continue prefixes greedily. The search goes on after an EOS.

    Args:
        prefixes: int64 (B, P).
        tokens: how many each row gets.
        known: the tokens with which each continuation must begin, any number of them.

    Returns:
        The continuations, int64 (B, tokens), and the smallest relative margin of each row, (B,).
    """
    margins = Margins()
    processors = LogitsProcessorList([margins])
    if any(known):
        processors.append(Forced(known, prefixes.device))
    output = generate(model, prefixes, tokens, logits_processor=processors)
    assert margins.least is not None
    return output, margins.least


class Margins(LogitsProcessor):
    """Watches a greedy search. `least` is the smallest relative margin of each row so far, (B,)."""

    least: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        largest, second = scores.topk(2).values.unbind(-1)
        least = relative_margin(largest, second)
        if self.least is not None:
            least = torch.minimum(self.least, least)
        self.least = least
        return scores


class Forced(LogitsProcessor):
    """Makes each row of a search begin with its known tokens.

    With [[7, 8], [5], []], the first step yields 7, 5 and a free choice, the second 8 and two free
    choices.
    """

    def __init__(self, known: Sequence[Sequence[int]], device: torch.device) -> None:
        longest = max(map(len, known))
        padded = []
        for row in known:
            free = [-1] * (longest - len(row))
            padded.append([*row, *free])
        # One column for each step: int64 (B,) token ids, with -1 for a free choice.
        columns = torch.tensor(padded, device=device).unbind(-1)
        self._columns = iter(columns)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        column = next(self._columns, None)
        if column is None:
            return scores
        chosen = torch.where(column < 0, scores.argmax(-1), column)
        forbidden = torch.full_like(scores, -math.inf)
        return forbidden.scatter(-1, chosen[:, None], 0.0)


class Diverged(StoppingCriteria):
    """Ends the search of a single row as soon as it leaves `ids`, a prefix and its suffix."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = ids

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        last = input_ids.shape[1] - 1
        return input_ids[:, last] != self._ids[last]


def relative_margin(largest: Tensor, second: Tensor) -> Tensor:
    """The gap between two logits, relative to the size of the larger one, or to 1 if that is small.

    Largest 20 and second 19.5 give 0.025; 0.5 and 0.4 give 0.1.
    """
    unit = largest.abs().clamp(min=1)
    return (largest - second) / unit


def least_beams(
    model: Any,
    prefix: Sequence[int],
    suffix: Sequence[int],
    ranks: Sequence[int],
    tried: Sequence[int],
) -> int:
    """The smallest number of beams among `tried` that finds `suffix`; 0 if none does.

    It is found if it is the best result of the search.

    ranks: of the suffix's tokens, teacher-forced; 0 is the most probable.
    """
    ids = torch.tensor([prefix], device=device_of(model))
    worst = max(ranks)
    for beams in sorted(tried):
        # generate() keeps the B * max(2, 1 + n_eos) best candidates of a step with B beams; n_eos
        # is 0 here. A token of a higher rank is never among them, so no search is needed.
        if worst >= 2 * beams:
            continue
        found = generate(model, ids, len(suffix), settings={"num_beams": beams})
        if found[0].tolist() == list(suffix):
            return beams
    return 0
