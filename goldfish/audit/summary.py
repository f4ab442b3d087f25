"""Records -> the figures of summary.json. Reads each record once and keeps a few numbers of it."""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from goldfish.audit.attribution import Repeats, accuracies, attribution_figures, notes, reached
from goldfish.audit.extraction import Record
from goldfish.audit.membership import Side, buckets, membership_figures
from goldfish.audit.sampling import sampling_figures
from goldfish.audit.schema import ATTACKS, SCHEMA, TRIVIAL
from goldfish.audit.stats import Codes, Floats, mean, rate, token_rate
from goldfish.audit.verdict import verdict

MEANS = ("rouge_l_text", "rouge_l_ids", "longest_run", "edit_similarity", "first_divergence")


def prefix_grid(prefix_length: int) -> list[int]:
    """Tenths of the prefix: the lengths that the sweep tells."""
    return sorted({round(prefix_length * tenth / 10) for tenth in range(1, 11)} - {0})


def summarize(
    records: Iterable[Record],
    *,
    protocol: Mapping[str, Any],
    skipped: Mapping[str, int],
    receipt: Mapping[str, Any] | None = None,
    **about: Any,
) -> dict[str, Any]:
    """The whole of summary.json; docs/audit.md describes every key.

    Args:
        records: rows of records.parquet, of one or both splits, in any order; read once.
        protocol: as in summary.json, without `prefix_grid`. skipped: rows too short to make a window, by split.
        receipt: the checkpoint's goldfish.json, for what it says about decisions.
        about: what comes before the figures: name, checkpoint, rule, versions.

    Raises:
        ValueError: no records at all.
    """
    protocol = {**protocol, "prefix_grid": prefix_grid(protocol["prefix_length"])}
    columns: dict[str, Columns] = {}
    for record in records:
        columns.setdefault(record["split"], Columns(protocol)).add(record)
    if not columns:
        raise ValueError("there is no record to summarize")
    splits = {
        name: columns[name].figures(skipped.get(name, 0), notes(receipt))
        for name in ("members", "heldout")
        if name in columns
    }
    both = len(splits) == 2
    summary = {
        "schema": SCHEMA,
        **about,
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
        self._documents: dict[str, int] = {}
        self._words: list[NDArray[np.int32]] = []
        self._repeats = Repeats()

    def add(self, record: Record) -> None:
        dropped, length = record["dropped"], len(record["suffix_ids"])
        text = record["prefix_text"] + "".join(record["suffix_tokens"])
        self._words.append(buckets(text))
        first = record["offset"] == self._protocol["offsets"][0]
        if first and dropped is not None:
            self._repeats.add(record["suffix_ids"], dropped)
        correct = np.array(record["correct"], dtype=bool)
        row = {
            "document": self._documents.setdefault(record["document"], len(self._documents)),
            **{name: record[name] for name in ("offset", "count", "settled", "exact_match", "beams", *MEANS)},
            "trivial": record["type_token_ratio"] < TRIVIAL,
            "tokens": length,
            "right": correct.sum(),
            "right_free": round(record["token_accuracy"] * length),
            "nll": np.sum(record["nll"]),
            "sweep": self._sweep(record),
            "log_p": record["log_p"],
            "ruled": dropped is not None,
            "reached": reached(dropped or (), record["first_divergence"]),
            "kinds": accuracies(correct, dropped),
            "characters": len(text),
            **{attack: record[f"mia_{attack}"] for attack in ATTACKS},
        }
        if not self._places:
            end = 0
            for name, value in row.items():
                self._places[name] = slice(end, end := end + np.size(np.array(value, dtype=np.float64)))
        for value in row.values():
            self._numbers.extend(np.atleast_1d(np.array(value, dtype=np.float64)))  # None becomes NaN

    def _sweep(self, record: Record) -> list[bool]:
        """For every prefix length of the grid, whether the tokens after it are recited."""
        length = len(record["suffix_ids"])
        misses = np.cumsum([True, *(not hit for hit in record["prefix_correct"] + record["correct"])])
        return [bool(misses[start - 1 + length] == misses[start - 1]) for start in self._protocol["prefix_grid"]]

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
