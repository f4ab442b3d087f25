"""Windows -> scores. The only file of the audit that runs a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from goldfish.audit.windows import Window

LOGITS_BUDGET = 2**28  # bytes of float32 logits that a batch may make; a larger batch was no faster on a CPU

TOKENS_BUDGET = 2**16  # tokens that a batch may hold, prefixes included


@dataclass(frozen=True)
class Score:
    """What a model does with a window; all lists have one entry a suffix token.

    greedy: teacher-forced argmax, given the true tokens before. nll: -log P(token | all before), nats.
    output: the free-running greedy continuation. It equals the suffix exactly where `greedy` does, so it is
    generated only for the other windows.
    """

    greedy: list[int]
    nll: list[float]
    output: list[int]


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
    rows_of_logits = LOGITS_BUDGET // (4 * suffix_length * model.config.get_text_config().vocab_size)
    batch_size = max(1, min(rows_of_logits, TOKENS_BUDGET // len(windows[0].ids)))
    scores: list[Score] = []
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(windows), batch_size):
            batch = windows[first : first + batch_size]
            ids = torch.tensor([window.ids for window in batch], device=model.device)
            greedy, nll = _teacher_forced(model, ids, suffix_length)
            output = greedy.clone()
            diverged = (greedy != ids[:, prefix_length:]).any(-1)
            if diverged.any():
                output[diverged] = _continue_greedily(model, ids[diverged, :prefix_length], suffix_length)
            for row in zip(greedy.tolist(), nll.tolist(), output.tolist(), strict=True):
                scores.append(Score(*row))
            progress(len(batch))
    finally:
        model.train(was_training)
    return scores


@torch.inference_mode()
def _teacher_forced(model: Any, ids: Tensor, suffix_length: int) -> tuple[Tensor, Tensor]:
    """Argmax and negative log-likelihood (float32) of the last suffix_length tokens, both (B, suffix_length)."""
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=suffix_length + 1).logits
    logits = logits[:, -suffix_length - 1 : -1].float()
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, -suffix_length:], reduction="none")
    return logits.argmax(-1), nll


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
