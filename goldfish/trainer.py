"""Goldfish in a Hugging Face Trainer. The only file that imports transformers.Trainer."""

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from goldfish.labels import IGNORE_INDEX, GoldfishCollator, mask_batch
from goldfish.loss import GoldfishLoss
from goldfish.receipt import read_receipt, write_receipt
from goldfish.rule import Goldfish


class GoldfishMixin(Trainer):
    """Makes any Trainer class train with the goldfish loss: `class MyTrainer(GoldfishMixin, SFTTrainer): ...`

    The labels of training batches are masked just before Trainer counts their targets, so the loss is the sum over
    kept tokens divided by their number over the whole optimiser step, whatever the accumulation or the number of
    processes. Evaluation and prediction never see the rule. Logs gain `goldfish/drop_rate`, the share of targets
    dropped since the last log; every checkpoint gains goldfish.json.

    Args:
        goldfish: the rule; everything else is the Trainer's.
    """

    # A subclass of Trainer for its types only: in front of another trainer class, super() finds that class.

    goldfish: Goldfish

    def __init__(self, *args: Any, goldfish: Goldfish, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._start_goldfish(goldfish)

    def _start_goldfish(self, rule: Goldfish) -> None:
        if not isinstance(rule, Goldfish):
            raise TypeError(f"goldfish must be a Goldfish rule such as Goldfish(k=4, h=13), got {rule!r}")
        if isinstance(self.compute_loss_func, GoldfishLoss) or isinstance(self.data_collator, GoldfishCollator):
            raise ValueError(
                "this trainer already drops tokens in its compute_loss_func or data_collator; "
                "take GoldfishLoss or GoldfishCollator out, the trainer's rule does their work"
            )
        self.goldfish = rule
        self._totals = (0, 0)  # targets and dropped ones, all processes, since training began
        self._logged = (0, 0)  # the same at the last log
        self._counted = torch.zeros(2, dtype=torch.int64, device=self.args.device)  # this process, since _sync_counts

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | int | None]:
        masked = map(self._mask_and_count, epoch_iterator)
        batches, num_items = super().get_batch_samples(masked, num_batches, device)
        if num_items is not None:  # no kept token in the whole step: the loss is a zero, not 0 / 0
            num_items = num_items.clamp(min=1) if torch.is_tensor(num_items) else max(num_items, 1)
        return batches, num_items

    def _mask_and_count(self, batch: dict[str, Any]) -> dict[str, Any]:
        masked = mask_batch(self.goldfish, batch)
        before = (batch.get("labels", batch["input_ids"])[..., 1:] != IGNORE_INDEX).sum()
        after = (masked["labels"][..., 1:] != IGNORE_INDEX).sum()
        self._counted += torch.stack([before, before - after]).to(self._counted.device)
        return masked

    def _sync_counts(self) -> None:
        """Add up what all processes counted. Every process must call it."""
        counted = self.accelerator.reduce(self._counted, "sum").tolist()
        self._counted.zero_()
        self._totals = (self._totals[0] + counted[0], self._totals[1] + counted[1])

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs or "train_runtime" in logs:  # where Trainer calls this in every process
            self._sync_counts()
            targets, dropped = (now - then for now, then in zip(self._totals, self._logged, strict=True))
            if "loss" in logs and targets > 0:
                logs["goldfish/drop_rate"] = dropped / targets
                self._logged = self._totals
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if _internal_call:  # Trainer's own checkpoints are made by all processes, a user's call perhaps by one
            self._sync_counts()
        if self.args.should_save:
            write_receipt(
                output_dir or self.args.output_dir,
                self.goldfish,
                tokenizer=self.processing_class,
                targets=self._totals[0],
                dropped=self._totals[1],
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        self._totals = self._logged = (0, 0)
        self._counted.zero_()
        receipt = read_receipt(checkpoint) if checkpoint else None
        if receipt is not None:
            if receipt["rule"] != self.goldfish:
                raise ValueError(
                    f"{checkpoint} was trained under {receipt['rule']}, this trainer has {self.goldfish}; "
                    "resume with the same rule, or start a new run from its weights (model, not resume_from_checkpoint)"
                )
            self._totals = self._logged = (receipt["targets"], receipt["dropped"])
        return super().train(resume_from_checkpoint, *args, **kwargs)


class GoldfishTrainer(GoldfishMixin):
    """transformers.Trainer with the goldfish loss: `GoldfishTrainer(model, args, train_dataset=ds, goldfish=rule)`."""


AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


def attach(trainer: AnyTrainer, rule: Goldfish) -> AnyTrainer:
    """Make an existing trainer (Trainer, TRL's SFTTrainer, your own) train with the goldfish loss; returns it.

        trainer = attach(SFTTrainer(model, args, train_dataset=ds), Goldfish(k=4, h=13))

    The instance becomes one of a subclass of its class with `GoldfishMixin` in front; see there for what changes.

    Raises:
        TypeError: not a Trainer, not a rule.
        ValueError: a trainer that already drops tokens.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(f"attach needs a transformers.Trainer or a subclass of it, got {type(trainer).__name__}")
    if isinstance(trainer, GoldfishMixin):
        raise ValueError(f"this trainer already has a rule, {trainer.goldfish}; set trainer.goldfish to change it")
    plain = trainer.__class__
    with_goldfish = type(f"Goldfish{plain.__name__}", (GoldfishMixin, plain), {"__module__": plain.__module__})
    try:
        trainer.__class__ = with_goldfish
        trainer._start_goldfish(rule)
    except BaseException:
        trainer.__class__ = plain
        raise
    return trainer
