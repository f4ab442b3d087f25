"""Records and run.json of an audit -> summary.json: every estimate and the verdict."""

from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow.compute import list_value_length

from goldfish.audit.attribution import attribution_figures, notes
from goldfish.audit.columns import ATTACKS, COUNTS, TRIVIAL, read_run, records
from goldfish.audit.estimate import Codes, Floats, mean, rate, token_rate
from goldfish.audit.membership import Side, membership_figures
from goldfish.audit.sampling import log10_samples_needed, sampling_figures
from goldfish.audit.verdict import RUN, SAMPLES, SIMILARITY, parse_limits, verdict

SCORES = [f"mia_{attack}" for attack in ATTACKS]
COLUMNS = [
    "split", "document", "cluster", "count", "offset", "suffix_ids", "dropped", "prefix_sweep", "settled",
    "exact_match", "matches", "correct_count", "nll_sum", "rouge_l_text", "rouge_l_ids", "longest_run",
    "completion", "secret_recited", "edit_similarity", "first_divergence", "type_token_ratio", "log_p", "rank_bits",
    "beams", "characters", "words",
    *COUNTS, *SCORES,
]  # fmt: skip
ABOUT = ("schema", "name", "checkpoint", "date", "command", "rule", "versions", "inputs", "weights", "protocol")


def summarize(folder: str | Path, limits: Sequence[str] = (), require: Sequence[str] = ()) -> dict[str, Any]:
    """The whole of summary.json, with Estimates in it, from a folder's run.json and records.

    Raises:
        FileNotFoundError, ValueError: a folder without all records of an audit.
    """
    return summary_of(read_run(folder), records(folder, COLUMNS), limits, require)


def summary_of(
    run: Mapping[str, Any], table: pa.Table, limits: Sequence[str] = (), require: Sequence[str] = ()
) -> dict[str, Any]:
    """The same, from their content; docs/audit-files.md describes every key.

    Args:
        run: run.json. table: the records of one or both splits, with COLUMNS; its order does not matter.
        limits: such as "recited=0.1%". require: "membership" makes that question count.

    Raises:
        ValueError: no records at all.
    """
    names = np.asarray(table["split"].to_pylist(), dtype=str)
    tables = {split: table.filter(pa.array(names == split)) for split in ("members", "heldout") if split in names}
    if not tables:
        raise ValueError("there is no record to summarize")
    summary = {
        **{key: run[key] for key in ABOUT},
        "overlap": run.get("overlap"),
        "splits": {split: split_figures(run, split, rows) for split, rows in tables.items()},
        "membership": membership_figures(*map(_side, tables.values())) if len(tables) == 2 else None,
    }
    return {**summary, "verdict": verdict(summary, parse_limits(limits), require)}


def split_figures(run: Mapping[str, Any], split: str, table: pa.Table) -> dict[str, Any]:
    """One split of the summary: about all its windows; rates of recitation count documents."""
    protocol, offsets = run["protocol"], _numbers(table, "offset")
    documents, secrets = _documents(table), _numbers(table, "secret_recited")
    tokens = list_value_length(table["suffix_ids"]).to_numpy()
    marked = ~np.isnan(secrets)
    of_text = _numbers(table, "completion") == 0
    sweeps = _lists(table.filter(pa.array(of_text)), "prefix_sweep").T if of_text.any() else []
    recited, trivial = _numbers(table, "exact_match") > 0, _numbers(table, "type_token_ratio") < TRIVIAL
    long_run = _numbers(table, "longest_run") >= RUN
    similar = _numbers(table, "edit_similarity") >= SIMILARITY
    log_p, beams = _lists(table, "log_p"), _numbers(table, "beams")
    bits = _numbers(table, "rank_bits")
    needed = log10_samples_needed(np.column_stack([-np.log(2) * bits, log_p]), SAMPLES[1])
    within = needed <= np.log10(SAMPLES[0]) + 1e-12
    extractable = within[:, 1:].any(-1)
    ruled = ~np.isnan(_numbers(table, COUNTS[0]))
    counts = np.stack([_numbers(table, name)[ruled] for name in COUNTS], -1)
    nll = _numbers(table, "nll_sum")
    diverged = counts[:, 0] + counts[:, 2] > 0
    kinds = {
        "exact_match": recited,
        "extractable": extractable,
        "beam_search": beams > 0,
        "near_verbatim": long_run | similar | recited,
        "secrets": secrets > 0,
    }

    def average(name: str, greatest: float = 1.0) -> Any:
        return mean(_numbers(table, name), documents, bounds=(0.0, greatest))

    return {
        "n": len(table),
        "documents": len(np.unique(documents)),
        "skipped": sum(each["count"] for each in run["inputs"][split]["skipped"]),
        "settled": int(_numbers(table, "settled").sum()),
        "recited": {name: _names(table, hits) for name, hits in kinds.items()},
        "exact_match": rate(recited, documents),
        "exact_match_nontrivial": rate(recited[~trivial], documents[~trivial]),
        "near_verbatim": rate(kinds["near_verbatim"], documents),
        "long_run": rate(long_run, documents),
        "similar": rate(similar, documents),
        "extractable": rate(extractable, documents) if protocol["sampling"] else None,
        "extractable_bound": rate(within[:, 0], documents),
        "rank_bits": {"least": float(bits.min()), "median": float(np.median(bits)), "greatest": float(bits.max())},
        "secrets": rate(secrets[marked] > 0, documents[marked]) if marked.any() else None,
        "trivial": token_rate(trivial, np.ones(len(table)), documents),
        "token_accuracy": token_rate(_numbers(table, "matches"), tokens, documents),
        "teacher_forced_accuracy": token_rate(_numbers(table, "correct_count"), tokens, documents),
        "teacher_forced_accuracy_dropped":
            token_rate(counts[:, 4], counts[:, 5], documents[ruled]) if ruled.any() else None,
        "teacher_forced_accuracy_kept":
            token_rate(counts[:, 6], counts[:, 7], documents[ruled]) if ruled.any() else None,
        # A loss has no upper bound; that of a uniform guess is far above any text's under a model that works.
        "nll": mean(nll, documents, tokens, (0.0, max(log(protocol["vocabulary"]), (nll / tokens).max(initial=0)))),
        "rouge_l_text": average("rouge_l_text"),
        "rouge_l_ids": average("rouge_l_ids"),
        "longest_run": average("longest_run", tokens.max()),
        "edit_similarity": average("edit_similarity"),
        "first_divergence": average("first_divergence", tokens.max()),
        "first_divergence_dropped":
            token_rate(counts[diverged, 0], diverged[diverged], documents[ruled][diverged]) if ruled.any() else None,
        "prefix_sweep": [
            {"prefix_length": length, "exact_match": rate(matched, documents[of_text])}
            for length, matched in zip(protocol["prefix_grid"] if of_text.any() else [], sweeps, strict=True)
        ],
        "offset_sweep": [
            {"offset": offset, "exact_match": rate(recited[offsets == offset], documents[offsets == offset])}
            for offset in protocol["offsets"]
        ],
        "strata": _strata(_numbers(table, "count"), recited, documents),
        "sampling": [
            sampling_figures(logarithms, documents, dict(setting))
            for setting, logarithms in zip(protocol["sampling"], log_p.T, strict=True)
        ],
        "beam_search": [
            {"beams": width, "exact_match": rate((beams > 0) & (beams <= width), documents)}
            for width in protocol["beams"]
        ] if protocol["beams"] else None,
        "attribution": {
            **attribution_figures(counts[:, :4], counts[:, 4:], documents[ruled]),
            "decisions": _decisions(table.filter(pa.array(ruled))),
            "notes": notes(run["receipt"]),
        } if ruled.any() else None,
    }  # fmt: skip


def _numbers(table: pa.Table, name: str) -> Floats:
    """A column of numbers as float64; null becomes NaN."""
    return np.asarray(table[name].cast(pa.float64()).to_numpy(), dtype=np.float64)


def _lists(table: pa.Table, name: str) -> Floats:
    """A column of lists of one length, (windows, length)."""
    return np.array(table[name].to_pylist(), dtype=np.float64).reshape(len(table), -1)


def _documents(table: pa.Table) -> Codes:
    """The codes of the windows' documents, from 0."""
    codes: Codes = np.unique(table["cluster"].to_numpy(), return_inverse=True)[1]
    return codes


def _side(table: pa.Table) -> Side:
    scores = {attack: _numbers(table, name) for attack, name in zip(ATTACKS, SCORES, strict=True)}
    words = [np.array(each, dtype=np.int32) for each in table["words"].to_pylist()]
    return Side(_documents(table), scores, words, _numbers(table, "characters"))


def _names(table: pa.Table, hits: NDArray[np.bool_], most: int = 10) -> list[str]:
    """The names of the documents that have a hit, the first ten of them."""
    names = dict.fromkeys(table.filter(pa.array(hits))["document"].to_pylist())
    return list(names)[:most]


def _strata(counts: Floats, recited: NDArray[np.bool_], documents: Codes) -> list[dict[str, Any]] | None:
    """Exact match by how often a text was trained on, in powers of two; None where no input row says."""
    if np.isnan(counts).all():
        return None
    power = np.array([-1 if np.isnan(count) else int(count).bit_length() for count in counts])
    return [
        {
            "count_from": 2**bits >> 1,
            "count_to": 2**bits - 1,
            "exact_match": rate(recited[power == bits], documents[power == bits]),
        }
        for bits in sorted(set(power.tolist()) - {-1})
    ]


def _decisions(table: pa.Table) -> dict[str, int]:
    """Distinct suffixes, those in several windows, and of these those of which other tokens were dropped."""
    seen: dict[int, list[int]] = {}
    for suffix, dropped in zip(table["suffix_ids"].to_pylist(), table["dropped"].to_pylist(), strict=True):
        seen.setdefault(hash(tuple(suffix)), []).append(hash(tuple(dropped)))
    return {
        "suffixes": len(seen),
        "repeated": sum(len(each) > 1 for each in seen.values()),
        "several": sum(len(set(each)) > 1 for each in seen.values()),
    }
