"""Records -> the table of figures, one row a figure. Everything that an audit says is made of it.

A new figure of what the records have is one function here: it takes a `Side`, yields Figures, and
is listed in FIGURES; `lengths_of_runs` is an example. CONTRIBUTING.md has all steps.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from goldfish.audit.intervals import (
    Bools,
    Figure,
    Side,
    sides_of,
)
from goldfish.audit.questions import ask, membership, proof, secrets
from goldfish.audit.records import (
    DRAWS,
    UNITS,
    extracted,
    probability_within,
    thresholds,
)

if TYPE_CHECKING:
    from goldfish.rule import Goldfish

# Draws of the curves over the number of samples.
SAMPLES = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
MOST_NAMES = 10


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
    if rule is None and run["rule"] is not None:
        from goldfish.rule import Goldfish  # here, as it needs torch

        rule = Goldfish(**run["rule"])
    found = None
    protocol = run["protocol"]
    if protocol["secrets"] or protocol["secret_column"]:
        found, table, asked = secrets.searched(run, table, asked)
    figures: list[Figure] = []
    examples: dict[str, dict[str, list[str]]] = {}
    sides = sides_of(run, table, rule)
    if not sides:
        raise ValueError("there is no record to summarize")
    for side in sides:
        for make in FIGURES:
            figures += make(side)
        examples[side.split] = _names(side, _hits(side))
    if found is not None:
        figures += secrets.figures(found)
        for side in sides:
            figures += secrets.answers(side)
            examples[side.split] |= _names(side, secrets.hits(side))
    if len(sides) == 2:
        figures += membership.figures(*map(membership.scores_of, sides))
    if asked is not None:
        for side in sides_of(run, asked, rule):
            figures += ask.figures(side)
            examples[side.split] |= _names(side, ask.hits(side))
    return figures, examples


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
    yield side.count("settled", side.numbers("settled") > 0)
    side = side.as_trained
    tokens = side.lengths("suffix_ids")
    # The records have the share of each suffix; a rate of tokens needs the number.
    matches = np.rint(side.numbers("token_accuracy") * tokens)
    yield side.token_rate("token_accuracy", matches, tokens)
    yield side.token_rate("teacher_forced_accuracy", side.sums("correct"), tokens)
    for name in ("rouge_l_text", "rouge_l_ids", "edit_similarity"):
        yield side.mean(name, side.numbers(name))
    yield side.mean("nll", side.sums("nll"), tokens, bounded=False)


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


FIGURES: tuple[Callable[[Side], Iterable[Figure]], ...] = (
    recitation,
    sampling,
    agreement,
    lengths_of_runs,
    sweeps,
    proof.figures,
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
    if side.settings:
        log_p = side.lists("log_p", len(side.settings))
        hits["extractable"] = np.asarray(extracted(log_p, DRAWS).any(-1))
    return hits


def _names(side: Side, hits: Mapping[str, Bools]) -> dict[str, list[str]]:
    """By figure: the names of the documents that count, the first ten."""
    names = {}
    for figure, these in hits.items():
        chosen = side.table.filter(pa.array(these))["name"].to_pylist()
        names[figure] = list(dict.fromkeys(chosen))[:MOST_NAMES]
    return names
