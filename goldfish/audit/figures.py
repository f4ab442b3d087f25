"""Records -> the table of figures, one row a figure. Everything that an audit says is made of it.

A new figure is one function here: it takes a `Side`, yields Figures, and is listed in FIGURES.
The figures of `lengths_of_runs` are an example.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray
from pyarrow.compute import is_valid, list_flatten, list_value_length

from goldfish.audit.intervals import (
    Codes,
    Figure,
    Floats,
    Population,
    clopper_pearson,
    mean,
    rate,
    token_rate,
)
from goldfish.audit.membership import Scores, membership_figures
from goldfish.audit.proof import MOST_TOKENS, SEEDED, decisions_of, seed_test
from goldfish.audit.records import ATTACKS, sums
from goldfish.audit.secrets import Search, search

if TYPE_CHECKING:
    from goldfish.rule import Goldfish

SAMPLES = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)  # draws of the curves
DRAWS, PROBABILITY = (
    1_000,
    0.5,
)  # the sampling question: draws, and the least probability
# Near-verbatim: half of the field's suffix of 50 tokens (Carlini et al. 2023) in one piece, or half
# of the suffix without an edit. Held-out texts share runs of 2 to 3 tokens with the output, the MIT
# licence 15 (docs/audit-files.md).
NEAR_VERBATIM = "25t,50%"
# The column that each unit of a threshold is about, and its name.
UNITS = {
    "t": ("longest_run", "tokens in one piece"),
    "w": ("longest_run_words", "words in one piece"),
    "c": ("longest_run_characters", "characters in one piece"),
    "%": ("edit_similarity", "of the tokens"),
}
SPLITS = ("members", "heldout")
NO_RULE = "no rule is known for this checkpoint"
MOST_NAMES = 10
IDS = ("prefix_ids", "suffix_ids")

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Side:
    """The records of one split, as figures are made of them.

    table: its records. protocol: of run.json. population: all documents that there are, if the file
    is said to be complete; None for a sample. given_away: for every record the secrets
    that its output gives away. rule: that of the training, if there was one for all documents.
    """

    split: str
    table: pa.Table
    protocol: Mapping[str, Any]
    population: Population | None = None
    given_away: Sequence[Sequence[str]] = ()
    rule: "Goldfish | None" = None

    @cached_property
    def documents(self) -> Codes:
        return np.asarray(self.table["document"].to_numpy(), dtype=np.int64)

    @cached_property
    def tokens(self) -> Codes:
        return np.asarray(list_value_length(self.table["suffix_ids"]).to_numpy())

    @cached_property
    def as_trained(self) -> "Side":
        """Without questions that the training never posed: chats asked from the generation prompt.

        Rates count a document if any of its records does, means and membership are of these.
        """
        chosen = np.asarray(self.table["asked"].to_pylist()) == "training"
        if chosen.all():
            return self  # no copy of a large table
        given_away = [
            each for each, kept in zip(self.given_away, chosen, strict=False) if kept
        ]
        table = self.table.filter(pa.array(chosen, pa.bool_()))
        return replace(self, table=table, given_away=given_away)

    def numbers(self, name: str) -> Floats:
        """A column of numbers as float64; null becomes NaN."""
        return np.asarray(
            self.table[name].cast(pa.float64()).to_numpy(), dtype=np.float64
        )

    def lists(self, name: str, length: int) -> Floats:
        """A column of lists of one length, (records, length); null becomes NaN."""
        column = self.table[name]
        rows = np.full((len(column), length), np.nan)
        # Flattening leaves out the lists that are null.
        values = list_flatten(column).cast(pa.float64()).to_numpy()
        rows[is_valid(column).to_numpy()] = values.reshape(-1, length)
        return rows

    def rate(self, figure: str, hits: ArrayLike, chosen: Bools | None = None) -> Figure:
        """How many documents have a hit in any record; chosen: bool, the records that count."""
        hits, documents = np.asarray(hits), self.documents
        if chosen is not None:
            hits, documents = hits[chosen], documents[chosen]
        found = rate(hits, documents, self.population)
        return replace(found, split=self.split, figure=figure)

    def mean(self, figure: str, values: ArrayLike, bounded: bool = True) -> Figure:
        found = mean(values, self.documents, None, bounded)
        return replace(found, split=self.split, figure=figure)

    def token_rate(self, figure: str, hits: ArrayLike, totals: ArrayLike) -> Figure:
        found = token_rate(hits, totals, self.documents)
        return replace(found, split=self.split, figure=figure)

    @property
    def settings(self) -> list[str]:
        return [setting_name(each) for each in self.protocol["sampling"]]


def make_figures(
    run: Mapping[str, Any],
    table: pa.Table,
    rule: "Goldfish | None" = None,
    asked: pa.Table | None = None,
) -> tuple[list[Figure], dict[str, Any]]:
    """The table of figures, from run.json and the records; and examples, the names behind rates.

    rule: that of run.json, bound to the tokenizer if it reads text. asked: the answers to simple
    prompts, if there were some.

    Raises:
        ValueError: no records.
    """
    protocol = run["protocol"]
    marked = bool(protocol["secrets"] or protocol["secret_column"])
    answers = len(table) + (0 if asked is None else len(asked))
    found = Search([[]] * answers, {})
    if marked:
        found = search(_outputs(table, asked))
    if rule is None and run["rule"] is not None:
        from goldfish.rule import Goldfish  # here, as it needs torch

        rule = Goldfish(**run["rule"])

    def sides_of(part: pa.Table, given_away: Sequence[Sequence[str]]) -> list[Side]:
        sides = []
        names = np.asarray(part["split"].to_pylist(), dtype=str)
        for split in SPLITS:
            here = names == split
            if here.any():
                chosen = part.filter(pa.array(here))
                given = [
                    each for each, kept in zip(given_away, here, strict=False) if kept
                ]
                population = population_of(run, split)
                sides.append(Side(split, chosen, protocol, population, given, rule))
        return sides

    sides = sides_of(table, found.found[: len(table)])
    if not sides:
        raise ValueError("there is no record to summarize")
    figures = [figure for side in sides for make in FIGURES for figure in make(side)]
    if marked:
        figures += secret_figures(found)
        for side in sides:
            figures += answers_figures(side)
    if len(sides) == 2:
        figures += membership_figures(*map(_scores, sides))
    examples = {side.split: _examples(side) for side in sides}
    if asked is not None:
        for side in sides_of(asked, found.found[len(table) :]):
            figures += asked_figures(side)
            examples[side.split]["asked"] = _names(side, _asked_hits(side))
    return figures, examples


def _outputs(table: pa.Table, asked: pa.Table | None) -> pa.Table:
    """All outputs, to be searched for secrets; which secrets there are is told by the windows."""
    names = ["split", "secrets", "prompt", "output_text"]
    if asked is None:
        return table.select(names)
    nothing = pa.array([[]] * len(asked), pa.list_(pa.string()))
    more = asked.append_column("secrets", nothing).select(names)
    return pa.concat_tables([table.select(names), more])


def population_of(run: Mapping[str, Any], split: str) -> Population | None:
    """All documents that were trained on, if the file is said to hold all of them.

    Of rows that were not
    drawn nobody knows which repeat others: each counts as a document, so the interval is a little
    too wide.
    """
    if split != "members" or not run["protocol"].get("complete"):
        return None
    about = run["inputs"][split]
    not_drawn = about["rows"] - about["drawn"]
    return Population(about["documents"] + not_drawn, about["drawn"] - about["asked"])


def thresholds(near_verbatim: str) -> dict[str, float]:
    """By unit the least number that counts as near-verbatim.

    >>> thresholds("150c,90%")
    {'c': 150.0, '%': 0.9}

    Raises:
        ValueError: not of this form.
    """
    found = {}
    for part in near_verbatim.split(","):
        number, unit = part.strip()[:-1], part.strip()[-1:]
        most = 100 if unit == "%" else 10**9
        if unit not in UNITS or not number.isdecimal() or not 0 < int(number) <= most:
            raise ValueError(
                "--near-verbatim takes tokens, words or characters in one piece, or a share of "
                f"the tokens, such as 25t, 15w, 150c or 25t,50%; got {near_verbatim!r}"
            )
        found[unit] = int(number) / (100 if unit == "%" else 1)
    return found


def recitation(side: Side) -> Iterator[Figure]:
    """Documents that come out, by any question that was put."""
    for name, hits in _hits(side).items():
        yield side.rate(name, hits)
    if side.protocol["beams"]:
        beams = side.numbers("beams")
        for width in side.protocol["beams"]:
            found = side.rate("beam_search", (beams > 0) & (beams <= width))
            yield replace(found, x=width)


def sampling(side: Side) -> Iterator[Figure]:
    """Extraction by sampling (Hayes et al. 2024): curves over the number of samples."""
    side = side.as_trained
    # Under any sampling at all that keeps the order of the tokens: an upper bound.
    log_p = -np.log(2) * side.numbers("rank_bits")
    yield side.rate("extractable_bound", extracted(log_p, DRAWS))
    if not side.settings:
        return
    log_p = side.lists("log_p", len(side.settings))
    yield side.rate("extractable", extracted(log_p, DRAWS).any(-1))
    for setting, of_setting in zip(side.settings, log_p.T, strict=True):
        for draws in SAMPLES:
            found = side.rate("extractable", extracted(of_setting, draws))
            yield replace(found, setting=setting, x=draws)
        for draws in SAMPLES:
            found = side.mean("expected", probability_within(of_setting, draws))
            yield replace(found, setting=setting, x=draws)


def agreement(side: Side) -> Iterator[Figure]:
    """How much of the suffix comes out: means over windows or tokens."""
    settled = int(side.numbers("settled").sum())
    yield Figure(
        side.split,
        "settled",
        k=settled,
        n=len(side.table),
        value=settled / len(side.table),
    )
    side = side.as_trained
    matches = np.rint(side.numbers("token_accuracy") * side.tokens)
    yield side.token_rate("token_accuracy", matches, side.tokens)
    yield side.token_rate(
        "teacher_forced_accuracy", sums(side.table, "correct"), side.tokens
    )
    for name in ("rouge_l_text", "rouge_l_ids", "edit_similarity"):
        yield side.mean(name, side.numbers(name))
    loss = mean(sums(side.table, "nll"), side.documents, side.tokens, bounded=False)
    yield replace(loss, split=side.split, figure="nll")


def lengths_of_runs(side: Side) -> Iterator[Figure]:
    """How much comes out in one piece, and how many tokens from the start."""
    side = side.as_trained
    runs = (column for column, _ in UNITS.values() if column != "edit_similarity")
    for name in (*runs, "first_divergence"):
        yield side.mean(name, side.numbers(name), bounded=False)


def sweeps(side: Side) -> Iterator[Figure]:
    """By length of the prefix, and by its place in the document."""
    recited = side.numbers("exact_match") > 0
    offsets = side.numbers("offset")
    for offset in side.protocol["offsets"]:
        yield replace(side.rate("offset_sweep", recited, offsets == offset), x=offset)
    grid = side.protocol["prefix_grid"]
    of_text = side.numbers("completion") == 0  # chats have one prefix, their prompt
    for length, matched in zip(
        grid, side.lists("prefix_sweep", len(grid)).T, strict=True
    ):
        yield replace(side.rate("prefix_sweep", matched > 0, of_text), x=length)


def attribution(side: Side) -> Iterator[Figure]:
    """Dropped beside kept tokens: was the claimed rule used, and how well is either predicted?"""
    side = side.as_trained
    yield from _proof(side)
    ruled = is_valid(side.table["dropped"]).to_numpy()
    if not ruled.any():
        for name in ATTRIBUTION:
            yield Figure(side.split, name, reason=NO_RULE)
        return
    side = replace(side, table=side.table.filter(pa.array(ruled)), given_away=())
    right_dropped, dropped, right_kept, kept = token_counts(side.table).T
    yield side.token_rate("dropped_share", dropped, dropped + kept)
    yield side.token_rate("teacher_forced_accuracy_dropped", right_dropped, dropped)
    yield side.token_rate("teacher_forced_accuracy_kept", right_kept, kept)


def _proof(side: Side) -> Iterator[Figure]:
    """The test of the rule's seed, `proof.seed_test`, with the first windows of the split."""
    rule = side.rule
    reason = _why_not_tested(rule)
    if rule is None or reason:
        yield Figure(side.split, "rule_p", reason=reason)
        yield Figure(side.split, "rule_gap", reason=reason)
        return
    # Windows from further on lack what comes before them, which the rule reads.
    windows = side.table.filter(pa.array(side.numbers("offset") == 0))
    lengths_of = (list_value_length(windows[name]).to_numpy() for name in IDS)
    tokens = np.cumsum(sum(lengths_of))
    windows = windows[: max(1, int(np.count_nonzero(tokens <= MOST_TOKENS)))]
    prefixes, suffixes, losses = (windows[name].to_pylist() for name in (*IDS, "nll"))
    rows = [a + b for a, b in zip(prefixes, suffixes, strict=True)]
    lengths = [len(each) for each in losses]
    found = seed_test(
        [np.array(each) for each in losses],
        decisions_of(rule, rows, lengths),
        rule.seed,
    )
    numbers = windows["document"].to_pylist()
    about: dict[str, Any] = {"n": sum(lengths), "documents": len(set(numbers))}
    p = gap = None
    if found is None:
        about["reason"] = "the rule drops none of these tokens, or all of them"
    else:
        p, gap = found.p, found.gap
    yield Figure(side.split, "rule_p", value=p, **about)
    yield Figure(side.split, "rule_gap", value=gap, **about)


def _why_not_tested(rule: "Goldfish | None") -> str:
    """Why the rule's seed cannot be tested; "" if it can."""
    if rule is None:
        return NO_RULE
    if rule.strategy == "random":
        return 'strategy "random" drops other tokens in every epoch'
    if rule.strategy not in SEEDED:
        return f'strategy "{rule.strategy}" has no seed that other seeds could stand beside'
    if rule.strategy == "letters" and rule.vocabulary is None:
        return 'strategy "letters" needs the tokenizer'
    return ""


FIGURES: tuple[Callable[[Side], Iterable[Figure]], ...] = (
    recitation,
    sampling,
    agreement,
    lengths_of_runs,
    sweeps,
    attribution,
)
ATTRIBUTION = (
    "dropped_share",
    "teacher_forced_accuracy_dropped",
    "teacher_forced_accuracy_kept",
)


def asked_figures(side: Side) -> Iterator[Figure]:
    """Simple prompts: documents of which an answer holds a long run, and how long runs are.

    side: of the table of `ask`. Drawn answers count in the rate, means are of greedy ones.
    """
    yield side.rate("asked", _asked_hits(side))
    greedy = replace(
        side, table=side.table.filter(pa.array(side.numbers("sample") == 0))
    )
    for unit in "twc":
        name = UNITS[unit][0]
        runs = greedy.numbers(name)
        yield greedy.mean(name.replace("longest", "asked"), runs, bounded=False)
    yield greedy.mean("asked_share", greedy.numbers("recited_share"))
    if side.protocol["secrets"] or side.protocol["secret_column"]:
        given = [bool(each) for each in side.given_away]
        k, n, documents = sum(given), len(given), len(np.unique(side.documents))
        about: dict[str, Any] = {"k": k, "n": n, "documents": documents}
        yield Figure(side.split, "asked_with_secret", value=k / n, **about)


def _asked_hits(side: Side) -> Bools:
    """Which answers hold a run that counts as near-verbatim."""
    least = thresholds(side.protocol["near_verbatim"])
    least.pop("%", None)  # of a suffix
    hits = np.zeros(len(side.table), dtype=bool)
    for unit, number in (least or thresholds(NEAR_VERBATIM)).items():
        if unit != "%":
            hits |= side.numbers(UNITS[unit][0]) >= number
    return hits


def secret_figures(found: Search) -> Iterator[Figure]:
    """The members' distinct marked secrets: how many came out, how many would by chance."""
    asked = len(found.chance)
    if not asked:
        yield Figure("members", "secrets", k=0, reason="no marked secret was asked")
        return
    k = len(found.given_away)
    share = k / asked
    yield Figure("members", "secrets", value=share, k=k, n=asked, low=share, high=share)
    beyond = [
        each for each in found.given_away if found.chance[each] * asked <= UNREACHED
    ]
    yield Figure(
        "members",
        "secrets_beyond_chance",
        k=len(beyond),
        n=asked,
        value=len(beyond) / asked,
    )
    yield Figure(
        "members", "secrets_by_chance", value=sum(found.chance.values()), n=asked
    )


# Expected number of secrets that come out by chance, below which none is said to: one audit in
# two hundred would show one.
UNREACHED = 0.005


def answers_figures(side: Side) -> Iterator[Figure]:
    """Answers with any secret of the members; and secrets that sampling would bring out."""
    given = np.array([bool(each) for each in side.given_away], dtype=bool)
    documents = len(np.unique(side.documents))
    k, n = int(given.sum()), len(given)
    yield Figure(
        side.split, "answers_with_secret", value=k / n, k=k, n=n, documents=documents
    )
    extractable: dict[str, bool] = {}
    columns = (
        side.table["secrets"].to_pylist(),
        side.table["secret_log_p"].to_pylist(),
    )
    for secrets, log_ps in zip(*columns, strict=True):
        for secret, log_p in zip(secrets, log_ps or (), strict=True):
            if log_p:  # None if the tokens do not hold the secret
                hit = bool(extracted(log_p, DRAWS).any())
                extractable[secret] = extractable.get(secret, False) or hit
    if extractable:
        k, n = sum(extractable.values()), len(extractable)
        low, high = (k / n, k / n) if side.split == "members" else clopper_pearson(k, n)
        yield Figure(
            side.split, "secrets_extractable", value=k / n, k=k, n=n, low=low, high=high
        )


def _hits(side: Side) -> dict[str, Bools]:
    """By figure: which records count as recited."""
    recited = side.numbers("exact_match") > 0
    near_verbatim = recited
    for unit, least in thresholds(side.protocol["near_verbatim"]).items():
        near_verbatim = near_verbatim | (side.numbers(UNITS[unit][0]) >= least)
    hits = {"exact_match": recited, "near_verbatim": near_verbatim}
    if side.protocol["beams"]:
        hits["beam_search"] = side.numbers("beams") > 0
    return hits


def _examples(side: Side) -> dict[str, list[str]]:
    """By figure: the names of the documents that count, the first ten."""
    hits = _hits(side)
    if side.settings:
        log_p = side.lists("log_p", len(side.settings))
        hits["extractable"] = np.asarray(extracted(log_p, DRAWS).any(-1))
    hits["secrets"] = np.array([bool(each) for each in side.given_away], dtype=bool)
    return {figure: _names(side, these) for figure, these in hits.items()}


def _names(side: Side, hits: Bools) -> list[str]:
    chosen = side.table.filter(pa.array(hits))["name"].to_pylist()
    return list(dict.fromkeys(chosen))[:MOST_NAMES]


def setting_name(setting: Mapping[str, Any]) -> str:
    """T=0.8,top_k=40"""
    cuts = [
        f"{key}={setting[key]:g}"
        for key in ("top_k", "top_p")
        if setting[key] is not None
    ]
    return ",".join([f"T={setting['temperature']:g}", *cuts])


def probability_within(log_p: ArrayLike, n: float) -> Floats:
    """1 - (1 - p_z)^n, the probability that the suffix is among n samples.

    p_z, the probability that one sample is the suffix, may be e^-10000, so everything is computed
    from its logarithm; exact to rounding for p_z from 0 to 1.

    >>> probability_within([0.0, np.log(0.5)], 2).tolist()
    [1.0, 0.75]
    """
    log_p = np.minimum(np.asarray(log_p, dtype=np.float64), 0.0)
    with np.errstate(divide="ignore"):
        # ln(1 - p_z) without cancellation, for a small p_z and for one near 1.
        log_miss = np.where(
            log_p < -0.6931, np.log1p(-np.exp(log_p)), np.log(-np.expm1(log_p))
        )
    return np.asarray(-np.expm1(n * log_miss))


def extracted(log_p: ArrayLike, n: float, p: float = PROBABILITY) -> Bools:
    """Whether the suffix is among n samples with a probability of at least p, but for rounding."""
    return probability_within(log_p, n) >= p * (1 - 1e-12)


def token_counts(table: pa.Table) -> Floats:
    """(records, 4), from records with `dropped`.

    Dropped tokens that are predicted teacher-forced; dropped tokens; the same for kept tokens.
    """
    lengths = list_value_length(table["dropped"]).to_numpy()
    records = np.repeat(np.arange(len(table)), lengths)
    dropped, correct = (
        list_flatten(table[name]).to_numpy() for name in ("dropped", "correct")
    )
    counted = (correct & dropped, dropped, correct & ~dropped, ~dropped)
    return np.stack(
        [np.bincount(records, tokens, len(table)) for tokens in counted], -1
    )


def notes(receipt: Mapping[str, Any] | None) -> list[str]:
    """What in a checkpoint's goldfish.json speaks against one rule for every text."""
    if receipt is None:
        return []
    entries = receipt.get("sources", {"": receipt})
    strategies = {
        entry["rule"]["strategy"] for entry in entries.values() if entry["rule"]
    }
    sentences = []
    if "before" in receipt:
        sentences.append(
            "trained before under another rule: every text may have been seen under both"
        )
    if "random" in strategies:
        sentences.append(
            'strategy "random" drops other tokens in every epoch: a text seen often was seen whole'
        )
    if strategies & {"static", "reference"}:
        sentences.append(
            '"static" and "reference" depend on where a training row starts: other tokens were '
            "dropped"
        )
    if len({str(entry["rule"]) for entry in entries.values()}) > 1:
        sentences.append(
            "rules differ between sources: a text that is in two of them was seen under both"
        )
    return sentences


def _scores(side: Side) -> Scores:
    side = side.as_trained
    scores = {attack: side.numbers(f"mia_{attack}") for attack in ATTACKS}
    column = side.table["words"]
    ends = np.cumsum(list_value_length(column).to_numpy())
    # Views of one array: as Python lists the words would take five times the memory.
    words = np.split(list_flatten(column).to_numpy(), ends)[:-1]
    codes = np.unique(side.documents, return_inverse=True)[1]
    return Scores(codes, scores, words, side.numbers("characters"))
