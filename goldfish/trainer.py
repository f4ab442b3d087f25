"""The goldfish loss in a Hugging Face Trainer. The only file that imports transformers.Trainer."""

import itertools
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainerCallback, TrainerControl
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from goldfish import spec
from goldfish.fused import FusedHead, fuse_head
from goldfish.gauge import is_text, measure, readings, rows_to_measure
from goldfish.guide import Guide, load_decisions, save_decisions
from goldfish.loss import GoldfishLoss, smoothed_loss
from goldfish.masking import (
    IGNORE_INDEX,
    GoldfishCollator,
    Masked,
    check_rule,
    mask_batch,
)
from goldfish.receipt import (
    DropCounts,
    bind_rule,
    card_section,
    count_drops,
    read_receipt,
    rules_of,
    tokenizer_fingerprint,
    write_receipt,
)
from goldfish.rule import Goldfish
from goldfish.unsupported import (
    SHARDED,
    labels_are_targets,
    predicts_the_first_token,
    why_not_entropy,
    why_not_this_model,
    why_not_this_trainer,
)
from goldfish.unwrap import bare_model

logger = logging.get_logger(__name__)
TAG = "goldfish-loss"  # of models on the Hub
RESUME = (
    ". Each of them teaches tokens that the other drops. Resume with what the checkpoint had, "
    "start a new run from its weights, or, if this is intended, "
    "train(resume_from_checkpoint=..., allow_other_rule=True)"
)
# Ranks that differ only along these dimensions of a device mesh read the same rows.
SHARED_ROWS = ("tp", "cp", "sp")
# Rows that the collator makes into one batch for the guide, which forms its own batches of them.
ROWS_READ = 64


class GoldfishMixin(Trainer):
    """Makes any Trainer class train with the goldfish loss, in front of it among the base classes.

        class MyTrainer(GoldfishMixin, SFTTrainer): ...

    The labels of training batches are masked just before Trainer counts their targets. So the loss
    is the sum over kept tokens divided by their number over the whole optimizer step, whatever the
    gradient accumulation or the number of processes; label smoothing too is over kept tokens. A
    model whose forward takes no num_items_in_batch must return the mean over its targets; its
    batches are then weighted by their share of the step's kept tokens. Evaluation and prediction
    are not masked.

    Every checkpoint gets a goldfish.json. Logs get `goldfish/drop_rate`, the share of targets
    dropped since the last log, and the gauge of memorization: `goldfish/kept_loss` and
    `goldfish/dropped_loss`, nats per token on rows of the last batch, and their difference
    `goldfish/gap`. They are measured without gradient after the step that is logged, on at least
    one row, and on as many as take 1% of the time.

    Args:
        goldfish: the rule. All other arguments are the Trainer's.
        fused: compute the training loss inside the model's head, for kept tokens only and without
            logits (`fuse_head`): faster, in less memory, equal up to rounding. If that is not known
            to be right, the model's own loss is used, and the log says why.

    Raises:
        TypeError: not a rule.
        ValueError: as `attach`.
        RuntimeError: in the first step, if the loss does not depend on the labels.
    """

    # A subclass of Trainer for its types only: in front of another trainer class, super() finds
    # that class.
    goldfish: Goldfish
    data_collator: Any
    compute_loss_func: Any

    def __init__(
        self,
        *args: Any,
        goldfish: Goldfish,
        fused: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._set_up(goldfish, fused)

    def _set_up(self, rule: Goldfish, fused: bool) -> None:
        check_rule(rule)
        self._refuse_what_is_not_supported(rule)
        self._fused = fused
        self._head: FusedHead | None = None
        # Unsloth sets `train` on the instance, which would hide ours.
        self._bound_train = self.__dict__.pop("train", None)
        # A checkpoint, and whether it may have been trained under another rule.
        self._resume_from: tuple[str, bool] | None = None
        # TRL's trainers have other losses, which Trainer's label smoothing does not touch.
        smoothes_nll = (
            self.label_smoother and getattr(self.args, "loss_type", "nll") == "nll"
        )
        if smoothes_nll and self.compute_loss_func is None:
            self.compute_loss_func = partial(
                smoothed_loss, epsilon=self.label_smoother.epsilon
            )
        if fused:
            self._leave_the_head_to_us()
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(TAG)
        if self._averages() and self.args.n_gpu > 1:
            logger.warning_once(
                "nn.DataParallel averages its replicas, whatever tokens they keep: use torchrun"
            )
        self._warn_of_secrets_that_are_cut(rule)
        self._start_counting(rule)
        # Trainer announces these moments to callbacks only.
        self._events = _Events(self)
        self.add_callback(self._events)

    def _refuse_what_is_not_supported(self, rule: Goldfish) -> None:
        reason = why_not_this_trainer(self) or why_not_entropy(self, rule)
        if not reason and not self.compute_loss_func:
            reason = why_not_this_model(self.model)
        if reason:
            raise ValueError(reason)
        by_loss = isinstance(self.compute_loss_func, GoldfishLoss)
        if by_loss or isinstance(self.data_collator, GoldfishCollator):
            raise ValueError(
                "this trainer already drops tokens in its compute_loss_func or data_collator; "
                "remove GoldfishLoss or GoldfishCollator: the trainer applies its own rule"
            )

    def _warn_of_secrets_that_are_cut(self, rule: Goldfish) -> None:
        """Without TRL's default strategy, a part of a document may begin in the middle of a match.

        The default one, "bfd", keeps the beginning of a document and leaves out what is too long.
        """
        packs = getattr(self.args, "packing", False)
        strategy = getattr(self.args, "packing_strategy", "")
        if rule.secrets is not None and packs and strategy in ("bfd_split", "wrapped"):
            logger.warning(
                "packing_strategy=%r cuts documents. If a cut separates a secret from the words by "
                "which secrets=%r finds it, the secret is trained on. Use packing_strategy='bfd', "
                "or write the labels before packing: premask(dataset, rule)",
                strategy,
                rule.secrets,
            )

    def _leave_the_head_to_us(self) -> None:
        """Liger's own fused loss would replace the model's forward."""
        # Older versions of Trainer apply Liger's kernels in __init__.
        is_patched = "forward" in vars(bare_model(self.model))
        if getattr(self.args, "use_liger_kernel", False) and not is_patched:
            config = dict(self.args.liger_kernel_config or {})
            config["fused_linear_cross_entropy"] = False
            self.args.liger_kernel_config = config
            logger.warning_once(
                "Liger's fused_linear_cross_entropy is off: the goldfish loss is fused with the "
                "head"
            )

    def _start_counting(self, rule: Goldfish) -> None:
        self.goldfish = bind_rule(rule, self.processing_class)
        self._counts = DropCounts(self.goldfish, self.args.device)
        self._logged = (0, 0)  # targets and dropped targets at the last log
        # Sums of the gauge since the last log.
        self._measured = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        self._gauge_is_off = False
        self._last_batch: dict[str, Any] = {}  # with the labels before they were masked
        self._last_dropped: Tensor | None = None
        # Labels of a step's first batch before they were masked, for the check of the first step.
        self._unmasked: dict[str, Tensor] = {}
        self._check_is_due = False
        # The receipt of earlier training under another rule.
        self._before: dict[str, Any] | None = None

    # Before a step: masking, counting

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> Any:
        # Trainer takes the micro-batches of a step from here and counts their targets together: two
        # of them with 100 and 20 kept targets are both divided by 120.
        masked = map(self._mask_and_count, epoch_iterator, itertools.count())
        batches, num_items = super().get_batch_samples(masked, num_batches, device)
        # Trainer does not count for a model that takes no num_items_in_batch. We do, because
        # compute_loss weights such a model's means.
        if batches and self._averages():
            num_items = (
                torch.stack([_targets(batch) for batch in batches]).sum().to(device)
            )
            if self.args.average_tokens_across_devices:
                num_items = self.accelerator.reduce(num_items, "sum")
        # Without a kept token in the whole step the loss is 0, not 0 / 0.
        if torch.is_tensor(num_items):
            num_items = num_items.clamp(min=1)
        elif num_items is not None:
            num_items = max(num_items, 1)
        return batches, num_items

    def _mask_and_count(self, batch: Any, micro_batch: int) -> Any:
        if batch.get("labels") is None and batch.get("shift_labels") is not None:
            raise ValueError(SHARDED)
        # For strategy "random": a resumed run draws what the interrupted one would have drawn.
        draw = spec.key([self.state.global_step, micro_batch, self.args.process_index])
        first_is_target = predicts_the_first_token(self.model)
        masked = mask_batch(
            self.goldfish,
            batch,
            ignore_first=not first_is_target,
            first_is_target=first_is_target,
            draw=draw,
        )
        self._counts.add(count_drops(masked))
        labels = batch["input_ids"].masked_fill(~masked.targets, IGNORE_INDEX)
        self._last_batch = {**batch, "labels": labels}
        self._last_dropped = masked.dropped
        if self._check_is_due and micro_batch == 0:
            self._unmasked = _dropped_put_back(batch, masked)
        return _in_type_of(batch, masked.batch)

    def _averages(self) -> bool:
        """Whether the model's loss is the mean over the targets of its own batch."""
        scaled = self.model_accepts_loss_kwargs or getattr(
            self, "loss_is_scaled_for_ga", None
        )
        return not scaled and self.compute_loss_func is None

    # In a step: the loss

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if num_items_in_batch is None or not self._averages():
            # Evaluation passes none, and the compute_loss of a subclass may not take one.
            options: dict[str, Any] = {"return_outputs": return_outputs}
            if num_items_in_batch is not None:
                options["num_items_in_batch"] = num_items_in_batch
            return super().compute_loss(model, inputs, **options)
        kept = _targets(inputs)
        # The mean over no target would be 0 / 0, and so would its gradient: such a batch gets
        # targets, with weight 0.
        inputs = inputs | {"labels": inputs["labels"].masked_fill(kept == 0, 0)}
        result = super().compute_loss(model, inputs, return_outputs=return_outputs)
        mean, *outputs = result if return_outputs else (result,)
        # Two micro-batches with means a and b over 100 and 20 of the step's 120 kept targets: the
        # loss is (100 a + 20 b) / 120. Trainer takes the mean of what is returned here for the two,
        # and DDP the mean over processes, so 2 * a * 100 / 120 is returned for the first.
        means = self.current_gradient_accumulation_steps
        if self.args.average_tokens_across_devices:
            means *= self.accelerator.num_processes
        loss = torch.where(kept > 0, mean * (means * kept / num_items_in_batch), 0.0)
        return (loss, *outputs) if return_outputs else loss

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        unmasked, self._unmasked = self._unmasked, {}
        # A fused head takes its targets from the labels itself.
        is_fused = self._head is not None and self._head.reason == ""
        if unmasked and not is_fused:
            self._check_that_labels_are_targets(
                model, inputs, unmasked, num_items_in_batch
            )
        return super().training_step(model, inputs, num_items_in_batch, **kwargs)

    def _check_that_labels_are_targets(
        self, model: Any, inputs: Any, unmasked: dict[str, Tensor], num_items: Any
    ) -> None:
        """Refuse a trainer whose loss stays the same when the dropped labels are put back.

        Its targets are not its labels, so it would train on every token, while the receipt says
        otherwise. Two forward passes without gradient, once in a training, and only for trainers
        of which it is not known (`labels_are_targets`).
        """
        labels = inputs["labels"]
        here = (labels != unmasked["labels"].to(labels.device)).any()
        # All processes compute the two losses, or none: a sharded model gathers its weights there.
        anywhere = self.accelerator.reduce(here.float().to(self.args.device), "sum")
        # The rule dropped nothing in this batch: the next step may tell.
        if anywhere == 0:
            return
        losses = [
            self._loss_without_trace(
                model, _in_type_of(inputs, {**inputs, **changed}), num_items
            )
            for changed in ({}, unmasked)
        ]
        self._check_is_due = False
        if here and torch.equal(*losses):
            raise RuntimeError(
                f"the loss of {type(self).__name__} with {type(bare_model(self.model)).__name__} "
                "does not change when the dropped labels are put back: its targets are not the "
                f"labels of the batch (label_names={self.args.label_names}), so every token would "
                "be learned. Take the targets from `labels`"
            )

    @torch.no_grad()
    def _loss_without_trace(
        self,
        model: Any,
        inputs: Any,
        num_items: Any,
    ) -> Tensor:
        """The training loss of a batch, without drawing random numbers or adding to TRL's logs."""
        # What TRL's compute_loss adds to its logs: put back below.
        names = ("_metrics", "_total_train_tokens")
        logged = {
            name: deepcopy(value) for name, value in vars(self).items() if name in names
        }
        model.train()
        # Dropout draws here, and would draw other numbers in the step itself.
        gpus = {
            parameter.device for parameter in model.parameters() if parameter.is_cuda
        }
        with torch.random.fork_rng(gpus), self.compute_loss_context_manager():
            prepared = self._prepare_inputs(inputs)
            loss: Tensor = self.compute_loss(
                model, prepared, num_items_in_batch=num_items
            )
        self.__dict__.update(logged)
        return loss.float().mean()  # nn.DataParallel returns several

    # After a step: the gauge, logs, receipts

    def _read_gauge(self) -> None:
        """Measure the last batch. All processes do, or none: they wait for each other."""
        batch, dropped = self._last_batch, self._last_dropped
        measurable = bool(batch) and is_text(batch)
        if batch and not measurable:
            logger.warning_once(
                "The gauge of memorization skips batches that hold images or audio beside the text."
            )
        # One process without a measurable batch stops all: the others would wait in `measure`.
        skips = torch.tensor(
            float(self._gauge_is_off or not measurable), device=self.args.device
        )
        if self.accelerator.reduce(skips, "sum") > 0 or dropped is None:
            return
        step_rows = (
            self.args.per_device_train_batch_size
            * self.args.gradient_accumulation_steps
        )
        rows = rows_to_measure(len(dropped), step_rows, self.state.logging_steps)
        sums = torch.zeros_like(self._measured)
        try:
            inputs = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                sums += measure(
                    self.model_wrapped, inputs, dropped.to(self.args.device), rows
                )
        # Whatever goes wrong here is no reason to end a training.
        except Exception as error:
            logger.warning(
                "The gauge of memorization is off, training goes on. %s: %s",
                type(error).__name__,
                error,
            )
            self._gauge_is_off = True
        self._measured += self.accelerator.reduce(sums, "sum")

    def _sync(self, *, may_wait: bool = True) -> None:
        """Add up what all processes counted.

        Only where all of them arrive. One process alone may call log and save_model (push_to_hub
        does): they use the sums of the last time.
        """
        if may_wait or self.accelerator.num_processes == 1:
            self._counts.sync(self._sum_over_rows)

    def _sum_over_rows(self, counts: Tensor) -> Tensor:
        """The sum over all processes, with rows that several of them read counted once.

        Four processes with tensor parallelism of 2 read two batches: ranks 0 and 1 the first, 2 and
        3 the second. Their places along "tp" are 0, 1, 0, 1, so ranks 1 and 3 add nothing.
        """
        mesh: Any = getattr(self.accelerator, "torch_device_mesh", None)
        for name in getattr(mesh, "mesh_dim_names", None) or ():
            if name in SHARED_ROWS and mesh.get_local_rank(name) > 0:
                counts = torch.zeros_like(counts)
        result: Tensor = self.accelerator.reduce(counts, "sum")
        return result

    def log(
        self,
        logs: dict[str, float],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self._sync(may_wait=False)
        now = self._counts.sum()
        targets, dropped = now[0] - self._logged[0], now[1] - self._logged[1]
        # Not in the log of an evaluation or of a finished training, which have no "loss".
        if "loss" in logs and targets > 0:
            logs |= {"goldfish/drop_rate": dropped / targets} | readings(self._measured)
            self._logged = now
            self._measured.zero_()
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        tags = kwargs.get("tags") or []
        tags = [tags] if isinstance(tags, str) else list(tags)
        kwargs["tags"] = tags if TAG in tags else [*tags, TAG]
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            with (Path(self.args.output_dir) / "README.md").open(
                "a", encoding="utf-8"
            ) as card:
                card.write(card_section(self._counts))

    def save_model(
        self, output_dir: str | None = None, _internal_call: bool = False
    ) -> None:
        super().save_model(output_dir, _internal_call)
        self.save_receipt(output_dir)
        # Into checkpoints, for a resumed run, and nowhere else: Trainer pushes the output folder to
        # the Hub, and whoever has the decisions can test whether a text was trained on.
        checkpoint = output_dir if _internal_call else None
        decided = self.goldfish.decisions is not None
        if checkpoint is not None and decided and self.args.should_save:
            save_decisions(checkpoint, self.goldfish)

    def save_receipt(self, folder: str | None = None) -> None:
        """Write goldfish.json, on the process that saves.

        `save_model` does it too; this is for weights that something else saved.
        """
        self._sync(may_wait=False)
        if self.args.should_save:
            folder = folder or self.args.output_dir
            write_receipt(folder, self._counts, self.processing_class, self._before)

    # A whole training

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,
        allow_other_rule: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As Trainer's. A resumed run continues the counts of its checkpoint's goldfish.json.

        Args:
            allow_other_rule: resume although the rule or the tokenizer changed; goldfish.json then
                keeps the old receipt under `before`.

        Raises:
            ValueError: the checkpoint was trained under another rule or with another tokenizer.
        """
        # Someone set another rule; or Trainer makes a new model for this training.
        if self.goldfish != self._counts.rule or self.model_init is not None:
            self._start_counting(self.goldfish)
        self.goldfish = self._counts.rule  # the same rule, bound to the tokenizer
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        # If there is no such folder, Trainer's own error follows.
        is_there = checkpoint and Path(checkpoint).is_dir()
        if is_there or not resume_from_checkpoint:
            self._decide_by_entropy(checkpoint or None, allow_other_rule)
        self._resume_from = (str(checkpoint), allow_other_rule) if checkpoint else None
        # Ours is the last callback: others may ask for a log or a checkpoint.
        self.remove_callback(self._events)
        self.add_callback(self._events)
        try:
            train = self._bound_train or super().train
            return train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self._head is not None:
                self._head.remove()

    def _decide_by_entropy(self, checkpoint: Any, allow_other_rule: bool) -> None:
        """Strategy "entropy": let the model read the data, or resume with what it decided then."""
        # Without a train_dataset, Trainer's own error follows.
        if self.goldfish.strategy != "entropy" or self.train_dataset is None:
            return
        if self.goldfish.decisions is not None:
            return
        if reason := why_not_entropy(self, self.goldfish):
            raise ValueError(reason)
        stored = None if checkpoint is None else self._stored_decisions(checkpoint)
        may_differ = checkpoint is None or allow_other_rule
        # Now, and not after an hour of reading.
        if stored is None and not may_differ:
            raise ValueError(self._trained_otherwise(checkpoint) + RESUME)
        rule = stored or self._read_training_data()
        assert rule.decisions is not None
        # Every batch is looked up there.
        decisions = rule.decisions.to(self.args.device)
        self.goldfish = self._counts.rule = replace(rule, decisions=decisions)

    def _stored_decisions(self, checkpoint: Any) -> Goldfish | None:
        """The rule with the decisions of a checkpoint; None if that has another rule."""
        rule = self.goldfish
        receipt = read_receipt(checkpoint)
        was = None if receipt is None else rules_of(receipt)
        if not isinstance(was, Goldfish) or rule not in (was, replace(was, guide=None)):
            return None
        stored = load_decisions(checkpoint)
        if stored != was:
            raise ValueError(
                f"{checkpoint} was trained under {was}, but its decisions are those of another "
                f"checkpoint, trained under {stored}"
            )
        return replace(rule, guide=stored.guide, decisions=stored.decisions)

    def _read_training_data(self) -> Goldfish:
        """The rule with decisions about all training rows.

        Each process reads its share of the rows, and all get the same decisions.
        """
        guide = Guide(self.model)
        rows = range(
            self.args.process_index, len(self.train_dataset), self.args.world_size
        )
        loader = DataLoader(
            Subset(self.train_dataset, rows),
            batch_size=ROWS_READ,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator),
            # Its own, so that training draws the same numbers as without it.
            generator=torch.Generator(),
        )
        found = [torch.zeros(0, dtype=torch.int64)]
        bar = {"desc": "Guide reads", "disable": self.args.disable_tqdm}
        for batch in logging.tqdm(loader, **bar):
            if not is_text(batch):
                raise ValueError(
                    "the guide reads text alone, but the rows hold images or audio too: use "
                    'strategy="hash"'
                )
            with self.compute_loss_context_manager():
                found.append(guide.decisions(self.goldfish, batch))
        of_all_processes = gather_object([torch.cat(found)])
        decisions = torch.unique(torch.cat(of_all_processes))
        return guide.with_decisions(self.goldfish, decisions)

    def _begin(self) -> None:
        """When training begins: the model is prepared, and a checkpoint is loaded."""
        if self._resume_from is not None:
            self._resume(*self._resume_from)
            self._resume_from = None
        self._counts.forget_step()
        self._check_is_due = not labels_are_targets(self)
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
        # A compute_loss in front of ours (a subclass of GoldfishTrainer) or behind it (attach).
        in_front = type(self).compute_loss is not GoldfishMixin.compute_loss
        behind = getattr(super().compute_loss, "__func__", None)
        if in_front or behind is not Trainer.compute_loss:
            return f"{type(self).__name__} computes its own loss"
        if self.args.n_gpu > 1:
            return "nn.DataParallel runs replicas of the model; use one process per GPU (torchrun)"
        if not hasattr(bare_model(self.model), "loss_function"):
            return f"{type(self.model).__name__} is no causal language model of transformers"
        return ""

    def _resume(self, checkpoint: str, allow_other_rule: bool) -> None:
        receipt = read_receipt(checkpoint)
        here = (self.goldfish, tokenizer_fingerprint(self.processing_class))
        if receipt and (rules_of(receipt), receipt["tokenizer"]) == here:
            self._continue_counts_of(receipt)
            return
        reason = self._trained_otherwise(checkpoint)
        if not allow_other_rule:
            raise ValueError(reason + RESUME)
        logger.warning("%s", reason)
        self._start_counting(self.goldfish)
        self._before = receipt or {"rule": None}

    def _trained_otherwise(self, checkpoint: Any) -> str:
        receipt = read_receipt(checkpoint)
        was = "without a rule"
        if receipt:
            was = f"under {rules_of(receipt)} with the tokenizer {receipt['tokenizer']}"
        tokenizer = tokenizer_fingerprint(self.processing_class)
        return (
            f"{checkpoint} was trained {was}, this trainer has {self.goldfish} and the tokenizer "
            f"{tokenizer}"
        )

    def _continue_counts_of(self, receipt: dict[str, Any]) -> None:
        self._before = receipt.get("before")
        self._counts.restore(receipt)
        self._logged = self._counts.sum()

    def _load_best_model(self) -> None:
        """Trainer's load_best_model_at_end: with the weights the counts go back to that step."""
        super()._load_best_model()
        receipt = read_receipt(self.state.best_model_checkpoint)
        if receipt is not None:
            self._continue_counts_of(receipt)


class _Events(TrainerCallback):
    """Calls a trainer at the moments of training that Trainer announces to callbacks."""

    def __init__(self, trainer: GoldfishMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer._begin()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        if not self.trainer._last_batch:
            raise RuntimeError(
                f"{type(self.trainer).__name__} took a step, but no batch was masked: its "
                "get_batch_samples must call super().get_batch_samples, where labels are masked "
                "and counted"
            )
        self.trainer._counts.end_step()

    def on_step_end(
        self,
        args: Any,
        state: Any,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        if control.should_log:
            self.trainer._read_gauge()
        # The best checkpoint is saved after an evaluation.
        if control.should_log or control.should_save or control.should_evaluate:
            self.trainer._sync()

    on_epoch_end = on_step_end

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.trainer._sync()


def _in_type_of(batch: Any, values: dict[str, Any]) -> Any:
    """The values as a batch of the same type, such as BatchEncoding."""
    return values if type(batch) is dict else type(batch)(values)


def _dropped_put_back(batch: Any, masked: Masked) -> dict[str, Tensor]:
    """The labels of a masked batch with its dropped targets put back; also its shift_labels."""
    labels = batch["input_ids"] if batch.get("labels") is None else batch["labels"]
    whole = {"labels": torch.where(masked.dropped, labels, masked.batch["labels"])}
    if batch.get("shift_labels") is not None:
        whole["shift_labels"] = batch["shift_labels"]
    return whole


def _targets(batch: dict[str, Any]) -> Tensor:
    """How many targets the model gets from a batch, 0-dim; it shifts."""
    labels: Tensor = batch["labels"]
    return (labels[..., 1:] != IGNORE_INDEX).sum()


class GoldfishTrainer(GoldfishMixin):
    """transformers.Trainer with the goldfish loss and one more argument, `goldfish=rule`.

    See GoldfishMixin for what changes.

        trainer = GoldfishTrainer(model, args, train_dataset=ds, goldfish=Goldfish(k=4, h=13))
    """


AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


def attach(trainer: AnyTrainer, rule: Goldfish, *, fused: bool = False) -> AnyTrainer:
    """Make an existing trainer train with the goldfish loss; returns it.

    For Trainer, TRL's SFTTrainer, your own. The instance gets a subclass of its class with
    `GoldfishMixin` in front; see there for what changes. The trainer still computes its loss as
    before, unless `fused=True`.

    Raises:
        TypeError: not a Trainer, not a rule.
        ValueError: a trainer that already drops tokens or whose dataset is premasked; whose model
            or batches have no next-token labels; a rule that is bound to another tokenizer.

    >>> import tempfile, transformers
    >>> from goldfish import Goldfish, attach
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=16, **sizes))
    >>> arguments = transformers.TrainingArguments(tempfile.mkdtemp(), report_to="none")
    >>> trainer = transformers.Trainer(model, arguments)
    >>> trainer = attach(trainer, Goldfish(k=4, h=13, max_kept=4))
    >>> trainer.goldfish.k, isinstance(trainer, transformers.Trainer)
    (4, True)
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"attach needs a transformers.Trainer or a subclass of it, got {type(trainer).__name__}"
        )
    if isinstance(trainer, GoldfishMixin):
        raise ValueError(
            f"this trainer already has a rule, {trainer.goldfish}; set trainer.goldfish to change "
            "it"
        )
    # The object itself is changed, since others refer to it already (its callbacks do). If the rule
    # is refused, it is as it was.
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
    """An attached trainer without its state.

    pickle cannot find a class that was made at run time.
    """
    return object.__new__(_with_goldfish(plain))
