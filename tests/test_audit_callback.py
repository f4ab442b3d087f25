"""The audit where training ends."""

import pytest
from datasets import Dataset
from helpers import PROSE, tiny_llama
from transformers import Trainer, TrainingArguments

from goldfish import Goldfish, GoldfishTrainer
from goldfish.audit import AuditCallback, read

LENGTHS = {"prefix_length": 4, "suffix_length": 6, "sampling": ()}


@pytest.fixture
def rows(tokenizer):
    return [
        {"text": text, "input_ids": tokenizer(text)["input_ids"][:24]}
        for text in PROSE[:2]
    ]


def trainer_of(rows, tokenizer, folder, steps=3, kind=Trainer, **more):
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
    )
    data = Dataset.from_list(
        [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]
    )
    return kind(
        tiny_llama(),
        arguments,
        train_dataset=data,
        processing_class=tokenizer,
        **more,
    )


def test_training_ends_with_an_audit_and_its_page(rows, tokenizer, tmp_path):
    rule = Goldfish(k=4, h=3, max_kept=4)
    trainer = trainer_of(rows, tokenizer, tmp_path, kind=GoldfishTrainer, goldfish=rule)
    callback = AuditCallback(trainer, rows, every=2, **LENGTHS)
    trainer.add_callback(callback)
    trainer.train()
    assert trainer.model.training
    assert callback.result == read(tmp_path / "audit")
    assert callback.result.run["rule"] == rule.to_dict()
    assert callback.result["members.rule_p"].value is not None
    assert "</html>" in (tmp_path / "audit.html").read_text(encoding="utf-8")
    logged = [
        (each["step"], each["goldfish/recited"])
        for each in trainer.state.log_history
        if "goldfish/recited" in each
    ]
    assert [step for step, _ in logged] == [2, 3], "every two steps, and at the end"
    assert logged[-1][1] == callback.result["members.exact_match"].value


def test_what_is_learned_by_heart_is_logged_as_recited(rows, tokenizer, tmp_path):
    trainer = trainer_of(rows, tokenizer, tmp_path, steps=120)
    trainer.add_callback(AuditCallback(trainer, rows, every=60, **LENGTHS))
    trainer.train()
    logged = [
        each["goldfish/recited"]
        for each in trainer.state.log_history
        if "goldfish/recited" in each
    ]
    assert logged[-1] == 1.0
    assert len(logged) == 2


def test_nothing_is_overwritten_and_it_is_told_before_the_first_step(
    rows, tokenizer, tmp_path
):
    (tmp_path / "audit").mkdir()
    trainer = trainer_of(rows, tokenizer, tmp_path)
    trainer.add_callback(AuditCallback(trainer, rows, **LENGTHS))
    with pytest.raises(FileExistsError, match="another output_dir"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_what_is_refused(rows, tokenizer, tmp_path):
    trainer = trainer_of(rows, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="a number of steps"):
        AuditCallback(trainer, rows, every=0)
    trainer.add_callback(AuditCallback(trainer, rows, prefix_length=10**4))
    with pytest.raises(ValueError, match="do not fit the model"):
        trainer.train()
    trainer = trainer_of(rows, None, tmp_path)
    with pytest.raises(ValueError, match="processing_class"):
        AuditCallback(trainer, rows)
