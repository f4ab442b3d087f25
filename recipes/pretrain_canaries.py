r"""The standard experiment: pretraining in which a few documents recur 50 times.

Which rule keeps the model from reciting them, and what does that cost on held-out text?

    # 1 CPU core, 30 trainings of 2.2M parameters, about 15 minutes; planted documents recited:
    # standard 9 to 13 of 16, k=4 and control 0 of 16; the same command resumes a stopped run
    python recipes/pretrain_canaries.py
    accelerate launch --config_file recipes/configs/ddp.yaml recipes/pretrain_canaries.py
    # one GPU
    python recipes/pretrain_canaries.py @recipes/configs/canaries-124m.args --text FILE.jsonl
    # the paper's size
    accelerate launch --config_file recipes/configs/fsdp2.yaml recipes/pretrain_canaries.py \
        @recipes/configs/canaries-1.1b.args
    # seconds
    python recipes/pretrain_canaries.py --documents 2 --repeats 2 --background 20 --validation 4 \
        --rules hash-4-13-4 --equal-supervised hash-4-13-4 --seeds 0 --hidden-size 32 \
        --output-dir runs/miniature

After the standard experiment of Hans et al. 2024 (section 4.2). Background is read once;
`documents` planted windows come `repeats` times among it. Trained are: the standard loss, the
goldfish loss under every rule, a control that reads background instead of the planted windows, and
the rules in `equal_supervised` once more with so much more background that as many tokens are
*supervised* as in the standard training: k/(k-1) times the input. All are audited on the planted
and on held-out windows; sweep.py makes the table, the plots and the choice of a rule.

The presets, which nobody has run yet: canaries-124m (estimated 10 minutes on one H100; FILE.jsonl
of 28 MB or more, a smaller one with less --background) and canaries-1.1b (TinyLlama's shape, 20B
tokens, batches of 2.1M, the paper's learning rate, warm-up and seed; on N GPUs choose
--accumulation so that N * accumulation divides 1024; --dataset may also be a local folder). What
the latter plants, 2000 Wikipedia articles and as many held out, is made first:

    python -c "from datasets import load_dataset as load; \
        articles = load('wikimedia/wikipedia', '20231101.en', split='train[:1%]'); \
        articles.to_json('runs/wikipedia.jsonl')"

The default background is the Python language reference and the docstrings of the standard library.
"""

import ast
import itertools
import random
import shutil
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
import runs
import sweep
import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from runs import option
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from goldfish import attach
from goldfish.audit.records import read_records
from goldfish.checkpoint import load_tokenizer
from goldfish.receipt import read_receipt


@dataclass
class Arguments(common.Corpus):
    rules: list[str] = option(
        [f"hash-{k}-13" for k in (3, 4, 8, 32, 128)],
        "strategy-k-h[-max_kept]; the standard loss and a control are always trained",
    )
    equal_supervised: list[str] = option(
        [f"hash-{k}-13" for k in (3, 4, 8)],
        "of these, rules that are also trained on k/(k-1) times the tokens",
    )
    seeds: list[int] = option(
        [0, 1, 2], "of the split, the weights, the batches and the rule"
    )
    documents: int = option(16, "planted windows; as many again are held out")
    repeats: int = option(50, "how often each planted window is read")
    background: int = option(1600, "background windows, read once")
    validation: int = option(256, "more background windows, for the held-out loss")
    window: int = option(32, "tokens per window; the first half is the audit's prefix")
    batch_size: int = option(4, "windows per optimiser step, over all processes")
    accumulation: int = option(1, "batches of each process per optimiser step")
    learning_rate: float = 4e-3
    warmup_steps: int | None = option(None, "a twentieth of the steps by default")
    hidden_size: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int | None = None
    intermediate_size: int | None = option(None, "3 * hidden_size by default")
    tokenizer: str | None = option(None, "name or path of one, instead of a new BPE")
    planted: str | None = option(None, "plant windows of this .txt or .jsonl instead")
    workers: int | None = option(None, "processes that tokenize the background")
    save_steps: int = option(500, "optimiser steps between two checkpoints")
    leak: float = option(
        0.1, "choose the largest k that leaves at most this of recitation"
    )
    output_dir: str = "runs/canaries"
    dry_run: bool = option(False, "print what would run, and stop")

    def __post_init__(self) -> None:
        runs.at_least(1, self, "documents", "repeats", "background", "validation")
        runs.at_least(1, self, "batch_size", "accumulation", "save_steps")
        runs.at_least(8, self, "window")
        for name in self.rules:
            if common.rule_of(name) is None:
                raise ValueError(f"--rules {name}: it is always trained; leave it out")
        if missing := set(self.equal_supervised) - set(self.rules):
            raise ValueError(
                f"--equal_supervised {' '.join(sorted(missing))}: not among --rules"
            )


@dataclass(frozen=True)
class Run:
    """One training; the control reads no planted windows."""

    seed: int
    rule: str = "standard"
    planted: bool = True
    equal_supervised: bool = False

    @property
    def name(self) -> str:
        return (
            self.rule + ", equal" * self.equal_supervised if self.planted else "control"
        )

    @property
    def k(self) -> float | None:
        rule = common.rule_of(self.rule)
        return None if rule is None else rule.k

    def folder(self, output: Path) -> Path:
        return output / f"seed{self.seed}-{self.name.replace(', ', '-')}"

    def background(self, args: Arguments) -> int:
        """How many windows of background it reads.

        So many that all batches are full, whatever the number of processes.
        """
        planted = args.documents * args.repeats
        # A rule keeps 1 - 1/k of the targets: with k/(k-1) times the input it keeps as many.
        more = self.k / (self.k - 1) if self.k and self.equal_supervised else 1.0
        steps = max(1, round((args.background + planted) * more / args.batch_size))
        return max(0, steps * args.batch_size - planted * self.planted)

    def windows(self, args: Arguments) -> int:
        """How many windows it reads in all."""
        return self.background(args) + self.planted * args.documents * args.repeats


@dataclass
class Data:
    """What one seed trains and audits on."""

    planted: common.Split
    background: Dataset
    validation: Dataset


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = HfArgumentParser(Arguments, fromfile_prefix_chars="@")
    (args,) = parser.parse_args_into_dataclasses(argv)
    state, output = (
        runs.start(args.batch_size, args.accumulation),
        Path(args.output_dir),
    )
    trainings = [run for seed in args.seeds for run in trainings_of(args, seed)]
    if args.dry_run:
        tokens = sum(run.windows(args) for run in trainings) * args.window
        state.print(f"{len(trainings)} trainings, {tokens:,} tokens in all -> {output}")
        return []
    texts, corpus = load_corpus(args)
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer)
    else:
        tokenizer = common.byte_level_bpe(texts, args.vocab_size)
    runs.begin(output, args)
    named = {(run.seed, run.name): run for run in trainings}
    wanted = [{"seed": seed, "run": name} for seed, name in named]
    lacking = runs.missing(output / "results.jsonl", wanted)
    todo = [named[each["seed"], each["run"]] for each in lacking]
    for seed, of_seed in itertools.groupby(todo, key=lambda run: run.seed):
        # The other processes read what the main one has cached.
        with state.main_process_first():
            data = load_data(args, seed, texts, corpus, tokenizer)
        for run in of_seed:
            folder = run.folder(output)
            if not runs.finished(folder / "model"):
                windows = run.background(args)
                state.print(
                    f"\nTraining {run.name}, seed {run.seed}: {windows} windows of background"
                )
                train(args, run, data, tokenizer, folder / "model")
            state.wait_for_everyone()
            if state.is_main_process:
                runs.append(
                    output / "results.jsonl",
                    examine(args, run, data, tokenizer, folder),
                )
    if not state.is_main_process:
        return []
    results = runs.read_results(output / "results.jsonl")
    sweep.present(results, output, args.leak)
    return results


def trainings_of(args: Arguments, seed: int) -> list[Run]:
    """In the order of training: standard, control, the rules, the rules at equal supervision."""
    plain = [
        Run(seed),
        Run(seed, planted=False),
        *(Run(seed, rule) for rule in args.rules),
    ]
    return plain + [
        Run(seed, rule, equal_supervised=True) for rule in args.equal_supervised
    ]


def load_corpus(args: Arguments) -> tuple[list[str], Dataset]:
    """The texts that planted windows are taken from, and the documents of the background."""
    texts = common.load_texts(
        args.text, args.dataset, args.dataset_config, 20 * args.documents
    )
    planted = common.load_texts(args.planted) if args.planted else texts
    if args.dataset is not None:
        rows = load_dataset(args.dataset, args.dataset_config, split="train")
        return planted, rows.select_columns("text")
    # The language reference alone is too short for 1600 windows beside the planted ones.
    background = [*texts, *docstrings()] if args.text is None else texts
    return planted, Dataset.from_dict({"text": background})


def docstrings() -> Iterator[str]:
    """The docstrings of each module of the standard library: 1.6 MB of English."""
    root = Path(sysconfig.get_path("stdlib"))
    others = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
    for path in sorted(root.rglob("*.py")):
        if others & set(path.relative_to(root).parts):
            continue
        try:
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            # A few files are broken on purpose.
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts = [
            ast.get_docstring(node) for node in nodes if isinstance(node, documented)
        ]
        if text := "\n\n".join(filter(None, texts)):
            yield text


def load_data(
    args: Arguments, seed: int, texts: list[str], corpus: Dataset, tokenizer: Any
) -> Data:
    """Planted and held-out windows, and background that overlaps neither.

    The background's documents are concatenated, with an end-of-text token between them, and cut
    into windows. Windows that share 16 consecutive tokens with a planted or held-out one are left
    out.
    """
    planted = common.split_windows(texts, tokenizer, args.documents, args.window, seed)
    # Only every eighth run of eight tokens is remembered, which keeps the set small. Any 15
    # consecutive tokens of a window contain one of them, so no overlap of 16 is missed; a shorter
    # one is found if it contains such a run.
    taken = {
        tuple(ids[i : i + 8])
        for split in planted
        for ids in split
        for i in range(0, len(ids) - 7, 8)
    }

    def overlaps(window: list[int]) -> bool:
        return not taken.isdisjoint(zip(*(window[i:] for i in range(8)), strict=False))

    def pack(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids: list[int] = []
        for document in tokenizer(batch["text"], add_special_tokens=False)["input_ids"]:
            ids += [*document, tokenizer.eos_token_id]
        windows = common.cut(ids, args.window)
        return {"input_ids": [window for window in windows if not overlaps(window)]}

    packed = corpus.map(
        pack, batched=True, remove_columns=corpus.column_names, num_proc=args.workers
    )
    order = random.Random(seed).sample(range(len(packed)), len(packed))
    needed = args.validation + max(
        run.background(args) for run in trainings_of(args, seed)
    )
    if needed > len(packed):
        raise ValueError(
            f"the background is too short: {len(packed)} windows of {args.window} tokens, but "
            f"{needed} are needed (--background {args.background} for the standard training, more "
            f"for equal supervised tokens, --validation {args.validation}); give more text, or "
            "lower one of them"
        )
    validation, background = order[: args.validation], order[args.validation :]
    return Data(planted, packed.select(background), packed.select(validation))


def train(args: Arguments, run: Run, data: Data, tokenizer: Any, folder: Path) -> None:
    """Train from scratch on background and planted windows, shuffled.

    Leaves model, receipt and log in the folder.
    """
    # Every training of a seed reads the same windows; a longer one reads more of them.
    rows = data.background.select(range(run.background(args)))
    if run.planted:
        planted = Dataset.from_dict(
            {"input_ids": data.planted[0]}, features=rows.features
        )
        repeated = list(range(len(planted))) * args.repeats
        rows = concatenate_datasets([rows, planted.select(repeated)])
    set_seed(run.seed)
    trainer = Trainer(
        LlamaForCausalLM(model_config(args, tokenizer)),
        settings_for(args, run, folder, len(rows)),
        train_dataset=rows,
        eval_dataset=data.validation,
        data_collator=collate,
        processing_class=tokenizer,
    )
    rule = common.rule_of(run.rule, run.seed)
    if rule is not None:
        # Windows are cut from a stream of documents; no decision looks past a document's start.
        attach(trainer, replace(rule, document_end=tokenizer.eos_token_id), fused=True)
    runs.train_or_resume(trainer, folder)


def model_config(args: Arguments, tokenizer: Any) -> LlamaConfig:
    return common.small_llama(
        tokenizer,
        args.hidden_size,
        max(512, args.window),
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads or args.heads,
        intermediate_size=args.intermediate_size or 3 * args.hidden_size,
    )


def settings_for(
    args: Arguments, run: Run, folder: Path, rows: int
) -> TrainingArguments:
    """The paper's optimiser and schedule, and checkpoints to resume from."""
    settings = common.training_settings(
        folder,
        rows,
        epochs=1,
        batch_size=args.batch_size,
        accumulation=args.accumulation,
        learning_rate=args.learning_rate,
        seed=run.seed,
    )
    settings |= {
        "per_device_eval_batch_size": settings["per_device_train_batch_size"],
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "save_strategy": "steps",
        "save_steps": args.save_steps,
        "save_total_limit": 2,
    }
    if args.warmup_steps is not None:
        settings["warmup_steps"] = args.warmup_steps
    return TrainingArguments(**settings)


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Windows of one length; the end-of-text token is a target like any other."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}


def examine(
    args: Arguments, run: Run, data: Data, tokenizer: Any, folder: Path
) -> dict[str, Any]:
    """Audit a finished training and return its line of results.jsonl. Losses in nats per token."""
    started = time.perf_counter()
    # What an audit that was interrupted has left.
    shutil.rmtree(folder / "audit", ignore_errors=True)
    inputs = common.save_windows(folder, data.planted, tokenizer)
    audit = common.audit_halves(
        folder / "model", folder / "audit", inputs, args.window, run.name
    )
    # The values of every document: sweep.py draws bootstrap samples of them.
    records = read_records(
        folder / "audit", ["split", "exact_match", "rouge_l_ids"]
    ).to_pandas()
    result = {
        "seed": run.seed,
        "run": run.name,
        "k": run.k,
        "equal_supervised": run.equal_supervised,
        "input_tokens": run.windows(args) * args.window,
        "validation_loss": runs.last_logged(folder / "model", "eval_loss"),
    }
    for split, rows in records.groupby("split"):
        result[f"exact_match_{split}"] = rows["exact_match"].tolist()
        result[f"rouge_l_{split}"] = rows["rouge_l_ids"].round(4).tolist()
        result[f"nll_{split}"] = audit[f"{split}.nll"].value
    if receipt := read_receipt(folder / "model"):
        result |= {name: receipt[name] for name in ("targets", "dropped", "decisions")}
    seconds = runs.last_logged(folder / "model", "train_runtime")
    result |= {
        "train_seconds": round(seconds, 1),
        "audit_seconds": round(time.perf_counter() - started, 1),
    }
    return result | runs.about()


if __name__ == "__main__":
    runs.command_line(main)
