"""The live gauge: how much a model memorises beyond what it generalises, while it trains.

Dropped tokens are held-out targets inside the training data. Their loss beside that of kept tokens of the same rows,
both without gradient, says what the model knows by having been taught it and not by having understood it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from goldfish.fused import bare_model
from goldfish.labels import IGNORE_INDEX

LOGITS_BUDGET = 2**26  # logits that a measurement may hold: 256 MB of fp32; longer rows are cut
SHARE = 0.01  # of the training time, at most; a forward takes about a third of a step


def rows_to_measure(batch_rows: int, rows_a_step: int, logging_steps: float) -> int:
    """How many rows of a batch a measurement may run, so that it stays within SHARE of the time between two logs."""
    steps = max(1.0, logging_steps)
    return max(1, min(batch_rows, int(3 * SHARE * rows_a_step * steps)))


@torch.no_grad()
def measure(model: nn.Module, batch: Mapping[str, Any], dropped_labels: Tensor, rows: int) -> Tensor:
    """Sums over the first `rows` rows of a batch: nll (nats) and number of kept targets, the same of dropped ones.

    Args:
        model: a Hugging Face causal language model; it is put into evaluation mode for the moment.
        batch: its inputs, with labels as they were before masking.
        dropped_labels: the labels (B, T) after masking.
        rows: how many rows to run.

    Returns:
        float64 (4,): kept nll, kept targets, dropped nll, dropped targets.
    """
    inputs = {
        name: value
        for name, value in batch.items()
        if name in ("input_ids", "attention_mask", "position_ids") and isinstance(value, Tensor)
    }
    length = max(2, LOGITS_BUDGET // (rows * _vocabulary(model)))
    cut = {name: value[:rows, :length] if value.ndim == 2 else value[:rows] for name, value in inputs.items()}
    labels = batch["labels"][:rows, 1:length]
    was_training = model.training
    model.eval()
    try:
        logits = model(**cut).logits[:, :-1]
    finally:
        model.train(was_training)
    nll = nn.functional.cross_entropy(
        logits.float().transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none"
    ).double()
    target = labels != IGNORE_INDEX
    kept = target & (dropped_labels[:rows, 1:length] != IGNORE_INDEX)
    dropped = target & ~kept
    return torch.stack([(nll * kept).sum(), kept.sum(), (nll * dropped).sum(), dropped.sum()])


def _vocabulary(model: nn.Module) -> int:
    return int(bare_model(model).config.get_text_config().vocab_size)


def readings(sums: Tensor) -> dict[str, float]:
    """What the log says, in nats per token; nothing where one of the two has no target."""
    kept_nll, kept, dropped_nll, dropped = sums.tolist()
    if not (kept and dropped):
        return {}
    kept_loss, dropped_loss = kept_nll / kept, dropped_nll / dropped
    return {
        "goldfish/kept_loss": kept_loss,
        "goldfish/dropped_loss": dropped_loss,
        "goldfish/gap": dropped_loss - kept_loss,
    }
