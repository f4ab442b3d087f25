"""The rule in transformers.Trainer: exact in scale, absent in evaluation, and recorded."""

import json
import logging

import pytest
import torch
import transformers
from helpers import RULE, trained, unequal_rows
from packaging.version import Version
from transformers import (
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from goldfish import (
    Goldfish,
    GoldfishCollator,
    GoldfishLoss,
    GoldfishMixin,
    GoldfishTrainer,
    attach,
)
from goldfish.receipt import SCHEMA, read_receipt, rules_of

pytestmark = pytest.mark.core
counts_shifted_labels = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.10.1"),
    reason="this Trainer takes position 0 for a target",
)


@counts_shifted_labels
def test_a_rule_that_drops_nothing_changes_nothing(tmp_path, tokenizer):
    _, plain, plain_gradients = trained(tmp_path, tokenizer)
    _, ours, gradients = trained(
        tmp_path, tokenizer, then=lambda t: attach(t, Goldfish(k=10**9))
    )
    assert ours == plain
    assert all(
        torch.equal(a, b) for a, b in zip(gradients, plain_gradients, strict=True)
    )


def test_evaluation_never_sees_the_rule(tmp_path, tokenizer):
    trainer, _, _ = trained(
        tmp_path,
        tokenizer,
        trainer_class=GoldfishTrainer,
        goldfish=Goldfish(k=1.1, h=2),
    )
    plain = Trainer(
        model=trainer.model, args=trainer.args, data_collator=trainer.data_collator
    )
    rows = unequal_rows(8, 30)
    assert trainer.evaluate()["eval_loss"] == plain.evaluate(rows)["eval_loss"]
    ours, theirs = trainer.predict(rows), plain.predict(rows)
    assert ours.metrics["test_loss"] == theirs.metrics["test_loss"]


@counts_shifted_labels
def test_goldfish_loss_as_compute_loss_func(tmp_path, tokenizer):
    """Exact with one batch a step, in scale with several; evaluation is plain."""
    _, exact, _ = trained(
        tmp_path, tokenizer, trainer_class=GoldfishTrainer, goldfish=RULE, batch=8
    )
    trainer, one, _ = trained(
        tmp_path, tokenizer, compute_loss_func=GoldfishLoss(RULE), batch=8
    )
    _, several, _ = trained(
        tmp_path,
        tokenizer,
        compute_loss_func=GoldfishLoss(RULE),
        batch=2,
        accumulation=4,
    )
    assert one == pytest.approx(exact, rel=2e-6)
    assert several == pytest.approx(exact, rel=2e-2)
    assert several != pytest.approx(exact, rel=2e-6)
    plain = Trainer(
        model=trainer.model, args=trainer.args, data_collator=trainer.data_collator
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        plain.evaluate(trainer.eval_dataset)["eval_loss"], rel=1e-6
    )


def test_a_step_without_a_kept_token_is_a_zero(tmp_path, tokenizer):
    everything = Goldfish(
        k=1 + 1e-9
    )  # drops all but each document's first token, which is no target anyway
    trainer, losses, gradients = trained(
        tmp_path, tokenizer, trainer_class=GoldfishTrainer, goldfish=everything
    )
    assert losses == [0.0] * 4
    assert all((step == 0).all() for step in gradients)
    assert trainer.state.log_history[0]["goldfish/drop_rate"] == 1.0


def test_drop_rate_is_logged_and_checkpoints_tell_the_rule(tmp_path, tokenizer):
    trainer, _, _ = trained(
        tmp_path,
        tokenizer,
        trainer_class=GoldfishTrainer,
        goldfish=RULE,
        settings={"save_strategy": "steps", "save_steps": 2},
    )
    trainer.save_model(str(tmp_path / "final"))
    targets = dropped = 0
    for row in unequal_rows():  # four steps of four rows: each row once
        gone = RULE.dropped(torch.tensor(row["input_ids"]))[1:]
        targets, dropped = targets + len(gone), dropped + int(gone.sum())
    for folder in ("checkpoint-4", "final"):
        receipt = read_receipt(tmp_path / folder)
        assert rules_of(receipt) == RULE
        assert (receipt["targets"], receipt["dropped"]) == (targets, dropped)
        assert len(receipt["tokenizer"]) == 64
        assert (tmp_path / folder / "model.safetensors").is_file()
    rates = [
        entry["goldfish/drop_rate"]
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    assert len(rates) == 4
    assert 0 < read_receipt(tmp_path / "checkpoint-2")["targets"] < targets
    assert sum(rates) / 4 == pytest.approx(dropped / targets, abs=0.1)


@pytest.mark.parametrize("rule", [RULE, Goldfish(k=3, h=4, strategy="random")], ids=str)
def test_resuming_goes_on_counting_and_refuses_another_rule(tmp_path, tokenizer, rule):
    settings = {"save_strategy": "steps", "save_steps": 2, "seed": 3}
    whole, losses, _ = trained(
        tmp_path / "a",
        tokenizer,
        trainer_class=GoldfishTrainer,
        goldfish=rule,
        settings=settings,
    )
    before = read_receipt(tmp_path / "a" / "checkpoint-4")
    totals, decisions = before["targets"], before["decisions"]
    whole.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    resumed = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert resumed == losses
    assert read_receipt(tmp_path / "a" / "checkpoint-4")["targets"] == totals
    assert read_receipt(tmp_path / "a" / "checkpoint-4")["decisions"] == decisions
    whole.goldfish = Goldfish(k=4)
    with pytest.raises(
        ValueError,
        match=r"checkpoint-2 was trained under Goldfish\(k=3, h=4.*this trainer has Goldfish\(k=4",
    ):
        whole.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


def test_another_rule_may_go_on_when_told_to(tmp_path, tokenizer):
    settings = {"save_strategy": "steps", "save_steps": 2, "seed": 3}
    trainer, _, _ = trained(
        tmp_path,
        tokenizer,
        trainer_class=GoldfishTrainer,
        goldfish=RULE,
        settings=settings,
    )
    middle = read_receipt(tmp_path / "checkpoint-2")
    trainer.goldfish = Goldfish(k=4)
    trainer.train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2"), allow_other_rule=True
    )
    receipt = read_receipt(tmp_path / "checkpoint-4")
    assert receipt["before"] == middle
    assert rules_of(receipt) == Goldfish(k=4)
    assert receipt["targets"] + middle["targets"] == sum(
        len(row["input_ids"]) - 1 for row in unequal_rows()
    )


def test_a_checkpoint_without_a_rule_is_not_resumed_unasked(tmp_path, tokenizer):
    settings = {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path, tokenizer, settings=settings)
    trainer, _, _ = trained(
        tmp_path / "other", tokenizer, trainer_class=GoldfishTrainer, goldfish=RULE
    )
    with pytest.raises(
        ValueError,
        match=r"checkpoint-2 was trained without a rule, this trainer has Goldfish\(k=3",
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trainer.train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2"), allow_other_rule=True
    )
    trainer.save_model(str(tmp_path / "out"))
    assert read_receipt(tmp_path / "out")["before"] == {"rule": None}


def test_training_on_goes_on_counting(tmp_path, tokenizer):
    trainer, _, _ = trained(
        tmp_path, tokenizer, trainer_class=GoldfishTrainer, goldfish=RULE
    )
    trainer.save_model(str(tmp_path / "once"))
    trainer.train()
    trainer.save_model(str(tmp_path / "twice"))
    assert (
        read_receipt(tmp_path / "twice")["targets"]
        == 2 * read_receipt(tmp_path / "once")["targets"]
    )


def test_another_tokenizer_is_refused(tmp_path, tokenizer):
    settings = {"save_strategy": "steps", "save_steps": 2}
    trainer, _, _ = trained(
        tmp_path,
        tokenizer,
        trainer_class=GoldfishTrainer,
        goldfish=RULE,
        settings=settings,
    )
    path = tmp_path / "checkpoint-2" / "goldfish.json"
    path.write_text(
        path.read_text().replace(read_receipt(path.parent)["tokenizer"], "0" * 64)
    )
    with pytest.raises(
        ValueError,
        match=r"was trained under Goldfish.* with the tokenizer 0000.*new run from its weights",
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_receipts_agree_whatever_the_batches(tmp_path, tokenizer):
    """The same texts in another order, other batches, other padding: the same receipt."""

    def decisions(name, rule=RULE, **how):
        trainer, _, _ = trained(
            tmp_path / name,
            tokenizer,
            trainer_class=GoldfishTrainer,
            goldfish=rule,
            **how,
        )
        trainer.save_model(str(tmp_path / name))
        receipt = read_receipt(tmp_path / name)
        return receipt["targets"], receipt["dropped"], receipt["decisions"]

    first = decisions("a", batch=4, steps=4)
    assert decisions("b", batch=2, steps=8, settings={"seed": 9}) == first
    assert decisions("c", batch=2, steps=4, accumulation=2) == first
    for name, other in (
        ("d", Goldfish(k=3, h=4, seed=1)),
        ("e", Goldfish(k=3, h=5)),
        ("f", Goldfish(k=4, h=4)),
    ):
        assert decisions(name, other)[2] != first[2]


def test_attach_gives_what_goldfish_trainer_gives(tmp_path, tokenizer):
    class MyTrainer(Trainer):
        marker = "mine"

    _, ours, _ = trained(
        tmp_path, tokenizer, trainer_class=GoldfishTrainer, goldfish=RULE, fused=False
    )
    _, fused, _ = trained(
        tmp_path, tokenizer, trainer_class=GoldfishTrainer, goldfish=RULE
    )
    trainer, theirs, _ = trained(
        tmp_path, tokenizer, trainer_class=MyTrainer, then=lambda t: attach(t, RULE)
    )
    assert theirs == ours
    assert fused == pytest.approx(ours, rel=2e-6)
    assert isinstance(trainer, MyTrainer)
    assert isinstance(trainer, GoldfishMixin)
    assert type(trainer).__name__ == "GoldfishMyTrainer"


def test_attach_refuses_what_it_cannot_do(tmp_path, tokenizer, model):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True
    )
    with pytest.raises(
        TypeError, match=r"attach needs a transformers.Trainer .* got Llama"
    ):
        attach(model, RULE)
    trainer = Trainer(model=model, args=arguments)
    with pytest.raises(
        TypeError,
        match=r"expected a rule such as Goldfish\(k=4, h=13, max_kept=4\), got 4",
    ):
        attach(trainer, 4)
    assert type(trainer) is Trainer, "a failed attach leaves the trainer as it was"
    attach(trainer, RULE)
    with pytest.raises(ValueError, match=r"already has a rule, Goldfish\(k=3"):
        attach(trainer, RULE)
    for twice in (
        Trainer(model=model, args=arguments, compute_loss_func=GoldfishLoss(RULE)),
        Trainer(
            model=model,
            args=arguments,
            data_collator=GoldfishCollator(DataCollatorForSeq2Seq(tokenizer), RULE),
        ),
    ):
        with pytest.raises(ValueError, match="already drops tokens"):
            attach(twice, RULE)


def test_the_head_is_fused_while_training_only(tmp_path, tokenizer, caplog):
    """Training sees no logits; afterwards the model is as it was."""
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            ids = torch.tensor([[5, 6, 7]])
            seen.append(model(input_ids=ids, labels=ids).get("logits"))

    trainer, _, _ = trained(
        tmp_path,
        tokenizer,
        trainer_class=GoldfishTrainer,
        goldfish=RULE,
        then=lambda t: t.add_callback(Watch()) or t,
    )
    assert seen == [None] * 4
    ids = torch.tensor([[5, 6, 7]])
    trainer.model.train()
    assert trainer.model(input_ids=ids, labels=ids).logits.shape == (1, 3, 320)

    class Own(GoldfishTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    for why, how in (
        ("Own computes its own loss", {"trainer_class": Own}),
        ("need the logits", {"settings": {"label_smoothing_factor": 0.1}}),
    ):
        caplog.clear()
        transformers_log = logging.getLogger("goldfish.trainer")
        with caplog.at_level("WARNING", logger=transformers_log.name):
            trained(
                tmp_path,
                tokenizer,
                **{"trainer_class": GoldfishTrainer, "goldfish": RULE, **how},
            )
        assert why in caplog.text


def test_a_broken_receipt_is_named(tmp_path):
    assert read_receipt(tmp_path) is None
    for broken in (
        "{",
        "[]",
        json.dumps({"schema": "goldfish.receipt/9"}),
        json.dumps({"schema": "goldfish.receipt/1"}),
        json.dumps({"schema": SCHEMA, "sources": []}),
    ):
        (tmp_path / "goldfish.json").write_text(broken)
        with pytest.raises(
            ValueError, match=r"goldfish.json is not a goldfish receipt: "
        ):
            read_receipt(tmp_path)


def test_a_callback_saves_what_was_counted(tmp_path, tokenizer):
    """Between two logs, on a single process; its own step is counted."""

    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            self.trainer.save_model(str(tmp_path / str(state.global_step)))

    def watched(trainer):
        trainer.add_callback(save := Save())
        save.trainer = trainer
        return trainer

    trained(
        tmp_path,
        tokenizer,
        trainer_class=GoldfishTrainer,
        goldfish=RULE,
        then=watched,
        settings={"logging_steps": 500},
    )
    for steps in (1, 3, 4):
        trained(
            tmp_path / "alone",
            tokenizer,
            trainer_class=GoldfishTrainer,
            goldfish=RULE,
            steps=steps,
            settings={"save_strategy": "steps", "save_steps": steps},
        )
        assert read_receipt(tmp_path / str(steps)) == read_receipt(
            tmp_path / "alone" / f"checkpoint-{steps}"
        )


def test_batches_that_bypass_the_rule_are_an_error(tmp_path, tokenizer):
    class Own(GoldfishTrainer):
        def get_batch_samples(self, epoch_iterator, num_batches, device):
            return [next(epoch_iterator) for _ in range(num_batches)], None

    with pytest.raises(
        RuntimeError,
        match="Own took a step, but no batch was masked: its get_batch_samples",
    ):
        trained(tmp_path, tokenizer, trainer_class=Own, goldfish=RULE)
