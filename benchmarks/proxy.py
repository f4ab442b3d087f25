r"""Pretraining with planted documents: entropy from a small proxy in place of a hash.

    python benchmarks/proxy.py --seeds 0 1 2          # minutes of one core
    python benchmarks/proxy.py --table

The trainings of recipes/pretrain_canaries.py: 2.2M parameters from scratch, background read once
and 16 planted windows read 50 times. The rule's guide is a proxy, because a model that is not
trained yet is equally uncertain everywhere: half the width, so about a quarter of the parameters,
trained on the background alone. Appends one line for each training to
benchmarks/results/proxy.jsonl; those that are there are skipped. The proxy is a line, too.
"""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import about
import pretrain_canaries as recipe
import runs
import torch
from datasets import Dataset, concatenate_datasets
from runs import option
from transformers import HfArgumentParser, LlamaForCausalLM, Trainer, set_seed

from goldfish import Goldfish, premask

OUTPUT = about.RESULTS / "proxy.jsonl"
RULES = ("standard", "hash-4-13", "hash-4-13-4")
PROXY = "proxy of a quarter"


@recipe.dataclass
class Arguments(recipe.Arguments):
    output_dir: str = "runs/proxy"
    table: bool = option(False, "print the table and train nothing")


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if args.table:
        print(table())
        return
    torch.set_num_threads(1)
    texts, corpus = recipe.load_corpus(args)
    tokenizer = recipe.common.byte_level_bpe(texts, args.vocab_size)
    for seed in args.seeds:
        data = recipe.load_data(args, seed, texts, corpus, tokenizer)
        trainings = [
            *(recipe.Run(seed, rule) for rule in RULES),
            recipe.Run(seed, planted=False),
        ]
        for run in trainings:
            if has(seed, run.name):
                continue
            folder = run.folder(Path(args.output_dir))
            recipe.train(args, run, data, tokenizer, folder / "model")
            about.append(OUTPUT, recipe.examine(args, run, data, tokenizer, folder))
        if not has(seed, "entropy-4"):
            with_proxy(args, seed, data, tokenizer)


def has(seed: int, name: str) -> bool:
    done = about.read_results(OUTPUT)
    return any((each["seed"], each["run"]) == (seed, name) for each in done)


def with_proxy(args: Arguments, seed: int, data: recipe.Data, tokenizer: Any) -> None:
    """Train the proxy, premask with it, train on that."""
    small = replace(args, hidden_size=args.hidden_size // 2)
    run = recipe.Run(seed, planted=False)
    folder = Path(args.output_dir, f"seed{seed}-proxy")
    recipe.train(small, run, data, tokenizer, folder / "model")
    line = recipe.examine(small, run, data, tokenizer, folder)
    about.append(OUTPUT, line | {"run": PROXY})

    proxy = LlamaForCausalLM.from_pretrained(folder / "model")
    run = recipe.Run(seed)
    rows = data.background.select(range(run.background(args)))
    planted = Dataset.from_dict({"input_ids": data.planted[0]}, features=rows.features)
    repeated = planted.select(list(range(len(planted))) * args.repeats)
    rows = concatenate_datasets([rows, repeated])
    rule = Goldfish(k=4, strategy="entropy", document_end=tokenizer.eos_token_id)
    masked = premask(rows, rule, guide=proxy)
    folder = Path(args.output_dir, f"seed{seed}-entropy")
    set_seed(seed)
    trainer = Trainer(
        LlamaForCausalLM(recipe.model_config(args, tokenizer)),
        recipe.settings_for(args, run, folder / "model", len(rows)),
        train_dataset=masked,
        eval_dataset=data.validation,
        data_collator=collate,
        processing_class=tokenizer,
    )
    runs.train_or_resume(trainer, folder / "model")
    targets = [label for row in masked["labels"] for label in row[1:]]
    line = recipe.examine(args, run, data, tokenizer, folder) | {
        "run": "entropy-4",
        "targets": len(targets),
        "dropped": targets.count(-100),
    }
    about.append(OUTPUT, line)


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Validation rows have no labels: every token is a target."""
    return {
        "input_ids": torch.tensor([row["input_ids"] for row in rows]),
        "labels": torch.tensor([row.get("labels", row["input_ids"]) for row in rows]),
    }


def table() -> str:
    results = sorted(about.read_results(OUTPUT), key=lambda each: each["seed"])
    rows = []
    for name in (*RULES, "entropy-4", "control", PROXY):
        group = [each for each in results if each["run"] == name]
        recited = [sum(each["exact_match_members"]) for each in group]
        drops = [each.get("dropped", 0) / each.get("targets", 1) for each in group]
        rouge = [statistics.fmean(each["rouge_l_members"]) for each in group]
        rows.append(
            [
                name,
                ", ".join(f"{drop:.3f}" for drop in drops),
                ", ".join(f"{count} of 16" for count in recited),
                ", ".join(f"{value:.2f}" for value in rouge),
                ", ".join(f"{each['nll_members']:.2f}" for each in group),
                ", ".join(f"{each['validation_loss']:.3f}" for each in group),
            ]
        )
    heading = [
        "trained with",
        "drop rate",
        "recited word for word",
        "ROUGE-L",
        "loss of planted suffixes, nats/token",
        "held-out loss, nats/token",
    ]
    return about.markdown(heading, rows)


if __name__ == "__main__":
    main()
