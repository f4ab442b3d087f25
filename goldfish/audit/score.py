"""Windows -> scores. The only file of the audit that runs a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from goldfish.audit.windows import Window

LOGITS_BUDGET = 2**28  # bytes of float32 logits that a batch may make; a larger batch was no faster on a CPU

TOKENS_BUDGET = 2**16  # tokens that a batch may hold, prefixes included


@dataclass(frozen=True)
class Sampling:
    """How an adversary samples: the logits over a temperature, cut to the top_k largest, then to the top_p nucleus."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


@dataclass(frozen=True)
class Score:
    """What a model does with a window of T ids. Arrays (T-1,) speak of ids[1:], each given all ids before it."""

    greedy: np.ndarray  # int64 (T-1,) teacher-forced argmax
    nll: np.ndarray  # float32 (T-1,) -log P(token), nats
    rank: np.ndarray  # int64 (T-1,) entries of the vocabulary with a larger logit; 0: the most probable
    margin: np.ndarray  # float32 (T-1,) largest logit minus the second largest
    entropy_mean: np.ndarray  # float32 (T-1,) mean of log P over the vocabulary under P (mu of Min-K%++)
    entropy_std: np.ndarray  # float32 (T-1,) its standard deviation (sigma of Min-K%++)
    log_q: np.ndarray  # float32 (settings, S) log-probability of the suffix under each Sampling; -inf where cut off
    output: list[int]  # (S,) the free-running greedy continuation of the prefix
    settled: bool = False  # an ambiguous row (16-bit) decided by generate at batch size 1
    lowercase_nll: float | None = None  # mean nll (nats/token) of the window's text in lower case; on request
    control_nll: float | None = None  # mean nll of the same ids under the control checkpoint
    beams: int | None = None  # the least number of beams among those tried that recites; 0: none; None: not tried


def score(model: Any, windows: Sequence[Window], progress: Callable[[int], None] = lambda done: None) -> list[Score]:
    """Score windows of equal length; `progress` is told how many windows each batch finished.

    One forward pass answers exact match, first divergence, teacher-forced accuracy and likelihood; a greedy
    continuation is generated for the windows that diverge. Both ignore the checkpoint's generation settings
    (repetition penalty and the like) and go on through an EOS, so that they mean the same thing.
    """
    if not windows:
        return []
    prefix_length = windows[0].prefix_length
    suffix_length = len(windows[0].suffix)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and len(windows[0].ids) > longest:
        raise ValueError(
            f"windows of {prefix_length} + {suffix_length} tokens do not fit this model's context of {longest} tokens; "
            "ask for a shorter prefix or suffix"
        )
    rows_of_logits = LOGITS_BUDGET // (4 * len(windows[0].ids) * model.config.get_text_config().vocab_size)
    batch_size = max(1, min(rows_of_logits, TOKENS_BUDGET // len(windows[0].ids)))
    scores: list[Score] = []
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(windows), batch_size):
            batch = windows[first : first + batch_size]
            ids = torch.tensor([window.ids for window in batch], device=model.device)
            forced = _teacher_forced(model, ids)
            output = forced[0][:, prefix_length - 1 :].clone()
            diverged = (output != ids[:, prefix_length:]).any(-1)
            if diverged.any():
                output[diverged] = _continue_greedily(model, ids[diverged, :prefix_length], suffix_length)
            for i, continuation in enumerate(output.tolist()):
                greedy, nll, rank, margin, mean, std = (each[i].cpu().numpy() for each in forced)
                log_q = -nll[None, prefix_length - 1 :]
                scores.append(Score(greedy, nll, rank, margin, mean, std, log_q, continuation))
            progress(len(batch))
    finally:
        model.train(was_training)
    return scores


@torch.inference_mode()
def _teacher_forced(model: Any, ids: Tensor) -> tuple[Tensor, ...]:
    """The first six fields of Score for a batch."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    log_probs = logits.log_softmax(-1)
    mean = (log_probs.exp() * log_probs).sum(-1)
    variance = (log_probs.exp() * (log_probs - mean[..., None]).square()).sum(-1)
    target = ids[:, 1:, None]
    top = logits.topk(2, -1).values
    return (
        logits.argmax(-1),
        -log_probs.gather(-1, target)[..., 0],
        (logits > logits.gather(-1, target)).sum(-1),
        top[..., 0] - top[..., 1],
        mean,
        variance.sqrt(),
    )


@torch.inference_mode()
def _continue_greedily(model: Any, prefix: Tensor, suffix_length: int) -> Tensor:
    """The greedy continuation of prefixes of equal length, (B, suffix_length)."""
    from transformers import GenerationConfig

    own_settings = model.generation_config
    # generate() fills what its configuration leaves open from the model's own, so that one is put aside.
    model.generation_config = GenerationConfig()
    try:
        settings = GenerationConfig(do_sample=False, max_new_tokens=suffix_length, pad_token_id=0)
        output = model.generate(prefix, attention_mask=torch.ones_like(prefix), generation_config=settings)
    finally:
        model.generation_config = own_settings
    continuation: Tensor = output[:, prefix.shape[1] :]
    return continuation
