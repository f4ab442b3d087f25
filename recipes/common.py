"""What the recipes share about data and models: corpus, tokenizer, windows, Llama, Trainer.

`datasets` is imported where it is needed: benchmarks and GPU tests also run without it.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import PartialState
from runs import option
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

# Members and held-out windows: the token ids of each.
Split: TypeAlias = tuple[list[list[int]], list[list[int]]]

# Windows that share this many consecutive tokens count as overlapping.
SHARED = 8
END = "<|endoftext|>"


@dataclass
class Corpus:
    """Options of a recipe that trains a small model from scratch."""

    text: str | None = option(None, "corpus: .txt, or .jsonl with a `text` field")
    dataset: str | None = option(
        None, "corpus: a dataset with a `text` column, by name"
    )
    dataset_config: str | None = option(None, "its configuration, e.g. 20231101.en")
    vocab_size: int = option(
        2048, "of the byte-level BPE that is trained on the corpus"
    )
    hidden_size: int = option(128, "of the small Llama that is trained from scratch")
    learning_rate: float = 2e-3


def load_texts(
    text: str | None = None,
    dataset: str | None = None,
    config: str | None = None,
    limit: int = 0,
) -> list[str]:
    """Load a corpus as a list of documents in a fixed order.

    Args:
        text: a .txt or .jsonl file.
        dataset: a dataset with a `text` column, streamed; its first `limit` rows are taken.
        config: the configuration of that dataset.

    Without either, the corpus is the Python language reference, which every CPython ships.
    """
    if text is not None and dataset is not None:
        raise ValueError("--text and --dataset both name a corpus; give one of them")
    if text is not None:
        texts = [
            row["text"] for row in read_rows(text) if isinstance(row.get("text"), str)
        ]
    elif dataset is not None:
        from datasets import load_dataset

        rows = load_dataset(dataset, config, split="train", streaming=True)
        texts = [row["text"] for row in rows.take(limit)]
    else:
        from pydoc_data.topics import topics

        texts = [topics[name] for name in sorted(topics)]
    if not any(text.strip() for text in texts):
        raise ValueError(f"the corpus {text or dataset} is empty")
    return texts


def byte_level_bpe(
    texts: list[str], vocab_size: int, end: str | None = END, pad: str | None = None
) -> PreTrainedTokenizerFast:
    """Train a tokenizer on the texts. It is deterministic: every process gets the same one.

    `end` is the end-of-text token, None for a tokenizer without special tokens; it also pads,
    unless `pad` is another token.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[token for token in (end, pad) if token is not None],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=end, pad_token=pad or end
    )


def cut(ids: list[int], length: int) -> list[list[int]]:
    """The ids in windows of one length, from the start; the remainder is left out."""
    return [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]


def cut_windows(texts: list[str], tokenizer: Any, length: int) -> list[list[int]]:
    """Each text in windows of that many tokens."""
    windows = []
    for text in texts:
        windows += cut(tokenizer(text, add_special_tokens=False)["input_ids"], length)
    return windows


def distinct(windows: Iterable[list[int]], wanted: int) -> list[list[int]]:
    """The first `wanted` windows, skipping those that overlap a window chosen before them.

    Documents quote each other. Without this, a held-out suffix could have been trained on.
    """
    chosen: list[list[int]] = []
    seen: set[tuple[int, ...]] = set()
    for window in windows:
        if len(chosen) == wanted:
            break
        runs = {tuple(window[i : i + SHARED]) for i in range(len(window) - SHARED + 1)}
        if seen.isdisjoint(runs):
            chosen.append(window)
            seen |= runs
    return chosen


def split_windows(
    texts: list[str], tokenizer: Any, documents: int, length: int, seed: int
) -> Split:
    """Member and held-out windows, `documents` of each, chosen at random before any training."""
    # Shuffled before the choice: windows of one document end up on both sides.
    windows = cut_windows(texts, tokenizer, length)
    random.Random(seed).shuffle(windows)
    chosen = distinct(windows, 2 * documents)
    if len(chosen) < 2 * documents:
        raise ValueError(
            f"the corpus is too short: {len(texts)} texts give {len(windows)} windows of {length} "
            f"tokens, {len(chosen)} of them distinct, but --documents {documents} needs "
            f"{2 * documents} (members and held-out); give more text, or lower --documents or "
            "--window"
        )
    return chosen[:documents], chosen[documents:]


def save_windows(folder: Path, windows: Split, tokenizer: Any) -> dict[str, Path]:
    """Write members.jsonl and heldout.jsonl, the input of an audit: ids, and their text."""
    paths = {}
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in zip(("members", "heldout"), windows, strict=True):
        paths[split] = folder / f"{split}.jsonl"
        with paths[split].open("w", encoding="utf-8") as lines:
            for ids in rows:
                # Ids are what was trained on; the text is for people who read the file.
                text = tokenizer.decode(ids)
                name = " ".join(text.split()[:6])[:60]
                lines.write(
                    json.dumps({"name": name, "input_ids": ids, "text": text}) + "\n"
                )
    return paths


def audit_halves(
    model: str | Path,
    output: Path,
    inputs: dict[str, Path],
    window: int,
    name: str,
    complete: bool = False,
) -> Any:
    """Audit a model: prefix and suffix are the halves of each window. Returns the audit.

    `complete`: the members are everything that was trained on.
    """
    # Imported here, because training needs none of the audit's packages.
    from goldfish.audit import audit

    half = window // 2
    return audit(
        model,
        output,
        members=inputs["members"],
        heldout=inputs["heldout"],
        prefix_length=half,
        suffix_length=window - half,
        name=name,
        complete=complete,
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
    """TrainingArguments for epochs over that many rows.

    `batch_size` counts the rows of an optimiser step over all processes and micro-batches.
    """
    # The last batch of an epoch may be smaller: divided and rounded up.
    steps = epochs * -(-rows // batch_size)
    return {
        "output_dir": str(folder),
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch_size
        // PartialState().num_processes
        // accumulation,
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
        # Without it, several CPU processes do not find each other.
        "use_cpu": not torch.accelerator.is_available(),
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
        # A list is a dataset, too: Trainer needs only a length and indexing.
        "train_dataset": [{"input_ids": ids, "labels": ids} for ids in rows],
        # Pads rows of different lengths, and their labels with -100.
        "data_collator": DataCollatorForSeq2Seq(tokenizer),
        "processing_class": tokenizer,
    }
    return Trainer(**given) if rule is None else GoldfishTrainer(**given, goldfish=rule)


def rule_of(name: str, seed: int = 0) -> Goldfish | None:
    """The rule named "strategy-k-h[-max_kept]", such as "hash-4-13-4"; None for "standard".

    >>> rule_of("standard") is None
    True
    >>> rule_of("hash-4-13-4").max_kept
    4
    """
    if name == "standard":
        return None
    try:
        strategy, k, h, *rest = name.split("-")
        (max_kept,) = map(int, rest) if rest else (None,)
        return Goldfish(
            k=float(k),
            h=int(h),
            strategy=strategy,  # type: ignore[arg-type]
            seed=seed,
            max_kept=max_kept,
        )
    except ValueError as error:
        raise ValueError(
            "a rule is standard or strategy-k-h[-max_kept] such as hash-4-13-4, got "
            f"{name!r}: {error}"
        ) from error
