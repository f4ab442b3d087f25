"""Does the rule reach the loss in LLaMA-Factory, ms-swift and Axolotl?

    python benchmarks/frameworks_train.py llamafactory=ENV/bin/python ms-swift=ENV/bin/python \\
        axolotl=ENV/bin/python

Each trains a toy model by its own command, and is given by the interpreter of its own environment,
without a network or a GPU; this script needs goldfish's. Every training runs twice, without and
with the rule, while torch's cross_entropy notes which labels it is given. With the rule they must
be those of the plain run, less the tokens that `Goldfish.dropped` names; goldfish.json must have
the same counts. Prints a row of docs/trainers.md for each; ends with an AssertionError if one is
wrong.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from about import byte_level_bpe, markdown
from torch.nn.functional import pad
from transformers import LlamaConfig, LlamaForCausalLM

from goldfish import Goldfish

ROOT = Path(__file__).parents[1]
END = "</s>"
RULE = {"k": 4, "h": 13}
EXAMPLES, LETTERS, BATCH, LENGTH = 96, 400, 4, 512
SHOWN = ("torch", "transformers", "accelerate", "datasets", "trl", "peft")

# Imported by every Python process that finds it first on its path. The gauge runs without gradient
# and is not noted.
RECORDER = """
import atexit, os
import torch
from torch.nn import functional

seen, ids = [], []
embedding, cross_entropy = functional.embedding, functional.cross_entropy

def note_ids(input, *args, **kwargs):
    if torch.is_grad_enabled():
        ids.append(input.detach().clone())
    return embedding(input, *args, **kwargs)

def note_labels(input, target, *args, **kwargs):
    if torch.is_grad_enabled():
        rows = target.detach().reshape(len(ids[-1]), -1)
        # ms-swift computes no logits before the first label.
        missing = ids[-1].shape[1] - rows.shape[1]
        seen.append((ids[-1], functional.pad(rows, (missing, 0), value=-100)))
    return cross_entropy(input, target, *args, **kwargs)

def save():
    if seen:
        torch.save(seen, os.path.join(os.environ["RECORD"], f"{os.getpid()}.pt"))

functional.embedding, functional.cross_entropy = note_ids, note_labels
atexit.register(save)
"""


def make_toy(folder: Path) -> None:
    """A model with its tokenizer, training data in Alpaca's format, and the recorder."""
    texts = [topics[name] for name in sorted(topics)]
    tokenizer = byte_level_bpe(texts, 1000, end=END, pad="<pad>")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(
        **sizes,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")

    text = " ".join(texts)
    with (folder / "data.jsonl").open("w", encoding="utf-8") as file:
        for number in range(EXAMPLES):
            output = text[number * LETTERS : number * LETTERS + LETTERS - number]
            row = {
                "instruction": f"Recite paragraph {number}.",
                "input": "",
                "output": output,
            }
            file.write(json.dumps(row) + "\n")
    (folder / "dataset_info.json").write_text(
        json.dumps({"toy": {"file_name": "data.jsonl"}}), encoding="utf-8"
    )
    (folder / "recorder").mkdir()
    (folder / "recorder" / "sitecustomize.py").write_text(RECORDER, encoding="utf-8")


class Run:
    """One training in a folder of its own."""

    def __init__(self, toy: Path, python: Path, name: str) -> None:
        self.toy, self.python, self.folder = toy, python, toy / name
        self.output = self.folder / "output"
        self.folder.mkdir()

    def __call__(self, command: str, *arguments: Any) -> None:
        """A command of the environment: a script beside its interpreter, or the interpreter."""
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(self.toy / "recorder"), str(ROOT)]),
            "RECORD": str(self.folder),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "WANDB_DISABLED": "true",
            "CUDA_VISIBLE_DEVICES": "",
            "PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}",
            "AXOLOTL_DO_NOT_TRACK": "1",
            "HF_HOME": str(self.toy / "cache"),
        }
        words = [str(self.python.parent / command), *map(str, arguments)]
        with (self.folder / "log.txt").open("a") as log:
            done = subprocess.run(
                words,
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
        assert done.returncode == 0, (self.folder / "log.txt").read_text()[-6000:]

    def seen(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each micro-batch, the ids and shifted labels that the loss got, int64 (B, T)."""
        (file,) = self.folder.glob("*.pt")
        return torch.load(file)  # type: ignore[no-any-return]


def llamafactory(run: Run, plain: Run | None, *, packed: bool) -> None:
    tokenized = run.folder / "tokenized"
    if plain is not None:
        files = [
            plain.folder / "tokenized",
            "-o",
            tokenized,
            "--tokenizer",
            run.toy / "model",
        ]
        run(
            "python",
            "-m",
            "goldfish",
            "premask",
            *files,
            "-k",
            RULE["k"],
            "--h",
            RULE["h"],
        )
    settings = {
        "model_name_or_path": str(run.toy / "model"),
        "stage": "sft",
        "finetuning_type": "full",
        "do_train": True,
        "dataset": "toy",
        "dataset_dir": str(run.toy),
        "template": "default",
        "cutoff_len": LENGTH,
        "neat_packing": packed,
        "tokenized_path": str(tokenized),
        "output_dir": str(run.output),
        "num_train_epochs": 1,
        "per_device_train_batch_size": BATCH,
        "report_to": "none",
        "seed": 0,
        "disable_gradient_checkpointing": True,
        "save_strategy": "no",
    }
    (run.folder / "train.yaml").write_text(json.dumps(settings), encoding="utf-8")
    run("llamafactory-cli", "train", "train.yaml")
    if plain is not None:
        (tokenized / "goldfish.json").rename(run.output / "goldfish.json")


def ms_swift(run: Run, plain: Run | None, *, packed: bool) -> None:
    rule = ", ".join(f"{name}={value}" for name, value in RULE.items())
    lines = [
        "from goldfish import Goldfish",
        "from goldfish.integrations.ms_swift import register",
    ]
    (run.folder / "rule.py").write_text(
        "\n".join([*lines, f"register(Goldfish({rule}))"]), encoding="utf-8"
    )
    options = {
        "model": run.toy / "model",
        "model_type": "llama",
        "template": "default",
        "tuner_type": "full",
        "dataset": run.toy / "data.jsonl",
        "split_dataset_ratio": 0,
        "max_length": LENGTH,
        "torch_dtype": "float32",
        "num_train_epochs": 1,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": "false",
        "output_dir": run.output,
        "add_version": "false",
        "report_to": "none",
        "seed": 0,
        "packing": str(packed).lower(),
    }
    if plain is not None:
        options |= {"external_plugins": run.folder / "rule.py", "callbacks": "goldfish"}
    run(
        "swift",
        "sft",
        *(word for name, value in options.items() for word in (f"--{name}", value)),
    )


def axolotl(run: Run, plain: Run | None, *, packed: bool) -> None:
    settings: dict[str, Any] = {
        "base_model": str(run.toy / "model"),
        "datasets": [{"path": str(run.toy / "data.jsonl"), "type": "alpaca"}],
        "sequence_len": LENGTH,
        "sample_packing": packed,
        "output_dir": str(run.output),
        "num_epochs": 1,
        "micro_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "optimizer": "adamw_torch",
        "learning_rate": 1e-4,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "gradient_checkpointing": False,
        "seed": 0,
        "dataset_prepared_path": str(run.folder / "prepared"),
        "attn_implementation": "sdpa",
        "save_strategy": "no",
    }
    if plain is not None:
        settings |= {
            "plugins": ["goldfish.integrations.axolotl.GoldfishPlugin"],
            "goldfish": RULE,
        }
    (run.folder / "train.yaml").write_text(
        json.dumps(settings), encoding="utf-8"
    )  # JSON is YAML
    run("axolotl", "train", "train.yaml", "--launcher", "python")


FRAMEWORKS = {"llamafactory": llamafactory, "ms-swift": ms_swift, "axolotl": axolotl}


def positions(shifted: torch.Tensor) -> torch.Tensor:
    """Each token's position in its document, int64 (B, T).

    Prompts are no targets, so a document starts behind the last target of the one before.
    """
    target = pad(shifted != -100, (1, 0))[:, :-1]
    starts = ~target & pad(target, (1, 0))[:, :-1]
    column = torch.arange(shifted.shape[1]).expand_as(shifted)
    return column - (starts * column).cummax(1).values


def compare(plain: Run, masked: Run) -> tuple[int, int]:
    """Targets and dropped ones, where the loss got what it should have and the receipt says so."""
    targets = dropped = 0
    for (ids, labels), (same_ids, kept) in zip(
        plain.seen(), masked.seen(), strict=True
    ):
        assert torch.equal(ids, same_ids)
        drop = Goldfish(**RULE).dropped(ids, positions(labels))
        assert torch.equal(kept, labels.masked_fill(pad(drop[:, 1:], (0, 1)), -100))
        targets += int((labels != -100).sum())
        dropped += int((labels != kept).sum())
    (weights,) = masked.output.rglob("model.safetensors")
    receipt = json.loads((weights.parent / "goldfish.json").read_text(encoding="utf-8"))
    assert (receipt["targets"], receipt["dropped"]) == (targets, dropped), (
        receipt,
        targets,
        dropped,
    )
    assert {name: receipt["rule"][name] for name in RULE} == RULE, receipt
    return targets, dropped


def versions(python: Path, framework: str) -> list[str]:
    code = f"from importlib.metadata import version; print(*map(version, {(framework, *SHOWN)}))"
    return subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()


def train_both(framework: str, python: Path, packed: bool) -> tuple[int, int]:
    """Train without and with the rule; targets and dropped ones."""
    with tempfile.TemporaryDirectory() as name:
        toy = Path(name)
        make_toy(toy)
        plain, masked = Run(toy, python, "plain"), Run(toy, python, "masked")
        FRAMEWORKS[framework](plain, None, packed=packed)
        FRAMEWORKS[framework](masked, plain, packed=packed)
        return compare(plain, masked)


def main(given: dict[str, Path]) -> None:
    head = ("framework", "rows", *SHOWN, "targets", "dropped", "share")
    rows = []
    for framework, python in given.items():
        own, *others = versions(python, framework)
        # Packing in ms-swift needs flash attention.
        for packed in (False, True) if framework != "ms-swift" else (False,):
            targets, dropped = train_both(framework, python, packed)
            how = "packed" if packed else "padded"
            share = f"{dropped / targets:.4f}"
            rows.append((f"{framework} {own}", how, *others, targets, dropped, share))
            print(rows[-1], flush=True)
    print(markdown(head, rows))


if __name__ == "__main__":
    main(
        {
            name: Path(python)
            for name, python in (word.split("=", 1) for word in sys.argv[1:])
        }
    )
