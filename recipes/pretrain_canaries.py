r"""The standard experiment: pretraining in which a few documents recur 50 times. Who recites them, at which k, and what
does that cost on held-out text?

    python recipes/pretrain_canaries.py        # 1 CPU core, 30 trainings of 2.2M parameters, about 15 minutes; planted
                                               # documents recited: standard 9 to 13 of 16, k=4 and control 0 of 16
    python recipes/pretrain_canaries.py --resume           # goes on where a killed run stopped
    accelerate launch --config_file recipes/configs/ddp.yaml recipes/pretrain_canaries.py
    python recipes/pretrain_canaries.py @recipes/configs/canaries-124m.args --text FILE.jsonl      # one GPU
    accelerate launch --config_file recipes/configs/fsdp2.yaml recipes/pretrain_canaries.py \
        @recipes/configs/canaries-1.1b.args                                                        # the paper's size
    python recipes/pretrain_canaries.py --documents 2 --repeats 2 --background 20 --validation 4 --ks 4 \
        --equal_supervised 4 --seeds 0 --hidden_size 32 --output_dir runs/miniature                # seconds

After the standard experiment of Hans et al. 2024 (section 4.2). The background is read once; `documents` planted
windows come `repeats` times among it. Trained are: the standard loss, the goldfish loss at every k, a control that
reads background in the place of the planted windows, and for the k in `equal_supervised` once more with so much more
background that as many tokens are *supervised* as in the standard training, k/(k-1) of the input. All are audited on
the planted and on held-out windows; sweep.py makes the table, the pictures and the choice of k.

The presets, which nobody has run yet: canaries-124m (estimated 10 minutes on one H100; FILE.jsonl of 28 MB or more,
a smaller one with less --background) and canaries-1.1b (TinyLlama's shape, 20B tokens, batches of 2.1M, the paper's
learning rate, warm-up and seed; on N GPUs divide --accumulation so that N * accumulation divides 1024; --dataset may
also be a local folder). What the latter plants, 2000 Wikipedia articles and as many held out, is made first:

    python -c "from datasets import load_dataset as load; \
        load('wikimedia/wikipedia', '20231101.en', split='train[:1%]').to_json('runs/wikipedia.jsonl')"

The default background is the language reference and the docstrings of the standard library, which every CPython
ships. (Of memorize.py's options --k and --seed are not used here: --ks and --seeds say the same.)
"""

import ast
import itertools
import json
import random
import shutil
import sys
import sysconfig
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import common
import memorize
import sweep
import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets, load_dataset
from rich.console import Console
from transformers import HfArgumentParser, LlamaForCausalLM, TrainingArguments, set_seed

import goldfish.audit
from goldfish import Goldfish
from goldfish.audit import audit
from goldfish.audit import model as audit_load


@dataclass
class Arguments(memorize.Arguments):
    ks: list[float] = field(default_factory=lambda: [3, 4, 8, 32, 128])
    equal_supervised: list[float] = field(
        default_factory=lambda: [3, 4, 8], metadata={"help": "k that are also trained on k/(k-1) times the tokens"}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    documents: int = field(default=16, metadata={"help": "planted windows; as many again are held out"})
    repeats: int = field(default=50, metadata={"help": "how often each planted window is read"})
    background: int = field(default=1600, metadata={"help": "background windows, read once"})
    validation: int = field(default=256, metadata={"help": "more background windows, for the held-out loss"})
    epochs: int = field(default=1, metadata={"help": "over background and planted windows alike"})
    window: int = field(default=32, metadata={"help": "tokens a window; the first half is the audit's prefix"})
    batch_size: int = field(default=4, metadata={"help": "windows an optimiser step, over all processes"})
    learning_rate: float = 4e-3
    hidden_size: int = 256
    planted: str | None = field(default=None, metadata={"help": "plant windows of this .txt or .jsonl instead"})
    tokenizer: str | None = field(default=None, metadata={"help": "name or path of one, instead of a new BPE"})
    layers: int = 2
    heads: int = 4
    kv_heads: int | None = None
    intermediate_size: int | None = field(default=None, metadata={"help": "3 * hidden_size by default"})
    min_learning_rate: float = field(default=0.1, metadata={"help": "where the cosine ends, of learning_rate"})
    warmup_steps: int | None = field(default=None, metadata={"help": "a twentieth of the steps by default"})
    accumulation: int = field(default=1, metadata={"help": "batches of each process an optimiser step"})
    save_steps: int = field(default=500, metadata={"help": "optimiser steps between two checkpoints"})
    workers: int | None = field(default=None, metadata={"help": "processes that tokenize the background"})
    leak: float = field(default=0.1, metadata={"help": "choose the largest k that leaves at most this of recitation"})
    resume: bool = field(default=False, metadata={"help": "go on with the run in output_dir"})
    output_dir: str = "runs/canaries"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("repeats", "background", "validation", "accumulation", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.model is not None:
            raise ValueError("this recipe trains from scratch, --model does not fit; sft_lora.py finetunes")
        for k in self.ks:
            Goldfish(k=k, h=self.h, strategy=self.strategy)  # type: ignore[arg-type]  # refuses what is no rule
        if missing := set(self.equal_supervised) - set(self.ks):
            raise ValueError(f"--equal_supervised {' '.join(f'{k:g}' for k in missing)}: not among --ks")


@dataclass(frozen=True)
class Run:
    """One training: k None is the standard loss; planted False is the control."""

    seed: int
    k: float | None = None
    planted: bool = True
    equal_supervised: bool = False

    @property
    def name(self) -> str:
        if self.k is None:
            return "standard" if self.planted else "control"
        return f"k={self.k:g}" + (", equal" if self.equal_supervised else "")

    def folder(self, output: Path) -> Path:
        return output / f"seed{self.seed}-{self.name.replace('=', '').replace(', ', '-')}"

    def background(self, args: Arguments) -> int:
        """How many windows of background it reads: such that all its batches are full, whatever the processes."""
        planted = args.documents * args.repeats
        more = self.k / (self.k - 1) if self.k and self.equal_supervised else 1.0
        steps = max(1, round((args.background + planted) * more / args.batch_size))
        return max(0, steps * args.batch_size - planted * self.planted)


@dataclass
class Data:
    """What one seed trains and audits on: token ids of windows."""

    members: list[list[int]]
    heldout: list[list[int]]
    background: Dataset
    validation: Dataset


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = HfArgumentParser(Arguments, fromfile_prefix_chars="@")
    (args,) = parser.parse_args_into_dataclasses(argv)
    state, output = common.start(), Path(args.output_dir)
    if args.batch_size % (state.num_processes * args.accumulation):
        raise ValueError(
            f"--batch_size {args.batch_size} windows do not divide among {state.num_processes} processes and "
            f"--accumulation {args.accumulation}"
        )
    runs = [run for seed in args.seeds for run in runs_of(args, seed)]
    if args.dry_run:
        steps = sum(run.background(args) + run.planted * args.documents * args.repeats for run in runs)
        state.print(f"{len(runs)} trainings, {steps * args.window * args.epochs:,} tokens in all -> {output}")
        return []
    texts, corpus = load_corpus(args)
    tokenizer = audit_load.load_tokenizer(args.tokenizer) if args.tokenizer else memorize.load_tokenizer(args, texts)
    if state.is_main_process:
        common.prepare(output, args)
    state.wait_for_everyone()

    done = {(result["seed"], result["run"]) for result in common.read_results(output / "results.jsonl")}
    state.wait_for_everyone()  # all have read what is done before one adds to it
    todo = [run for run in runs if (run.seed, run.name) not in done]
    for seed, its_runs in itertools.groupby(todo, key=lambda run: run.seed):
        with state.main_process_first():  # the others read what it has cached
            data = load_data(args, seed, texts, corpus, tokenizer)
        for run in its_runs:
            folder = run.folder(output)
            if not common.finished(folder / "model"):
                state.print(f"\nTraining {run.name}, seed {run.seed}: {run.background(args)} windows of background")
                train(args, run, data, tokenizer, folder / "model")
            state.wait_for_everyone()
            if state.is_main_process:
                common.append(output / "results.jsonl", examine(args, run, data, tokenizer, folder))
    results = common.read_results(output / "results.jsonl") if state.is_main_process else []
    if state.is_main_process:
        sweep.present(results, output, args.leak, Console())
    return results


def runs_of(args: Arguments, seed: int) -> list[Run]:
    plain = [Run(seed), Run(seed, planted=False), *(Run(seed, k) for k in args.ks)]
    return plain + [Run(seed, k, equal_supervised=True) for k in args.equal_supervised]


def load_corpus(args: Arguments) -> tuple[list[str], Dataset]:
    """The texts that planted windows are taken from, and the documents of the background."""
    source = replace(args, text=args.planted, dataset=None) if args.planted else args
    texts = memorize.load_texts(source)
    if args.dataset is not None:
        return texts, load_dataset(args.dataset, args.dataset_config, split="train").select_columns("text")
    background = memorize.load_texts(args) if args.planted else texts
    if args.text is None:
        background = background + docstrings()
    return texts, Dataset.from_dict({"text": background})


def docstrings() -> list[str]:
    """The docstrings of each module of the standard library: 1.6 MB of English."""
    texts = []
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(path.relative_to(root).parts):
            try:
                nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            except (SyntaxError, UnicodeDecodeError, ValueError):
                continue  # a few files are broken on purpose
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
            found = (ast.get_docstring(node) for node in nodes if isinstance(node, documented))
            texts.append("\n\n".join(text for text in found if text))
    return [text for text in texts if text]


def load_data(args: Arguments, seed: int, texts: list[str], corpus: Dataset, tokenizer: Any) -> Data:
    """Planted and held-out windows as memorize.py splits them, and background that holds nothing of either.

    The background's documents are laid end to end, an end-of-text token between them, and cut into windows. A window
    that has 16 tokens in a row from a planted or held-out one is left out (8 where they are the eighth part of it).
    """
    members, heldout = memorize.split_windows(replace(args, seed=seed), texts, tokenizer)
    taken = {tuple(ids[i : i + 8]) for ids in (*members, *heldout) for i in range(0, len(ids) - 7, 8)}

    def pack(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids: list[int] = []
        for document in tokenizer(batch["text"], add_special_tokens=False)["input_ids"]:
            ids += [*document, tokenizer.eos_token_id]
        windows = (ids[i : i + args.window] for i in range(0, len(ids) - args.window + 1, args.window))
        return {"input_ids": [w for w in windows if taken.isdisjoint(zip(*(w[i:] for i in range(8)), strict=False))]}

    packed = corpus.map(pack, batched=True, remove_columns=corpus.column_names, num_proc=args.workers)
    order = random.Random(seed).sample(range(len(packed)), len(packed))
    needed = args.validation + max(run.background(args) for run in runs_of(args, seed))
    if needed > len(packed):
        raise ValueError(
            f"the background is too short: {len(packed)} windows of {args.window} tokens, but {needed} are needed "
            f"(--background {args.background} for the standard training, more for equal supervised tokens, "
            f"--validation {args.validation}); give more text, or lower one of them"
        )
    validation, background = order[: args.validation], order[args.validation :]
    return Data(members, heldout, packed.select(background), packed.select(validation))


def train(args: Arguments, run: Run, data: Data, tokenizer: Any, folder: Path) -> None:
    """Train from scratch on background and planted windows, shuffled; leave model, receipt and log in the folder."""
    rows = data.background.select(range(run.background(args)))
    if run.planted:
        planted = Dataset.from_dict({"input_ids": data.members}, features=rows.features)
        copies = list(range(len(planted))) * args.repeats
        rows = concatenate_datasets([rows, planted.select(copies)])
    args = replace(args, seed=run.seed)
    shape = {
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads or args.heads,
        "intermediate_size": args.intermediate_size or 3 * args.hidden_size,
    }
    set_seed(run.seed)
    model = LlamaForCausalLM(memorize.small_llama(args, tokenizer, **shape))
    steps = args.epochs * -(-len(rows) // args.batch_size)
    batch = args.batch_size // PartialState().num_processes // args.accumulation
    settings = memorize.training_settings(args, folder, steps) | {
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch,
        "gradient_accumulation_steps": args.accumulation,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": args.min_learning_rate},
        "warmup_steps": steps // 20 if args.warmup_steps is None else args.warmup_steps,
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "save_strategy": "steps",
        "save_steps": args.save_steps,
        "save_total_limit": 2,
    }
    rule = None
    if run.k is not None:
        rule = replace(args, k=run.k).rule(document_end=tokenizer.eos_token_id)
    arguments = TrainingArguments(**settings)
    trainer = memorize.make_trainer(model, arguments, rows, collate, tokenizer, rule, eval_dataset=data.validation)
    common.train_or_resume(trainer, folder)


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Windows of one length; the end-of-text token is a target like any other."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}


def examine(args: Arguments, run: Run, data: Data, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Audit a finished training; what its line in results.jsonl says. Losses in nats per token."""
    started = time.perf_counter()
    shutil.rmtree(folder / "audit", ignore_errors=True)  # of an audit that was cut off
    for split in ("members", "heldout"):
        memorize.save_windows(folder / f"{split}.jsonl", getattr(data, split), tokenizer)
    half = args.window // 2
    summary = audit(
        folder / "model", folder / "audit", members=folder / "members.jsonl", heldout=folder / "heldout.jsonl",
        prefix_length=half, suffix_length=args.window - half, name=run.name,
    )  # fmt: skip
    records = goldfish.audit.records(folder / "audit").to_pylist()
    log = common.log_of(folder / "model")
    windows = (run.background(args) + run.planted * args.documents * args.repeats) * args.epochs
    result = {
        "seed": run.seed, "run": run.name, "k": run.k, "equal_supervised": run.equal_supervised,
        "input_tokens": windows * args.window,
        "validation_loss": next(entry["eval_loss"] for entry in reversed(log) if "eval_loss" in entry),
    }  # fmt: skip
    for split in ("members", "heldout"):
        of_split = [record for record in records if record["split"] == split]
        result[f"exact_match_{split}"] = [record["exact_match"] for record in of_split]
        result[f"rouge_l_{split}"] = [round(record["rouge_l_ids"], 4) for record in of_split]
        result[f"nll_{split}"] = summary["splits"][split]["nll"]["mean"]
    if run.k is not None:
        receipt = json.loads((folder / "model" / "goldfish.json").read_text(encoding="utf-8"))
        result |= {name: receipt[name] for name in ("targets", "dropped", "decisions")}
    seconds = next(entry["train_runtime"] for entry in reversed(log) if "train_runtime" in entry)
    result |= {"train_seconds": round(seconds, 1), "audit_seconds": round(time.perf_counter() - started, 1)}
    return result | common.about()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"pretrain_canaries.py: {error}")
