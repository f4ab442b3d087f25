"""One form for every number of an audit: what was counted, the point estimate, its 95% interval, and how it is written.

`Estimate` is made once, stored in summary.json with all of its fields, and rendered by its own methods. Intervals are
over documents, since the windows of one document are not independent.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv

SCHEMA = "goldfish.audit/5"  # of run.json, the records and summary.json; docs/audit-files.md
RESAMPLES = 2_000
FEWEST_DOCUMENTS = 10  # with fewer, the intervals of a bootstrap are far too narrow
CHUNK = 2**21  # weights of documents held at once

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A number of an audit.

    value: the point estimate; None where it is not estimable. k: the count of a rate, k of n; None for other
    estimates. n: what was counted (windows, or tokens where docs/audit-files.md says so). documents: how many
    documents they are from. lower95, upper95: the 95% interval, 2.5% on each side; None where there is none.
    reason: why something is None.
    """

    value: float | None
    k: int | None = None
    n: int = 0
    documents: int = 0
    lower95: float | None = None
    upper95: float | None = None
    reason: str | None = None

    def point(self) -> str:
        """ "3 of 40" for a rate, "0.21" for other estimates."""
        if self.k is not None:
            return f"{self.k:,} of {self.n:,}"
        if self.value is not None:
            return decimals(self.value)
        return "not estimable" if self.lower95 is None else f"above {decimals(self.lower95)}"

    def interval(self) -> str:
        """ "1.6–20.4%", "0.19–0.24", or why there is none."""
        low, high = self.lower95, self.upper95
        write = decimals if self.k is None else percent
        if low is None and high is None:
            return self.reason or "no interval"
        if self.value is None and high is None:
            return "no upper bound"
        if low is None or high is None:
            return f"at least {write(low)}" if low is not None else f"at most {write(high or 0.0)}"
        return f"{write(low).removesuffix('%')}{' to ' if low < 0 else '–'}{write(high)}"

    def __str__(self) -> str:
        """ "3 of 40 (1.6–20.4%)", or the point alone where there is no interval."""
        bounded = self.lower95 is not None or self.upper95 is not None
        return f"{self.point()} ({self.interval()})" if bounded else self.point()


def percent(share: float) -> str:
    """A share; 0% and 100% only where exact, "<0.1%" and ">99.9%" beside them."""
    if share in (0, 1):
        return f"{share:.0%}"
    return (
        "<0.1%"
        if share < 0.0005
        else ">99.9%"
        if share > 0.9995
        else f"{100 * share:.1f}".removesuffix(".0") + "%"
    )


def decimals(value: float) -> str:
    """About three digits, without an exponent where people would not write one."""
    size = abs(value)
    return (
        f"{value:.3g}"
        if 0 < size < 0.1
        else f"{value:.2f}"
        if size < 10
        else f"{value:,.{int(size < 100)}f}"
    )


def dumps(value: Any) -> str:
    """Strict JSON of a structure that holds Estimates.

    Raises:
        ValueError: NaN or infinity.
    """
    return json.dumps(value, indent=2, allow_nan=False, default=asdict) + "\n"


def loads(text: str) -> Any:
    """The structure of `dumps`: every object with the fields of an Estimate becomes one."""
    names = {field.name for field in fields(Estimate)}
    return json.loads(
        text, object_hook=lambda value: Estimate(**value) if value.keys() == names else value
    )


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """The object in run.json or summary.json, with its Estimates.

    Raises:
        FileNotFoundError: no such file; `missing` says so. ValueError: an unreadable one, or one of another schema.
    """
    if not path.is_file():
        raise FileNotFoundError(missing)
    try:
        value: dict[str, Any] = loads(path.read_text(encoding="utf-8"))
        schema = value["schema"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); audit again") from error
    if schema != SCHEMA:
        raise ValueError(
            f"{path}: the schema is {schema!r:.80}, this version reads {SCHEMA!r}; audit again"
        )
    return value


def clopper_pearson(k: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a binomial rate (Clopper & Pearson 1934); k and n may be fractional effective counts."""
    tail = (1 - level) / 2
    low = float(betaincinv(k, n - k + 1, tail)) if k > 0 else 0.0
    high = float(betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0
    return low, high


def rate(hits: ArrayLike, documents: Codes | None = None, unasked: int | None = None) -> Estimate:
    """How many documents have a hit in at least one of their windows; Clopper-Pearson.

    With `unasked` it is a census: nothing was left out but so many documents, and the interval goes
    from none of these having a hit to all of them.

    Args:
        hits: bool (windows,). documents: int64 (windows,), their documents' codes; by default each its own.
    """
    hits = np.asarray(hits, dtype=bool)
    documents = np.arange(len(hits)) if documents is None else documents
    n, k = len(np.unique(documents)), len(np.unique(documents[hits]))
    if n == 0:
        return Estimate(None, 0, reason="nothing to count")
    if unasked is not None:
        return Estimate(k / n, k, n, n, k / (n + unasked), (k + unasked) / (n + unasked))
    return Estimate(k / n, k, n, n, *clopper_pearson(k, n))


def census(k: int, n: int) -> Estimate:
    """A share of everything that there is, without an interval."""
    if n == 0:
        return Estimate(None, 0, reason="nothing to count")
    return Estimate(k / n, k, n, n)


def mean(
    sums: ArrayLike,
    documents: Codes | None = None,
    counts: ArrayLike | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Estimate:
    """sum(sums) / sum(counts), the mean of values that lie within `bounds`; Gaffke's interval over documents.

    A Bayesian bootstrap with one more document, as large as the largest, that has the worst value that is possible
    (Gaffke 2005; Learned-Miller & Thomas 2020; docs/audit-files.md has its coverage). With 0s and 1s it is
    Clopper-Pearson's.

    Args:
        sums: (windows,), the sum of a window's values. counts: (windows,), how many there are; by default 1.
        documents: int64 (windows,), their documents' codes; by default each its own.
        bounds: the least and the greatest value that is possible.
    """
    sums = np.asarray(sums, dtype=np.float64)
    counts = np.ones(len(sums)) if counts is None else np.asarray(counts, dtype=np.float64)
    counted = counts > 0
    if not counted.any():
        return Estimate(None, reason="nothing to count")
    documents = np.arange(len(sums)) if documents is None else documents
    columns = document_sums([sums[counted], counts[counted]], documents[counted])
    total, extra = _dirichlet(columns)
    ends = []
    for bound, level in zip(bounds, (0.025, 0.975), strict=True):
        draws = (total[:, 0] + bound * extra) / (total[:, 1] + extra)
        ends.append(float(np.quantile(draws, level)))
    point = columns[:, 0].sum() / columns[:, 1].sum()
    # Rounding must not put the point outside.
    return Estimate(
        float(point),
        None,
        int(counts.sum()),
        len(columns),
        min(ends[0], point),
        max(ends[1], point),
    )


def token_rate(hits: ArrayLike, totals: ArrayLike, documents: Codes | None = None) -> Estimate:
    """sum(hits) of sum(totals) tokens, from the counts of each window; the interval of `mean`."""
    return replace(mean(hits, documents, totals), k=int(np.sum(hits)))


def _dirichlet(columns: Floats) -> tuple[Floats, Floats]:
    """Sums over documents under random exponential weights (RESAMPLES, M), and the weight of one more document, as
    large as the largest (RESAMPLES,). That weight's share is drawn evenly from its distribution, Beta(1, documents)."""
    count = len(columns)
    rows = max(1, CHUNK // count)
    columns = np.concatenate([columns, np.ones((count, 1))], -1)
    sums = np.concatenate(
        [_weights(count, first, rows) @ columns for first in range(0, RESAMPLES, rows)]
    )
    order = np.random.default_rng(0).permutation(RESAMPLES)
    share = 1 - ((order + 0.5) / RESAMPLES) ** (1 / count)
    return sums[:, :-1], sums[:, -1] * share / (1 - share) * columns[:, 1].max()


@lru_cache(maxsize=4)  # the estimates of a split have the same number of documents
def _weights(count: int, first: int, rows: int) -> Floats:
    generator = np.random.default_rng([count, first])
    return generator.standard_exponential((min(rows, RESAMPLES - first), count))


def difference(values: Floats, documents: Codes) -> Estimate:
    """The mean of paired differences; percentile bootstrap over documents.

    Approximate: with 10 to 20 documents its intervals hold the truth in about 91 of 100 cases.

    Args:
        values: (windows,). documents: int64 (windows,), their documents' codes.
    """
    columns = document_sums([values, np.ones(len(documents))], documents)
    value = float(np.mean(values))
    about: dict[str, Any] = {"n": len(documents), "documents": len(columns)}
    if len(columns) < FEWEST_DOCUMENTS:
        return Estimate(
            value, reason=f"{len(columns)} documents; an interval needs {FEWEST_DOCUMENTS}", **about
        )
    total = np.concatenate(
        [times @ columns for (times,) in resamples([len(columns)], len(columns))]
    )
    draws = total[:, 0] / total[:, 1]
    if np.ptp(draws) <= 1e-12 * abs(value):
        reason = "every resample gives the same value, which says nothing about other documents"
        return Estimate(value, reason=reason, **about)
    low, high = map(float, np.percentile(draws, [2.5, 97.5]))
    return Estimate(value, lower95=low, upper95=high, **about)


def document_sums(sums: Sequence[ArrayLike], documents: Codes) -> Floats:
    """(windows,) columns -> (documents, M), documents without a window left out."""
    here, place = np.unique(documents, return_inverse=True)
    return np.stack(
        [np.bincount(place, np.asarray(each, dtype=np.float64), len(here)) for each in sums], -1
    )


def resamples(counts: Sequence[int], size: int, times: int = RESAMPLES) -> Iterator[list[Floats]]:
    """How often each document is drawn, with replacement, from each of several groups; `times` times, fixed seed.

    counts: documents of each group. size: numbers that a resample takes in memory.

    Yields some resamples at a time: for each group (resamples, documents).
    """
    generator, rows = np.random.default_rng(0), max(1, CHUNK // size)
    for first in range(0, times, rows):
        weights = []
        for count in counts:
            shape = (min(rows, times - first), count)
            drawn = generator.integers(count, size=shape) + np.arange(shape[0])[:, None] * count
            weights.append(
                np.bincount(drawn.ravel(), minlength=drawn.size).reshape(shape).astype(np.float64)
            )
        yield weights
