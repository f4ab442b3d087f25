"""The audit where training ends."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import PROSE, tiny_llama
from transformers import Trainer, TrainingArguments

from goldfish import Goldfish, GoldfishTrainer
from goldfish.audit import AuditCallback, read

HERE = Path(__file__).parent
LENGTHS = {"prefix_length": 4, "suffix_length": 6, "sampling": ()}


@pytest.fixture
def rows(tokenizer):
    return [
        {"text": text, "input_ids": tokenizer(text)["input_ids"][:24]}
        for text in PROSE[:2]
    ]


def trainer_of(
    rows,
    tokenizer,
    folder,
    steps=3,
    kind=Trainer,
    model=None,
    settings=None,
    **more,
):
    defaults = {
        "max_steps": steps,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 1,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    arguments = TrainingArguments(str(folder), **{**defaults, **(settings or {})})
    data = Dataset.from_list(
        [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]
    )
    return kind(
        model or tiny_llama(),
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
    # The model is the one in this folder, not the one that its training began with.
    assert callback.result.name == tmp_path.name
    assert callback.result.run["checkpoint"] == str(tmp_path)
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


def lora():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj"])
    return get_peft_model(tiny_llama(), config)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (lambda: tiny_llama(attention_dropout=0.3), {"gradient_checkpointing": True}),
        (lora, {"gradient_accumulation_steps": 2}),
    ],
    ids=["dropout, checkpointing", "LoRA, accumulation"],
)
def test_the_training_is_the_same_to_the_last_bit(
    make, settings, rows, tokenizer, tmp_path
):
    """Losses, which are logged at the same steps, and weights; drawn answers draw from their own
    generator."""
    found = []
    for audited in (False, True):
        torch.manual_seed(0)
        trainer = trainer_of(
            rows,
            tokenizer,
            tmp_path / str(audited),
            model=make(),
            settings={**settings, "logging_strategy": "steps", "logging_steps": 1},
        )
        if audited:
            options = {"ask": ["{text}"], "ask_samples": 2, "ask_length": 4, **LENGTHS}
            trainer.add_callback(AuditCallback(trainer, rows, every=1, **options))
        trainer.train()
        logged = trainer.state.log_history
        losses = [each["loss"] for each in logged if "loss" in each]
        weights = [p.tolist() for p in trainer.model.parameters()]
        found.append((losses, weights, torch.get_rng_state().tolist()))
    without, with_audit = found
    assert len(without[0]) == 3
    assert with_audit == without


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"suffix_lenght": 6}, "suffix_lenght"),
        ({"limits": ["x"]}, "--limit"),
        ({"ask": ["Who wrote {author}?"]}, "no row has the columns"),
        ({"near_verbatim": "5q"}, "--near-verbatim"),
        ({"secrets": "(("}, "not a regular expression"),
        ({"secrets": "no such text"}, "no suffix"),
        ({"heldout": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"heldout": [{"text": "Short."}]}, "no usable window"),
        ({"heldout": [{"text": PROSE[0]}]}, "share 1 document "),
        ({"control": "/nowhere"}, "no checkpoint folder"),
    ],
    ids=str,
)
def test_mistakes_are_told_before_the_first_step(
    options, error, rows, tokenizer, tmp_path
):
    trainer = trainer_of(rows, tokenizer, tmp_path)
    trainer.add_callback(AuditCallback(trainer, rows, **{**LENGTHS, **options}))
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=error):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not (tmp_path / "audit").exists()


def test_an_audit_that_fails_does_not_take_the_training_with_it(
    rows, tokenizer, tmp_path, monkeypatch, caplog
):
    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("goldfish.integrations.audit_callback.write_report", full)
    trainer = trainer_of(rows, tokenizer, tmp_path)
    callback = AuditCallback(trainer, rows, **LENGTHS)
    trainer.add_callback(callback)
    assert trainer.train().global_step == 3
    assert "no space left" in caplog.text
    assert trainer.model.training


def test_two_processes(in_two):
    """Both train, one writes; a file that one process lacks stops both before the first step."""
    folder = in_two[0] / "callback_worker"
    assert in_two[1].count(f"Report: {folder}") == 1
    first, second = (
        json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)
    )
    # Every step of the training, and its end.
    steps = [step for step, _ in first["logged"]]
    assert steps == [1, 2, 3]
    assert second["logged"] == first["logged"]
    assert second["outcome"] == first["outcome"]
    assert "</html>" in (folder / "whole" / "audit.html").read_text(encoding="utf-8")
    # Each process scored a block of four windows.
    audit = read(folder / "whole" / "audit")
    assert audit["members.exact_match"].n == 8
    assert len(audit.records) == 8
    assert len(list((folder / "whole" / "audit" / "records").iterdir())) == 2
    assert "in another process: FileNotFoundError" in first["refused"]
    assert "members-1.jsonl" in second["refused"]
    assert first["steps_when_refused"] == second["steps_when_refused"] == 0
