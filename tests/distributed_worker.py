"""One rank of tests/test_distributed.py: a few steps of GoldfishTrainer, with losses to a file."""

import contextlib
import json
import os
import sys
from pathlib import Path

import helpers
import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState
from datasets import Dataset
from helpers import model_of
from launch import leave
from safetensors.torch import save_model
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
)

from goldfish import Goldfish, GoldfishTrainer
from goldfish.fused import HANDLE
from goldfish.receipt import read_receipt
from goldfish.unwrap import bare_model


def rows(dropped_whole: bool) -> Dataset:
    """16 rows of unequal length; with dropped_whole, every second four have no target at all."""
    generator = torch.Generator().manual_seed(0)
    ids = [
        torch.randint(2, 320, (int(n),), generator=generator).tolist()
        for n in torch.randint(3, 40, (16,), generator=generator)
    ]
    labels = [
        [-100] * len(row) if dropped_whole and i // 4 % 2 else row
        for i, row in enumerate(ids)
    ]
    return Dataset.from_dict(
        {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": [[1] * len(row) for row in ids],
        }
    )


@contextlib.contextmanager
def fsdp_on_cpu():
    """accelerate turns its FSDP on for accelerators only, though torch's shards on CPU too."""
    plain = AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState._reset_state(reset_partial_state=True)
    AcceleratorState.__init__ = with_fsdp
    try:
        yield
    finally:
        AcceleratorState.__init__ = plain
        AcceleratorState._reset_state(reset_partial_state=True)


def main(output: str, tokenizer: str, all_settings: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    found = [
        run(Path(f"{output}-{i}"), tokenizer, **settings)
        for i, settings in enumerate(json.loads(all_settings))
    ]
    if int(os.environ.get("RANK", 0)) == 0:
        Path(output).write_text(json.dumps(found))


def tensor_parallel(model, folder: Path):
    """The model, its layers shared by all processes; accelerate allows it for accelerators only."""
    # The lowest accelerate does not have it; the test of tensor parallelism is not run there.
    from accelerate.parallelism_config import ParallelismConfig

    ParallelismConfig._validate_accelerator = lambda *_: None
    folder = folder / f"rank-{os.environ['RANK']}"
    model.config.save_pretrained(
        folder
    )  # save_pretrained of the model waits for rank 0
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return type(model).from_pretrained(folder, tp_plan="auto")


class SeesFusing(TrainerCallback):
    """Notes whether the loss was fused, while it is."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.fused = (
            getattr(bare_model(model).__dict__.get(HANDLE), "reason", "no handle") == ""
        )


def run(
    folder: Path,
    tokenizer: str,
    *,
    fused=True,
    dropped_whole=False,
    fsdp=False,
    tp=False,
    model="LlamaForCausalLM",
    rule=None,
    resume=None,
    **options,
) -> dict:
    sees = SeesFusing()
    options = {"logging_steps": 1, "save_strategy": "no", **options}
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    shards = fsdp and several
    model = model_of(getattr(helpers, model))
    if tp and several:
        model = tensor_parallel(model, folder)
    if shards:
        layers = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        options |= {"fsdp": "full_shard auto_wrap", "fsdp_config": layers}
    with fsdp_on_cpu() if shards else contextlib.nullcontext():
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=3,
            learning_rate=1e-2,
            max_grad_norm=1.0,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            train_sampling_strategy="sequential",
            **options,
        )
        trainer = GoldfishTrainer(
            model,
            arguments,
            train_dataset=rows(dropped_whole),
            data_collator=DataCollatorForSeq2Seq(
                PreTrainedTokenizerFast.from_pretrained(tokenizer)
            ),
            goldfish=Goldfish(**(rule or {"k": 3, "h": 4})),
            fused=fused,
            callbacks=[sees],
        )
        trainer.train(resume_from_checkpoint=resume)
        if arguments.should_save and not (
            shards or (tp and several)
        ):  # one process alone, as push_to_hub does: none answers a reduce
            trainer.save_model(str(folder / "end"), _internal_call=True)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = [
        [entry["loss"], entry["grad_norm"], entry["goldfish/drop_rate"]]
        for entry in steps
    ]
    sharded = any(
        isinstance(p, torch.distributed.tensor.DTensor)
        for p in trainer.model.parameters()
    )
    receipts = {
        path.parent.name: read_receipt(path.parent)
        for path in sorted(folder.glob("*/goldfish.json"))
    }
    return {
        "steps": found,
        "sharded": sharded,
        "fused": sees.fused,
        "counted": trainer._counts.to_dict(),
        "receipts": receipts,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
