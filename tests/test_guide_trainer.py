"""Strategy "entropy" in trainers: the model reads the data once; a resume uses what it decided."""

import itertools

import pytest
import safetensors.torch
import torch
from helpers import tiny_llama, trained, unequal_rows
from transformers import Trainer

from goldfish import Goldfish, GoldfishTrainer, attach, premask
from goldfish.guide import FILE_NAME, Guide, load_decisions, save_decisions
from goldfish.receipt import read_receipt

pytestmark = pytest.mark.core
RULE = Goldfish(k=2, strategy="entropy")
SAVED = {"save_strategy": "steps", "save_steps": 2}


def attached(trainer):
    return attach(trainer, RULE)


def opinionated():
    """A model with entropies that differ."""
    return tiny_llama(initializer_range=0.5)


def counts(receipt):
    return {name: receipt[name] for name in ("targets", "dropped", "decisions")}


@pytest.mark.parametrize("kind", [Trainer, GoldfishTrainer])
def test_a_trainer_decides_like_premask(tmp_path, tokenizer, kind):
    premask(unequal_rows(), RULE, guide=opinionated(), receipt=tmp_path / "premasked")
    how = {"then": attached} if kind is Trainer else {"goldfish": RULE}
    trainer, _, _ = trained(
        tmp_path / "run",
        tokenizer,
        trainer_class=kind,
        model=opinionated(),
        settings=SAVED,
        **how,
    )
    trainer.save_model()
    receipt = read_receipt(tmp_path / "run")
    assert counts(receipt) == counts(read_receipt(tmp_path / "premasked"))
    assert receipt["rule"]["guide"] == Guide(opinionated()).fingerprint
    assert load_decisions(tmp_path / "run/checkpoint-2") == trainer.goldfish
    # Whoever has them can test what was trained on, and the output folder is what Trainer pushes.
    assert not (tmp_path / "run" / FILE_NAME).exists()
    # A second training of the same trainer keeps them; the model has learned since.
    before = trainer.goldfish
    trainer.train()
    assert trainer.goldfish is before


def test_the_same_batches_are_drawn_as_under_another_rule(tmp_path, tokenizer):
    def order(rule):
        seen = []
        trained(
            tmp_path / rule.strategy,
            tokenizer,
            model=opinionated(),
            trainer_class=GoldfishTrainer,
            goldfish=rule,
            data_collator=lambda rows: seen.extend(rows) or batch_of(rows),
        )
        return [row["input_ids"] for row in seen]

    def batch_of(rows):
        longest = max(len(row["input_ids"]) for row in rows)
        padded = [
            row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows
        ]
        ids = torch.tensor(padded)
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}

    read_first = order(RULE)
    assert read_first[:16] == unequal_rows()["input_ids"]
    assert read_first[16:] == order(Goldfish(k=2))


def test_a_resumed_run_trains_on_what_was_decided(tmp_path, tokenizer, monkeypatch):
    """The decisions are read from the checkpoint, even if the model would decide otherwise."""
    how = {"then": attached, "settings": SAVED}
    _, losses, _ = trained(tmp_path, tokenizer, model=opinionated(), **how)
    monkeypatch.setattr(Guide, "decisions", lambda *_: 1 / 0)
    checkpoint = tmp_path / "checkpoint-2"
    resume = {"resume_from_checkpoint": str(checkpoint)}
    other = tmp_path / "other"
    _, resumed, _ = trained(other, tokenizer, model=tiny_llama(), train=resume, **how)
    assert resumed == losses
    stored = (checkpoint / FILE_NAME).read_bytes()
    assert (other / "checkpoint-4" / FILE_NAME).read_bytes() == stored

    decisions = torch.ones(1).long()
    save_decisions(checkpoint, Guide(tiny_llama()).with_decisions(RULE, decisions))
    with pytest.raises(ValueError, match="those of another checkpoint"):
        trained(other, tokenizer, train=resume, **how)
    (checkpoint / FILE_NAME).unlink()
    with pytest.raises(FileNotFoundError, match="copy it there"):
        trained(other, tokenizer, train=resume, **how)


def test_a_resume_that_does_not_fit_reads_nothing(tmp_path, tokenizer, monkeypatch):
    def resume(rule, **options):
        return trained(
            tmp_path,
            tokenizer,
            model=opinionated(),
            settings=SAVED,
            then=lambda trainer: attach(trainer, rule),
            train={"resume_from_checkpoint": str(checkpoint), **options},
        )

    how = {"then": attached, "settings": SAVED}
    _, losses, _ = trained(tmp_path, tokenizer, model=opinionated(), **how)
    checkpoint = tmp_path / "checkpoint-2"
    stored = (checkpoint / FILE_NAME).read_bytes()
    monkeypatch.setattr(Guide, "decisions", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=r"was trained under Goldfish\(k=2, "):
        resume(Goldfish(k=3, strategy="entropy"))
    assert resume(RULE)[1] == losses
    monkeypatch.undo()
    # Decided anew, the old decisions stay beside the old weights.
    other, _, _ = resume(Goldfish(k=3, strategy="entropy"), allow_other_rule=True)
    assert load_decisions(tmp_path / "checkpoint-4") == other.goldfish
    assert (checkpoint / FILE_NAME).read_bytes() == stored

    safetensors.torch.save_file({"other": torch.zeros(1)}, checkpoint / FILE_NAME)
    no_decisions = (checkpoint / FILE_NAME).read_bytes()
    for damaged in (b"", stored[:20], stored[:-8], no_decisions):
        (checkpoint / FILE_NAME).write_bytes(damaged)
        with pytest.raises(
            ValueError, match=rf"{FILE_NAME} is not what a guide decided"
        ):
            resume(RULE)


@pytest.mark.parametrize("checkpoint", [True, "checkpoint-7"])
def test_without_a_checkpoint_nothing_is_read(
    tmp_path, tokenizer, monkeypatch, checkpoint
):
    """A mistyped name is Trainer's own error, and not after an hour of reading."""
    monkeypatch.setattr(Guide, "decisions", lambda *_: 1 / 0)
    resume = {"resume_from_checkpoint": checkpoint, "allow_other_rule": True}
    with pytest.raises(ValueError, match="valid checkpoint"):
        trained(tmp_path, tokenizer, then=attached, train=resume)


def test_given_decisions_are_stored_too(tmp_path, tokenizer):
    how = {"settings": SAVED}
    first, _, _ = trained(
        tmp_path, tokenizer, model=opinionated(), then=attached, **how
    )
    rule = load_decisions(tmp_path / "checkpoint-2")
    new = tmp_path / "new"
    trained(new, tokenizer, then=lambda trainer: attach(trainer, rule), **how)
    assert load_decisions(new / "checkpoint-2") == first.goldfish


def test_what_the_model_cannot_read_first_is_refused(tmp_path, tokenizer):
    stream = unequal_rows().to_iterable_dataset()
    for dataset in (stream, Stream()):
        with pytest.raises(ValueError, match=r"streaming\. Write the labels first"):
            trained(tmp_path, tokenizer, then=attached, train_dataset=dataset)
    cut = itertools.count()

    def cuts_at_random(rows):
        end = 3 + next(cut) % 2
        return {"input_ids": torch.tensor([row["input_ids"][:end] for row in rows])}

    rows = unequal_rows().filter(lambda row: len(row["input_ids"]) > 4)
    with pytest.raises(ValueError, match="a document that the guide did not read"):
        trained(
            tmp_path,
            tokenizer,
            then=attached,
            train_dataset=rows,
            data_collator=cuts_at_random,
        )


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(unequal_rows())
