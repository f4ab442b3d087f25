"""Extraction by sampling: how probable is a suffix within n samples? (Hayes et al. 2024, section 3)

p_z, the probability that one sample is the suffix, may be e^-10000, so everything is computed from its logarithm.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from goldfish.audit.estimate import Codes, Estimate, Floats, mean, rate

PROBABILITIES = (0.5, 0.9, 0.999)
SAMPLES = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)


def probability_within(log_p: ArrayLike, n: float) -> Floats:
    """1 - (1 - p_z)^n, the probability that the suffix is among n samples; exact to rounding for p_z from 0 to 1."""
    log_p = np.minimum(np.asarray(log_p, dtype=np.float64), 0.0)
    return np.asarray(-np.expm1(n * _log_miss(log_p)))


def log10_samples_needed(log_p: ArrayLike, p: float) -> Floats:
    """log10 of the least whole n >= 1 with 1 - (1 - p_z)^n >= p; inf where p_z is 0."""
    log_p = np.minimum(np.asarray(log_p, dtype=np.float64), 0.0)
    with np.errstate(divide="ignore"):
        n = np.log1p(-p) / _log_miss(log_p)
        # The factor forgives the division's rounding, so that p_z = p needs one sample and not two.
        near = np.log10(np.maximum(1.0, np.ceil(n * (1 - 1e-12))))
    far = (np.log(-np.log1p(-p)) - log_p) / np.log(10)  # ln(1 - p_z) = -p_z where floats cannot tell 1 - p_z from 1
    return np.asarray(np.where(log_p > -36, near, far))


def _log_miss(log_p: Floats) -> Floats:
    """ln(1 - p_z) without cancellation: log1p(-p) for a small p, log(-expm1(log p)) for one near 1."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.where(log_p < -0.6931, np.log1p(-np.exp(log_p)), np.log(-np.expm1(log_p))))


def setting_name(setting: dict[str, Any]) -> str:
    """T=0.8,top_k=40"""
    cuts = [f"{key}={setting[key]:g}" for key in ("top_k", "top_p") if setting[key] is not None]
    return ",".join([f"T={setting['temperature']:g}", *cuts])


def sampling_figures(log_p: Floats, documents: Codes) -> dict[str, Estimate]:
    """The (n,p) curves and the expected shares under one setting, by name; see docs/audit-files.md."""
    figures: dict[str, Estimate] = {}
    for p in PROBABILITIES:
        needed = log10_samples_needed(log_p, p)
        figures |= {f"extractable@{n},{p:g}": rate(needed <= np.log10(n) + 1e-12, documents) for n in SAMPLES}
    return figures | {f"expected@{n}": mean(probability_within(log_p, n), documents) for n in SAMPLES}
