"""One row of the table of figures, and its interval: what was counted, and how sure that is.

Intervals are over documents, since the windows of one document are not independent. Rates decide,
so their intervals are exact. Means only describe; theirs are simple and a little too wide.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray
from pyarrow.compute import is_valid, list_flatten, list_value_length
from scipy.special import betaincinv, stdtrit
from scipy.stats import hypergeom

from goldfish.text.printable import counted

if TYPE_CHECKING:
    from goldfish.rule import Goldfish

LEVEL = 0.95
FEWEST_DOCUMENTS = 10  # with fewer, the intervals of a bootstrap are far too narrow
CHUNK = 2**21  # weights of documents held at once
# Key in the files: name in sentences and tables.
SPLITS = {"members": "members", "heldout": "held-out"}

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Figure:
    """A row of the table of figures.

    Attributes:
        split: "members", "heldout", or "both" for figures that compare them.
        figure: its name, such as "exact_match".
        setting: of the adversary, such as "T=1,top_k=40"; "" if there is one only.
        x: what a curve runs over (tokens of prefix, samples, beams); None for a single number.
        value: the point estimate; None if it cannot be estimated.
        k: the count of a rate, k of n; None for other figures.
        n: what was counted: documents, windows, tokens or secrets (docs/audit-files.md).
        documents: how many documents they are from.
        low, high: the 95% interval, 2.5% on each side; None if there is none.
        reason: why something is None.
    """

    split: str = ""
    figure: str = ""
    setting: str = ""
    x: float | None = None
    value: float | None = None
    k: int | None = None
    n: int = 0
    documents: int = 0
    low: float | None = None
    high: float | None = None
    reason: str | None = None

    def point(self) -> str:
        """ "3 of 40" for a rate, "0.21" for other figures."""
        if self.k is not None:
            return f"{self.k:,} of {self.n:,}"
        if self.value is not None:
            return decimals(self.value)
        return "not estimable" if self.low is None else f"above {decimals(self.low)}"

    def interval(self) -> str:
        """ "1.6–20.4%", "0.19–0.24", "exact", or why there is none."""
        low = self.low
        high = self.high
        write = decimals if self.k is None else percent
        if low is None:
            if high is None:
                return self.reason or "no interval"
            return f"at most {write(high)}"
        if high is None:
            return f"at least {write(low)}"
        if low == high:  # of a census
            return "exact"
        dash = " to " if low < 0 else "–"  # no dash before a minus sign
        return f"{write(low).removesuffix('%')}{dash}{write(high)}"

    def __str__(self) -> str:
        """ "3 of 40 (1.6–20.4%)", or the point alone if there is no interval."""
        bounded = self.low is not None or self.high is not None
        return f"{self.point()} ({self.interval()})" if bounded else self.point()


class Figures(tuple[Figure, ...]):
    """The table of figures. What is shown, judged or compared is a selection of its rows."""

    @cached_property
    def _places(self) -> dict[tuple[str, str, str, float | None], Figure]:
        return {(each.split, each.figure, each.setting, each.x): each for each in self}

    def get(
        self,
        split: str,
        figure: str,
        setting: str = "",
        x: float | None = None,
    ) -> Figure | None:
        """The row with just these keys, or None."""
        return self._places.get((split, figure, setting, x))

    def select(self, **keys: Any) -> list[Figure]:
        """The rows that agree with all keys: select(split="members", figure="prefix_sweep")."""

        def agrees(row: Figure) -> bool:
            return all(getattr(row, key) == keys[key] for key in keys)

        return list(filter(agrees, self))


def percent(share: float) -> str:
    """A share; 0% and 100% only if exact, "<0.1%" and ">99.9%" beside them."""
    if share in (0, 1):
        return f"{share:.0%}"
    if share < 0.0005:
        return "<0.1%"
    if share > 0.9995:
        return ">99.9%"
    return f"{100 * share:.1f}".removesuffix(".0") + "%"


def decimals(value: float) -> str:
    """About three digits, without an exponent where people would not write one."""
    size = abs(value)
    if 0 < size < 0.1:
        return f"{value:.3g}"
    if size < 10:
        return f"{value:.2f}"
    return f"{value:,.{int(size < 100)}f}"


def clopper_pearson(k: float, n: float, level: float = LEVEL) -> tuple[float, float]:
    """The exact interval of a binomial rate (Clopper & Pearson 1934); k, n may be fractional.

    >>> [round(end, 4) for end in clopper_pearson(0, 368)]
    [0.0, 0.01]
    """
    tail = (1 - level) / 2
    # The tails of a binomial distribution are those of a beta distribution.
    low = 0.0
    if k > 0:
        low = float(betaincinv(k, n - k + 1, tail))
    high = 1.0
    if k < n:
        high = float(betaincinv(k + 1, n - k, 1 - tail))
    return low, high


def hypergeometric(
    k: int,
    n: int,
    population: int,
    level: float = LEVEL,
) -> tuple[float, float]:
    """The exact interval of a rate among `population` things, n of which were drawn and counted.

    It holds every number of hits among all things under which neither k or more, nor k or fewer,
    of n is rarer than (1 - level) / 2. With all of them drawn it is k / n, exactly.

    >>> hypergeometric(0, 62, 62)
    (0.0, 0.0)
    """
    tail = (1 - level) / 2
    # Between the hits that were seen and those that leave room for the misses that were seen.
    totals = range(k, population - (n - k) + 1)

    def many_enough(total: int) -> bool:
        return bool(hypergeom.sf(k - 1, population, total, n) > tail)

    def too_many(total: int) -> bool:
        return bool(hypergeom.cdf(k, population, total, n) <= tail)

    # Both are false up to some total and true from there on.
    first = bisect_left(totals, True, key=many_enough)
    behind = bisect_left(totals, True, key=too_many)
    return totals[first] / population, totals[behind - 1] / population


@dataclass(frozen=True)
class Population:
    """Everything that there is: `size` documents that could be asked, `unasked` that could not."""

    size: int
    unasked: int = 0


def bounds(
    k: int,
    n: int,
    population: Population | None,
    level: float = LEVEL,
) -> tuple[float, float]:
    """The interval of k of n: of a sample of such things, or of a finite number of them.

    Those that could not be asked may all be hits, or none.
    """
    if population is None:
        return clopper_pearson(k, n, level)
    size = max(population.size, n)
    low, high = hypergeometric(k, n, size, level)
    total = size + population.unasked
    fewest = low * size
    most = high * size + population.unasked
    return fewest / total, most / total


def rate(
    hits: ArrayLike,
    documents: Codes | None = None,
    population: Population | None = None,
) -> Figure:
    """How many documents have a hit in at least one of their windows, with its exact interval.

    Args:
        hits: bool (windows,). documents: int64 (windows,), the number of each one's document; by
            default each its own.
        population: all documents that there are, if they are known.
    """
    hits = np.asarray(hits, dtype=bool)
    documents = np.arange(len(hits)) if documents is None else documents
    n = len(np.unique(documents))
    k = len(np.unique(documents[hits]))
    if n == 0:
        return Figure(k=0, reason="nothing to count")
    # Windows of one document are one trial: together they recite it or not.
    low, high = bounds(k, n, population)
    return Figure(value=k / n, k=k, n=n, documents=n, low=low, high=high)


def mean(
    sums: ArrayLike,
    documents: Codes | None = None,
    counts: ArrayLike | None = None,
    bounded: bool = True,
) -> Figure:
    """sum(sums) / sum(counts): a mean over windows or tokens.

    The interval of a share, a value from 0 to 1, is that of the mean of the documents and of two
    more, one with 0 and one with 1, by Student's t; for zeros and ones that is nearly the interval
    of Agresti and Coull (1998). So ten documents with 0 do not bound it by 0. docs/audit-files.md
    has its coverage. Lengths and losses have no greatest value, and one recited text in a hundred
    moves their means: they get no interval.

    Args:
        sums: (windows,), the sum of each one's values. counts: (windows,), how many there are; by
            default 1. documents: int64 (windows,), the number of each one's document.
        bounded: whether the values lie between 0 and 1.
    """
    sums = np.asarray(sums, dtype=np.float64)
    if counts is None:
        counts = np.ones(len(sums))
    counts = np.asarray(counts, dtype=np.float64)
    counted = counts > 0
    if not counted.any():
        return Figure(reason="nothing to count")
    if documents is None:
        documents = np.arange(len(sums))
    columns = document_sums([sums[counted], counts[counted]], documents[counted])
    total, size = columns.sum(0)
    value = float(total / size)
    figure = Figure(value=value, n=int(counts.sum()), documents=len(columns))
    if not bounded:
        return replace(figure, reason="a mean of lengths or losses has no interval")
    # The two documents more have as many tokens as the longest one.
    longest = columns[:, 1].max()
    low, high = ratio_interval(np.vstack([columns, [0, longest], [longest, longest]]))
    # They draw the interval towards 1/2, so that it could leave out a share of 0 or 1.
    low = max(0.0, min(low, value))
    high = min(1.0, max(high, value))
    return replace(figure, low=low, high=high)


def ratio_interval(columns: Floats) -> tuple[float, float]:
    """Student's t interval of sum(columns[:, 0]) / sum(columns[:, 1]) over documents.

    By the linearization that is usual for ratios (Cochran 1977, section 6.4).
    """
    count = len(columns)
    total, size = columns.sum(0)
    ratio = total / size
    # What each document adds to the total beyond its share.
    residuals = columns[:, 0] - ratio * columns[:, 1]
    variance = count / (count - 1) * float(residuals @ residuals)
    error = math.sqrt(variance) / size
    margin = float(stdtrit(count - 1, (1 + LEVEL) / 2)) * error
    return ratio - margin, ratio + margin


def token_rate(
    hits: ArrayLike,
    totals: ArrayLike,
    documents: Codes | None = None,
) -> Figure:
    """sum(hits) of sum(totals) tokens, from the counts of each window; the interval of `mean`."""
    return replace(mean(hits, documents, totals), k=int(np.sum(hits)))


def difference(values: Floats, documents: Codes) -> Figure:
    """The mean of paired differences, with Student's t interval over documents.

    Args:
        values: (windows,). documents: int64 (windows,), the number of each one's document.
    """
    columns = document_sums([values, np.ones(len(documents))], documents)
    value = float(np.mean(values))
    figure = Figure(value=value, n=len(documents), documents=len(columns))
    if len(columns) < FEWEST_DOCUMENTS:
        few = (
            f"{counted(len(columns), 'document')}; an interval needs {FEWEST_DOCUMENTS}"
        )
        return replace(figure, reason=few)
    # Rounding alone must not pass for a spread.
    if np.ptp(columns[:, 0] / columns[:, 1]) <= 1e-12 * abs(value):
        return replace(
            figure, reason="all documents differ by the same, so there is no interval"
        )
    low, high = ratio_interval(columns)
    return replace(figure, low=low, high=high)


def document_sums(sums: Sequence[ArrayLike], documents: Codes) -> Floats:
    """(windows,) columns -> (documents, M), documents without a window left out."""
    here, place = np.unique(documents, return_inverse=True)
    columns = []
    for each in sums:
        values = np.asarray(each, dtype=np.float64)
        columns.append(np.bincount(place, values, len(here)))
    return np.stack(columns, -1)


def resamples(counts: Sequence[int], size: int, times: int) -> Iterator[list[Floats]]:
    """How often each document is drawn, with replacement, from each of several groups.

    counts: documents of each group. size: numbers that a resample takes in memory. The seed is
    fixed. Yields some resamples at a time: for each group (resamples, documents).
    """
    generator = np.random.default_rng(0)
    at_once = max(1, CHUNK // size)
    for first in range(0, times, at_once):
        rows = min(at_once, times - first)
        weights = []
        for count in counts:
            drawn = generator.integers(count, size=(rows, count))
            # One bincount for all rows: row i has the numbers from i * count on for itself.
            drawn += np.arange(rows)[:, None] * count
            times_drawn = np.bincount(drawn.ravel(), minlength=rows * count)
            weights.append(times_drawn.reshape(rows, count).astype(np.float64))
        yield weights


def population_of(
    run: Mapping[str, Any],
    split: str,
    asked: int | None = None,
) -> Population | None:
    """All documents that were trained on, if the file is said to hold all of them.

    asked: how many a question was put to, by default all that have a window. A simple prompt is not
    put to a row that lacks its columns.
    """
    if split != "members" or not run["protocol"].get("complete"):
        return None
    about = run["inputs"][split]
    # Nobody knows which of the rows that were not drawn repeat others. Each counts as a document,
    # which makes the interval a little too wide.
    not_drawn = about["rows"] - about["drawn"]
    left_out = 0 if asked is None else about["documents"] - asked
    return Population(
        size=about["documents"] - left_out + not_drawn,
        unasked=about["drawn"] - about["asked"] + left_out,
    )


@dataclass(frozen=True)
class Side:
    """The records of one split, from which figures are made.

    Attributes:
        split: "members" or "heldout". table: its records, or its answers to simple prompts.
        run: run.json. rule: that of the training, if there was one for all documents.
        population: all documents that there are, if the file is said to be complete; None for a
            sample.
    """

    split: str
    table: pa.Table
    run: Mapping[str, Any]
    rule: "Goldfish | None"
    population: Population | None

    @property
    def protocol(self) -> Mapping[str, Any]:
        protocol: Mapping[str, Any] = self.run["protocol"]
        return protocol

    @property
    def settings(self) -> list[str]:
        """The names of the adversaries who sample."""
        return [setting_name(each) for each in self.protocol["sampling"]]

    @cached_property
    def documents(self) -> Codes:
        """(records,): the number of each one's document."""
        return np.asarray(self.table["document"].to_numpy(), dtype=np.int64)

    @cached_property
    def as_trained(self) -> "Side":
        """Without questions that the training never posed: chats asked from the generation prompt.

        Rates count a document if any of its records does, means and membership are of these.
        """
        chosen = np.asarray(self.table["prompt_kind"].to_pylist()) == "training"
        if chosen.all():
            return self  # no copy of a large table
        return self.only(chosen)

    def only(self, chosen: Bools) -> "Side":
        """With some of the records; chosen: bool (records,)."""
        return replace(self, table=self.table.filter(pa.array(chosen, pa.bool_())))

    def numbers(self, name: str) -> Floats:
        """A column of numbers as float64; null becomes NaN."""
        column = self.table[name].cast(pa.float64())
        return np.asarray(column.to_numpy(), dtype=np.float64)

    def lists(self, name: str, length: int) -> Floats:
        """A column of lists of one length, (records, length); null becomes NaN."""
        column = self.table[name]
        rows = np.full((len(column), length), np.nan)
        # Flattening leaves out the lists that are null.
        values = list_flatten(column).cast(pa.float64()).to_numpy()
        rows[is_valid(column).to_numpy()] = values.reshape(-1, length)
        return rows

    def lengths(self, name: str) -> Codes:
        """The lengths of the lists in a column, (records,)."""
        return np.asarray(list_value_length(self.table[name]).to_numpy())

    def sums(self, name: str) -> Floats:
        """The sums of the lists in a column, (records,)."""
        return sums(self.table, name)

    def rate(self, figure: str, hits: ArrayLike, chosen: Bools | None = None) -> Figure:
        """How many documents have a hit in any record; chosen: bool, the records that count."""
        hits = np.asarray(hits)
        documents = self.documents
        if chosen is not None:
            hits = hits[chosen]
            documents = documents[chosen]
        return self._named(figure, rate(hits, documents, self.population))

    def count(self, figure: str, hits: ArrayLike) -> Figure:
        """How many records have a hit: of all that there are, so without an interval."""
        hits = np.asarray(hits, dtype=bool)
        k = int(hits.sum())
        n = len(hits)
        documents = len(np.unique(self.documents))
        found = Figure(value=k / n, k=k, n=n, documents=documents)
        return self._named(figure, found)

    def mean(
        self,
        figure: str,
        values: ArrayLike,
        counts: ArrayLike | None = None,
        bounded: bool = True,
    ) -> Figure:
        """See `mean`."""
        return self._named(figure, mean(values, self.documents, counts, bounded))

    def token_rate(self, figure: str, hits: ArrayLike, totals: ArrayLike) -> Figure:
        """See `token_rate`."""
        return self._named(figure, token_rate(hits, totals, self.documents))

    def _named(self, figure: str, found: Figure) -> Figure:
        return replace(found, split=self.split, figure=figure)


def sides_of(
    run: Mapping[str, Any],
    table: pa.Table,
    rule: "Goldfish | None",
) -> list[Side]:
    """Records by split; without a split that has none."""
    names = np.asarray(table["split"].to_pylist(), dtype=str)
    sides = []
    for split in SPLITS:
        here = table.filter(pa.array(names == split))
        if len(here):
            documents = len(here["document"].unique())
            population = population_of(run, split, documents)
            sides.append(Side(split, here, run, rule, population))
    return sides


def sums(table: pa.Table, name: str) -> Floats:
    """Of each window the sum of a column of lists of numbers."""
    lengths = list_value_length(table[name]).to_numpy()
    values = list_flatten(table[name]).to_numpy()
    # The window of each value. Differences of one running sum would lose digits.
    windows = np.repeat(np.arange(len(table)), lengths)
    totals = np.bincount(windows, values, len(table))
    return np.asarray(totals, dtype=np.float64)


def setting_name(setting: Mapping[str, Any]) -> str:
    """T=0.8,top_k=40"""
    parts = [f"T={setting['temperature']:g}"]
    for key in ("top_k", "top_p"):
        if setting[key] is not None:
            parts.append(f"{key}={setting[key]:g}")
    return ",".join(parts)
