"""Extraction by sampling: how probable is a suffix within n samples? (Hayes et al. 2024, section 3)

p_z, the probability that one sample is the suffix, may be e^-10000, so everything is computed from its logarithm.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from goldfish.audit.estimate import Codes, Estimate, Floats, mean, rate

PROBABILITIES = (0.5, 0.9, 0.999)
SAMPLES = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)


def probability_within(log_p: ArrayLike, n: float) -> Floats:
    """1 - (1 - p_z)^n, the probability that the suffix is among n samples; exact to rounding for p_z from 0 to 1."""
    log_p = np.minimum(np.asarray(log_p, dtype=np.float64), 0.0)
    with np.errstate(divide="ignore"):
        # ln(1 - p_z) without cancellation, for a small p_z and for one near 1.
        log_miss = np.where(log_p < -0.6931, np.log1p(-np.exp(log_p)), np.log(-np.expm1(log_p)))
    return np.asarray(-np.expm1(n * log_miss))


def extracted(log_p: ArrayLike, n: float, p: float) -> NDArray[np.bool_]:
    """Whether the suffix is among n samples with a probability of at least p, but for rounding."""
    return probability_within(log_p, n) >= p * (1 - 1e-12)


def setting_name(setting: dict[str, Any]) -> str:
    """T=0.8,top_k=40"""
    cuts = [f"{key}={setting[key]:g}" for key in ("top_k", "top_p") if setting[key] is not None]
    return ",".join([f"T={setting['temperature']:g}", *cuts])


def sampling_figures(log_p: Floats, documents: Codes) -> dict[str, Estimate]:
    """The (n,p) curves and the expected shares under one setting, by name; see docs/audit-files.md."""
    curves = {
        f"extractable@{n},{p:g}": rate(extracted(log_p, n, p), documents)
        for p in PROBABILITIES
        for n in SAMPLES
    }
    return curves | {
        f"expected@{n}": mean(probability_within(log_p, n), documents) for n in SAMPLES
    }
