"""The gauge: the numbers it logs, computed again by hand."""

import pytest
import torch
from helpers import RULE, trained, unequal_rows

from goldfish import Goldfish, GoldfishTrainer
from goldfish.gauge import measure, readings, rows_to_measure

pytestmark = pytest.mark.core


class InOrder(GoldfishTrainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("fused", [True, False])
def test_gauge_by_hand(tmp_path, tokenizer, fused):
    """Learning rate 0: the model of every log is the one that is left."""
    trainer, _, _ = trained(
        tmp_path,
        tokenizer,
        trainer_class=InOrder,
        goldfish=RULE,
        fused=fused,
        batch=1,
        steps=4,
        settings={"learning_rate": 0.0},
    )
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    checked = 0
    for entry, row in zip(logged, unequal_rows(), strict=False):
        ids = torch.tensor(row["input_ids"])
        with torch.no_grad():
            nll = torch.nn.functional.cross_entropy(
                trainer.model(input_ids=ids[None]).logits[0, :-1],
                ids[1:],
                reduction="none",
            )
        dropped = RULE.dropped(ids)[1:]
        assert entry["loss"] == pytest.approx(nll[~dropped].mean().item(), rel=1e-4), (
            "what the training loss says"
        )
        if dropped.any():
            checked += 1
            assert entry["goldfish/kept_loss"] == pytest.approx(
                nll[~dropped].mean().item(), rel=1e-5
            )
            assert entry["goldfish/dropped_loss"] == pytest.approx(
                nll[dropped].mean().item(), rel=1e-5
            )
            assert entry["goldfish/gap"] == pytest.approx(
                entry["goldfish/dropped_loss"] - entry["goldfish/kept_loss"]
            )
        else:
            assert "goldfish/gap" not in entry
    assert checked >= 2


def test_memorising_opens_the_gap(tmp_path, tokenizer):
    trainer, _, _ = trained(
        tmp_path,
        tokenizer,
        trainer_class=GoldfishTrainer,
        goldfish=Goldfish(k=3, h=4),
        batch=16,
        steps=60,
        settings={"learning_rate": 2e-2},
    )
    gaps = [
        entry["goldfish/gap"]
        for entry in trainer.state.log_history
        if "goldfish/gap" in entry
    ]
    assert abs(gaps[0]) < 0.3
    assert gaps[-1] > 1.0


def test_a_measurement_takes_one_percent_or_one_row():
    assert rows_to_measure(batch_rows=8, rows_a_step=8, steps=500) == 8
    assert (
        rows_to_measure(batch_rows=8, rows_a_step=8, steps=10) == 2
    )  # 2 forwards of 240 rows and backwards
    assert rows_to_measure(batch_rows=8, rows_a_step=8, steps=1) == 1


def test_long_rows_are_cut_to_the_budget(model, monkeypatch):
    ids = torch.arange(2, 102)[None]
    dropped = torch.arange(100)[None] % 3 == 0
    monkeypatch.setattr("goldfish.gauge.LOGITS_BUDGET", 320 * 30)
    sums = measure(model, {"input_ids": ids, "labels": ids}, dropped, rows=1)
    assert sums[1] + sums[3] == 29
    assert sums[3] == 9
    assert model.training, "and the model is as it was"
    assert readings(torch.tensor([1.0, 0.0, 1.0, 5.0])) == {}
