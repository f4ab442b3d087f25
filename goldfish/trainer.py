"""The goldfish loss in a Hugging Face Trainer. The only file that imports transformers.Trainer."""

import itertools
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import Trainer, TrainerCallback, TrainerControl
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from goldfish import spec
from goldfish.fused import FusedHead, fuse_head
from goldfish.gauge import is_text, measure, readings, rows_to_measure
from goldfish.loss import GoldfishLoss, smoothed_loss
from goldfish.masking import IGNORE_INDEX, GoldfishCollator, check_rule, mask_batch
from goldfish.receipt import (
    DropCounts,
    bind,
    card_section,
    count_drops,
    read_receipt,
    rules_of,
    tokenizer_fingerprint,
    write_receipt,
)
from goldfish.rule import Goldfish
from goldfish.unsupported import SHARDED, why_not_this_model, why_not_this_trainer
from goldfish.unwrap import bare_model

logger = logging.get_logger(__name__)
TAG = "goldfish-loss"  # of models on the Hub


class GoldfishMixin(Trainer):
    """Makes any Trainer class train with the goldfish loss: `class MyTrainer(GoldfishMixin, SFTTrainer): ...`

    The labels of training batches are masked just before Trainer counts their targets, so the loss is the sum over
    kept tokens divided by their number over the whole optimizer step, whatever the accumulation or the number of
    processes; label smoothing too is over kept tokens. A model whose forward takes no num_items_in_batch must return
    the mean over its targets; batches are then weighted by their share of the step's kept tokens.
    Evaluation and prediction are not masked. Every checkpoint gets a goldfish.json. Logs get `goldfish/drop_rate`,
    the share of targets dropped since the last log, and a gauge of memorization: `goldfish/kept_loss` and
    `goldfish/dropped_loss`, nats per token on rows of the last batch, without gradient, and their difference
    `goldfish/gap`; measured after the step that is logged, on as many rows as take 1% of the time, at least one.

    Args:
        goldfish: the rule. All other arguments are the Trainer's.
        fused: compute the training loss inside the model's head, for kept tokens only and without logits
            (`fuse_head`): faster, in less memory, equal up to rounding. Where that is not known to be right, the
            model's own loss is used, and the log says why.

    Raises:
        TypeError: not a rule. ValueError: as `attach`.
    """

    # A subclass of Trainer for its types only: in front of another trainer class, super() finds that class.
    goldfish: Goldfish
    data_collator: Any
    compute_loss_func: Any

    def __init__(self, *args: Any, goldfish: Goldfish, fused: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._set_up(goldfish, fused)

    def _set_up(self, rule: Goldfish, fused: bool) -> None:
        check_rule(rule)
        reason = why_not_this_trainer(self) or (
            why_not_this_model(self.model) if not self.compute_loss_func else ""
        )
        if reason:
            raise ValueError(reason)
        if isinstance(self.compute_loss_func, GoldfishLoss) or isinstance(
            self.data_collator, GoldfishCollator
        ):
            raise ValueError(
                "this trainer already drops tokens in its compute_loss_func or data_collator; "
                "remove GoldfishLoss or GoldfishCollator: the trainer applies its own rule"
            )
        self._fused = fused
        self._head: FusedHead | None = None
        self._bound_train = self.__dict__.pop("train", None)  # Unsloth sets one on the instance
        self._resume_from: tuple[str, bool] | None = (
            None  # a checkpoint, and whether its rule may differ
        )
        smooth = (
            self.label_smoother is not None and getattr(self.args, "loss_type", "nll") == "nll"
        )  # TRL has others
        if smooth and self.compute_loss_func is None:
            self.compute_loss_func = partial(smoothed_loss, epsilon=self.label_smoother.epsilon)
        patched = "forward" in vars(
            bare_model(self.model)
        )  # older versions of Trainer apply Liger's kernels at once
        if fused and getattr(self.args, "use_liger_kernel", False) and not patched:
            config = self.args.liger_kernel_config or {}
            self.args.liger_kernel_config = {**config, "fused_linear_cross_entropy": False}
            logger.warning_once(
                "Liger's fused_linear_cross_entropy is off: the goldfish loss is fused with the head"
            )
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(TAG)
        if self._averages() and self.args.n_gpu > 1:
            logger.warning_once(
                "nn.DataParallel averages its replicas, whatever tokens they keep: use torchrun"
            )
        self._start_counting(rule)
        self._events = _Events(self)
        self.add_callback(self._events)

    def _start_counting(self, rule: Goldfish) -> None:
        self.goldfish = bind(rule, self.processing_class)
        self._tally = DropCounts(self.goldfish, self.args.device)
        self._logged = (0, 0)  # targets and dropped ones at the last log
        self._measured = torch.zeros(
            4, dtype=torch.float64, device=self.args.device
        )  # by the gauge since the last log
        self._gauge_is_off = False
        self._last_batch: tuple[dict[str, Any], torch.Tensor] | None = None  # with its decisions
        self._before: dict[str, Any] | None = (
            None  # the receipt of earlier training under other rules
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> Any:
        masked = map(self._mask_and_count, epoch_iterator, itertools.count())
        batches, num_items = super().get_batch_samples(masked, num_batches, device)
        if batches and self._averages():
            num_items = torch.stack([_targets(batch) for batch in batches]).sum().to(device)
            if self.args.average_tokens_across_devices:
                num_items = self.accelerator.reduce(num_items, "sum")
        if num_items is not None:  # no kept token in the whole step: the loss is a zero, not 0 / 0
            num_items = num_items.clamp(min=1) if torch.is_tensor(num_items) else max(num_items, 1)
        return batches, num_items

    def _averages(self) -> bool:
        """Whether the model divides its loss by its own targets, as if every batch had equally many."""
        scaled = self.model_accepts_loss_kwargs or getattr(self, "loss_is_scaled_for_ga", None)
        return not scaled and self.compute_loss_func is None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if num_items_in_batch is None or not self._averages():
            given = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **given)
        kept = _targets(inputs)
        # The mean over no target would be 0 / 0, and so would its gradient: the model gets targets, with weight 0.
        inputs = inputs | {"labels": inputs["labels"].masked_fill(kept == 0, 0)}
        result = super().compute_loss(model, inputs, return_outputs=return_outputs)
        mean, *outputs = result if return_outputs else (result,)
        # Undoes the means that Trainer takes over micro-batches and DDP over processes.
        means = self.current_gradient_accumulation_steps
        if self.args.average_tokens_across_devices:
            means *= self.accelerator.num_processes
        loss = torch.where(kept > 0, mean * (means * kept / num_items_in_batch), 0.0)
        return (loss, *outputs) if return_outputs else loss

    def _mask_and_count(self, batch: Any, micro_batch: int) -> Any:
        if batch.get("labels") is None and batch.get("shift_labels") is not None:
            raise ValueError(SHARDED)
        # For strategy "random": a resumed run draws what the interrupted one would have drawn.
        draw = spec.key([self.state.global_step, micro_batch, self.args.process_index])
        masked = mask_batch(self.goldfish, batch, ignore_first=True, draw=draw)
        self._tally.add(count_drops(masked))
        labels = batch["input_ids"].masked_fill(~masked.targets, IGNORE_INDEX)
        self._last_batch = ({**batch, "labels": labels}, masked.dropped)
        # Of the type of the batch, such as BatchEncoding.
        return masked.batch if type(batch) is dict else type(batch)(masked.batch)

    def _read_gauge(self) -> None:
        batch, dropped = self._last_batch or ({}, None)
        if batch and not is_text(batch):
            logger.warning_once(
                "The gauge of memorization skips batches that hold images or audio beside the text."
            )
        skip = torch.tensor(
            float(self._gauge_is_off or not batch or not is_text(batch)), device=self.args.device
        )
        if (
            self.accelerator.reduce(skip, "sum") > 0 or dropped is None
        ):  # all processes measure, or none
            return
        step_rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        rows = rows_to_measure(len(dropped), step_rows, self.state.logging_steps)
        sums = torch.zeros_like(self._measured)
        try:
            inputs = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                sums += measure(self.model_wrapped, inputs, dropped.to(self.args.device), rows)
        except Exception as error:
            logger.warning(
                "The gauge of memorization is off, training goes on. %s: %s",
                type(error).__name__,
                error,
            )
            self._gauge_is_off = True
        self._measured += self.accelerator.reduce(sums, "sum")

    def _sync(self, *, may_wait: bool = True) -> None:
        """Add up what all processes counted. Only where all of them arrive: log and save_model, which one of several
        processes may call alone, use the sums of the last time."""
        if may_wait or self.accelerator.num_processes == 1:
            self._tally.sync(lambda counts: self.accelerator.reduce(counts, "sum"))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self._sync(may_wait=False)
        now = self._tally.sum()
        targets, dropped = now[0] - self._logged[0], now[1] - self._logged[1]
        if "loss" in logs and targets > 0:
            logs |= {"goldfish/drop_rate": dropped / targets} | readings(self._measured)
            self._logged = now
            self._measured.zero_()
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        tags = kwargs.get("tags") or []
        kwargs["tags"] = list(dict.fromkeys([*([tags] if isinstance(tags, str) else tags), TAG]))
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            with (Path(self.args.output_dir) / "README.md").open("a", encoding="utf-8") as card:
                card.write(card_section(self._tally))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        self.save_receipt(output_dir)

    def save_receipt(self, folder: str | None = None) -> None:
        """Write goldfish.json, on the process that saves; for weights that were not saved by `save_model`."""
        self._sync(may_wait=False)
        if self.args.should_save:
            write_receipt(
                folder or self.args.output_dir, self._tally, self.processing_class, self._before
            )

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
        other_rule = bind(self.goldfish, self.processing_class) != self._tally.rule
        if (
            other_rule or self.model_init is not None
        ):  # someone set another rule; Trainer makes a new model
            self._start_counting(self.goldfish)
        last = resume_from_checkpoint is True
        checkpoint = get_last_checkpoint(self.args.output_dir) if last else resume_from_checkpoint
        self._resume_from = (str(checkpoint), allow_other_rule) if checkpoint else None
        self.remove_callback(
            self._events
        )  # after other callbacks, which may ask for a log or a checkpoint
        self.add_callback(self._events)
        try:
            train = self._bound_train or super().train
            return train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self._head is not None:
                self._head.remove()

    def _begin(self) -> None:
        """When training begins: the model is prepared, and a checkpoint is loaded."""
        if self._resume_from is not None:
            self._resume(*self._resume_from)
            self._resume_from = None
        self._tally.forget_step()
        reason = self._why_not_fused() if self._fused else ""
        if reason:
            logger.warning(
                "The loss is not fused: %s. The model's own head and loss run on all tokens.",
                reason,
            )
        elif self._fused:
            self._head = fuse_head(self.model)

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
        receipt, tokenizer = read_receipt(checkpoint), tokenizer_fingerprint(self.processing_class)
        was, here = "without a rule", f"{self.goldfish} and the tokenizer {tokenizer}"
        if receipt:
            rules = rules_of(receipt)
            was = f"under {rules} with the tokenizer {receipt['tokenizer']}"
            if (rules, receipt["tokenizer"]) == (self.goldfish, tokenizer):
                self._before = receipt.get("before")
                self._tally.restore(receipt)
                self._logged = self._tally.sum()
                return
        if not allow_other_rule:
            raise ValueError(
                f"{checkpoint} was trained {was}, this trainer has {here}. Each of them teaches tokens that the other "
                "drops. Resume with what the checkpoint had, start a new run from its weights, or, if this is "
                "intended, train(resume_from_checkpoint=..., allow_other_rule=True)"
            )
        logger.warning("%s was trained %s and is resumed with %s", checkpoint, was, here)
        self._start_counting(self.goldfish)
        self._before = receipt or {"rule": None}


class _Events(TrainerCallback):
    """Calls a trainer at the moments of training that Trainer announces to callbacks."""

    def __init__(self, trainer: GoldfishMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer._begin()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        if self.trainer._last_batch is None:
            raise RuntimeError(
                f"{type(self.trainer).__name__} took a step, but no batch was masked: its get_batch_samples must "
                "call super().get_batch_samples, where labels are masked and counted"
            )
        self.trainer._tally.end_step()

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        if control.should_log:
            self.trainer._read_gauge()
        if (
            control.should_log or control.should_save or control.should_evaluate
        ):  # the best checkpoint is saved then
            self.trainer._sync()

    on_epoch_end = on_step_end

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.trainer._sync()


def _targets(batch: dict[str, Any]) -> torch.Tensor:
    """How many targets the model gets from a batch, 0-dim; it shifts."""
    labels: torch.Tensor = batch["labels"]
    return (labels[..., 1:] != IGNORE_INDEX).sum()


class GoldfishTrainer(GoldfishMixin):
    """transformers.Trainer with the goldfish loss: `GoldfishTrainer(model, args, train_dataset=ds, goldfish=rule)`."""


AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


def attach(trainer: AnyTrainer, rule: Goldfish, *, fused: bool = False) -> AnyTrainer:
    """Make an existing trainer (Trainer, TRL's SFTTrainer, your own) train with the goldfish loss; returns it.

        trainer = attach(SFTTrainer(model, args, train_dataset=ds), Goldfish(k=4, h=13))

    The instance gets a subclass of its class with `GoldfishMixin` in front; see there for what changes. The trainer
    still computes its loss as before, unless `fused=True`.

    Raises:
        TypeError: not a Trainer, not a rule.
        ValueError: a trainer that already drops tokens, or whose model or batches have no next-token labels.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"attach needs a transformers.Trainer or a subclass of it, got {type(trainer).__name__}"
        )
    if isinstance(trainer, GoldfishMixin):
        raise ValueError(
            f"this trainer already has a rule, {trainer.goldfish}; set trainer.goldfish to change it"
        )
    plain, state = trainer.__class__, dict(trainer.__dict__)
    try:
        trainer.__class__ = _with_goldfish(plain)
        trainer._set_up(rule, fused)
    except BaseException:
        trainer.__class__, trainer.__dict__ = plain, state
        raise
    return trainer


@cache
def _with_goldfish(plain: Any) -> Any:
    members = {
        "__module__": __name__,
        "__reduce_ex__": lambda self, _: (_rebuild, (plain,), self.__dict__),
    }
    return type(f"Goldfish{plain.__name__}", (GoldfishMixin, plain), members)


def _rebuild(plain: Any) -> Any:
    """An attached trainer without its state: pickle cannot find a class that was made at run time."""
    return object.__new__(_with_goldfish(plain))
