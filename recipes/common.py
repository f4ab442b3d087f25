"""What the recipes share about data and models: corpus, tokenizer, windows, a small Llama, a Trainer."""

import json
import random
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import PartialState
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from goldfish import Goldfish, GoldfishTrainer
from goldfish.text.rows import read_rows

Split: TypeAlias = tuple[
    list[list[int]], list[list[int]]
]  # members, held-out: token ids of each window


def load_texts(
    text: str | None = None, dataset: str | None = None, config: str | None = None, limit: int = 0
) -> list[str]:
    """A corpus as a list of documents in a fixed order: of a .txt or .jsonl file, or the first `limit` of a dataset
    with a `text` column, streamed; by default the Python language reference, which every CPython ships."""
    if text is not None and dataset is not None:
        raise ValueError("--text and --dataset both name a corpus; give one of them")
    if text is not None:
        texts = [row["text"] for row in read_rows(text) if isinstance(row.get("text"), str)]
    elif dataset is not None:
        rows = load_dataset(dataset, config, split="train", streaming=True)
        texts = [row["text"] for row in rows.take(limit)]
    else:
        from pydoc_data.topics import topics

        texts = [topics[name] for name in sorted(topics)]
    if not any(text.strip() for text in texts):
        raise ValueError(f"the corpus {text or dataset} holds no text")
    return texts


def byte_level_bpe(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the texts; deterministic, so every process gets the same."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def cut_windows(texts: list[str], tokenizer: Any, length: int) -> list[list[int]]:
    """Each text in windows of that many tokens, from its start; the remainder is left out."""
    windows = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        windows += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    return windows


def split_windows(
    texts: list[str], tokenizer: Any, documents: int, length: int, seed: int
) -> Split:
    """Member and held-out windows, `documents` of each, chosen at random before any training.

    Documents quote each other. A window that shares eight consecutive tokens with a window chosen before it is
    skipped, so that no held-out suffix is ever trained on.
    """
    chosen: list[list[int]] = []
    seen: set[tuple[int, ...]] = set()
    windows = cut_windows(texts, tokenizer, length)
    random.Random(seed).shuffle(windows)
    for window in windows:
        grams = {tuple(window[i : i + 8]) for i in range(len(window) - 7)}
        if len(chosen) == 2 * documents:
            break
        if seen.isdisjoint(grams):
            chosen.append(window)
            seen |= grams
    if len(chosen) < 2 * documents:
        raise ValueError(
            f"the corpus is too short: {len(texts)} texts give {len(windows)} windows of {length} tokens, "
            f"{len(chosen)} of them distinct, but --documents {documents} needs {2 * documents} (members and "
            "held-out); give more text, or lower --documents or --window"
        )
    return chosen[:documents], chosen[documents:]


def save_windows(folder: Path, windows: Split, tokenizer: Any) -> dict[str, Path]:
    """members.jsonl and heldout.jsonl, the input of an audit: the ids trained on, and their text for people."""
    paths = {}
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in zip(("members", "heldout"), windows, strict=True):
        paths[split] = folder / f"{split}.jsonl"
        with paths[split].open("w", encoding="utf-8") as lines:
            for ids in rows:
                text = tokenizer.decode(ids)
                name = " ".join(text.split()[:6])[:60]
                lines.write(json.dumps({"name": name, "input_ids": ids, "text": text}) + "\n")
    return paths


def audit_halves(
    model: str | Path, output: Path, inputs: dict[str, Path], window: int, name: str
) -> dict[str, Any]:
    """Audit a model: the first half of each window is given, the second is to be recited. Returns the summary."""
    from goldfish.audit import audit  # here, because training needs none of the audit's packages

    half = window // 2
    return audit(
        model,
        output,
        members=inputs["members"],
        heldout=inputs["heldout"],
        prefix_length=half,
        suffix_length=window - half,
        name=name,
    )


def small_llama(
    tokenizer: Any, hidden_size: int, context: int = 512, **changes: Any
) -> LlamaConfig:
    """A Llama of 4 layers and 4 heads with tied embeddings, or with these changes."""
    values = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return LlamaConfig(**{**values, **changes})


def training_settings(
    folder: Path,
    rows: int,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    accumulation: int = 1,
) -> dict[str, Any]:
    """TrainingArguments for epochs over that many rows, with batches of `batch_size` rows over all processes."""
    steps = epochs * -(-rows // batch_size)
    return {
        "output_dir": str(folder),
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch_size // PartialState().num_processes // accumulation,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": steps // 20,
        "logging_steps": max(1, steps // 4),
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),  # without it, several CPU processes do not find each other
    }


def make_trainer(
    model: Any,
    settings: dict[str, Any],
    rows: list[list[int]],
    tokenizer: Any,
    rule: Goldfish | None,
) -> Trainer:
    """A Trainer, or with a rule a GoldfishTrainer, on rows of token ids; nothing else differs."""
    given = {
        "model": model,
        "args": TrainingArguments(**settings),
        "train_dataset": Dataset.from_dict({"input_ids": rows, "labels": rows}),
        "data_collator": DataCollatorForSeq2Seq(
            tokenizer
        ),  # pads rows of different lengths, labels with -100
        "processing_class": tokenizer,
    }
    return Trainer(**given) if rule is None else GoldfishTrainer(**given, goldfish=rule)


def rule_of(name: str, seed: int = 0) -> Goldfish | None:
    """The rule that "strategy-k-h" or "strategy-k-h-max_kept" names, such as "hash-4-13"; None for "standard"."""
    if name == "standard":
        return None
    try:
        strategy, k, h, *rest = name.split("-")
        (max_kept,) = map(int, rest) if rest else (None,)
        return Goldfish(k=float(k), h=int(h), strategy=strategy, seed=seed, max_kept=max_kept)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(
            f"--rules are standard or strategy-k-h[-max_kept] such as hash-4-13, got {name!r}: {error}"
        ) from error
