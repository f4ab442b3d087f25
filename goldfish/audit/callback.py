"""An audit where training ends: a callback of Trainer."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from goldfish.audit.model import context_of
from goldfish.audit.results import Audit
from goldfish.audit.run import audit
from goldfish.audit.score import Scorer
from goldfish.audit.windows import Cutter, Window
from goldfish.report import write_report
from goldfish.text.rows import Source, in_memory, read_rows

MOST_WINDOWS = 256  # of the question that is asked during training


class AuditCallback(TrainerCallback):
    """Audits the model when its training ends, and asks on the way whether it recites.

    At the end it writes the audit's folder, and beside it the page:
    `goldfish.audit.read(folder)`. On the way, every `every` steps, it logs `goldfish/recited`: the
    share of the first 256 members' windows whose suffix the model predicts token for token, in one
    forward pass. In a launch of several processes all of them share the final audit.

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
        for path in (self.folder, self.page):
            if path.exists():
                raise FileExistsError(
                    f"{path} exists: give AuditCallback another output_dir, or remove it"
                )
        self._windows = list(islice(self._cut(), MOST_WINDOWS))
        if not self._windows:
            raise ValueError(
                "no member has enough tokens for a window: give AuditCallback a shorter "
                "prefix_length or suffix_length"
            )

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if self._every == "end" or state.global_step >= state.max_steps:
            return  # the audit is next
        if state.global_step % int(self._every) == 0:
            self._log(self._recited())

    def on_train_end(self, *_: Any, **__: Any) -> None:
        trainer = self._trainer
        # Only goldfish trainers have one. A model in memory has no receipt that would name it.
        rule = getattr(trainer, "goldfish", None)
        self.result = audit(
            trainer.model,
            self.folder,
            members=self._members,
            heldout=self._heldout,
            tokenizer=trainer.processing_class,
            state=PartialState(),
            device=trainer.args.device,
            **{"rule": rule, **self._options},
        )
        self._log(self.result["members.exact_match"].value or 0.0)
        if trainer.is_world_process_zero():
            write_report([self.folder], self.page)
            print(f"{self.result.verdict['sentence']}\nReport: {self.page}")

    def _log(self, recited: float) -> None:
        self._trainer.log({"goldfish/recited": recited})

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
                if isinstance(window, Window) and window.asked == "training":
                    yield window
