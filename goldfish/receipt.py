"""goldfish.json: beside a checkpoint's weights, what was dropped while they were trained."""

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

from goldfish import __version__
from goldfish.rule import Goldfish

FILE_NAME = "goldfish.json"
SCHEMA = "goldfish.receipt/1"


def write_receipt(folder: str | Path, rule: Goldfish, *, tokenizer: Any, targets: int, dropped: int) -> Path:
    """Write goldfish.json into a checkpoint folder, whole or not at all.

    Args:
        folder: the checkpoint.
        rule: the rule it was trained under.
        tokenizer: its tokenizer, or None where it is not known.
        targets, dropped: tokens that could have been targets so far, and how many of them were dropped.
    """
    import torch
    import transformers

    receipt = {
        "schema": SCHEMA,
        "rule": rule.to_dict(),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "targets": targets,
        "dropped": dropped,
        "versions": {
            "goldfish": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    path = Path(folder) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".json.tmp")
    unfinished.write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return path


def read_receipt(folder: str | Path) -> dict[str, Any] | None:
    """The receipt of a checkpoint folder with its rule as a Goldfish, or None for a checkpoint without one.

    Raises:
        ValueError: a goldfish.json that is not a receipt.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return None
    try:
        receipt: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if receipt["schema"] != SCHEMA:
            raise ValueError(f"its schema is {receipt['schema']!r}, this version reads {SCHEMA!r}")
        return {**receipt, "rule": Goldfish(**receipt["rule"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a goldfish receipt: {error}") from error


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """SHA-256 of what a tokenizer does to text; settings of the moment (padding, truncation) are left out."""
    if tokenizer is None:
        return None
    if hasattr(tokenizer, "backend_tokenizer"):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state.pop("padding", None)
        state.pop("truncation", None)
    elif hasattr(tokenizer, "get_vocab"):
        state = tokenizer.get_vocab()
    else:
        return None
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
