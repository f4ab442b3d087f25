"""One rank of tests/test_audit_callback.py: trains twice with an AuditCallback (see launch.py)."""

import json
import os
from pathlib import Path

import torch
from datasets import Dataset
from helpers import tiny_llama, write_jsonl
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from goldfish.audit import AuditCallback, run

# Two blocks of few windows, so that each process scores one.
run.BLOCK = 4
LENGTHS = {"prefix_length": 4, "suffix_length": 6, "sampling": ()}


def rows(count):
    ids = torch.randint(2, 320, (count, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row} for row in ids.tolist()]


def main(arguments: list[str]) -> None:
    """arguments: a folder for the output, and the folder of a tokenizer."""
    folder = Path(arguments[0])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments[1])
    rank = os.environ["RANK"]

    def trainer_in(name):
        arguments = TrainingArguments(
            str(folder / name),
            max_steps=3,
            per_device_train_batch_size=2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
            logging_steps=1,
        )
        data = [{**row, "labels": row["input_ids"]} for row in rows(16)]
        return Trainer(
            tiny_llama(),
            arguments,
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
        )

    trainer = trainer_in("whole")
    callback = AuditCallback(trainer, rows(8), every=1, **LENGTHS)
    trainer.add_callback(callback)
    trainer.train()
    found = {
        "outcome": callback.result.verdict["outcome"],
        "logged": [
            (each["step"], each["goldfish/recited"])
            for each in trainer.state.log_history
            if "goldfish/recited" in each
        ],
    }
    # A file that is on the first machine alone.
    if rank == "0":
        write_jsonl(folder / "members-0.jsonl", rows(4))
    trainer = trainer_in("refused")
    members = folder / f"members-{rank}.jsonl"
    trainer.add_callback(AuditCallback(trainer, members, **LENGTHS))
    try:
        trainer.train()
    except (ValueError, FileNotFoundError) as error:
        found["refused"] = str(error)
    found["steps_when_refused"] = trainer.state.global_step
    (folder / f"{rank}.json").write_text(json.dumps(found))
