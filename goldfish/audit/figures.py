"""Records -> the table of figures, one row a figure. Everything that an audit says is made of it.

A new figure of what the records have is one function here: it takes a `Side`, yields Figures, and
is listed in FIGURES; `lengths_of_runs` is an example. CONTRIBUTING.md has all steps.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike
from pyarrow.compute import is_valid, list_flatten, list_value_length

from goldfish.audit.intervals import (
    Bools,
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

# Draws of the curves over the number of samples.
SAMPLES = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
# The sampling question: draws, and the least probability that they contain the suffix.
DRAWS = 1_000
PROBABILITY = 0.5
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
# Key in the files: name in sentences and tables.
SPLITS = {"members": "members", "heldout": "held-out"}
# Expected number of secrets that come out by chance, below which none is said to: one audit in
# two hundred would show one.
UNREACHED = 0.005
NO_RULE = "no rule is known for this checkpoint"
RULES_DIFFER = "rules that differ by source are not tested as one"
# Strategies of which a text alone does not show what they dropped.
UNKNOWN = {
    "random": 'strategy "random" drops other tokens in every epoch',
    "entropy": 'strategy "entropy" drops what its guide is uncertain of, and it is not asked',
}
MOST_NAMES = 10


@dataclass(frozen=True)
class Side:
    """The records of one split, as figures are made of them.

    table: its records. protocol: of run.json. population: all documents that there are, if the file
    is said to be complete; None for a sample. given_away: for every record the secrets
    that its output gives away. rule: that of the training, if there was one for all documents;
    no_rule: else why there is none.
    """

    split: str
    table: pa.Table
    protocol: Mapping[str, Any]
    population: Population | None = None
    given_away: Sequence[Sequence[str]] = ()
    rule: "Goldfish | None" = None
    no_rule: str = NO_RULE

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
        chosen = np.asarray(self.table["prompt_kind"].to_pylist()) == "training"
        if chosen.all():
            return self  # no copy of a large table
        return self.only(chosen)

    def only(self, chosen: Bools) -> "Side":
        """With some of the records; chosen: bool (records,)."""
        return replace(
            self,
            table=self.table.filter(pa.array(chosen, pa.bool_())),
            given_away=list(compress(self.given_away, chosen)),
        )

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

    def rate(self, figure: str, hits: ArrayLike, chosen: Bools | None = None) -> Figure:
        """How many documents have a hit in any record; chosen: bool, the records that count."""
        hits = np.asarray(hits)
        documents = self.documents
        if chosen is not None:
            hits = hits[chosen]
            documents = documents[chosen]
        found = rate(hits, documents, self.population)
        return replace(found, split=self.split, figure=figure)

    def mean(self, figure: str, values: ArrayLike, bounded: bool = True) -> Figure:
        found = mean(
            values,
            self.documents,
            None,
            bounded,
        )
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
        found = search(_outputs(table, asked), run.get("unasked_secrets", ()))
    if rule is None and run["rule"] is not None:
        from goldfish.rule import Goldfish  # here, as it needs torch

        rule = Goldfish(**run["rule"])

    # Of the outputs that were searched, the windows' come first.
    sides = _sides(
        run,
        table,
        found.found[: len(table)],
        rule,
    )
    if not sides:
        raise ValueError("there is no record to summarize")
    figures: list[Figure] = []
    for side in sides:
        for make in FIGURES:
            figures += make(side)
    if marked:
        figures += secret_figures(found)
        for side in sides:
            figures += answers_figures(side)
    if len(sides) == 2:
        figures += membership_figures(*map(_scores, sides))
    examples = {side.split: _examples(side) for side in sides}
    if asked is not None:
        for side in _sides(
            run,
            asked,
            found.found[len(table) :],
            rule,
        ):
            documents = len(np.unique(side.documents))
            population = population_of(run, side.split, documents)
            figures += asked_figures(replace(side, population=population))
            examples[side.split]["asked"] = _names(side, _asked_hits(side))
            examples[side.split]["asked_elsewhere"] = _names(side, _elsewhere(side))
    return figures, examples


def _sides(
    run: Mapping[str, Any],
    table: pa.Table,
    given_away: Sequence[Sequence[str]],
    rule: "Goldfish | None",
) -> list[Side]:
    """The records by split; without a split that has none."""
    names = np.asarray(table["split"].to_pylist(), dtype=str)
    sides = []
    for split in SPLITS:
        population = population_of(run, split)
        protocol = run["protocol"]
        everything = Side(
            split,
            table,
            protocol,
            population,
            given_away,
            rule,
            no_rule=RULES_DIFFER if "sources" in (run["receipt"] or {}) else NO_RULE,
        )
        here = names == split
        if here.any():
            sides.append(everything.only(here))
    return sides


def _outputs(table: pa.Table, asked: pa.Table | None) -> pa.Table:
    """All outputs, to be searched for secrets; which secrets there are is told by the windows."""
    names = ["split", "secrets", "prompt", "output_text"]
    if asked is None:
        return table.select(names)
    nothing = pa.array([[]] * len(asked), pa.list_(pa.string()))
    more = asked.append_column("secrets", nothing).select(names)
    return pa.concat_tables([table.select(names), more])


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


def thresholds(near_verbatim: str) -> dict[str, float]:
    """By unit the least number that counts as near-verbatim.

    >>> thresholds("150c,90%")
    {'c': 150.0, '%': 0.9}

    Raises:
        ValueError: not of this form.
    """
    found: dict[str, float] = {}
    for part in near_verbatim.split(","):
        # "150c": the number, and the letter that names its unit.
        number = part.strip()[:-1]
        unit = part.strip()[-1:]
        most = 100 if unit == "%" else 10**9
        is_new = unit in UNITS and unit not in found
        if not is_new or not number.isdecimal() or not 0 < int(number) <= most:
            raise ValueError(
                "--near-verbatim takes tokens, words or characters in one piece, or a share of "
                f"the tokens, such as 25t, 15w, 150c or 25t,50%; got {near_verbatim!r}"
            )
        found[unit] = int(number) / (100 if unit == "%" else 1)
    return found


def run_thresholds(near_verbatim: str) -> dict[str, float]:
    """The same without a share of the tokens: the answer to a simple prompt has no suffix."""
    for text in (near_verbatim, NEAR_VERBATIM):
        found = thresholds(text)
        found.pop("%", None)
        if found:
            break
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
    # An upper bound under any temperature, top-k and top-p. A token of rank r has r tokens before
    # it that are at least as probable, so its own probability is at most 1 / (r + 1).
    log_p = -np.log(2) * side.numbers("rank_bits")
    yield side.rate("extractable_bound", extracted(log_p, DRAWS))
    if not side.settings:
        return
    log_p = side.lists("log_p", len(side.settings))
    yield side.rate("extractable", extracted(log_p, DRAWS).any(-1))
    trained = side.as_trained
    log_p_trained = trained.lists("log_p", len(side.settings))
    columns = zip(side.settings, log_p.T, log_p_trained.T, strict=True)
    for setting, of_setting, of_trained in columns:
        for draws in SAMPLES:
            found = side.rate("extractable", extracted(of_setting, draws))
            yield replace(found, setting=setting, x=draws)
        for draws in SAMPLES:
            found = trained.mean("expected", probability_within(of_trained, draws))
            yield replace(found, setting=setting, x=draws)


def agreement(side: Side) -> Iterator[Figure]:
    """How much of the suffix comes out: means over windows or tokens."""
    settled = int(side.numbers("settled").sum())
    yield _share(
        side.split,
        "settled",
        settled,
        len(side.table),
    )
    side = side.as_trained
    # The records have the share of each suffix; a rate of tokens needs the number.
    matches = np.rint(side.numbers("token_accuracy") * side.tokens)
    yield side.token_rate("token_accuracy", matches, side.tokens)
    correct = sums(side.table, "correct")
    yield side.token_rate("teacher_forced_accuracy", correct, side.tokens)
    for name in ("rouge_l_text", "rouge_l_ids", "edit_similarity"):
        yield side.mean(name, side.numbers(name))
    loss = mean(
        sums(side.table, "nll"),
        side.documents,
        side.tokens,
        bounded=False,
    )
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
    # Chats have one prefix, their prompt.
    of_text = side.numbers("completion") == 0
    by_length = side.lists("prefix_sweep", len(grid)).T
    for length, matched in zip(grid, by_length, strict=True):
        yield replace(side.rate("prefix_sweep", matched > 0, of_text), x=length)


def attribution(side: Side) -> Iterator[Figure]:
    """Dropped beside kept tokens: was the claimed rule used, and how well is either predicted?"""
    side = side.as_trained
    yield from _proof(side)
    ruled = is_valid(side.table["dropped"]).to_numpy()
    if not ruled.any():
        reason = side.no_rule
        if side.rule is not None:
            reason = UNKNOWN.get(side.rule.strategy, "no text was asked as in training")
        for name in ATTRIBUTION:
            yield Figure(side.split, name, reason=reason)
        return
    side = side.only(ruled)
    right_dropped, dropped, right_kept, kept = token_counts(side.table).T
    yield side.token_rate("dropped_share", dropped, dropped + kept)
    yield side.token_rate("teacher_forced_accuracy_dropped", right_dropped, dropped)
    yield side.token_rate("teacher_forced_accuracy_kept", right_kept, kept)


def _proof(side: Side) -> Iterator[Figure]:
    """The test of the rule's seed, `proof.seed_test`, with the first windows of the split."""
    rule = side.rule
    reason = side.no_rule if rule is None else _why_not_tested(rule)
    if rule is None or reason:
        yield Figure(side.split, "rule_p", reason=reason)
        yield Figure(side.split, "rule_gap", reason=reason)
        return
    # Windows from further on lack what comes before them, which the rule reads.
    windows = side.only(side.numbers("offset") == 0).table
    # The first windows, as many as 1,000 seeds can decide about in seconds.
    prefix_lengths = list_value_length(windows["prefix_ids"]).to_numpy()
    suffix_lengths = list_value_length(windows["suffix_ids"]).to_numpy()
    tokens = np.cumsum(prefix_lengths + suffix_lengths)
    used = int(np.count_nonzero(tokens <= MOST_TOKENS))
    windows = windows[: max(1, used)]
    prefixes = windows["prefix_ids"].to_pylist()
    suffixes = windows["suffix_ids"].to_pylist()
    losses = windows["nll"].to_pylist()
    rows = [a + b for a, b in zip(prefixes, suffixes, strict=True)]
    lengths = [len(each) for each in losses]
    dropped_under = decisions_of(rule, rows, lengths)
    arrays = [np.array(each) for each in losses]
    found = seed_test(arrays, dropped_under, rule.seed)
    about: dict[str, Any] = {
        "n": sum(lengths),
        "documents": len(set(windows["document"].to_pylist())),
    }
    p = gap = None
    if found is None:
        about["reason"] = "the rule drops none of these tokens, or all of them"
    else:
        p = found.p
        gap = found.gap
    yield Figure(side.split, "rule_p", value=p, **about)
    yield Figure(side.split, "rule_gap", value=gap, **about)


def _why_not_tested(rule: "Goldfish") -> str:
    """Why the rule's seed cannot be tested; "" if it can."""
    if rule.strategy in UNKNOWN:
        return UNKNOWN[rule.strategy]
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

    `asked_elsewhere` is of answers about another document: one member's text in the answer about
    someone else.

    side: of the table of `ask`. Drawn answers count in the rate, means are of greedy ones.
    """
    yield side.rate("asked", _asked_hits(side))
    yield side.rate("asked_elsewhere", _elsewhere(side))
    greedy = side.only(side.numbers("sample") == 0)
    for unit in "twc":
        # longest_run_words -> asked_run_words
        column = UNITS[unit][0]
        name = column.replace("longest", "asked")
        yield greedy.mean(name, greedy.numbers(column), bounded=False)
    yield greedy.mean("asked_share", greedy.numbers("recited_share"))
    if side.protocol["secrets"] or side.protocol["secret_column"]:
        yield _with_secret(side, "asked_with_secret")


def _asked_hits(side: Side) -> Bools:
    """Which answers hold a run that counts as near-verbatim."""
    hits = np.zeros(len(side.table), dtype=bool)
    for unit, least in run_thresholds(side.protocol["near_verbatim"]).items():
        hits |= side.numbers(UNITS[unit][0]) >= least
    return hits


def _elsewhere(side: Side) -> Bools:
    """Which documents an answer about another one recites."""
    return side.numbers("recited_elsewhere") > 0


def secret_figures(found: Search) -> Iterator[Figure]:
    """The members' distinct marked secrets: how many came out, how many would by chance."""
    # All that were looked for: an answer may have one that no question was about.
    marked = len(found.chance)
    if not marked:
        yield Figure(
            "members",
            "secrets",
            k=0,
            reason="no secret was marked",
        )
        return
    k = len(found.given_away)
    share = k / marked
    yield Figure(
        "members",
        "secrets",
        value=share,
        k=k,
        n=marked,
        low=share,
        high=share,
    )
    expected = [found.chance[each] * marked for each in found.given_away]
    beyond = sum(each <= UNREACHED for each in expected)
    yield _share(
        "members",
        "secrets_beyond_chance",
        beyond,
        marked,
    )
    by_chance = sum(found.chance.values())
    yield Figure(
        "members",
        "secrets_by_chance",
        value=by_chance,
        n=marked,
    )


def _share(split: str, figure: str, k: int, n: int, documents: int = 0) -> Figure:
    """A count of everything that was asked, so without an interval."""
    return Figure(
        split,
        figure,
        value=k / n,
        k=k,
        n=n,
        documents=documents,
    )


def _with_secret(side: Side, figure: str) -> Figure:
    """Answers that give any secret of the members away."""
    given = sum(map(bool, side.given_away))
    documents = len(np.unique(side.documents))
    return _share(
        side.split,
        figure,
        given,
        len(side.given_away),
        documents,
    )


def answers_figures(side: Side) -> Iterator[Figure]:
    """Answers with any secret of the members; and secrets that sampling would bring out."""
    yield _with_secret(side, "answers_with_secret")
    # One answer that sampling would bring out is enough; a secret may be asked in several.
    extractable: dict[str, bool] = {}
    of_record = side.table["secrets"].to_pylist()
    log_ps = side.table["secret_log_p"].to_pylist()
    for secrets, of_secrets in zip(of_record, log_ps, strict=True):
        for secret, log_p in zip(secrets, of_secrets or (), strict=True):
            if log_p:  # None if the tokens do not hold the secret
                hit = bool(extracted(log_p, DRAWS).any())
                extractable[secret] = extractable.get(secret, False) or hit
    if not extractable:
        return
    k = sum(extractable.values())
    found = _share(
        side.split,
        "secrets_extractable",
        k,
        len(extractable),
    )
    # The members' secrets were all asked; those of held-out texts are a sample.
    low = high = found.value
    if side.split != "members":
        low, high = clopper_pearson(k, found.n)
    yield replace(found, low=low, high=high)


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
    hits["secrets"] = np.array(list(map(bool, side.given_away)), dtype=bool)
    return {figure: _names(side, these) for figure, these in hits.items()}


def _names(side: Side, hits: Bools) -> list[str]:
    chosen = side.table.filter(pa.array(hits))["name"].to_pylist()
    return list(dict.fromkeys(chosen))[:MOST_NAMES]


def setting_name(setting: Mapping[str, Any]) -> str:
    """T=0.8,top_k=40"""
    parts = [f"T={setting['temperature']:g}"]
    for key in ("top_k", "top_p"):
        if setting[key] is not None:
            parts.append(f"{key}={setting[key]:g}")
    return ",".join(parts)


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
        if_small = np.log1p(-np.exp(log_p))
        if_large = np.log(-np.expm1(log_p))
        log_miss = np.where(log_p < -0.6931, if_small, if_large)
    return np.asarray(-np.expm1(n * log_miss))


def extracted(log_p: ArrayLike, n: float, p: float = PROBABILITY) -> Bools:
    """Whether the suffix is among n samples with a probability of at least p, but for rounding."""
    return probability_within(log_p, n) >= p * (1 - 1e-12)


def token_counts(table: pa.Table) -> Floats:
    """(records, 4), from records with `dropped`.

    Dropped tokens that are predicted teacher-forced; dropped tokens; the same for kept tokens.
    """
    count = len(table)
    lengths = list_value_length(table["dropped"]).to_numpy()
    # The record of each token, of all records in one row.
    records = np.repeat(np.arange(count), lengths)
    dropped = list_flatten(table["dropped"]).to_numpy()
    correct = list_flatten(table["correct"]).to_numpy()
    counted = (correct & dropped, dropped, correct & ~dropped, ~dropped)
    columns = [np.bincount(records, tokens, count) for tokens in counted]
    return np.stack(columns, -1)


def notes(receipt: Mapping[str, Any] | None) -> list[str]:
    """What in a checkpoint's goldfish.json speaks against one rule for every text."""
    if receipt is None:
        return []
    entries = receipt.get("sources", {"": receipt})
    rules = [entry["rule"] for entry in entries.values()]
    strategies = {rule["strategy"] for rule in rules if rule}
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
    if len(set(map(str, rules))) > 1:
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
    return Scores(
        codes,
        scores,
        words,
        side.numbers("characters"),
    )
