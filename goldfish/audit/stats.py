"""Rates and means that carry their n and a 95% interval."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest

RESAMPLES = 2_000


def rate(k: int, n: int, interval: bool = True) -> dict[str, Any] | None:
    """k of n with the exact (Clopper-Pearson) 95% interval; None where there is nothing to count.

    The interval takes the n for independent: right for windows, too narrow for tokens of the same window.
    """
    if n == 0:
        return None
    result: dict[str, Any] = {"k": int(k), "n": int(n), "rate": k / n}
    if interval:
        bounds = binomtest(int(k), int(n)).proportion_ci(0.95, method="exact")
        result |= {"lower95": float(bounds.low), "upper95": float(bounds.high)}
    return result


def mean(values: Sequence[float]) -> dict[str, Any] | None:
    """The mean with its percentile-bootstrap 95% interval (2,000 resamples, fixed seed); None for no values."""
    if not values:
        return None
    data = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(0).integers(len(data), size=(RESAMPLES, len(data)))
    low, high = np.percentile(data[draws].mean(-1), [2.5, 97.5])
    return {"mean": float(data.mean()), "lower95": float(low), "upper95": float(high), "n": len(data)}
