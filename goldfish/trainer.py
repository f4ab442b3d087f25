"""The goldfish loss in a Hugging Face Trainer. The only file that imports transformers.Trainer."""

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from goldfish.fused import FusedHead, bare_model, fuse_head
from goldfish.gauge import measure, readings, rows_to_measure
from goldfish.labels import (
    IGNORE_INDEX,
    SOURCE,
    CarrySource,
    GoldfishCollator,
    Rules,
    check_rules,
    decide,
    mask_batch,
    with_labels,
)
from goldfish.loss import GoldfishLoss, SmoothedLoss
from goldfish.receipt import Tally, bind, read_receipt, rules_of, tokenizer_fingerprint, write_receipt
from goldfish.rule import Goldfish

logger = logging.get_logger(__name__)


class GoldfishMixin(Trainer):
    """Makes any Trainer class train with the goldfish loss: `class MyTrainer(GoldfishMixin, SFTTrainer): ...`

    The labels of training batches are masked just before Trainer counts their targets, so the loss is the sum over
    kept tokens divided by their number over the whole optimizer step, whatever the accumulation or the number of
    processes; label smoothing too is over kept tokens. A model whose forward takes no num_items_in_batch must return
    the mean over its targets; batches are then weighted by their share of the step's kept tokens.
    Evaluation and prediction are not masked. Every checkpoint gets a goldfish.json. Logs get `goldfish/drop_rate`,
    the share of targets dropped since the last log, and a gauge of memorization: `goldfish/kept_loss` and
    `goldfish/dropped_loss`, nats per token on rows of the last batch, without gradient, and their difference
    `goldfish/gap`; measured when a log is due, on as many rows as take 1% of the time, at least one.

    Args:
        goldfish: the rule, or a mapping to rules from the names in the training dataset's column `source` (None: such
            rows are not masked). All other arguments are the Trainer's.
        fused: compute the training loss inside the model's head, for kept tokens only and without logits
            (`fuse_head`): faster, in less memory, equal up to rounding. Where that is not known to be right, the
            model's own loss is used, and the log says why.
        apply: False trains with the standard loss and only logs the gauge of the rule, for comparison.
    """

    # A subclass of Trainer for its types only: in front of another trainer class, super() finds that class.
    goldfish: Rules
    data_collator: Any
    label_smoother: Any
    compute_loss_func: Any
    _signature_columns: Any

    def __init__(self, *args: Any, goldfish: Rules, fused: bool = True, apply: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._set_up(goldfish, fused, apply)

    def _set_up(self, rules: Rules, fused: bool, apply: bool) -> None:
        check_rules(rules)
        if isinstance(self.compute_loss_func, GoldfishLoss) or isinstance(self.data_collator, GoldfishCollator):
            raise ValueError(
                "this trainer already drops tokens in its compute_loss_func or data_collator; "
                "take GoldfishLoss or GoldfishCollator out, the trainer's rule does their work"
            )
        self._fused, self._apply = fused, apply
        self._head: FusedHead | None = None
        self._resume_from: tuple[str, bool] | None = None  # a checkpoint, and whether its rule may differ
        smooth = self.label_smoother is not None and getattr(self.args, "loss_type", "nll") == "nll"  # TRL has others
        if apply and smooth and self.compute_loss_func is None:
            self.compute_loss_func = SmoothedLoss(self.label_smoother.epsilon)
        if self._averages() and self._replicas() > 1:
            logger.warning_once(
                f"the forward of {type(self.model).__name__} takes no num_items_in_batch: under nn.DataParallel, "
                "tensor or sequence parallelism Trainer takes the mean of batches' means, whatever tokens they keep"
            )
        self._start_counting(rules)
        self._events = _Events(self)
        self.add_callback(self._events)

    def _start_counting(self, rules: Rules) -> None:
        self.goldfish = bind(rules, self.processing_class)
        self._tally = Tally(self.goldfish, self.args.device)
        self._logged = (0, 0)  # targets and dropped ones at the last log
        self._gauge = torch.zeros(4, dtype=torch.float64, device=self.args.device)  # of this process, since `_sync`
        self._measured = torch.zeros_like(self._gauge)  # of all processes, since the last log
        self._before: dict[str, Any] | None = None  # the receipt of earlier training under other rules

    def get_train_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.goldfish, Goldfish):
            return super().get_train_dataloader(*args, **kwargs)
        # Training batches carry the sources of their rows. Trainer has no public way to keep one more column.
        self._set_signature_columns_if_needed()
        collator, columns = self.data_collator, self._signature_columns
        self.data_collator, self._signature_columns = CarrySource(collator, self.goldfish), [*columns, SOURCE]
        try:
            return super().get_train_dataloader(*args, **kwargs)
        finally:
            self.data_collator, self._signature_columns = collator, columns

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | int | None]:
        masked = map(self._mask_and_count, epoch_iterator)
        batches, num_items = super().get_batch_samples(masked, num_batches, device)
        if batches and self._averages() and self._replicas() == 1:
            num_items = torch.stack([_targets(batch) for batch in batches]).sum().to(device)
            if self.args.average_tokens_across_devices:
                num_items = self.accelerator.reduce(num_items, "sum")
        if batches and (self.state.global_step + 1) % max(1, self.state.logging_steps) == 0:
            self._read_gauge()
        if num_items is not None:  # no kept token in the whole step: the loss is a zero, not 0 / 0
            num_items = num_items.clamp(min=1) if torch.is_tensor(num_items) else max(num_items, 1)
        return batches, num_items

    def _averages(self) -> bool:
        """Whether the model divides its loss by its own targets, as if every batch had equally many."""
        scaled = self.model_accepts_loss_kwargs or getattr(self, "loss_is_scaled_for_ga", None)
        return self._apply and not scaled and self.compute_loss_func is None

    def _replicas(self) -> int:
        """Devices that share a batch: its targets are then not counted where its loss is computed."""
        return int(max(1, self.args.n_gpu) * self.get_tp_size() * self.get_cp_size() * self.get_sp_size())

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if num_items_in_batch is None or not self._averages() or self._replicas() > 1:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        kept = _targets(inputs)
        # The mean over no target would be 0 / 0, and so would its gradient: the model gets targets, with weight 0.
        inputs = inputs | {"labels": inputs["labels"].masked_fill(kept == 0, 0)}
        result = super().compute_loss(model, inputs, return_outputs)
        mean, *outputs = result if return_outputs else (result,)
        # Undoes the means that Trainer takes over micro-batches and DDP over processes.
        means = self.current_gradient_accumulation_steps
        if self.args.average_tokens_across_devices:
            means *= self.accelerator.num_processes
        loss = torch.where(kept > 0, mean * (means * kept / num_items_in_batch), 0.0)
        return (loss, *outputs) if return_outputs else loss

    def _mask_and_count(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch = with_labels(batch)
        dropped, keys = decide(self.goldfish, batch)
        self._tally.add(batch, dropped, keys)
        masked = mask_batch(batch, dropped)
        self._last_batch = (batch, masked["labels"])
        return masked if self._apply else {name: value for name, value in batch.items() if name != SOURCE}

    def _read_gauge(self) -> None:
        batch, labels = self._last_batch
        step_rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        rows = rows_to_measure(len(labels), step_rows, self.state.logging_steps)
        inputs = self._prepare_inputs({name: value for name, value in batch.items() if name != SOURCE})
        with self.compute_loss_context_manager():
            self._gauge += measure(self.model_wrapped, inputs, labels.to(self.args.device), rows)

    def _sync(self) -> None:
        """Add up what all processes counted and measured. Only where all of them arrive: log and save_model, which a
        process may call alone, use the sums of the last time."""
        self._tally.sync(lambda counts: self.accelerator.reduce(counts, "sum"))
        self._measured += self.accelerator.reduce(self._gauge, "sum")
        self._gauge.zero_()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        now = self._tally.sum()
        targets, dropped = now[0] - self._logged[0], now[1] - self._logged[1]
        if "loss" in logs and targets > 0:
            if self._apply:
                logs["goldfish/drop_rate"] = dropped / targets
            self._logged = now
            logs.update(readings(self._measured))
            self._measured.zero_()
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and self._apply:
            write_receipt(output_dir or self.args.output_dir, self._tally, self.processing_class, self._before)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,
        allow_other_rule: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As Trainer's. A resumed run continues the counts of its checkpoint's goldfish.json.

        Args:
            allow_other_rule: resume although the rule or the tokenizer changed; goldfish.json then keeps the old
                receipt under `before`.

        Raises:
            ValueError: the checkpoint was trained under another rule or with another tokenizer.
        """
        if bind(self.goldfish, self.processing_class) != self._tally.given:  # someone set another rule
            self._start_counting(self.goldfish)
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        self._resume_from = (str(checkpoint), allow_other_rule) if checkpoint and self._apply else None
        self.remove_callback(self._events)  # after other callbacks, which may ask for a log or a checkpoint
        self.add_callback(self._events)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._release_head()

    def _begin(self) -> None:
        """When training begins: the model is prepared, and a checkpoint is loaded."""
        if self._resume_from is not None:
            self._resume(*self._resume_from)
            self._resume_from = None
        self._tally.forget_step()
        if self._fused:
            reason = self._why_not_fused()
            if reason:
                logger.warning("The loss is not fused: %s. The model's own head and loss run on all tokens.", reason)
            else:
                self._head = fuse_head(self.model)

    def _release_head(self) -> None:
        if self._head is not None:
            self._head.remove()
            self._head = None

    def _why_not_fused(self) -> str:
        if self.compute_loss_func is not None or self.label_smoother is not None:
            return "compute_loss_func and label smoothing need the logits"
        own = type(self).compute_loss is not GoldfishMixin.compute_loss
        if own or getattr(super().compute_loss, "__func__", None) is not Trainer.compute_loss:
            return f"{type(self).__name__} computes its own loss"
        if self.args.n_gpu > 1:
            return "nn.DataParallel runs replicas of the model; use one process per GPU (torchrun)"
        if not hasattr(bare_model(self.model), "loss_function"):
            return f"{type(self.model).__name__} is no causal language model of transformers"
        return ""

    def _resume(self, checkpoint: str, allow_other_rule: bool) -> None:
        receipt = read_receipt(checkpoint)
        present = (self.goldfish, tokenizer_fingerprint(self.processing_class))
        trained = (rules_of(receipt), receipt["tokenizer"]) if receipt else (None, present[1])
        if receipt and trained == present:
            self._before = receipt.get("before")
            self._tally.restore(receipt)
            self._logged = self._tally.sum()
            return
        what = f"with the tokenizer {trained[1]}"
        if trained[0] != present[0]:
            what = f"under {trained[0]}" if receipt else "without a rule"
        here = present[0] if trained[0] != present[0] else present[1]
        if not allow_other_rule:
            raise ValueError(
                f"{checkpoint} was trained {what}, this trainer has {here}. Each of them teaches tokens that the other "
                "drops. Resume with what the checkpoint had, start a new run from its weights, or, if this is "
                "intended, train(resume_from_checkpoint=..., allow_other_rule=True)"
            )
        logger.warning("%s was trained %s and is resumed with %s", checkpoint, what, here)
        self._start_counting(self.goldfish)
        self._before = receipt or {"rule": None}


class _Events(TrainerCallback):
    """Calls a trainer at the moments of training that Trainer announces to callbacks."""

    def __init__(self, trainer: GoldfishMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._tally.end_step()
        self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_log or control.should_save or control.should_evaluate:  # the best checkpoint is saved then
            self.trainer._sync()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.trainer._sync()
        self.trainer._release_head()


def _targets(batch: dict[str, Any]) -> torch.Tensor:
    """How many targets the model gets from a batch, 0-dim; it shifts."""
    labels: torch.Tensor = batch["labels"]
    return (labels[..., 1:] != IGNORE_INDEX).sum()


class GoldfishTrainer(GoldfishMixin):
    """transformers.Trainer with the goldfish loss: `GoldfishTrainer(model, args, train_dataset=ds, goldfish=rule)`."""


AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


def attach(trainer: AnyTrainer, rule: Rules, *, fused: bool = False, apply: bool = True) -> AnyTrainer:
    """Make an existing trainer (Trainer, TRL's SFTTrainer, your own) train with the goldfish loss; returns it.

        trainer = attach(SFTTrainer(model, args, train_dataset=ds), Goldfish(k=4, h=13))

    The instance gets a subclass of its class with `GoldfishMixin` in front; see there for what changes. The trainer
    still computes its loss as before, unless `fused=True`; `apply=False` only logs the gauge.

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
        trainer._set_up(rule, fused, apply)
    except BaseException:
        trainer.__class__ = plain
        raise
    return trainer
