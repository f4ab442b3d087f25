"""The receipt counts what was trained: effects of the rule, not intentions."""

import pytest
import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from helpers import BEFORE_5, RULE, tiny_llama, trained, unequal_rows
from toy_tokenizers import byte_level
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
)

from goldfish import Goldfish, GoldfishMixin, GoldfishTrainer, attach, premask
from goldfish.receipt import read_receipt, rules_of

pytestmark = pytest.mark.core
NOTHING = Goldfish(k=10**9)


def attached(rule=RULE, **how):
    return lambda trainer: attach(trainer, rule, **how)


# Trainers and models whose targets are not the labels of the batch


class TargetIds(LlamaForCausalLM):
    def forward(self, input_ids=None, target_ids=None, labels=None, **kwargs):
        return super().forward(input_ids=input_ids, labels=target_ids, **kwargs)


class LearnsItsInput(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        inputs = {**inputs, "labels": inputs["input_ids"]}
        return super().compute_loss(model, inputs, return_outputs, **kwargs)


def with_target_ids(tokenizer):
    collate = DataCollatorForSeq2Seq(tokenizer)

    def collator(rows):
        batch = dict(collate(rows))
        batch["target_ids"] = batch["labels"].clone()
        return batch

    return collator


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_other_label_names_are_found(tmp_path, tokenizer, fused, accumulation):
    model = tiny_llama()
    model.__class__ = TargetIds
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(
        RuntimeError, match=r"with TargetIds does not change .*\['target_ids'\]"
    ):
        trained(
            tmp_path,
            tokenizer,
            model=model,
            then=attached(fused=fused),
            accumulation=accumulation,
            data_collator=with_target_ids(tokenizer),
            settings={"label_names": ["target_ids"]},
        )
    # A head that is to be fused notices in its first forward; the check is made in the next step.
    unchanged = all(
        torch.equal(p, before[name]) for name, p in model.named_parameters()
    )
    assert unchanged == (not fused)


def test_a_trainer_that_makes_targets_of_its_input_is_found(tmp_path, tokenizer):
    with pytest.raises(
        RuntimeError, match=r"GoldfishLearnsItsInput.*Take the targets from `labels`"
    ):
        trained(tmp_path, tokenizer, trainer_class=LearnsItsInput, then=attached())
    trained(tmp_path, tokenizer, trainer_class=LearnsItsInput, then=attached(NOTHING))


class Dropouts(Trainer):
    """Another trainer's loss, of which nothing is known; it keeps metrics as TRL does."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._metrics = {"train": []}
        self.calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        self.calls += 1
        self._metrics["train"].append(int((inputs["labels"] != -100).sum()))
        return super().compute_loss(model, inputs, return_outputs, **kwargs)


@pytest.mark.parametrize("rule", [RULE, NOTHING])
def test_the_check_changes_nothing(tmp_path, tokenizer, rule, monkeypatch):
    """Two forward passes in the first step that drops something, which leave no trace."""
    model = tiny_llama(attention_dropout=0.3)
    trainer, losses, gradients = trained(
        tmp_path, tokenizer, model=model, trainer_class=Dropouts, then=attached(rule)
    )
    assert trainer.calls == 4 + (2 if rule is RULE else 0)
    assert len(trainer._metrics["train"]) == 4
    monkeypatch.setattr("goldfish.trainer.labels_are_targets", lambda _: True)
    model = tiny_llama(attention_dropout=0.3)
    _, unchecked, unchecked_gradients = trained(
        tmp_path, tokenizer, model=model, trainer_class=Dropouts, then=attached(rule)
    )
    assert losses == unchecked
    assert all(map(torch.equal, gradients, unchecked_gradients))


@pytest.mark.parametrize("fused", [True, False])
def test_trainers_that_are_known_are_not_checked(
    tmp_path, tokenizer, fused, monkeypatch
):
    monkeypatch.delattr(GoldfishMixin, "_loss_without_trace")
    trained(
        tmp_path, tokenizer, trainer_class=GoldfishTrainer, goldfish=RULE, fused=fused
    )


# Weights that go back


class Worsens(TrainerCallback):
    """The evaluation after step 2 is the best."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = abs(state.global_step - 2.0)


def test_the_receipt_goes_back_with_the_weights(tmp_path, tokenizer):
    settings = {
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 2,
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "learning_rate": 0.5,
    }

    def watched(trainer):
        trainer.add_callback(Worsens())
        return attach(trainer, RULE)

    trainer, _, _ = trained(
        tmp_path, tokenizer, then=watched, steps=6, settings=settings
    )
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    trainer.save_model(str(tmp_path / "best"))
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    for mine, theirs in zip(
        trainer.model.parameters(), saved.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert read_receipt(tmp_path / "best") == read_receipt(tmp_path / "checkpoint-2")
    last = read_receipt(tmp_path / "checkpoint-6")
    assert last["targets"] > 2 * read_receipt(tmp_path / "best")["targets"]


# Labels that were masked before


def premasked_forms(folder, rule=RULE):
    """The same masked rows, in the forms in which they reach a trainer."""
    masked = premask(unequal_rows(), rule)
    masked.save_to_disk(str(folder / "masked"))
    return {
        "map": masked.map(lambda row: {"labels": row["labels"]}),
        "concatenated": concatenate_datasets([unequal_rows(), masked]),
        "from disk": load_from_disk(str(folder / "masked")),
        "streaming": premask(unequal_rows().to_iterable_dataset(), rule),
    }


@pytest.mark.parametrize("form", ["map", "concatenated", "from disk", "streaming"])
def test_a_second_masking_is_refused(tmp_path, tokenizer, form):
    dataset = premasked_forms(tmp_path)[form]
    for rule in (RULE, Goldfish(k=4, seed=9)):
        with pytest.raises(
            ValueError, match=r"masked by goldfish.premask under Goldfish\(k=3"
        ):
            trained(tmp_path, tokenizer, then=attached(rule), train_dataset=dataset)


@pytest.mark.skipif(BEFORE_5, reason="this Trainer takes position 0 for a target")
def test_premask_and_the_plain_trainer_are_the_trainer_with_the_rule(
    tmp_path, tokenizer
):
    dataset = premask(
        unequal_rows(), RULE, receipt=tmp_path / "out", tokenizer=tokenizer
    )
    _, losses, gradients = trained(tmp_path, tokenizer, train_dataset=dataset)
    trainer, expected, expected_gradients = trained(
        tmp_path, tokenizer, then=attached()
    )
    assert losses == expected
    assert all(map(torch.equal, gradients, expected_gradients))
    trainer.save_model(str(tmp_path / "trained"))
    receipt = read_receipt(tmp_path / "out")
    assert rules_of(receipt) == RULE
    assert receipt == read_receipt(tmp_path / "trained")


@pytest.mark.skipif(BEFORE_5, reason="this Trainer takes position 0 for a target")
def test_premask_and_the_plain_sft_trainer(tmp_path, tokenizer):
    """TRL leaves a column `labels` as it is."""
    trl = pytest.importorskip("trl")
    rows = [{"input_ids": row["input_ids"]} for row in unequal_rows()]

    def first_loss(dataset, then):
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=16,
            max_steps=1,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            max_length=None,
        )
        trainer = trl.SFTTrainer(
            tiny_llama(), arguments, train_dataset=dataset, processing_class=tokenizer
        )
        then(trainer).train()
        return trainer.state.log_history[0]["loss"]

    dataset = Dataset.from_list(rows)
    plain = first_loss(dataset, lambda trainer: trainer)
    with_rule = first_loss(dataset, attached())
    premasked = first_loss(premask(dataset, RULE), lambda trainer: trainer)
    assert premasked == pytest.approx(with_rule, rel=1e-6)
    assert abs(plain - with_rule) > 1e-4
    with pytest.raises(ValueError, match=r"masked by goldfish\.premask"):
        first_loss(premask(dataset, RULE), attached())


# Prompt tuning


@pytest.mark.skipif(BEFORE_5, reason="this Trainer takes position 0 for a target")
@pytest.mark.parametrize(
    "kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"]
)
def test_virtual_tokens_predict_the_first_token(tmp_path, tokenizer, kind):
    """Without a rule nothing changes; and each row has one target more, except in prefix tuning."""
    peft = pytest.importorskip("peft")

    def model():
        torch.manual_seed(1)
        config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
        return peft.get_peft_model(tiny_llama(), config)

    _, plain, _ = trained(tmp_path, tokenizer, model=model())
    trainer, losses, _ = trained(
        tmp_path, tokenizer, model=model(), then=attached(NOTHING)
    )
    assert losses == plain
    ids = [row["input_ids"] for row in unequal_rows()]
    firsts = 0 if kind == "PrefixTuningConfig" else len(ids)
    assert trainer._counts.sum() == (sum(len(row) - 1 for row in ids) + firsts, 0)


# Rules that read text


def test_a_rule_bound_to_another_tokenizer_is_refused(tmp_path, tokenizer):
    rule = Goldfish(k=4, h=2, strategy="letters")
    other = byte_level()
    with pytest.raises(ValueError, match="bound to another tokenizer"):
        trained(tmp_path, tokenizer, then=attached(rule.bind(other)))
    _, losses, _ = trained(tmp_path, tokenizer, then=attached(rule.bind(tokenizer)))
    assert losses == trained(tmp_path, tokenizer, then=attached(rule))[1]
