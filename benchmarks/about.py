"""What the benchmarks share: provenance, tables, data and models (those of the recipes), held-out loss, intervals."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

sys.path.append(
    str(Path(__file__).parents[1] / "recipes")
)  # so import this module before those of the recipes

from common import (
    audit_halves,
    byte_level_bpe,
    load_texts,
    rule_of,
    save_windows,
    small_llama,
    split_windows,
)
from runs import about, append, markdown, read_results

from goldfish.audit import records

RESULTS = Path(__file__).parent / "results"

__all__ = [
    "RESULTS",
    "about",
    "append",
    "audited",
    "byte_level_bpe",
    "heldout",
    "load_texts",
    "markdown",
    "mean_of",
    "paired",
    "read_results",
    "rule_of",
    "small_llama",
    "source",
    "split_windows",
]


def audited(
    model: Any, tokenizer: Any, windows: tuple[list[list[int]], list[list[int]]]
) -> list[dict[str, Any]]:
    """The records of an audit of member and held-out windows of one length, whose first half is given."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        paths = save_windows(Path(folder), windows, tokenizer)
        audit_halves(Path(folder), Path(folder, "audit"), paths, len(windows[0][0]), "")
        rows: list[dict[str, Any]] = records(Path(folder, "audit")).to_pylist()
        return rows


@torch.no_grad()
def heldout(model: Any, rows: Tensor, owners: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Loss of each target of held-out rows, nats, float64 (M, T - 1); and the loss of all targets in nats per token,
    its sum and the targets in each document. `owners`, int64 (M,): the document of each row."""
    model.eval()
    losses = []
    for batch in rows.split(16):
        logits = model(input_ids=batch).logits[:, :-1]
        losses.append(
            torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), batch[:, 1:], reduction="none"
            )
        )
    nll = torch.cat(losses).double()
    documents = torch.zeros(int(owners.max()) + 1, dtype=torch.float64).index_add(
        0, owners, nll.sum(1)
    )
    tokens = owners.bincount() * nll.shape[1]
    return nll, {
        "loss": nll.mean().item(),
        "documents": [round(value, 3) for value in documents.tolist()],
        "tokens": tokens.tolist(),
    }


def paired(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    """Difference of held-out losses over runs of the same documents, with its 95% bootstrap interval over documents."""
    tokens = np.sum([run["tokens"] for run in ours], axis=0)
    differences = np.sum([run["documents"] for run in ours], axis=0) - np.sum(
        [r["documents"] for r in theirs], axis=0
    )
    drawn = np.random.default_rng(0).integers(len(tokens), size=(4000, len(tokens)))
    lower, upper = np.quantile(differences[drawn].sum(1) / tokens[drawn].sum(1), (0.025, 0.975))
    return f"{differences.sum() / tokens.sum():+.4f} [{lower:+.4f}, {upper:+.4f}]"


def mean_of(values: Any, digits: int) -> str:
    """The mean of differences, with a 95% t interval if there are at least two."""
    values = np.asarray(values)
    centre = values.mean()
    if len(values) < 2:
        return f"{centre:+.{digits}f}"
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{centre:+.{digits}f} [{centre - half:+.{digits}f}, {centre + half:+.{digits}f}]"


def source(result: dict[str, Any]) -> str:
    """One line of a result's provenance."""
    versions = ", ".join(
        f"{name} {number}" for name, number in result["versions"].items() if number
    )
    return f"{result['device']}, {result['threads']} thread(s); {versions}; commit {result['commit'][:12]}"
