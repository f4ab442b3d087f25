"""An audit where training ends: a callback of Trainer."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainerCallback

from goldfish.audit.results import Audit
from goldfish.audit.run import audit
from goldfish.audit.score import Scorer
from goldfish.audit.windows import Cutter, Window
from goldfish.checkpoint import InMemory
from goldfish.report import write_report
from goldfish.text.rows import Source, in_memory, read_rows
from goldfish.unwrap import context_of

MOST_WINDOWS = 256  # of the question that is asked during training
_log = logging.getLogger(__name__)


class AuditCallback(TrainerCallback):
    """Audits the model when its training ends, and asks on the way whether it recites.

    At the end it writes the audit's folder, and beside it the page:
    `goldfish.audit.read(folder)`. On the way, every `every` steps, it logs `goldfish/recited`: the
    share of the first 256 members' windows whose suffix the model predicts token for token, in one
    forward pass. In a launch of several processes all of them share the final audit.

    Inputs and options are checked before the first step. If the final audit fails all the same (a
    full disk, too little memory), the error is logged and the training ends as it would have; only
    in a launch of several processes, which wait for each other, it is raised.

    Args:
        trainer: a transformers.Trainer or a subclass of it; its processing_class must be the
            tokenizer. If it has a goldfish rule, the audit tests whether the rule is in the
            weights.
        members, heldout, options: as of `goldfish.audit.audit`.
        every: a number of steps, or "end" for the final audit only.
        output_dir: by default the folder `audit` in that of the trainer. The page is audit.html.

    Raises:
        ValueError: a trainer without a tokenizer, or with sharded weights (FSDP, DeepSpeed ZeRO 3),
            whose saved checkpoint can be audited instead.
        FileExistsError: before the first step, a folder or page that exists.
        Other errors of `goldfish.audit.audit`, before the first step too.

    >>> trainer.add_callback(AuditCallback(trainer, "members.jsonl"))  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        trainer: Any,
        members: Source,
        heldout: Source | None = None,
        *,
        every: int | str = "end",
        output_dir: str | Path | None = None,
        **options: Any,
    ) -> None:
        if every != "end" and not (isinstance(every, int) and every > 0):
            raise ValueError(f'every is "end" or a number of steps, got {every!r}')
        if trainer.processing_class is None:
            raise ValueError(
                "the audit needs a tokenizer: Trainer(..., processing_class=tokenizer)"
            )
        # No process has whole weights, and a pass needs all of them to take part.
        zero_3 = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
        zero_3 = zero_3 is not None and zero_3.zero_stage == 3
        if zero_3 or getattr(trainer, "is_fsdp_enabled", False):
            raise ValueError(
                "the weights are sharded over processes: save the model and audit its folder with "
                "`goldfish audit`"
            )
        self._trainer = trainer
        self._every = every
        self._options = options
        self._members = in_memory(members)
        self._heldout = None if heldout is None else in_memory(heldout)
        self.folder = Path(output_dir or Path(trainer.args.output_dir, "audit"))
        self._windows: list[Window] = []
        self.result: Audit | None = None  # after the training

    @property
    def page(self) -> Path:
        return self.folder.with_suffix(".html")

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Everything that could go wrong goes wrong now, not after hours."""
        error: Exception | None = None
        try:
            self._rehearse()
        except Exception as refused:
            error = refused
        # A file may be missing on one machine alone, whose process the others would wait for.
        for refusal in gather_object([error and f"{type(error).__name__}: {error}"]):
            if refusal is not None:
                raise error or ValueError(f"in another process: {refusal}")

    def _rehearse(self) -> None:
        for path in (self.folder, self.page):
            if path.exists():
                raise FileExistsError(
                    f"{path} exists: give AuditCallback another output_dir, or remove it"
                )
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._windows = list(islice(self._cut(), MOST_WINDOWS))
        if not self._windows:
            raise ValueError(
                "no member has enough tokens for a window: give AuditCallback a shorter "
                "prefix_length or suffix_length"
            )
        trainer = self._trainer
        with suppress(_AllRead):
            self._audit(_Unready(trainer.model, trainer.processing_class))

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if self._every == "end" or state.global_step >= state.max_steps:
            return  # the audit is next
        if state.global_step % int(self._every) == 0:
            self._log_recited(self._recited())

    def on_train_end(self, *_: Any, **__: Any) -> None:
        trainer = self._trainer
        state = PartialState()
        try:
            # The page names the folder of the training, not the model that it began with.
            model = InMemory(
                trainer.model,
                trainer.processing_class,
                trainer.args.output_dir,
            )
            self.result = self._audit(model, state=state)
            if trainer.is_world_process_zero():
                write_report([self.folder], self.page)
        except Exception:
            if state.num_processes > 1:
                raise
            # Weights that were not saved yet are worth more than their audit.
            _log.exception(
                "The audit failed. The model was trained: save it, and audit its folder with "
                "`goldfish audit`."
            )
            return
        self._log_recited(self.result["members.exact_match"].value or 0.0)
        if trainer.is_world_process_zero():
            print(f"{self.result.verdict['sentence']}\nReport: {self.page}")

    def _audit(self, model: Any, **more: Any) -> Audit:
        trainer = self._trainer
        # Only goldfish trainers have one. A model in memory has no receipt that would name it.
        rule = getattr(trainer, "goldfish", None)
        return audit(
            model,
            self.folder,
            members=self._members,
            heldout=self._heldout,
            device=trainer.args.device,
            **{"rule": rule, **more, **self._options},
        )

    def _log_recited(self, recited: float) -> None:
        # Trainer takes a log of ours for its own of this step, and would leave out the loss.
        control = self._trainer.control
        was_due = control.should_log
        self._trainer.log({"goldfish/recited": recited})
        control.should_log = was_due

    def _recited(self) -> float:
        """The greedy question alone, in every process the same."""
        model = self._trainer.model
        # Dropout and NEFTune's noise are for training.
        was_training = model.training
        try:
            found = Scorer(model.eval(), ()).recited(self._windows)
        finally:
            model.train(was_training)
        return sum(found) / len(found)

    def _cut(self) -> Iterator[Window]:
        options = self._options
        cutter = Cutter(
            self._trainer.processing_class,
            options.get("prefix_length", 50),
            options.get("suffix_length", 50),
            options.get("offsets", (0,)),
            context_of(self._trainer.model.config),
        )
        # Secrets are left to the final audit.
        rows = read_rows(self._members, options.get("text_column", ""))
        for index, row in enumerate(rows):
            for window in cutter.cut(row, index, "members"):
                if isinstance(window, Window) and window.prompt_kind == "training":
                    yield window


class _AllRead(Exception):
    """All that can be checked without the model was checked."""


class _Unready(InMemory):
    """Stands for the model before its training: an audit of it ends where it would be run."""

    def hashes(self) -> dict[str, str]:
        return {}  # nobody will read them

    def model(self, *_: Any, **__: Any) -> Any:
        raise _AllRead
