"""Membership scores of a window, higher = more likely a member; docs/audit.md has their table and sources."""

import zlib

import numpy as np
from numpy.typing import NDArray

from goldfish.audit.score import Score

LEAST_PROBABLE = 0.2  # the share of tokens that Min-K% and Min-K%++ look at; both papers' default
SMALLEST_STD = 1e-6  # below it the model is certain, and (log P - mu) / sigma is rounding over rounding


def scores(score: Score, text: str, dropped: NDArray[np.bool_], known: NDArray[np.bool_]) -> dict[str, float | None]:
    """All attacks by column name; None for what was not asked for.

    Args:
        text: the window's. dropped, known: bool (T-1,), of ids[1:]: what the rule says, and where that is certain.
    """
    log_p = -np.asarray(score.nll, dtype=np.float64)
    loss = float(-log_p.mean())
    kept, gone = log_p[known & ~dropped], log_p[known & dropped]
    ruled = len(kept) > 0 and len(gone) > 0
    return {
        "mia_loss": -loss,
        "mia_zlib": float(log_p.sum()) / len(zlib.compress(text.encode("utf-8", "replace"))),
        "mia_lowercase": None if score.lowercase_nll is None else score.lowercase_nll - loss,
        "mia_reference": None if score.control_nll is None else score.control_nll - loss,
        "mia_min_k": mean_of_lowest(log_p),
        "mia_min_k_plus_plus": mean_of_lowest(standardized(log_p, score.entropy_mean, score.entropy_std)),
        "mia_kept_loss": float(kept.mean()) if ruled else None,
        "mia_dropped_gap": float(kept.mean() - gone.mean()) if ruled else None,
    }


def mean_of_lowest(values: NDArray[np.float64], share: float = LEAST_PROBABLE) -> float:
    """Mean of the lowest floor(share * n) values, at least one (Shi et al. 2024, equation 1)."""
    count = max(1, int(share * len(values)))
    return float(np.partition(values, count - 1)[:count].mean())


def standardized(
    log_p: NDArray[np.float64], mean: NDArray[np.floating], std: NDArray[np.floating]
) -> NDArray[np.float64]:
    """(log P - mu) / sigma over the vocabulary (Zhang et al. 2025, equation 3); 0 where the model is certain.

    A token that a certain model did not expect has log P far below mu; its sigma is still no smaller than
    SMALLEST_STD allows, so that it counts as very improbable instead of as nothing.
    """
    difference = log_p - np.asarray(mean, dtype=np.float64)
    return difference / np.maximum(np.asarray(std, dtype=np.float64), SMALLEST_STD)
