"""A live gauge of memorization: how much better a model knows the tokens it was taught than those it was not.

Dropped tokens are held-out targets inside the training data. Their loss beside that of kept tokens of the same rows,
both without gradient, shows what the model has memorized rather than generalized.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from goldfish.fused import bare_model
from goldfish.masking import IGNORE_INDEX

LOGITS_BUDGET = 2**26  # logits that a measurement may hold: 256 MB of fp32; longer rows are cut
SHARE = 0.01  # of the training time, at most; a forward takes about a third of a step


def rows_to_measure(batch_rows: int, rows_a_step: int, steps: float) -> int:
    """How many rows of a batch a measurement may run, to stay within SHARE of the time of the steps between two."""
    return max(1, min(batch_rows, int(3 * SHARE * rows_a_step * max(1.0, steps))))


def is_text(batch: Mapping[str, Any]) -> bool:
    """Whether the first rows of a batch are a batch, as they are not with pixel_values or input_features."""
    length = batch["input_ids"].shape[-1]
    values = [
        value for value in batch.values() if isinstance(value, Tensor) and value.is_floating_point()
    ]
    return all(value.shape[-1:] == (length,) for value in values)


@torch.no_grad()
def measure(model: nn.Module, batch: Mapping[str, Any], dropped: Tensor, rows: int) -> Tensor:
    """Sums over the first `rows` rows of a batch of text (`is_text`), float64 (4,): nll (nats) and number of the kept
    targets, the same of the dropped ones. Its labels (B, T) are those before masking; dropped: bool (B, T).
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    shape = batch["input_ids"].shape
    length = max(2, LOGITS_BUDGET // (rows * bare_model(model).config.get_text_config().vocab_size))
    inputs = {
        name: value[:rows, :length] for name, value in tensors.items() if value.shape == shape
    }
    labels = inputs.pop("labels")[:, 1:]
    inputs.pop("shift_labels", None)
    for name, value in tensors.items():
        if (
            name == "position_ids"
        ):  # (B, T), (1, T), or (3 or 4, B, T) where images have positions of their own
            inputs[name] = value[..., :rows, :length]
        elif (
            name == "attention_mask" and value.ndim == 4
        ):  # (B, 1, T, T): which tokens see each other
            inputs[name] = value[:rows, :, :length, :length]
    was_training = model.training
    model.eval()
    try:
        logits = model(**inputs).logits[
            :, -labels.shape[1] - 1 : -1
        ]  # prompt tuning puts virtual tokens in front
    finally:
        model.train(was_training)
    nll = nn.functional.cross_entropy(
        logits.float().transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none"
    ).double()
    target = labels != IGNORE_INDEX
    groups = target & ~dropped[:rows, 1:length], target & dropped[:rows, 1:length]
    return torch.stack(
        [number for group in groups for number in ((nll * group).sum(), group.sum())]
    )


def readings(sums: Tensor) -> dict[str, float]:
    """What is logged, in nats per token; nothing if there is no kept or no dropped target."""
    kept_nll, kept, dropped_nll, dropped = sums.tolist()
    if not (kept and dropped):
        return {}
    losses = {"goldfish/kept_loss": kept_nll / kept, "goldfish/dropped_loss": dropped_nll / dropped}
    return losses | {"goldfish/gap": dropped_nll / dropped - kept_nll / kept}
