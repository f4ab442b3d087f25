"""What the benchmarks share: provenance, tables, held-out loss, intervals, the recipes' data.

Import this module before those of the recipes: it puts their folder on the path.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "recipes"))

from common import (
    Split,
    audit_halves,
    byte_level_bpe,
    cut,
    load_texts,
    make_trainer,
    rule_of,
    save_windows,
    small_llama,
    split_windows,
    training_settings,
)
from runs import about, append, markdown, missing, parser, read_results

RESULTS = Path(__file__).parent / "results"

__all__ = [
    "RESULTS",
    "Split",
    "about",
    "append",
    "audited",
    "byte_level_bpe",
    "cut",
    "heldout",
    "load_texts",
    "make_trainer",
    "markdown",
    "mean_of",
    "missing",
    "paired",
    "parser",
    "read_results",
    "rule_of",
    "seconds_of",
    "small_llama",
    "source",
    "split_windows",
    "training_settings",
]


def audited(model: Any, tokenizer: Any, windows: Split) -> list[dict[str, Any]]:
    """The records of an audit of windows of one length: halves are prefix and suffix."""
    from goldfish.audit.records import read_records

    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        paths = save_windows(Path(folder), windows, tokenizer)
        audit_halves(Path(folder), Path(folder, "audit"), paths, len(windows[0][0]), "")
        rows: list[dict[str, Any]] = read_records(Path(folder, "audit")).to_pylist()
        return rows


@torch.no_grad()
def heldout(model: Any, rows: Tensor, owners: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The loss on held-out rows.

    Args:
        rows: int64 (M, T).
        owners: int64 (M,), the document of each row.

    Returns:
        The loss of each target, nats, float64 (M, T - 1); and a dict of the mean `loss` in nats
        per token, and of the sum of losses and the number of targets in each document.
    """
    model.eval()
    losses = []
    for batch in rows.split(16):
        logits = model(input_ids=batch).logits[:, :-1].transpose(1, 2)
        losses.append(
            torch.nn.functional.cross_entropy(logits, batch[:, 1:], reduction="none")
        )
    nll = torch.cat(losses).double()
    sums = torch.zeros(int(owners.max()) + 1, dtype=torch.float64)
    sums.index_add_(0, owners, nll.sum(1))
    return nll, {
        "loss": nll.mean().item(),
        "documents": [round(value, 3) for value in sums.tolist()],
        "tokens": (owners.bincount() * nll.shape[1]).tolist(),
    }


def paired(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    """Difference of two held-out losses on the same documents, with a 95% interval over them.

    The interval is a bootstrap of documents, each with all its runs.
    """
    tokens = np.sum([run["tokens"] for run in ours], axis=0)
    differences = np.sum([run["documents"] for run in ours], axis=0)
    differences = differences - np.sum([run["documents"] for run in theirs], axis=0)
    drawn = np.random.default_rng(0).integers(len(tokens), size=(4000, len(tokens)))
    shares = differences[drawn].sum(1) / tokens[drawn].sum(1)
    lower, upper = np.quantile(shares, (0.025, 0.975))
    return f"{differences.sum() / tokens.sum():+.4f} [{lower:+.4f}, {upper:+.4f}]"


def mean_of(values: Any, digits: int) -> str:
    """The mean of differences, with a 95% t interval if there are at least two."""
    # Imported here: machines for GPU benchmarks may lack the audit's packages.
    from scipy.stats import t as student

    values = np.asarray(values)
    centre = values.mean()
    if len(values) < 2:
        return f"{centre:+.{digits}f}"
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{centre:+.{digits}f} [{centre - half:+.{digits}f}, {centre + half:+.{digits}f}]"


def seconds_of(times: Sequence[float]) -> tuple[str, str]:
    """Median, and least - greatest, for the cells of a table."""
    return f"{np.median(times):.3f}", f"{min(times):.3f} - {max(times):.3f}"


def source(result: dict[str, Any]) -> str:
    """One line of a result's provenance."""
    installed = {name: number for name, number in result["versions"].items() if number}
    versions = ", ".join(f"{name} {number}" for name, number in installed.items())
    commit = result["commit"][:12]
    return f"{result['device']}, {result['threads']} thread(s); {versions}; commit {commit}"
