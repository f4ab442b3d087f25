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
    Floats,
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
Examples = dict[str, dict[str, list[str]]]  # by split and figure: names of documents


def make_figures(
    run: Mapping[str, Any],
    table: pa.Table,
    rule: "Goldfish | None" = None,
    asked: pa.Table | None = None,
) -> tuple[list[Figure], Examples]:
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
    examples: Examples = {}
    sides = sides_of(run, table, rule)
    if not sides:
        raise ValueError("there is no record to summarize")
    for side in sides:
        for make in FIGURES:
            figures += make(side)
        examples[side.split] = _names(side, _hits(side))
    answers = [] if asked is None else sides_of(run, asked, rule)
    figures += _of_other_questions(sides, answers, found, examples)
    return figures, examples


def _of_other_questions(
    sides: list[Side],
    answers: list[Side],
    found: secrets.Search | None,
    examples: Examples,
) -> Iterator[Figure]:
    """What an audit may ask besides recitation; `examples` get names.

    answers: to simple prompts, by split. found: None if no secrets are marked.
    """
    if found is not None:
        # Secrets of held-out texts are decoys: without members there is none to come out.
        if "members" in examples:
            yield from secrets.figures(found)
        for side in sides:
            yield from secrets.answers(side)
            examples[side.split] |= _names(side, secrets.hits(side))
    if len(sides) == 2:
        scores = map(membership.scores_of, sides)
        yield from membership.figures(*scores)
    for side in answers:
        yield from ask.figures(side)
        examples[side.split] |= _names(side, ask.hits(side))


def recitation(side: Side) -> Iterator[Figure]:
    """Documents that come out, by any question that was put."""
    for name, hits in _hits(side).items():
        yield side.rate(name, hits)
    if not side.protocol["beams"]:
        return
    # The least number of beams that recites a window; 0 if none does.
    beams = side.numbers("beams")
    for width in side.protocol["beams"]:
        is_recited = (beams > 0) & (beams <= width)
        found = side.rate("beam_search", is_recited)
        yield replace(found, x=width)


def sampling(side: Side) -> Iterator[Figure]:
    """Extraction by sampling (Hayes et al. 2024): curves over the number of samples."""
    # An upper bound under any temperature, top-k and top-p. A token of rank r has r tokens before
    # it that are at least as probable, so its own probability is at most 1 / (r + 1).
    most = -np.log(2) * side.numbers("rank_bits")
    yield side.rate("extractable_bound", extracted(most, DRAWS))
    if not side.settings:
        return
    trained = side.as_trained
    log_p = _log_p(side)
    log_p_trained = _log_p(trained)
    for place, setting in enumerate(side.settings):
        for draws in SAMPLES:
            hits = extracted(log_p[:, place], draws)
            found = side.rate("extractable", hits)
            yield replace(found, setting=setting, x=draws)
        for draws in SAMPLES:
            chances = probability_within(log_p_trained[:, place], draws)
            found = trained.mean("expected", chances)
            yield replace(found, setting=setting, x=draws)


def _log_p(side: Side) -> Floats:
    """(records, settings): ln of the probability of drawing each suffix."""
    return side.lists("log_p", len(side.settings))


def agreement(side: Side) -> Iterator[Figure]:
    """How much of the suffix comes out: means over windows or tokens."""
    settled = side.numbers("settled") > 0
    yield side.count("settled", settled)
    side = side.as_trained
    tokens = side.lengths("suffix_ids")
    # The records have the share of each suffix; a rate of tokens needs the number.
    matches = np.rint(side.numbers("token_accuracy") * tokens)
    yield side.token_rate("token_accuracy", matches, tokens)
    correct = side.sums("correct")
    yield side.token_rate("teacher_forced_accuracy", correct, tokens)
    for name in ("rouge_l_text", "rouge_l_ids", "edit_similarity"):
        values = side.numbers(name)
        yield side.mean(name, values)
    losses = side.sums("nll")
    yield side.mean("nll", losses, tokens, bounded=False)


def lengths_of_runs(side: Side) -> Iterator[Figure]:
    """How much comes out in one piece, and how many tokens from the start."""
    side = side.as_trained
    # A run has a length in each unit but a share of tokens.
    runs = [UNITS[unit][0] for unit in "twc"]
    for name in [*runs, "first_divergence"]:
        lengths = side.numbers(name)
        yield side.mean(name, lengths, bounded=False)


def sweeps(side: Side) -> Iterator[Figure]:
    """By length of the prefix, and by its place in the document."""
    recited = side.numbers("exact_match") > 0
    offsets = side.numbers("offset")
    for offset in side.protocol["offsets"]:
        found = side.rate("offset_sweep", recited, offsets == offset)
        yield replace(found, x=offset)
    grid = side.protocol["prefix_grid"]
    # Chats have one prefix, their prompt.
    of_text = side.numbers("completion") == 0
    matched = side.lists("prefix_sweep", len(grid)) > 0
    for place, length in enumerate(grid):
        found = side.rate("prefix_sweep", matched[:, place], of_text)
        yield replace(found, x=length)


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
    # One threshold that is met is enough.
    for unit, least in thresholds(side.protocol["near_verbatim"]).items():
        column, _ = UNITS[unit]
        is_near = side.numbers(column) >= least
        near_verbatim = near_verbatim | is_near
    hits = {
        "exact_match": recited,
        "near_verbatim": near_verbatim,
    }
    if side.protocol["beams"]:
        hits["beam_search"] = side.numbers("beams") > 0
    if side.settings:
        # By any of the adversaries who sample.
        by_setting = extracted(_log_p(side), DRAWS)
        hits["extractable"] = np.asarray(by_setting.any(-1))
    return hits


def _names(side: Side, hits: Mapping[str, Bools]) -> dict[str, list[str]]:
    """By figure: the names of the documents that count, the first ten."""
    names = {}
    for figure, these in hits.items():
        recited = side.table.filter(pa.array(these))
        chosen = recited["name"].to_pylist()
        distinct = list(dict.fromkeys(chosen))
        names[figure] = distinct[:MOST_NAMES]
    return names
