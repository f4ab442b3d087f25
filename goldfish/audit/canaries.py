"""Canaries: random rows to put into a training set, and their likes that stay out, for exposure.

write_canaries("canaries", tokenizer)      # before the training: add inserted.jsonl to its data
goldfish audit CHECKPOINT --members canaries/canaries.jsonl --heldout canaries/references.jsonl -o DIR
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def write_canaries(
    folder: str | Path,
    tokenizer: Any,
    *,
    counts: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128) * 4,
    references: int = 1023,
    length: int = 100,
    seed: int = 0,
) -> Path:
    """Write inserted.jsonl, to train on, and for the audit canaries.jsonl and references.jsonl; returns the folder.

    Rows hold `input_ids`, drawn evenly from the tokenizer's ordinary ids: train on the ids, not on their text. A canary
    stands counts[i] times in inserted.jsonl, shuffled, and once, with its count, in canaries.jsonl; references are
    never trained on. Exposure cannot exceed log2(references + 1) bits.

    Args:
        folder: new or empty. tokenizer: of the training.
        counts: how often each canary is trained on. references: how many stay out. length: tokens of a row.

    Raises:
        FileExistsError: a folder that holds something.
        ValueError: no canary or no reference, or a count or length below 1.
    """
    if not counts or min(counts) < 1 or references < 1 or length < 2:
        raise ValueError(
            f"canaries need a count of at least 1 each, a reference and 2 tokens, got counts={list(counts)}, "
            f"references={references}, length={length}"
        )
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder; choose another one or remove it")
    generator = np.random.default_rng(seed)
    ordinary = np.setdiff1d(sorted(tokenizer.get_vocab().values()), tokenizer.all_special_ids)
    ids = generator.choice(ordinary, size=(len(counts) + references, length)).tolist()
    canaries = [{"name": f"canary {i}", "input_ids": ids[i], "count": count} for i, count in enumerate(counts)]
    outside = [{"name": f"reference {i}", "input_ids": row} for i, row in enumerate(ids[len(counts) :])]
    copies = generator.permutation(np.repeat(np.arange(len(counts)), counts))
    files = {"inserted": [canaries[i] for i in copies], "canaries": canaries, "references": outside}
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
