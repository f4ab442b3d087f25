"""A gauge of memorization during training: the loss on kept tokens beside that on dropped ones.

Dropped tokens are held-out targets inside the training data: the model reads them as context and is
never taught to predict them. What it has learned in general lowers the loss of both kinds; what it
has memorized lowers only that of the kept tokens. So their difference, `goldfish/gap`, starts near
0 and grows with memorization. Both are measured on the same rows in the same forward pass.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from goldfish.masking import IGNORE_INDEX
from goldfish.unwrap import bare_model, evaluation_mode

# Logits that exist during a measurement: 256 MB of fp32. Longer rows are cut.
LOGITS_BUDGET = 2**26
# The share of the training time that measuring may take, unless a single row takes more.
SHARE = 0.01


def rows_to_measure(batch_rows: int, rows_a_step: int, steps: float) -> int:
    """How many rows of a batch may be measured, for SHARE of the time of `steps` steps.

    A forward pass takes about a third of a training step of the same rows.

    >>> rows_to_measure(batch_rows=8, rows_a_step=8, steps=10)  # 1% of 80 rows' steps
    2
    """
    trained_rows = rows_a_step * max(1.0, steps)
    affordable = int(3 * SHARE * trained_rows)
    return max(1, min(batch_rows, affordable))


def is_text(batch: Mapping[str, Any]) -> bool:
    """Whether the first rows of a batch make a batch.

    They do not if it holds pixel_values or input_features, which have other rows.
    """
    length = batch["input_ids"].shape[-1]
    for value in batch.values():
        is_input = isinstance(value, Tensor) and value.is_floating_point()
        if is_input and value.shape[-1:] != (length,):
            return False
    return True


@torch.no_grad()
def measure(
    model: nn.Module,
    batch: Mapping[str, Any],
    dropped: Tensor,
    rows: int,
) -> Tensor:
    """Sums over the first `rows` rows of a batch, float64 (4,).

    They are the nll (nats) and the number of the kept targets, and the same of the dropped ones.

    Args:
        model: as it trains; it is measured in evaluation mode, without gradient.
        batch: of text (`is_text`), with its labels before masking, (B, T).
        dropped: bool (B, T).
    """
    vocabulary = bare_model(model).config.get_text_config().vocab_size
    length = max(2, LOGITS_BUDGET // (rows * vocabulary))
    inputs = _first(batch, rows, length)
    labels = inputs.pop("labels")[:, 1:]
    inputs.pop("shift_labels", None)
    with evaluation_mode(model):
        logits = model(**inputs).logits
    # Counted from the end: prompt tuning puts virtual tokens in front. The last position predicts
    # a token that no row has.
    logits = logits[:, -labels.shape[1] - 1 : -1]
    nll = nn.functional.cross_entropy(
        logits.float().transpose(1, 2),
        labels,
        ignore_index=IGNORE_INDEX,
        reduction="none",
    )
    nll = nll.double()
    is_target = labels != IGNORE_INDEX
    is_dropped = dropped[:rows, 1:length]
    sums = []
    for targets in (is_target & ~is_dropped, is_target & is_dropped):
        sums += [(nll * targets).sum(), targets.sum()]
    return torch.stack(sums)


def _first(batch: Mapping[str, Any], rows: int, length: int) -> dict[str, Tensor]:
    """The first `rows` rows and `length` columns of a batch of text."""
    shape = batch["input_ids"].shape
    first = {}
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            continue
        if name == "position_ids":
            # (B, T), (1, T), or (3 or 4, B, T) if images have positions of their own
            first[name] = value[..., :rows, :length]
        elif name == "attention_mask" and value.ndim == 4:
            # (B, 1, T, T): which tokens see each other
            first[name] = value[:rows, :, :length, :length]
        elif value.shape == shape:
            first[name] = value[:rows, :length]
    return first


def readings(sums: Tensor) -> dict[str, float]:
    """What is logged, in nats per token; nothing without a kept and a dropped target."""
    kept_nll, kept, dropped_nll, dropped = sums.tolist()
    if not (kept and dropped):
        return {}
    kept_loss = kept_nll / kept
    dropped_loss = dropped_nll / dropped
    return {
        "goldfish/kept_loss": kept_loss,
        "goldfish/dropped_loss": dropped_loss,
        "goldfish/gap": dropped_loss - kept_loss,
    }
