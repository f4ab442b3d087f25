"""Estimates that carry their n and a 95% interval over documents, or say in words why they have none.

An estimate is a JSON-ready dict; docs/audit.md, "Estimates", describes its fields.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv

RESAMPLES = 2_000
FEWEST_DOCUMENTS = 10  # below it a bootstrap's intervals are far too narrow
CHUNK = 2**22  # resampled documents held at once

Estimate = dict[str, Any]
Floats = NDArray[np.float64]
Codes = NDArray[np.int64]


def clopper_pearson(k: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a binomial rate (Clopper & Pearson 1934); k and n may be fractions of effective counts."""
    tail = (1 - level) / 2
    low = float(betaincinv(k, n - k + 1, tail)) if k > 0 else 0.0
    high = float(betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0
    return low, high


def rate(hits: ArrayLike, documents: Codes | None = None) -> Estimate:
    """How many windows; Clopper-Pearson, on the effective size where a document has several windows.

    That takes the windows of a document to say all the same, the worst case; with one window a document it is exact.

    Args:
        hits: bool (windows,). documents: their documents' codes; by default each its own.
    """
    hits = np.asarray(hits, dtype=bool)
    k, n = int(hits.sum()), len(hits)
    if n == 0:
        return _nothing("rate", k=0)
    documents = np.arange(n) if documents is None else documents
    share = effective_size(documents) / n
    low, high = clopper_pearson(k * share, n * share)
    return {"k": k, "n": n, "documents": len(np.unique(documents)), "rate": k / n, "lower95": low, "upper95": high}


def effective_size(documents: Codes) -> float:
    """n^2 / sum(m^2) with m windows of each document: n independent ones, or as few as there are documents (Kish)."""
    return len(documents) ** 2 / float(np.square(np.bincount(documents), dtype=np.float64).sum())


def token_rate(hits: ArrayLike, totals: ArrayLike, documents: Codes | None = None) -> Estimate:
    """sum(hits) of sum(totals) tokens, from the counts of each window; bootstrap over documents."""
    k = int(np.sum(hits))
    return {"k": k, **_ratio("rate", hits, totals, documents)}


def mean(sums: ArrayLike, documents: Codes | None = None, counts: ArrayLike | None = None) -> Estimate:
    """sum(sums) / sum(counts), a window's count being 1 by default; bootstrap over documents."""
    return _ratio("mean", sums, np.ones(np.shape(sums)) if counts is None else counts, documents)


def value(statistic: Callable[[Floats], Floats], sums: Sequence[ArrayLike], n: int, documents: Codes) -> Estimate:
    """Any function of sums over windows, such as a ratio of rates; bootstrap over documents.

    Args:
        statistic: from (..., M) sums to (...) values; NaN or inf where there is none.
        sums: M arrays (windows,).
        n: what the estimate says it counted.
    """
    columns = document_sums(sums, documents)
    result: Estimate = {"value": None, "n": n, "documents": len(columns)}
    with np.errstate(divide="ignore", invalid="ignore"):
        point = float(statistic(columns.sum(0)))
    result["value"] = point if np.isfinite(point) else None
    return result | interval(statistic, columns)


def interval(statistic: Callable[[Floats], Floats], columns: Floats, level: float = 0.95) -> Estimate:
    """lower95 and upper95 by the percentile bootstrap over documents, or null and a reason.

    Args:
        statistic: as for `value`. columns: (documents, M) sums of each document.
    """
    none: Estimate = {"lower95": None, "upper95": None}
    if len(columns) < FEWEST_DOCUMENTS:
        return none | {"reason": f"{len(columns)} documents; an interval needs {FEWEST_DOCUMENTS}"}
    with np.errstate(divide="ignore", invalid="ignore"):
        single = statistic(columns)
        draws = statistic(resampled(columns))
    if (single == single[0]).all():
        return none | {"reason": "every document has the same value, which says nothing about others"}
    if not np.isfinite(draws).all():
        return none | {"reason": "too few events for an interval"}
    if (draws == draws[0]).all():
        return none | {"reason": "every resample gives the same value, which says nothing about other documents"}
    tail = 50 * (1 - level)
    low, high = np.percentile(draws, [tail, 100 - tail])
    return {"lower95": float(low), "upper95": float(high)}


def document_sums(sums: Sequence[ArrayLike], documents: Codes) -> Floats:
    """(windows,) columns -> (documents, M), documents without a window left out."""
    here, place = np.unique(documents, return_inverse=True)
    return np.stack([np.bincount(place, np.asarray(each, dtype=np.float64), len(here)) for each in sums], -1)


def resampled(columns: Floats, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """(documents, M) -> (resamples, M): sums over documents drawn with replacement; fixed seed."""
    generator, count = np.random.default_rng(seed), len(columns)
    rows = max(1, CHUNK // count)
    sums = []
    for first in range(0, resamples, rows):
        shape = (min(rows, resamples - first), count)
        drawn = generator.integers(count, size=shape) + np.arange(shape[0])[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(shape)  # how often each was drawn
        sums.append(times.astype(np.float64) @ columns)
    return np.concatenate(sums)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p of the exact McNemar test: are the items that only one of two models gets equally often each's?"""
    from scipy.stats import binomtest

    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


def _ratio(name: str, sums: ArrayLike, counts: ArrayLike, documents: Codes | None) -> Estimate:
    sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    counted = counts > 0
    if not counted.any():
        return _nothing(name)
    documents = np.arange(len(sums)) if documents is None else documents
    found = value(
        lambda total: total[..., 0] / total[..., 1],
        [sums[counted], counts[counted]], int(counts.sum()), documents[counted],
    )  # fmt: skip
    return {name: found.pop("value"), **found}


def _nothing(name: str, **more: Any) -> Estimate:
    return {**more, name: None, "n": 0, "documents": 0, "lower95": None, "upper95": None, "reason": "nothing to count"}
