r"""The goldfish experiment in small: train one model with the standard loss and one with the goldfish loss on the same
texts, until the standard model knows them by heart; then ask both to recite.

    python recipes/memorize.py                      # 2 CPU cores, 2 to 3 minutes: standard 32 of 32, goldfish 0 of 32
    python recipes/memorize.py --dry-run            # prints what would run; a stopped run goes on with its command
    accelerate launch recipes/memorize.py           # one or several GPUs, bf16
    python recipes/memorize.py --text mine.jsonl    # your own texts: .txt, or .jsonl with a `text` field
    python recipes/memorize.py --documents 4 --epochs 2 --hidden-size 32 --output-dir runs/miniature    # seconds

After the extreme experiment of Hans et al. 2024, who train LLaMA-2-7B on 100 articles for 100 epochs. The default
corpus is the Python language reference, which every CPython ships, so no network is needed. The paper's own setting,
on eight GPUs of 80 GB (fp32 weights and optimiser, 14 GB on each; we have not run it):

    accelerate launch --config_file recipes/configs/fsdp2.yaml recipes/memorize.py --model meta-llama/Llama-2-7b-hf \
        --dataset wikimedia/wikipedia --dataset-config 20231101.en --documents 100 --window 2048 --learning-rate 1e-5
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import runs
import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    HfArgumentParser,
    LlamaForCausalLM,
    set_seed,
)

from goldfish import Goldfish
from goldfish.audit.model import load_tokenizer
from goldfish.report import write_report


@dataclass
class Arguments:
    k: float = field(default=4, metadata={"help": "one token in k is dropped"})
    h: int = field(default=13, metadata={"help": "how many preceding tokens decide"})
    strategy: str = field(
        default="hash", metadata={"help": "hash or letters; for comparison static or random"}
    )
    seed: int = field(
        default=0, metadata={"help": "of the split, the weights, the batches and the rule"}
    )
    documents: int = field(
        default=32, metadata={"help": "windows to train on; as many again are held out"}
    )
    epochs: int = 100
    window: int = field(
        default=256, metadata={"help": "tokens per window; the first half is the audit's prefix"}
    )
    batch_size: int = field(
        default=8, metadata={"help": "windows per optimiser step, over all processes"}
    )
    learning_rate: float = 2e-3
    hidden_size: int = field(
        default=128, metadata={"help": "of the small Llama that is trained from scratch"}
    )
    vocab_size: int = field(
        default=2048, metadata={"help": "of the byte-level BPE that is trained on the corpus"}
    )
    text: str | None = field(
        default=None, metadata={"help": "corpus: .txt, or .jsonl with a `text` field"}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "corpus: a dataset with a `text` column, by name"}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "its configuration, e.g. 20231101.en"}
    )
    model: str | None = field(
        default=None, metadata={"help": "start from this checkpoint (name or path) instead"}
    )
    output_dir: str = "runs/memorize"
    dry_run: bool = field(default=False, metadata={"help": "print what would run, and stop"})

    def __post_init__(self) -> None:
        runs.at_least(1, self, "documents", "epochs", "batch_size")
        runs.at_least(8, self, "window")
        if self.hidden_size < 8 or self.hidden_size % 8:
            raise ValueError(
                f"--hidden_size must be a multiple of 8 (four heads of even size), got {self.hidden_size}"
            )


def figures(summaries: dict[str, dict[str, Any]]) -> Table:
    """A row for each model and split; dropped, kept: teacher-forced accuracy on such tokens."""
    table = Table("model", "texts", "recited", "ROUGE-L", "dropped", "kept", "nll")
    keys = ("rouge_l_ids", "teacher_forced_accuracy_dropped", "teacher_forced_accuracy_kept", "nll")
    for name, summary in summaries.items():
        for split, values in summary["splits"].items():
            numbers = [f"{values[key].value:.3f}" if values[key] else "-" for key in keys]
            table.add_row(name, split, str(values["exact_match"]), *numbers)
    return table


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    rule = Goldfish(k=args.k, h=args.h, strategy=args.strategy, seed=args.seed)
    state, output = runs.start(args.batch_size), Path(args.output_dir)
    texts = common.load_texts(args.text, args.dataset, args.dataset_config, 20 * args.documents)
    tokenizer = (
        load_start_tokenizer(args) if args.model else common.byte_level_bpe(texts, args.vocab_size)
    )
    windows = common.split_windows(texts, tokenizer, args.documents, args.window, args.seed)
    state.print(
        f"Corpus: {args.text or args.dataset or 'the Python language reference'}, {len(texts)} documents\n"
        f"Split: {args.documents} member and {args.documents} held-out windows of {args.window} tokens\n"
        f"Train: {args.model or f'a small Llama of width {args.hidden_size}'}, {args.epochs} epochs each, with the "
        f"standard loss and with {rule}, {state.num_processes} process(es) on {state.device} -> {output}"
    )
    if args.dry_run:
        return {}
    runs.begin(output, args)
    trainings = {"standard": None, "goldfish": rule}
    for name, loss in trainings.items():
        if not runs.finished(output / name):
            state.print(f"\nTraining {name}")
            train(args, loss, windows[0], tokenizer, output / name)
    if not state.is_main_process:
        return {}

    inputs = common.save_windows(output, windows, tokenizer)
    audits, summaries = {name: output / "audit" / name for name in trainings}, {}
    for name, folder in audits.items():
        summaries[name] = common.audit_halves(output / name, folder, inputs, args.window, name)
    report = write_report(list(audits.values()), output / "report.html", overwrite=True)
    console = Console()
    console.print(figures(summaries))
    console.print(f"Report: {report}", highlight=False, soft_wrap=True)
    return summaries


def load_start_tokenizer(args: Arguments) -> Any:
    """The tokenizer of --model; ValueError, before any training, for windows longer than that model's context."""
    assert args.model is not None
    tokenizer = load_tokenizer(args.model)
    if tokenizer.pad_token is None:  # as in many published models; padding is no target
        tokenizer.pad_token = tokenizer.eos_token
    context = getattr(AutoConfig.from_pretrained(args.model), "max_position_embeddings", None)
    if context is not None and args.window > context:
        raise ValueError(
            f"--window {args.window} tokens, but {args.model} reads at most {context}; lower --window"
        )
    return tokenizer


def train(
    args: Arguments, rule: Goldfish | None, rows: list[list[int]], tokenizer: Any, folder: Path
) -> None:
    """Train on rows of token ids, with the goldfish loss if there is a rule, and save an ordinary checkpoint."""
    set_seed(args.seed)
    if args.model is not None:
        model = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=torch.float32
        )  # whatever it was saved in
    else:
        model = LlamaForCausalLM(
            common.small_llama(tokenizer, args.hidden_size, max(512, args.window))
        )
    settings = common.training_settings(
        folder,
        len(rows),
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    runs.train_or_resume(common.make_trainer(model, settings, rows, tokenizer, rule), folder)


if __name__ == "__main__":
    runs.command_line(main)
