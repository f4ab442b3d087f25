"""The rows of the table of figures: how records are counted, and how certain the counts are.

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
CHUNK = 2**21  # numbers that resampling holds in memory at once
# By key in the files: the name in sentences and tables.
SPLITS = {"members": "members", "heldout": "held-out"}

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]
Bools = NDArray[np.bool_]
Interval = tuple[float, float]
Run = Mapping[str, Any]  # run.json


@dataclass(frozen=True)
class Figure:
    """A row of the table of figures.

    Attributes:
        split: "members", "heldout", or "both" for figures that compare them.
        figure: its name, such as "exact_match".
        setting: of the adversary, such as "T=1,top_k=40"; "" if there is only one.
        x: what a curve runs over (tokens of prefix, samples, beams); None for a single number.
        value: the point estimate; None if it cannot be estimated.
        k: the count of a rate, k of n; None for other figures.
        n: how many documents, windows, tokens or secrets were counted (see docs/audit-files.md).
        documents: how many documents they come from.
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
        if self.low is not None:
            return f"above {decimals(self.low)}"
        return "not estimable"

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
        # One percent sign is enough: 1.6–20.4%.
        start = write(low).removesuffix("%")
        dash = " to " if low < 0 else "–"  # no dash before a minus sign
        return f"{start}{dash}{write(high)}"

    def __str__(self) -> str:
        """ "3 of 40 (1.6–20.4%)", or the point alone if there is no interval."""
        if self.low is None and self.high is None:
            return self.point()
        return f"{self.point()} ({self.interval()})"


class Figures(tuple[Figure, ...]):
    """The table of figures. What is shown, judged or compared is a selection of its rows."""

    def get(
        self,
        split: str,
        figure: str,
        setting: str = "",
        x: float | None = None,
    ) -> Figure | None:
        """The row with exactly these keys, or None."""
        keys = split, figure, setting, x
        for row in self:
            keys_of_row = row.split, row.figure, row.setting, row.x
            if keys_of_row == keys:
                return row
        return None

    def select(self, **keys: Any) -> list[Figure]:
        """The rows with all of some keys: select(split="members", figure="prefix_sweep")."""
        wanted = list(keys.values())
        rows = []
        for row in self:
            found = [getattr(row, key) for key in keys]
            if found == wanted:
                rows.append(row)
        return rows


@dataclass(frozen=True)
class Population:
    """All documents that exist: `size` that could be asked about, `unasked` that could not."""

    size: int
    unasked: int = 0


def population_of(
    run: Run,
    split: str,
    asked: int | None = None,
) -> Population | None:
    """All documents that were trained on, if the audit was told that the file is complete.

    asked: how many of them a question was about, by default all that have a window. A simple prompt
    is not made for a row that lacks its columns.
    """
    is_complete = run["protocol"].get("complete")
    if split != "members" or not is_complete:
        return None
    about = run["inputs"][split]
    documents = about["documents"]
    if asked is None:
        asked = documents
    # Which of the rows that were not drawn repeat others is unknown. Each counts as a document,
    # which makes the interval a little too wide.
    not_drawn = about["rows"] - about["drawn"]
    without_window = about["drawn"] - about["asked"]
    left_out = documents - asked
    size = asked + not_drawn
    unasked = without_window + left_out
    return Population(size, unasked)


@dataclass(frozen=True)
class Side:
    """The records of one split, from which figures are made.

    Attributes:
        split: "members" or "heldout".
        table: its records, or its answers to simple prompts.
        run: run.json.
        rule: that of the training, if there was one for all documents.
        population: all documents that exist, if the file is complete; None for a sample.
    """

    split: str
    table: pa.Table
    run: Run
    rule: "Goldfish | None"
    population: Population | None

    @property
    def protocol(self) -> Mapping[str, Any]:
        protocol: Mapping[str, Any] = self.run["protocol"]
        return protocol

    @property
    def settings(self) -> list[str]:
        """The names of the settings of sampling."""
        return [setting_name(each) for each in self.protocol["sampling"]]

    @cached_property
    def documents(self) -> Codes:
        """int64 (records,): the number of each record's document."""
        numbers = self.table["document"].to_numpy()
        return np.asarray(numbers, dtype=np.int64)

    @cached_property
    def as_trained(self) -> "Side":
        """Only the records whose prompt is as in training, not a chat's generation prompt.

        Means and membership are of these. Rates are of all: a document counts if any of its
        records does.
        """
        kinds = self.table["prompt_kind"].to_pylist()
        chosen = np.asarray(kinds) == "training"
        if chosen.all():
            return self  # no copy of a large table
        return self.only(chosen)

    def only(self, chosen: Bools) -> "Side":
        """The same side with some of its records; chosen: bool (records,)."""
        mask = pa.array(chosen, pa.bool_())
        table = self.table.filter(mask)
        return replace(self, table=table)

    def numbers(self, name: str) -> Floats:
        """A column of numbers, float64 (records,); null becomes NaN."""
        column = self.table[name].cast(pa.float64())
        numbers = column.to_numpy()
        return np.asarray(numbers, dtype=np.float64)

    def lists(self, name: str, length: int) -> Floats:
        """A column of lists of one length, float64 (records, length); null becomes NaN."""
        column = self.table[name]
        shape = (len(column), length)
        rows = np.full(shape, np.nan)
        # Flattening leaves out the lists that are null.
        flat = list_flatten(column).cast(pa.float64())
        values = flat.to_numpy()
        present = is_valid(column)
        rows[present.to_numpy()] = values.reshape(-1, length)
        return rows

    def lengths(self, name: str) -> Codes:
        """The lengths of the lists in a column, (records,)."""
        lengths = list_value_length(self.table[name])
        return np.asarray(lengths.to_numpy())

    def sums(self, name: str) -> Floats:
        """The sums of the lists in a column, float64 (records,)."""
        return sums(self.table, name)

    def rate(self, figure: str, hits: ArrayLike, chosen: Bools | None = None) -> Figure:
        """How many documents have a hit in any record.

        hits: bool (records,). chosen: bool (records,), the records that count; by default all.
        """
        hits = np.asarray(hits)
        documents = self.documents
        if chosen is not None:
            hits = hits[chosen]
            documents = documents[chosen]
        found = rate(hits, documents, self.population)
        return self._named(figure, found)

    def count(self, figure: str, hits: ArrayLike) -> Figure:
        """How many records have a hit. These are all records, so there is no interval."""
        hits = np.asarray(hits, dtype=bool)
        k = int(hits.sum())
        n = len(hits)
        if n == 0:
            return self._named(figure, Figure(k=0, reason="nothing to count"))
        value = k / n
        documents = np.unique(self.documents)
        found = Figure(value=value, k=k, n=n, documents=len(documents))
        return self._named(figure, found)

    def mean(
        self,
        figure: str,
        values: ArrayLike,
        counts: ArrayLike | None = None,
        bounded: bool = True,
    ) -> Figure:
        """See `mean`."""
        found = mean(values, self.documents, counts, bounded)
        return self._named(figure, found)

    def token_rate(self, figure: str, hits: ArrayLike, totals: ArrayLike) -> Figure:
        """See `token_rate`."""
        found = token_rate(hits, totals, self.documents)
        return self._named(figure, found)

    def _named(self, figure: str, found: Figure) -> Figure:
        return replace(found, split=self.split, figure=figure)


def sides_of(
    run: Run,
    table: pa.Table,
    rule: "Goldfish | None",
) -> list[Side]:
    """A side for each split that has records."""
    names = np.asarray(table["split"].to_pylist(), dtype=str)
    sides = []
    for split in SPLITS:
        in_split = pa.array(names == split)
        here = table.filter(in_split)
        if len(here):
            documents = here["document"].unique()
            population = population_of(run, split, asked=len(documents))
            side = Side(split, here, run, rule, population)
            sides.append(side)
    return sides


def sums(table: pa.Table, name: str) -> Floats:
    """The sums of the lists in a column, float64 (windows,): [[1, 2], [], [4]] -> 3, 0, 4."""
    column = table[name]
    lengths = list_value_length(column)
    flat = list_flatten(column)
    # Sums by the window of each value. Differences of one running sum would lose digits.
    count = len(table)
    windows = np.arange(count)
    window_of_value = np.repeat(windows, lengths.to_numpy())
    values = flat.to_numpy()
    totals = np.bincount(window_of_value, values, count)
    return np.asarray(totals, dtype=np.float64)


def clopper_pearson(k: float, n: float, level: float = LEVEL) -> Interval:
    """The exact interval of a binomial rate (Clopper & Pearson 1934).

    k and n need not be whole numbers.

    >>> [round(end, 4) for end in clopper_pearson(0, 368)]
    [0.0, 0.01]
    """
    tail = (1 - level) / 2
    misses = n - k
    # The tails of a binomial distribution are those of a beta distribution.
    low = 0.0
    if k > 0:
        low = betaincinv(k, misses + 1, tail)
    high = 1.0
    if misses > 0:
        high = betaincinv(k + 1, misses, 1 - tail)
    return float(low), float(high)


def hypergeometric(
    k: int,
    n: int,
    population: int,
    level: float = LEVEL,
) -> Interval:
    """The exact interval of a rate among `population` things, n of which were drawn, with k hits.

    It holds each number of hits among all things under which neither k hits or more, nor k or
    fewer, are rarer than (1 - level) / 2. If all things were drawn, both ends are k / n.

    >>> hypergeometric(0, 62, 62)
    (0.0, 0.0)
    """
    tail = (1 - level) / 2
    misses = n - k
    # From the hits that were seen to all but the misses that were seen.
    totals = range(k, population - misses + 1)

    def many_enough(total: int) -> bool:
        k_or_more = hypergeom.sf(k - 1, population, total, n)
        return bool(k_or_more > tail)

    def too_many(total: int) -> bool:
        k_or_fewer = hypergeom.cdf(k, population, total, n)
        return bool(k_or_fewer <= tail)

    # Both are false up to some total and true from there on.
    first = bisect_left(totals, True, key=many_enough)
    behind_last = bisect_left(totals, True, key=too_many)
    fewest = totals[first]
    most = totals[behind_last - 1]
    return fewest / population, most / population


def bounds(
    k: int,
    n: int,
    population: Population | None,
    level: float = LEVEL,
) -> Interval:
    """The exact interval of k of n documents, drawn from a finite population if there is one.

    The documents that could not be asked about may all be hits, or none of them.
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
        hits: bool (windows,).
        documents: int64 (windows,), the number of each window's document. By default each window is
            a document.
        population: all documents that exist; None for a sample.
    """
    hits = np.asarray(hits, dtype=bool)
    if documents is None:
        documents = np.arange(len(hits))
    # Windows of one document are one trial: together they recite it or not.
    all_documents = np.unique(documents)
    with_hit = np.unique(documents[hits])
    n = len(all_documents)
    k = len(with_hit)
    if n == 0:
        return Figure(k=0, reason="nothing to count")
    value = k / n
    low, high = bounds(k, n, population)
    return Figure(value=value, k=k, n=n, documents=n, low=low, high=high)


def mean(
    values: ArrayLike,
    documents: Codes | None = None,
    counts: ArrayLike | None = None,
    bounded: bool = True,
) -> Figure:
    """sum(values) / sum(counts): a mean over windows or tokens.

    Shares, which lie between 0 and 1, get Student's t interval over the documents and two extra
    ones, one with 0 and one with 1. For zeros and ones that is nearly the interval of Agresti and
    Coull (1998). So ten documents with 0 are no proof of 0. docs/audit-files.md has its coverage.
    Lengths and losses have no upper limit, and one recited text in a hundred moves their means, so
    they get no interval.

    Args:
        values: (windows,), for each window a value, or the sum of several.
        documents: int64 (windows,), the number of each window's document. By default each window is
            a document.
        counts: (windows,), how many values were summed; by default 1.
        bounded: whether the values lie between 0 and 1.
    """
    values = np.asarray(values, dtype=np.float64)
    if documents is None:
        documents = np.arange(len(values))
    if counts is None:
        counts = np.ones(len(values))
    counts = np.asarray(counts, dtype=np.float64)
    # A window may have nothing to count, such as no dropped token.
    present = counts > 0
    if not present.any():
        return Figure(reason="nothing to count")
    values = values[present]
    counts = counts[present]
    columns = document_sums(values, counts, documents[present])
    total, size = columns.sum(0)
    value = float(total / size)
    n = int(counts.sum())
    figure = Figure(value=value, n=n, documents=len(columns))
    if not bounded:
        return replace(figure, reason="a mean of lengths or losses has no interval")
    # The two extra documents are as long as the longest one.
    _, sizes = columns.T
    longest = sizes.max()
    extra = [[0, longest], [longest, longest]]
    with_extra = np.vstack([columns, extra])
    low, high = ratio_interval(with_extra)
    # They pull the interval towards 1/2, so it could leave out a share of 0 or 1.
    low = max(0.0, min(low, value))
    high = min(1.0, max(high, value))
    return replace(figure, low=low, high=high)


def token_rate(
    hits: ArrayLike,
    totals: ArrayLike,
    documents: Codes | None = None,
) -> Figure:
    """sum(hits) of sum(totals) tokens, from the counts of each window, with the interval of `mean`.

    hits, totals: (windows,), numbers of tokens. documents: as in `mean`.
    """
    figure = mean(hits, documents, totals)
    return replace(figure, k=int(np.sum(hits)))


def difference(values: Floats, documents: Codes) -> Figure:
    """The mean of paired differences, with Student's t interval over documents.

    values: (windows,). documents: int64 (windows,), the number of each window's document.
    """
    windows = np.ones(len(documents))
    columns = document_sums(values, windows, documents)
    value = float(np.mean(values))
    count = len(columns)
    figure = Figure(value=value, n=len(values), documents=count)
    if count < FEWEST_DOCUMENTS:
        few = counted(count, "document")
        reason = f"{few}; an interval needs {FEWEST_DOCUMENTS}"
        return replace(figure, reason=reason)
    totals, sizes = columns.T
    means = totals / sizes
    spread = np.ptp(means)
    # Rounding alone must not pass for a spread.
    if spread <= 1e-12 * abs(value):
        reason = "all documents differ by the same, so there is no interval"
        return replace(figure, reason=reason)
    low, high = ratio_interval(columns)
    return replace(figure, low=low, high=high)


def document_sums(values: Floats, counts: Floats, documents: Codes) -> Floats:
    """The sums of values and of counts, (windows,), over each document: float64 (documents, 2).

    Numbers of documents without a window are left out.
    """
    # Documents 7, 7 and 3 take the places 1, 1 and 0.
    here, place = np.unique(documents, return_inverse=True)
    number = len(here)
    totals = np.bincount(place, values, number)
    sizes = np.bincount(place, counts, number)
    return np.stack([totals, sizes], -1)


def ratio_interval(columns: Floats) -> Interval:
    """Student's t interval of the ratio of two sums over documents, from `document_sums`.

    By the usual linearization of a ratio (Cochran 1977, section 6.4).
    """
    documents = len(columns)
    freedom = documents - 1
    total, size = columns.sum(0)
    ratio = total / size
    totals, sizes = columns.T
    # What each document adds to the total beyond its share.
    residuals = totals - ratio * sizes
    squares = float(residuals @ residuals)
    variance = documents / freedom * squares
    error = math.sqrt(variance) / size
    # 2.5% of the distribution lie above.
    upper_end = (1 + LEVEL) / 2
    quantile = stdtrit(freedom, upper_end)
    margin = float(quantile) * error
    return ratio - margin, ratio + margin


def resamples(counts: Sequence[int], size: int, times: int) -> Iterator[list[Floats]]:
    """How often each document is drawn, with replacement, in `times` resamples of several groups.

    The seed is fixed.

    Args:
        counts: how many documents each group has.
        size: how many numbers the caller makes of one resample. It bounds how many come at once.

    Yields:
        for each group, float64 (resamples, documents).
    """
    generator = np.random.default_rng(0)
    at_once = max(1, CHUNK // size)
    for first in range(0, times, at_once):
        rows = min(at_once, times - first)
        groups = []
        for count in counts:
            shape = (rows, count)
            drawn = generator.integers(count, size=shape)
            # One bincount counts all rows: row i has the numbers from i * count on for itself.
            # Of 3 documents, the rows 0 2 2 and 1 1 0 become 0 2 2 4 4 3 and are counted as
            # 1 0 2 and 1 2 0.
            starts = np.arange(rows) * count
            drawn += starts[:, None]
            flat = drawn.ravel()
            often = np.bincount(flat, minlength=len(flat))
            weights = often.reshape(shape)
            groups.append(weights.astype(np.float64))
        yield groups


def percent(share: float) -> str:
    """A share such as 1.2%. 0% and 100% are exact; next to them are <0.1% and >99.9%."""
    if share in (0, 1):
        return f"{share:.0%}"
    if share < 0.0005:
        return "<0.1%"
    if share > 0.9995:
        return ">99.9%"
    number = f"{100 * share:.1f}".removesuffix(".0")
    return f"{number}%"


def decimals(value: float) -> str:
    """About three digits: 0.00123, 1.23, 12.3, 1,235."""
    size = abs(value)
    if 0 < size < 0.1:
        return f"{value:.3g}"
    if size < 10:
        return f"{value:.2f}"
    if size < 100:
        return f"{value:,.1f}"
    return f"{value:,.0f}"


def setting_name(setting: Mapping[str, Any]) -> str:
    """The name of a setting of sampling: T=0.8,top_k=40."""
    temperature = setting["temperature"]
    name = f"T={temperature:g}"
    for key in ("top_k", "top_p"):
        value = setting[key]
        if value is not None:
            name += f",{key}={value:g}"
    return name
