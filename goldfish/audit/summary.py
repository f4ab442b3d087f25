"""Records and run.json of an audit -> summary.json: every estimate and the verdict."""

from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow.compute import is_valid, list_value_length

from goldfish.audit.attribution import attribution_figures, notes, token_counts
from goldfish.audit.estimate import Codes, Floats, mean, rate, token_rate
from goldfish.audit.leaks import Answer, SecretsFound, find_secrets
from goldfish.audit.membership import Side, membership_figures
from goldfish.audit.records import ATTACKS, read_records, read_run, sums
from goldfish.audit.sampling import extracted, sampling_figures, setting_name
from goldfish.audit.verdict import RUN, SAMPLES, SIMILARITY, is_census, parse_limits, verdict

SCORES = [f"mia_{attack}" for attack in ATTACKS]
COLUMNS = [
    "split",
    "document",
    "name",
    "offset",
    "asked",
    "suffix_ids",
    "prefix_sweep",
    "settled",
    "exact_match",
    "token_accuracy",
    "correct",
    "nll",
    "dropped",
    "rouge_l_text",
    "rouge_l_ids",
    "longest_run",
    "completion",
    "secrets",
    "output_text",
    "prompt",
    "edit_similarity",
    "first_divergence",
    "log_p",
    "rank_bits",
    "beams",
    "characters",
    "words",
    *SCORES,
]
ABOUT = (
    "schema",
    "name",
    "checkpoint",
    "date",
    "command",
    "rule",
    "versions",
    "inputs",
    "weights",
    "protocol",
)


def summarize(
    folder: str | Path, limits: Sequence[str] = (), require: Sequence[str] = ()
) -> dict[str, Any]:
    """The whole of summary.json, with Estimates in it, from a folder's run.json and records; errors as of `read_records`."""
    return summary_of(read_run(folder), read_records(folder, COLUMNS), limits, require)


def summary_of(
    run: Mapping[str, Any], table: pa.Table, limits: Sequence[str] = (), require: Sequence[str] = ()
) -> dict[str, Any]:
    """The same, from their content, a table with COLUMNS in any order; docs/audit-files.md describes every key."""
    names = np.asarray(table["split"].to_pylist(), dtype=str)
    tables = {
        split: table.filter(pa.array(names == split))
        for split in ("members", "heldout")
        if split in names
    }
    if not tables:
        raise ValueError("there is no record to summarize")
    found = _secrets_of(run["protocol"], table)
    summary = {
        **{key: run[key] for key in ABOUT},
        "overlap": run.get("overlap"),
        "sanity": run.get("sanity"),
        "secrets": None if found is None else found.counts(),
        "splits": {
            split: split_figures(run, split, rows, _answers_with(found, names == split))
            for split, rows in tables.items()
        },
        "membership": membership_figures(*(_side(_as_trained(rows)) for rows in tables.values()))
        if len(tables) == 2
        else None,
    }
    return {**summary, "verdict": verdict(summary, parse_limits(limits), require)}


def _secrets_of(protocol: Mapping[str, Any], table: pa.Table) -> SecretsFound | None:
    """The members' secrets in every output; None if none was marked."""
    if not (protocol["secrets"] or protocol["secret_column"]):
        return None
    columns = [table[name].to_pylist() for name in ("split", "prompt", "output_text", "secrets")]
    rows = list(zip(*columns, strict=True))
    answers = [
        Answer(i, split, prompt, output) for i, (split, prompt, output, _) in enumerate(rows)
    ]
    marked = [secret for split, _, _, each in rows if split == "members" for secret in each or ()]
    return find_secrets(marked, answers)


def _answers_with(found: SecretsFound | None, here: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    """Of the rows of one split, those whose outputs give a secret away; None if none was marked."""
    if found is None:
        return None
    hits = np.zeros(len(here), dtype=bool)
    hits[found.rows()] = True
    return hits[here]


def split_figures(
    run: Mapping[str, Any],
    split: str,
    table: pa.Table,
    gave_secret_away: NDArray[np.bool_] | None = None,
) -> dict[str, Any]:
    """One split of the summary. Rates count documents, and a document counts if any row of it does.

    Means, accuracies and sampling are about the rows that were asked as in training: a chat that was
    asked from its generation prompt too is not counted twice.

    Args:
        table: records of the split; without rows it gets the same names. gave_secret_away: bool
            (rows,), whether an output gives a secret away; None if none was marked.
    """
    hits = _hits(run["protocol"], table)
    if gave_secret_away is not None:
        hits["secrets"] = gave_secret_away
    census = split == "members" and is_census(run["protocol"])
    unasked = unasked_of(run, split) if census else None
    documents = _documents(table)
    training = _as_trained(table)
    return {
        "n": len(training),
        "documents": len(np.unique(documents)),
        "skipped": unasked_of(run, split),
        "settled": int(_numbers(table, "settled").sum()),
        "recited": {name: _names(table, these) for name, these in hits.items()},
        **{name: rate(these, documents, unasked) for name, these in hits.items()},
        **_mean_figures(run, training),
        **_sweep_figures(run["protocol"], training),
    }


def _as_trained(table: pa.Table) -> pa.Table:
    """The rows that were asked from the exact prefix of the training rendering."""
    asked = table["asked"].to_numpy(zero_copy_only=False)
    return table.filter(pa.array(asked == "training"))


def _hits(protocol: Mapping[str, Any], table: pa.Table) -> dict[str, NDArray[np.bool_]]:
    """For each question of the verdict the rows that count, bool (rows,)."""
    recited = _numbers(table, "exact_match") > 0
    long_run = _numbers(table, "longest_run") >= RUN
    similar = _numbers(table, "edit_similarity") >= SIMILARITY
    hits = {"exact_match": recited, "near_verbatim": long_run | similar | recited}
    if protocol["sampling"]:
        log_p = _lists(table, "log_p", len(protocol["sampling"]))
        # Probabilities are of the text after the prompt that it was trained with.
        asked = np.asarray(table["asked"].to_pylist(), dtype=str)
        log_p[asked != "training"] = -np.inf
        hits["extractable"] = np.asarray(extracted(log_p, *SAMPLES).any(-1))
    if protocol["beams"]:
        hits["beam_search"] = _numbers(table, "beams") > 0
    return hits


def _mean_figures(run: Mapping[str, Any], table: pa.Table) -> dict[str, Any]:
    """Accuracies, losses and similarities, and what sampling would draw."""
    protocol, documents = run["protocol"], _documents(table)
    tokens = list_value_length(table["suffix_ids"]).to_numpy()
    bound = extracted(-np.log(2) * _numbers(table, "rank_bits"), *SAMPLES)
    log_p = _lists(table, "log_p", len(protocol["sampling"]))
    nll, matches = sums(table, "nll"), np.rint(_numbers(table, "token_accuracy") * tokens)
    # A loss has no upper bound; that of a uniform guess is far above any text's under a model that works.
    greatest = {"nll": max(log(protocol["vocabulary"]), (nll / tokens).max(initial=0))}
    greatest |= dict.fromkeys(("longest_run", "first_divergence"), tokens.max(initial=0))
    figures = {
        "extractable_bound": rate(bound, documents),
        "token_accuracy": token_rate(matches, tokens, documents),
        "teacher_forced_accuracy": token_rate(sums(table, "correct"), tokens, documents),
        **_rule_figures(run, table, documents),
        "nll": mean(nll, documents, tokens, (0.0, greatest["nll"])),
    }
    for name in (
        "rouge_l_text",
        "rouge_l_ids",
        "longest_run",
        "edit_similarity",
        "first_divergence",
    ):
        bounds = (0.0, greatest.get(name, 1.0))
        figures[name] = mean(_numbers(table, name), documents, bounds=bounds)
    for i, setting in enumerate(protocol["sampling"]):
        for name, figure in sampling_figures(log_p[:, i], documents).items():
            figures[f"{name},{setting_name(setting)}" if i else name] = figure
    return figures


def _sweep_figures(protocol: Mapping[str, Any], table: pa.Table) -> dict[str, Any]:
    """Exact match by prefix length (of texts), by offset and by beam width."""
    documents, recited = _documents(table), _numbers(table, "exact_match") > 0
    of_text = _numbers(table, "completion") == 0
    texts = table.filter(pa.array(of_text))
    sweep = _lists(texts, "prefix_sweep", len(protocol["prefix_grid"]))
    offsets, beams = _numbers(table, "offset"), _numbers(table, "beams")
    figures = {}
    for length, matched in zip(protocol["prefix_grid"], sweep.T, strict=True):
        figures[f"prefix_sweep@{length}"] = rate(matched, documents[of_text])
    for offset in protocol["offsets"]:
        here = offsets == offset
        figures[f"offset_sweep@{offset}"] = rate(recited[here], documents[here])
    for width in protocol["beams"] or ():
        figures[f"beam_search@{width}"] = rate((beams > 0) & (beams <= width), documents)
    return figures


def unasked_of(run: Mapping[str, Any], split: str) -> int:
    """How many rows, or turns of chats, could not be asked."""
    return sum(each["count"] for each in run["inputs"][split]["skipped"])


def _rule_figures(run: Mapping[str, Any], table: pa.Table, documents: Codes) -> dict[str, Any]:
    """What is said of dropped and of kept tokens; None without a rule."""
    ruled = is_valid(table["dropped"]).to_numpy()
    if not ruled.any():
        return dict.fromkeys(
            ("teacher_forced_accuracy_dropped", "teacher_forced_accuracy_kept", "attribution")
        )
    counts, documents = token_counts(table.filter(pa.array(ruled))), documents[ruled]
    return {
        "teacher_forced_accuracy_dropped": token_rate(counts[:, 4], counts[:, 5], documents),
        "teacher_forced_accuracy_kept": token_rate(counts[:, 6], counts[:, 7], documents),
        "attribution": {**attribution_figures(counts, documents), "notes": notes(run["receipt"])},
    }


def _numbers(table: pa.Table, name: str) -> Floats:
    """A column of numbers as float64; null becomes NaN."""
    return np.asarray(table[name].cast(pa.float64()).to_numpy(), dtype=np.float64)


def _lists(table: pa.Table, name: str, length: int) -> Floats:
    """A column of lists of one length, (windows, length)."""
    return np.array(table[name].to_pylist(), dtype=np.float64).reshape(len(table), length)


def _documents(table: pa.Table) -> Codes:
    """The codes of the windows' documents, from 0."""
    codes: Codes = np.unique(table["document"].to_numpy(), return_inverse=True)[1]
    return codes


def _side(table: pa.Table) -> Side:
    scores = {attack: _numbers(table, name) for attack, name in zip(ATTACKS, SCORES, strict=True)}
    words = [np.array(each, dtype=np.int32) for each in table["words"].to_pylist()]
    return Side(_documents(table), scores, words, _numbers(table, "characters"))


def _names(table: pa.Table, hits: NDArray[np.bool_], most: int = 10) -> list[str]:
    """The names of the documents that have a hit, the first ten of them."""
    names = dict.fromkeys(table.filter(pa.array(hits))["name"].to_pylist())
    return list(names)[:most]
