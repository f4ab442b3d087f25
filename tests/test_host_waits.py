"""Where a training step makes the host wait for a GPU: where Trainer does, and once for the head.

No GPU is needed: operations are recorded (operations.py), and a tensor on the device "meta" stands
for one on a GPU. It has no values, so whatever asks for one is an error.
"""

from collections import Counter

import pytest
import torch
from helpers import trained
from operations import Operations
from transformers import Trainer, TrainerCallback

from goldfish import Goldfish, GoldfishTrainer
from goldfish.masking import mask_batch
from goldfish.receipt import DropCounts, count_drops

RULES = [
    Goldfish(k=4, h=13, max_kept=4),
    Goldfish(k=4, h=13, window="inclusive", exempt=(1, 2)),
    Goldfish(k=4, h=13, opening="keep", document_end=3),
    Goldfish(k=4, strategy="static"),
    Goldfish(k=4, strategy="random"),
]


def batch_on(device: str) -> dict[str, torch.Tensor]:
    ids = torch.zeros(2, 8, dtype=torch.int64, device=device)
    mask = torch.ones_like(ids)
    return {
        "input_ids": ids,
        "labels": ids,
        "attention_mask": mask,
        "position_ids": ids,
    }


@pytest.mark.parametrize(
    "rule", RULES, ids=lambda rule: f"{rule.strategy}-{rule.window}"
)
def test_masking_and_counting_wait_for_nothing(rule, monkeypatch):
    counts, batch = DropCounts(rule, torch.device("meta")), batch_on("meta")

    def step():
        masked = mask_batch(rule, batch, ignore_first=True, draw=3)
        counts.add(count_drops(masked))
        counts.end_step()

    step()  # ids that are exempt are copied to a device once
    copied, plain_tensor = [], torch.tensor

    def tensor(*args, device="cpu", **kwargs):
        copied.append(str(device))
        return plain_tensor(*args, device=device, **kwargs)

    monkeypatch.setattr(torch, "tensor", tensor)
    with Operations() as operations:
        step()
    assert operations.waits == []
    assert "meta" not in copied


def test_operations_that_wait_are_seen():
    with Operations() as operations:
        values = torch.arange(4)
        values.nonzero()
        values[values > 1]
        values.sum().item()
        values.to("meta")
    assert operations.waits == [
        "aten::nonzero",
        "aten::index",
        "aten::_local_scalar_dense",
        "aten::_to_copy cpu and meta",
    ]


class Recorded(TrainerCallback):
    """Records the waits of single steps: forward, backward and optimizer."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, *args, **kwargs):
        self.operations = Operations()
        self.operations.__enter__()

    def on_step_end(self, *args, **kwargs):
        self.operations.__exit__(None, None, None)
        self.steps.append(Counter(self.operations.waits))


@pytest.mark.parametrize(("fused", "more"), [(True, {"aten::nonzero": 1}), (False, {})])
def test_a_training_step_waits_for_the_kept_rows_alone(
    tmp_path, tokenizer, monkeypatch, fused, more
):
    # On a GPU labels are checked by an assertion there; the probe lies on the CPU anyway.
    monkeypatch.setattr("goldfish.linear._check_range", lambda *_: None)
    monkeypatch.setattr("goldfish.fused.read_probe", lambda _: (1.0, None))

    def waits(**how):
        recorded = Recorded()

        def watched(trainer):
            trainer.add_callback(recorded)
            return trainer

        trained(
            tmp_path, tokenizer, then=watched, settings={"logging_steps": 100}, **how
        )
        return recorded.steps[
            1:
        ]  # the first step finds out what the model does after its head

    plain = waits(trainer_class=Trainer)
    ours = waits(trainer_class=GoldfishTrainer, goldfish=RULES[0], fused=fused)
    assert [step - other for step, other in zip(ours, plain, strict=True)] == [
        Counter(more)
    ] * 3
