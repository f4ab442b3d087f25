"""The goldfish loss on logits: cross-entropy over the kept tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from goldfish.linear import divisor
from goldfish.masking import IGNORE_INDEX, mask_labels
from goldfish.rule import Goldfish


class GoldfishLoss(nn.Module):
    """Mean negative log-likelihood of the kept tokens (Hans et al. 2024, equation 1).

    >>> import torch
    >>> from goldfish import Goldfish, GoldfishLoss
    >>> loss = GoldfishLoss(Goldfish(k=4, h=13, max_kept=4))
    >>> input_ids = torch.arange(12)[None]
    >>> loss(torch.zeros(1, 12, 50), input_ids, input_ids=input_ids).exp()  # a uniform guess
    tensor(50.0000)

    In a custom training loop, `GoldfishLoss(rule)(logits, labels, input_ids=input_ids)` equals

        masked = mask_labels(rule, input_ids, labels)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), masked[:, 1:].flatten())

    except that the logits of dropped tokens are not read, and that a batch without a kept token
    gives a zero with a gradient of zero instead of NaN.

    In Trainer, `Trainer(..., compute_loss_func=GoldfishLoss(rule))`; the evaluation loss is then
    the plain one. GoldfishTrainer is better. Trainer passes no input_ids, so the rule decides from
    the labels, as if ignored positions were not there: with a masked prompt from the answer alone,
    and packed rows need document_end. And Trainer counts targets before any is dropped, so the
    batches of a step are weighted by their targets: a difference in the third digit.

    Args:
        rule: decides which tokens are dropped.
        ignore_index: the label that means "no target".
    """

    def __init__(self, rule: Goldfish, ignore_index: int = IGNORE_INDEX) -> None:
        super().__init__()
        self.rule = rule
        self.ignore_index = ignore_index

    def forward(
        self,
        logits: Any,
        labels: Tensor,
        *,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The loss, a scalar in nats per kept token; float32, or float64 for float64 logits.

        Args:
            logits: (B, T, V), or the output of a Hugging Face model, which has them.
            labels: integers (B, T), aligned with input_ids; this function shifts.
            input_ids: integers (B, T), from which the rule decides. Required in a loop, not passed
                by Trainer.
            position_ids, attention_mask: as for `Goldfish.dropped`.
            num_items_in_batch: targets of the whole optimiser step, counted before dropping, as
                Trainer does.

        Raises:
            TypeError, ValueError: as `Goldfish.dropped`; missing labels or input_ids; logits that
                do not fit.
        """
        if labels is None:
            raise ValueError(
                "GoldfishLoss needs labels; a collator such as DataCollatorForLanguageModeling "
                "makes them"
            )
        if input_ids is not None:
            masked = mask_labels(
                self.rule,
                input_ids,
                labels,
                position_ids=position_ids,
                attention_mask=attention_mask,
                ignore_index=self.ignore_index,
            )
        elif isinstance(logits, Tensor):
            raise ValueError(
                "GoldfishLoss needs input_ids in a training loop: "
                "loss(logits, labels, input_ids=input_ids). The rule decides from the ids; labels "
                "hold ignored positions, so they would give other decisions"
            )
        elif not torch.is_grad_enabled():
            masked = labels  # Trainer calls its compute_loss_func in evaluation too
        else:
            # Trainer in training: decide from the labels, as if ignored ones were padding.
            attended = labels != self.ignore_index
            ids = labels.masked_fill(~attended, 0)
            masked = mask_labels(
                self.rule,
                ids,
                labels,
                attention_mask=attended,
                ignore_index=self.ignore_index,
            )
        logits = logits if isinstance(logits, Tensor) else _logits_of(logits)
        if logits.ndim != labels.ndim + 1 or logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit: "
                "expected (B, T, V) and (B, T), not shifted"
            )
        total, kept = _sum_over_targets(logits, masked, self.ignore_index)
        loss = total / kept.clamp(min=1)
        if num_items_in_batch is not None:
            # The mean over the kept tokens of this batch, weighted by its share of the targets of
            # the step, because Trainer adds the losses of the batches up.
            targets = (labels[..., 1:] != self.ignore_index).sum()
            step = torch.as_tensor(num_items_in_batch, device=loss.device)
            loss = loss * targets.to(loss.device) / step.clamp(min=1)
        return loss


def smoothed_loss(
    outputs: Any,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    *,
    epsilon: float,
) -> Tensor:
    """Trainer's label smoothing for masked labels, as its compute_loss_func.

    (1 - epsilon) times the nll plus epsilon times the mean of -log p over the vocabulary, summed
    over the kept tokens and divided by num_items_in_batch.

    transformers' LabelSmoother in 5.10 divides each batch by its own number of tokens, which may be
    0; and no version shifts the labels of a model whose class is not in transformers' list.
    """
    total, kept = _sum_over_targets(_logits_of(outputs), labels, IGNORE_INDEX, epsilon)
    return total / divisor(kept, num_items_in_batch)


def _logits_of(outputs: Any) -> Any:
    return outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]


def _sum_over_targets(
    logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The loss summed over the targets among `labels` (not shifted), and their number.

    In float32 or better.
    """
    targets = labels[..., 1:].to(logits.device)
    kept = targets != ignore_index
    rows = logits[..., :-1, :][kept]
    if rows.dtype != torch.float64:
        rows = rows.float()
    # A sum over no rows is a zero with a graph, so a rank without a kept token still takes part in
    # the backward pass.
    total = nn.functional.cross_entropy(
        rows, targets[kept], reduction="sum", label_smoothing=label_smoothing
    )
    return total, kept.sum()
