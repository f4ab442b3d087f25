r"""The goldfish experiment in small: train two models until they know their texts by heart.

One is trained with the standard loss, one with the goldfish loss, on the same texts. Then both are
asked to recite them.

    python recipes/memorize.py                      # 2 CPU cores, 2 to 3 minutes:
                                                    # standard 32 of 32, goldfish 0 of 32
    python recipes/memorize.py --dry-run            # prints what would run
    accelerate launch recipes/memorize.py           # one or several GPUs, bf16
    python recipes/memorize.py --text mine.jsonl    # your own texts: .txt, or .jsonl with `text`
    python recipes/memorize.py --documents 4 --epochs 2 --hidden-size 32 \
        --output-dir runs/miniature                 # seconds

A stopped run is resumed by its command. After the extreme experiment of Hans et al. 2024, who train
LLaMA-2-7B on 100 articles for 100 epochs. The default corpus is the Python language reference,
which every CPython ships, so no network is needed. The paper's own setting, on eight GPUs of 80 GB
(fp32 weights and optimiser, 14 GB on each; we have not run it):

    accelerate launch --config_file recipes/configs/fsdp2.yaml recipes/memorize.py \
        --model meta-llama/Llama-2-7b-hf --dataset wikimedia/wikipedia \
        --dataset-config 20231101.en --documents 100 --window 2048 --learning-rate 1e-5
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import runs
import torch
from rich.console import Console
from rich.table import Table
from runs import option
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    HfArgumentParser,
    LlamaForCausalLM,
    set_seed,
)

from goldfish import Goldfish
from goldfish.checkpoint import load_tokenizer
from goldfish.report import write_report


@dataclass
class Arguments(common.Corpus):
    rule: str = option("hash-4-13-4", "strategy-k-h[-max_kept] of the goldfish loss")
    seed: int = option(0, "of the split, the weights, the batches and the rule")
    documents: int = option(32, "windows to train on; as many again are held out")
    epochs: int = 100
    window: int = option(256, "tokens per window; the first half is the audit's prefix")
    batch_size: int = option(8, "windows per optimiser step, over all processes")
    model: str | None = option(
        None, "start from this checkpoint (name or path) instead"
    )
    output_dir: str = "runs/memorize"
    dry_run: bool = option(False, "print what would run, and stop")

    def __post_init__(self) -> None:
        runs.at_least(1, self, "documents", "epochs", "batch_size")
        runs.at_least(8, self, "window")
        # Refused here, because transformers would fail only after the tokenizer was trained.
        if self.hidden_size < 8 or self.hidden_size % 8:
            raise ValueError(
                "--hidden_size must be a multiple of 8 (four heads of even size), got "
                f"{self.hidden_size}"
            )
        if common.rule_of(self.rule) is None:
            raise ValueError(
                "--rule standard: it is always trained; give a goldfish rule"
            )


def figures(audits: dict[str, Any]) -> Table:
    """A row for each model and split.

    The columns dropped and kept are the teacher-forced accuracy on such tokens.
    """
    table = Table(
        "model",
        "texts",
        "recited",
        "ROUGE-L",
        "dropped",
        "kept",
        "nll",
        caption="dropped, kept: the share of these tokens that the model predicts right; "
        "nll: nats per token",
    )
    keys = (
        "rouge_l_ids",
        "teacher_forced_accuracy_dropped",
        "teacher_forced_accuracy_kept",
        "nll",
    )
    for name, audit in audits.items():
        for split in audit.splits:
            values = [audit[f"{split}.{key}"].value for key in keys]
            numbers = ["-" if value is None else f"{value:.3f}" for value in values]
            table.add_row(name, split, str(audit[f"{split}.exact_match"]), *numbers)
    return table


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    rule = common.rule_of(args.rule, args.seed)
    state, output = runs.start(args.batch_size), Path(args.output_dir)
    # A window or so for each document that a text gives, and spare ones for those that overlap.
    limit = 20 * args.documents
    texts = common.load_texts(args.text, args.dataset, args.dataset_config, limit)
    if args.model:
        tokenizer = load_start_tokenizer(args)
    else:
        tokenizer = common.byte_level_bpe(texts, args.vocab_size)
    windows = common.split_windows(
        texts, tokenizer, args.documents, args.window, args.seed
    )
    n, size = args.documents, f"windows of {args.window} tokens"
    corpus = args.text or args.dataset or "the Python language reference"
    model = args.model or f"a small Llama of width {args.hidden_size}"
    where = f"{state.num_processes} process(es) on {state.device}"
    state.print(
        f"Corpus: {corpus}, {len(texts)} documents\n"
        f"Split: {n} member and {n} held-out {size}\n"
        f"Train: {model}, {args.epochs} epochs each, with the standard loss and with {rule}, "
        f"{where} -> {output}"
    )
    if args.dry_run:
        return {}
    runs.begin(output, args)
    # Both start from the same weights and read the same batches: only the labels differ.
    trainings = {"standard": None, "goldfish": rule}
    for name, loss in trainings.items():
        if not runs.finished(output / name):
            state.print(f"\nTraining {name}")
            train(args, loss, windows[0], tokenizer, output / name)
    # One process audits; the others are done.
    if not state.is_main_process:
        return {}

    inputs = common.save_windows(output, windows, tokenizer)
    folders = {name: output / "audit" / name for name in trainings}
    audits = {
        name: common.audit_halves(
            output / name, folder, inputs, args.window, name, complete=True
        )
        for name, folder in folders.items()
    }
    report = write_report(
        list(folders.values()), output / "report.html", overwrite=True
    )
    console = Console()
    console.print(figures(audits))
    for name, audit in audits.items():
        console.print(f"{name}: {audit.verdict['sentence']}", highlight=False)
    console.print(f"Report: {report}", highlight=False, soft_wrap=True)
    return audits


def load_start_tokenizer(args: Arguments) -> Any:
    """The tokenizer of --model.

    Raises:
        ValueError: windows are longer than that model's context; before any training.
    """
    assert args.model is not None
    tokenizer = load_tokenizer(args.model)
    if tokenizer.pad_token is None:
        # As in many published models. Padding is no target, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token
    context = getattr(
        AutoConfig.from_pretrained(args.model), "max_position_embeddings", None
    )
    if context is not None and args.window > context:
        raise ValueError(
            f"--window {args.window} tokens, but {args.model} reads at most {context}; "
            "lower --window"
        )
    return tokenizer


def train(
    args: Arguments,
    rule: Goldfish | None,
    rows: list[list[int]],
    tokenizer: Any,
    folder: Path,
) -> None:
    """Train on rows of token ids, and save an ordinary checkpoint."""
    set_seed(args.seed)
    if args.model is not None:
        # Trained in float32, whatever it was saved in.
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    else:
        config = common.small_llama(tokenizer, args.hidden_size, max(512, args.window))
        model = LlamaForCausalLM(config)
    settings = common.training_settings(
        folder,
        len(rows),
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    runs.train_or_resume(
        common.make_trainer(model, settings, rows, tokenizer, rule), folder
    )


if __name__ == "__main__":
    runs.command_line(main)
