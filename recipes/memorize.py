r"""The goldfish experiment in small: train one model with the standard loss and one with the goldfish loss on the same
texts, for so many epochs that the standard model knows them by heart; then ask both to recite.

    python recipes/memorize.py                      # 2 CPU cores, 2 minutes: standard 32 of 32, goldfish 0 of 32
    python recipes/memorize.py --dry_run            # says what would run
    accelerate launch recipes/memorize.py           # one or several GPUs, bf16
    python recipes/memorize.py --text mine.jsonl    # your own texts: .txt, or .jsonl with a `text` field
    python recipes/memorize.py --documents 4 --epochs 2 --hidden_size 32 --output_dir runs/miniature    # seconds

After the extreme experiment of Hans et al. 2024, who train LLaMA-2-7B on 100 articles for 100 epochs. The default
corpus is the Python language reference that every CPython ships (pydoc_data.topics), so this needs no network. The
paper's own setting, on eight GPUs of 80 GB (fp32 weights and optimiser, 14 GB of each; not run by us, so no minutes):

    accelerate launch --config_file recipes/configs/fsdp2.yaml recipes/memorize.py --model meta-llama/Llama-2-7b-hf \
        --dataset wikimedia/wikipedia --dataset_config 20231101.en --documents 100 --window 2048 --learning_rate 1e-5
"""

import json
import random
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import PartialState
from datasets import Dataset, load_dataset
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from goldfish import Goldfish, GoldfishTrainer
from goldfish.audit import audit
from goldfish.audit import model as audit_load
from goldfish.audit.table import summary_table
from goldfish.audit.windows import read_rows
from goldfish.report import write_report

Split: TypeAlias = tuple[list[list[int]], list[list[int]]]  # members, held-out: token ids of each window


@dataclass
class Arguments:
    k: float = field(default=4, metadata={"help": "one token in k is dropped"})
    h: int = field(default=13, metadata={"help": "how many preceding tokens decide"})
    strategy: str = field(default="hash", metadata={"help": "hash, text, static, random or reference"})
    seed: int = field(default=0, metadata={"help": "of the split, the weights, the batches and the rule"})
    documents: int = field(default=32, metadata={"help": "windows to train on; as many again are held out"})
    epochs: int = 100
    window: int = field(default=256, metadata={"help": "tokens a window; the first half is the audit's prefix"})
    batch_size: int = field(default=8, metadata={"help": "windows an optimiser step, over all processes"})
    learning_rate: float = 2e-3
    hidden_size: int = field(default=128, metadata={"help": "of the small Llama that is trained from scratch"})
    vocab_size: int = field(default=2048, metadata={"help": "of the byte-level BPE that is trained on the corpus"})
    text: str | None = field(default=None, metadata={"help": "corpus: .txt, or .jsonl with a `text` field"})
    dataset: str | None = field(default=None, metadata={"help": "corpus: a dataset with a `text` column, by name"})
    dataset_config: str | None = field(default=None, metadata={"help": "its configuration, e.g. 20231101.en"})
    model: str | None = field(default=None, metadata={"help": "start from this checkpoint (name or path) instead"})
    output_dir: str = "runs/memorize"
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier run in output_dir"})
    dry_run: bool = field(default=False, metadata={"help": "print what would run, and stop"})

    def __post_init__(self) -> None:
        for name, least in (("documents", 1), ("epochs", 1), ("window", 8), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        if self.hidden_size < 8 or self.hidden_size % 8:
            raise ValueError(f"--hidden_size must be a multiple of 8 (four heads of even size), got {self.hidden_size}")

    def rule(self, **more: Any) -> Goldfish:
        return Goldfish(k=self.k, h=self.h, strategy=self.strategy, seed=self.seed, **more)  # type: ignore[arg-type]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    rule, state = args.rule(), PartialState(cpu=not torch.accelerator.is_available())
    if args.batch_size % state.num_processes:
        raise ValueError(f"--batch_size {args.batch_size} windows do not divide among {state.num_processes} processes")
    texts = load_texts(args)
    output = Path(args.output_dir)
    tokenizer = load_tokenizer(args, texts)
    check_context(args)
    members, heldout = split_windows(args, texts, tokenizer)
    if args.dry_run:
        describe(args, rule, len(texts), state)
        return {}
    if state.is_main_process:
        prepare_output(output, args)
        save_windows(output / "members.jsonl", members, tokenizer)
        save_windows(output / "heldout.jsonl", heldout, tokenizer)
    state.wait_for_everyone()

    for name in ("standard", "goldfish"):
        state.print(f"\nTraining {name}: {len(members)} windows of {args.window} tokens, {args.epochs} epochs")
        train(args, rule if name == "goldfish" else None, members, tokenizer, output / name)

    summaries = {}
    if state.is_main_process:
        for name in ("standard", "goldfish"):
            summaries[name] = audit(
                output / name,
                output / "audit" / name,
                members=output / "members.jsonl",
                heldout=output / "heldout.jsonl",
                prefix_length=args.window // 2,
                suffix_length=args.window - args.window // 2,
            )
        report = write_report([output / "audit" / name for name in summaries], output / "report.html")
        (output / "summary.json").write_text(json.dumps(summaries, indent=2) + "\n", encoding="utf-8")
        console = Console()
        console.print(summary_table(summaries.values()))
        console.print(f"Report: {report}", highlight=False, soft_wrap=True)
    return summaries


def load_texts(args: Arguments) -> list[str]:
    """The corpus as a list of documents, in a fixed order."""
    if args.text is not None and args.dataset is not None:
        raise ValueError("--text and --dataset both name a corpus; give one of them")
    if args.text is not None:
        texts = [row["text"] for row in read_rows(args.text) if isinstance(row.get("text"), str)]
    elif args.dataset is not None:
        # Streamed, and no more than it takes: an encyclopedia is larger than this experiment.
        rows = load_dataset(args.dataset, args.dataset_config, split="train", streaming=True)
        texts = [row["text"] for row in rows.take(20 * args.documents)]
    else:
        from pydoc_data.topics import topics

        texts = [topics[name] for name in sorted(topics)]
    if not any(text.strip() for text in texts):
        raise ValueError(f"the corpus {args.text or args.dataset} holds no text")
    return texts


def load_tokenizer(args: Arguments, texts: list[str]) -> Any:
    """That of --model, or a byte-level BPE trained on the texts."""
    if args.model is not None:
        tokenizer = audit_load.load_tokenizer(args.model)
        if tokenizer.pad_token is None:  # many language models have none; what pads is no target
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)  # deterministic, so that every process makes the same
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def split_windows(args: Arguments, texts: list[str], tokenizer: Any) -> Split:
    """Members and held-out windows, token ids, chosen at random before any training.

    The corpus quotes itself. A window that shares eight consecutive tokens with a window chosen before it is passed
    over, so that no held-out suffix was ever trained on.
    """
    chosen: list[list[int]] = []
    seen: set[tuple[int, ...]] = set()
    windows = cut_windows(texts, tokenizer, args.window)
    random.Random(args.seed).shuffle(windows)
    for window in windows:
        grams = {tuple(window[i : i + 8]) for i in range(len(window) - 7)}
        if len(chosen) == 2 * args.documents:
            break
        if seen.isdisjoint(grams):
            chosen.append(window)
            seen |= grams
    if len(chosen) < 2 * args.documents:
        raise ValueError(
            f"the corpus is too short: {len(texts)} texts give {len(windows)} windows of {args.window} tokens, "
            f"{len(chosen)} of them distinct, but --documents {args.documents} needs {2 * args.documents} "
            "(members and held-out); give more text, or lower --documents or --window"
        )
    return chosen[: args.documents], chosen[args.documents :]


def cut_windows(texts: list[str], tokenizer: Any, length: int) -> list[list[int]]:
    """Each text in windows of that many tokens, from its start; what is left at its end is left out."""
    windows = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        windows += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    return windows


def check_context(args: Arguments) -> None:
    """ValueError for windows that --model cannot read whole: before the first training, not in its first step."""
    if args.model is None:
        return
    context = getattr(AutoConfig.from_pretrained(args.model), "max_position_embeddings", None)
    if context is not None and args.window > context:
        raise ValueError(f"--window {args.window} tokens, but {args.model} reads at most {context}; lower --window")


def train(args: Arguments, rule: Goldfish | None, members: list[list[int]], tokenizer: Any, folder: Path) -> None:
    """Train on the members, with the goldfish loss where there is a rule, and save an ordinary checkpoint."""
    set_seed(args.seed)
    if args.model is not None:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)  # whatever it was saved in
    else:
        model = LlamaForCausalLM(small_llama(args, tokenizer))
    steps = args.epochs * -(-len(members) // args.batch_size)
    arguments = TrainingArguments(**training_settings(args, folder, steps))
    rows = Dataset.from_dict({"input_ids": members, "labels": members})
    collator = DataCollatorForSeq2Seq(tokenizer)  # pads where rows differ, labels with -100
    trainer = make_trainer(model, arguments, rows, collator, tokenizer, rule)
    trainer.train()
    trainer.save_model()


def training_settings(args: Arguments, folder: Path, steps: int) -> dict[str, Any]:
    """TrainingArguments for that many optimiser steps."""
    return {
        "output_dir": str(folder),
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": args.batch_size // PartialState().num_processes,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": steps // 20,
        "logging_steps": max(1, steps // 4),
        "save_strategy": "no",
        "report_to": "none",
        "seed": args.seed,
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),  # several CPU processes find each other only when told so
    }


def make_trainer(
    model: Any, arguments: TrainingArguments, rows: Dataset, collator: Any, tokenizer: Any, rule: Goldfish | None,
    **more: Any,
) -> Trainer:  # fmt: skip
    """A Trainer, or with a rule a GoldfishTrainer; nothing else differs."""
    common = {
        "model": model,
        "args": arguments,
        "train_dataset": rows,
        "data_collator": collator,
        "processing_class": tokenizer,
        **more,
    }
    return Trainer(**common) if rule is None else GoldfishTrainer(**common, goldfish=rule)


def small_llama(args: Arguments, tokenizer: Any, **changes: Any) -> LlamaConfig:
    values = {
        "vocab_size": len(tokenizer),
        "hidden_size": args.hidden_size,
        "intermediate_size": 3 * args.hidden_size,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": max(512, args.window),
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return LlamaConfig(**{**values, **changes})


def save_windows(path: Path, windows: list[list[int]], tokenizer: Any) -> None:
    """The audit's input: the very ids that were trained on, and their text for people."""
    with path.open("w", encoding="utf-8") as lines:
        for ids in windows:
            text = tokenizer.decode(ids)
            opening = " ".join(text.split()[:6])[:60]
            lines.write(json.dumps({"name": opening, "input_ids": ids, "text": text}) + "\n")


def prepare_output(output: Path, args: Arguments) -> None:
    """An empty folder that says which run it belongs to; an earlier run is replaced only when asked."""
    marker = output / "arguments.json"
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not marker.is_file():
            raise FileExistsError(
                f"{output} holds something that is not a run of this recipe; choose another --output_dir"
            )
        if not args.overwrite:
            raise FileExistsError(
                f"{output} holds an earlier run; choose another --output_dir, or replace it: --overwrite"
            )
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(asdict(args), indent=2) + "\n", encoding="utf-8")


def describe(args: Arguments, rule: Goldfish, texts: int, state: PartialState) -> None:
    source = args.text or args.dataset or "pydoc_data.topics (the Python language reference)"
    state.print(
        f"Corpus: {source}, {texts} documents\n"
        f"Split: {args.documents} member and {args.documents} held-out windows of {args.window} tokens\n"
        f"Train: {args.model or f'a small Llama, hidden size {args.hidden_size}'}, {args.epochs} epochs, "
        f"batch {args.batch_size}, learning rate {args.learning_rate:g}, "
        f"{state.num_processes} process(es) on {state.device}\n"
        f"  1. with the standard loss   -> {args.output_dir}/standard\n"
        f"  2. with {rule} -> {args.output_dir}/goldfish\n"
        f"Audit: both, {args.window // 2} tokens given, {args.window - args.window // 2} to recite "
        f"-> {args.output_dir}/report.html"
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"memorize.py: {error}")
