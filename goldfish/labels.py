"""The rule meets batches: labels with -100 where a token is dropped."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from goldfish.rule import Goldfish

IGNORE_INDEX = -100  # what torch's cross-entropy and Hugging Face's models leave out of the loss


def mask_labels(
    rule: Goldfish,
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """`labels` with ignore_index where `rule` drops the token; everything else as it was.

    Labels are aligned as Hugging Face's models take them: labels[i] is the token input_ids[i] (or ignore_index),
    and the model shifts. The decision is made from input_ids, so a masked-out prompt still counts as context.

    Args:
        rule: says which tokens are dropped.
        input_ids: integers, (T,) or (B, T).
        labels: integers of the same shape; by default input_ids, with ignore_index where attention_mask is 0.
        position_ids, attention_mask: as for `Goldfish.dropped`: document starts, padding.
        ignore_index: the value that means "no target".

    Returns:
        A new tensor of the shape, dtype and device of labels.

    Raises:
        TypeError, ValueError: as `Goldfish.dropped`; ValueError for labels of another shape than input_ids.
    """
    # Strategy "random" takes its draws from torch's CPU generator, which Trainer seeds, saves and restores.
    draw = int(torch.randint(2**62, ())) if rule.strategy == "random" else 0
    dropped = rule.dropped(input_ids, position_ids, attention_mask=attention_mask, draw=draw)
    if labels is None:
        labels = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, ignore_index)
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels must have the shape of input_ids, {tuple(input_ids.shape)}, got {tuple(labels.shape)}; "
            "labels are not shifted here, the model does that"
        )
    return labels.masked_fill(dropped, ignore_index)


def mask_batch(rule: Goldfish, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a Hugging Face batch with its labels (and shift_labels, where a collator made them) masked.

    Uses the batch's input_ids, position_ids and a two-dimensional attention_mask.

    Raises:
        ValueError: a batch without input_ids.
    """
    if "input_ids" not in batch:
        raise ValueError(f"the rule decides from input_ids, but the batch holds only {', '.join(batch) or 'nothing'}")
    input_ids, attention_mask = batch["input_ids"], batch.get("attention_mask")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        attention_mask = None  # a (B, 1, T, T) mask says who sees whom; padding is then marked by labels alone
    labels = mask_labels(
        rule,
        input_ids,
        batch.get("labels"),
        position_ids=batch.get("position_ids"),
        attention_mask=attention_mask,
    )
    masked = {**batch, "labels": labels}
    if "shift_labels" in batch:
        gone = torch.nn.functional.pad(labels[..., 1:] == IGNORE_INDEX, (0, 1), value=True)
        masked["shift_labels"] = batch["shift_labels"].masked_fill(gone, IGNORE_INDEX)
    return masked


@dataclass
class GoldfishCollator:
    """A data collator that masks what another one made: `DataLoader(ds, collate_fn=GoldfishCollator(inner, rule))`.

    For loops of your own; give it to the training DataLoader only. A Trainer uses one collator for training and
    evaluation, so there it would change the evaluation loss: use GoldfishTrainer or attach(trainer, rule) instead.

    Args:
        inner: any collator whose batch holds input_ids of shape (B, T) and, if it likes, labels, attention_mask,
            position_ids.
        rule: says which tokens are dropped.
    """

    inner: Callable[..., Mapping[str, Any]]
    rule: Goldfish

    def __call__(self, features: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return mask_batch(self.rule, self.inner(features, *args, **kwargs))
