"""One rank of tests/test_audit_callback.py: trains twice with an AuditCallback."""

import json
import os
import sys
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


def main(folder: Path, tokenizer: str) -> None:
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
            processing_class=PreTrainedTokenizerFast.from_pretrained(tokenizer),
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


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    # Every rank must be done before one leaves. os._exit skips Python's finalization, during which
    # a C++ thread of gloo or autograd that asks for the GIL aborts the process now and then
    # ("terminate called without an active exception", once in dozens of runs).
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)
