"""One rank of tests/test_distributed.py: a few steps of GoldfishTrainer on rows of unequal length; losses to a file."""

import json
import os
import sys
from pathlib import Path

import torch
from conftest import tiny_llama
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, TrainingArguments

from goldfish import Goldfish, GoldfishTrainer


def rows(dropped_whole: bool) -> Dataset:
    """16 rows of unequal length; with dropped_whole, every second four have no target at all."""
    generator = torch.Generator().manual_seed(0)
    ids = [
        torch.randint(2, 320, (int(n),), generator=generator).tolist()
        for n in torch.randint(3, 40, (16,), generator=generator)
    ]
    labels = [[-100] * len(row) if dropped_whole and i // 4 % 2 else row for i, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "attention_mask": [[1] * len(row) for row in ids]})


def main(output: str, tokenizer: str, all_settings: str) -> None:
    found = [run(output, tokenizer, **settings) for settings in json.loads(all_settings)]
    if int(os.environ.get("RANK", 0)) == 0:
        Path(output).write_text(json.dumps(found))


def run(output: str, tokenizer: str, *, fused: bool = True, dropped_whole: bool = False, **options) -> dict:
    arguments = TrainingArguments(
        output_dir=f"{output}-run", max_steps=3, logging_steps=1, learning_rate=1e-2, max_grad_norm=1.0,
        report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, train_sampling_strategy="sequential",
        **options,
    )  # fmt: skip
    trainer = GoldfishTrainer(
        tiny_llama(),
        arguments,
        train_dataset=rows(dropped_whole),
        data_collator=DataCollatorForSeq2Seq(PreTrainedTokenizerFast.from_pretrained(tokenizer)),
        goldfish=Goldfish(k=3, h=4),
        fused=fused,
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = [[entry["loss"], entry["grad_norm"], entry["goldfish/drop_rate"]] for entry in steps]
    return {"steps": found, "decisions": trainer._tally.entries()["decisions"]}


if __name__ == "__main__":
    main(*sys.argv[1:])
