"""Records and run.json of an audit -> summary.json: every estimate and the verdict."""

from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow.compute import is_valid, list_value_length

from goldfish.audit.attribution import attribution_figures, notes, token_counts
from goldfish.audit.estimate import Codes, Floats, mean, rate, token_rate
from goldfish.audit.membership import Side, membership_figures
from goldfish.audit.records import ATTACKS, read_records, read_run, sums
from goldfish.audit.sampling import extracted, sampling_figures, setting_name
from goldfish.audit.verdict import RUN, SAMPLES, SIMILARITY, parse_limits, verdict

SCORES = [f"mia_{attack}" for attack in ATTACKS]
COLUMNS = [
    "split",
    "document",
    "name",
    "offset",
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
    "edit_similarity",
    "first_divergence",
    "log_p",
    "rank_bits",
    "beams",
    "characters",
    "asked",
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
    summary = {
        **{key: run[key] for key in ABOUT},
        "overlap": run.get("overlap"),
        "splits": {split: split_figures(run, split, rows) for split, rows in tables.items()},
        "membership": membership_figures(*map(_side, tables.values()))
        if len(tables) == 2
        else None,
    }
    return {**summary, "verdict": verdict(summary, parse_limits(limits), require)}


def split_figures(run: Mapping[str, Any], split: str, table: pa.Table) -> dict[str, Any]:
    """One split of the summary: about all its windows; rates of recitation count documents.

    Of a table without rows it has the same names.
    """
    protocol, documents = run["protocol"], _documents(table)
    tokens = list_value_length(table["suffix_ids"]).to_numpy()
    recited, beams = _numbers(table, "exact_match") > 0, _numbers(table, "beams")
    near_verbatim = (_numbers(table, "longest_run") >= RUN) | (
        _numbers(table, "edit_similarity") >= SIMILARITY
    )
    trained = np.asarray(table["asked"].to_pylist(), dtype=str) == "training"
    log_p = _lists(table, "log_p", len(protocol["sampling"]))
    log_p[~trained] = -np.inf
    bound = extracted(-np.log(2) * _numbers(table, "rank_bits"), *SAMPLES)
    hits = {"exact_match": recited, "near_verbatim": near_verbatim | recited}
    if protocol["sampling"]:
        hits["extractable"] = np.asarray(extracted(log_p, *SAMPLES).any(-1))
    if protocol["beams"]:
        hits["beam_search"] = beams > 0
    figures = {name: rate(these, documents) for name, these in hits.items()}
    if protocol["secrets"] or protocol["secret_column"]:
        marked = list_value_length(table["secrets"]).to_numpy() > 0
        hits["secrets"] = _given_away(table)
        figures["secrets"] = rate(hits["secrets"][marked], documents[marked])
    # Rates count whatever comes out; means are of the texts as they were trained.
    every, table, documents = table, table.filter(pa.array(trained)), documents[trained]
    recited, beams, bound = (each[trained] for each in (recited, beams, bound))
    log_p, tokens = log_p[trained], tokens[trained]
    nll, matches = sums(table, "nll"), np.rint(_numbers(table, "token_accuracy") * tokens)
    # A loss has no upper bound; that of a uniform guess is far above any text's under a model that works.
    greatest = {"nll": max(log(protocol["vocabulary"]), (nll / tokens).max(initial=0))}
    greatest |= dict.fromkeys(("longest_run", "first_divergence"), tokens.max(initial=0))
    of_text = _numbers(table, "completion") == 0
    sweep = _lists(table.filter(pa.array(of_text)), "prefix_sweep", len(protocol["prefix_grid"]))
    offsets = _numbers(table, "offset")
    return {
        "n": len(table),
        "documents": len(np.unique(documents)),
        "skipped": sum(each["count"] for each in run["inputs"][split]["skipped"]),
        "settled": int(_numbers(table, "settled").sum()),
        "recited": {name: _names(every, these) for name, these in hits.items()},
        **figures,
        "extractable_bound": rate(bound, documents),
        "token_accuracy": token_rate(matches, tokens, documents),
        "teacher_forced_accuracy": token_rate(sums(table, "correct"), tokens, documents),
        **_rule_figures(run, table, documents),
        "nll": mean(nll, documents, tokens, (0.0, greatest["nll"])),
        **{
            name: mean(_numbers(table, name), documents, bounds=(0.0, greatest.get(name, 1.0)))
            for name in (
                "rouge_l_text",
                "rouge_l_ids",
                "longest_run",
                "edit_similarity",
                "first_divergence",
            )
        },
        **{
            f"prefix_sweep@{length}": rate(matched, documents[of_text])
            for length, matched in zip(protocol["prefix_grid"], sweep.T, strict=True)
        },
        **{
            f"offset_sweep@{offset}": rate(recited[offsets == offset], documents[offsets == offset])
            for offset in protocol["offsets"]
        },
        **{
            f"beam_search@{width}": rate((beams > 0) & (beams <= width), documents)
            for width in protocol["beams"] or ()
        },
        **{
            f"{name},{setting_name(setting)}" if i else name: figure
            for i, setting in enumerate(protocol["sampling"])
            for name, figure in sampling_figures(log_p[:, i], documents).items()
        },
    }


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


def _given_away(table: pa.Table) -> NDArray[np.bool_]:
    """Whether a window's output holds one of its own secrets."""
    pairs = zip(table["secrets"].to_pylist(), table["output_text"].to_pylist(), strict=True)
    return np.array([any(each in text for each in secrets) for secrets, text in pairs], dtype=bool)


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
    table = table.filter(pc.equal(table["asked"], "training"))
    scores = {attack: _numbers(table, name) for attack, name in zip(ATTACKS, SCORES, strict=True)}
    words = [np.array(each, dtype=np.int32) for each in table["words"].to_pylist()]
    return Side(_documents(table), scores, words, _numbers(table, "characters"))


def _names(table: pa.Table, hits: NDArray[np.bool_], most: int = 10) -> list[str]:
    """The names of the documents that have a hit, the first ten of them."""
    names = dict.fromkeys(table.filter(pa.array(hits))["name"].to_pylist())
    return list(names)[:most]
