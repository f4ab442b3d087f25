"""Records -> the figures of summary.json. Reads each record once and keeps a few numbers of it."""

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from goldfish.audit.attribution import Repeats, attribution_figures, notes
from goldfish.audit.columns import ATTACKS, COUNTS, SCHEMA, TRIVIAL, read_run, records
from goldfish.audit.membership import Side, membership_figures
from goldfish.audit.sampling import sampling_figures
from goldfish.audit.stats import Codes, Floats, mean, rate, token_rate
from goldfish.audit.verdict import verdict

MEANS = ("rouge_l_text", "rouge_l_ids", "longest_run", "edit_similarity", "first_divergence")


def summarize(folder: str | Path) -> dict[str, Any]:
    """The whole of summary.json, from run.json and the records; docs/audit.md describes every key.

    Raises:
        FileNotFoundError, ValueError: a folder without records of a whole audit.
    """
    run = read_run(folder)
    protocol, receipt = run["protocol"], run["receipt"]
    columns: dict[str, Columns] = {}
    for batch in records(folder).to_batches(1024):
        for record in batch.to_pylist():
            columns.setdefault(record["split"], Columns(protocol)).add(record)
    if not columns:
        raise ValueError("there is no record to summarize")
    splits = {
        name: columns[name].figures(sum(each["count"] for each in run["inputs"][name]["skipped"]), notes(receipt))
        for name in ("members", "heldout")
        if name in columns
    }
    both = len(splits) == 2
    about = ("name", "checkpoint", "date", "command", "rule", "versions", "inputs", "weights")
    summary = {
        "schema": SCHEMA,
        **{key: run[key] for key in about},
        "protocol": protocol,
        "splits": splits,
        "membership": membership_figures(columns["members"].side(), columns["heldout"].side()) if both else None,
    }
    return {**summary, "verdict": verdict(summary)}


class Columns:
    """What the figures of one split need of each record: a row of numbers, its words, its document."""

    def __init__(self, protocol: Mapping[str, Any]) -> None:
        self._protocol = protocol
        self._places: dict[str, slice] = {}
        self._numbers = array("d")
        self._documents: dict[int, int] = {}
        self._words: list[NDArray[np.int32]] = []
        self._repeats = Repeats()

    def add(self, record: dict[str, Any]) -> None:
        dropped, length = record["dropped"], len(record["suffix_ids"])
        self._words.append(np.array(record["words"], dtype=np.int32))
        first = record["offset"] == self._protocol["offsets"][0]
        if first and dropped is not None:
            self._repeats.add(record["suffix_ids"], dropped)
        row = {
            "document": self._documents.setdefault(record["cluster"], len(self._documents)),
            **{name: record[name] for name in ("offset", "count", "settled", "exact_match", "beams", *MEANS)},
            "trivial": record["type_token_ratio"] < TRIVIAL,
            "tokens": length,
            "right": record["correct_count"],
            "right_free": record["matches"],
            "nll": record["nll_sum"],
            "sweep": record["prefix_sweep"],
            "log_p": record["log_p"],
            "ruled": dropped is not None,
            "reached": [record[name] or 0 for name in COUNTS[:4]],
            "kinds": [record[name] or 0 for name in COUNTS[4:]],
            "characters": record["characters"],
            **{attack: record[f"mia_{attack}"] for attack in ATTACKS},
        }
        if not self._places:
            end = 0
            for name, value in row.items():
                self._places[name] = slice(end, end := end + np.size(np.array(value, dtype=np.float64)))
        for value in row.values():
            self._numbers.extend(np.atleast_1d(np.array(value, dtype=np.float64)))  # None becomes NaN

    def _column(self, name: str) -> Floats:
        """(windows,), or (windows, m) for what has several numbers."""
        width = max(place.stop for place in self._places.values())
        rows: Floats = np.frombuffer(self._numbers, dtype=np.float64).reshape(-1, width)
        place = self._places[name]
        return rows[:, place] if name in ("sweep", "log_p", "reached", "kinds") else rows[:, place.start]

    def side(self) -> Side:
        scores = {attack: self._column(attack) for attack in ATTACKS}
        documents = self._column("document").astype(np.int64)
        return Side(documents, scores, self._words, self._column("characters"))

    def figures(self, skipped: int, notes: Sequence[str]) -> dict[str, Any]:
        """One split of the summary."""
        offsets, everyone = self._column("offset"), self._column("document").astype(np.int64)
        here: NDArray[np.bool_] = offsets == self._protocol["offsets"][0]

        def column(name: str) -> Floats:
            return self._column(name)[here]

        def yes(name: str) -> NDArray[np.bool_]:
            return column(name) > 0

        documents, recited, trivial, ruled = everyone[here], yes("exact_match"), yes("trivial"), yes("ruled")
        tokens, kinds, diverged = column("tokens"), column("kinds"), yes("ruled") & ~yes("exact_match")
        return {
            "n": len(recited),
            "documents": len(np.unique(documents)),
            "skipped": skipped,
            "settled": int(yes("settled").sum()),
            "exact_match": rate(recited, documents),
            "exact_match_nontrivial": rate(recited[~trivial], documents[~trivial]),
            "trivial": rate(trivial, documents),
            "token_accuracy": token_rate(column("right_free"), tokens, documents),
            "teacher_forced_accuracy": token_rate(column("right"), tokens, documents),
            "teacher_forced_accuracy_dropped": token_rate(kinds[:, 0], kinds[:, 1], documents) if ruled.any() else None,
            "teacher_forced_accuracy_kept": token_rate(kinds[:, 2], kinds[:, 3], documents) if ruled.any() else None,
            "nll": mean(column("nll"), documents, tokens),
            **{name: mean(column(name), documents) for name in MEANS},
            "first_divergence_dropped": rate(column("reached")[diverged, 0], documents[diverged])
            if ruled.any() else None,
            "prefix_sweep": [
                {"prefix_length": length, "exact_match": rate(matched, documents)}
                for length, matched in zip(self._protocol["prefix_grid"], column("sweep").T, strict=True)
            ],
            "offset_sweep": [
                {"offset": offset, "exact_match": rate(self._column("exact_match")[at], everyone[at])}
                for offset in self._protocol["offsets"]
                for at in [offsets == offset]
            ],
            "strata": _strata(column("count"), recited, documents),
            "sampling": [
                sampling_figures(log_p, documents, dict(setting))
                for setting, log_p in zip(self._protocol["sampling"], column("log_p").T, strict=True)
            ],
            "beam_search": self._beam_search(column("beams"), documents),
            "attribution": {
                **attribution_figures(column("reached")[ruled], kinds[ruled], documents[ruled]),
                "decisions": self._repeats.counts(),
                "notes": list(notes),
            } if ruled.any() else None,
        }  # fmt: skip

    def _beam_search(self, beams: Floats, documents: Codes) -> list[dict[str, Any]] | None:
        if not self._protocol["beams"]:
            return None
        return [
            {"beams": width, "exact_match": rate((beams > 0) & (beams <= width), documents)}
            for width in self._protocol["beams"]
        ]


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
