"""Two audits of the same items, paired: does the second model recite less than the first?"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from goldfish.audit.columns import records
from goldfish.audit.formats import literal
from goldfish.audit.results import Audit, read
from goldfish.audit.stats import Codes, Floats, mcnemar, mean

SCHEMA = "goldfish.compare/1"
MEANS = ("rouge_l_text", "rouge_l_ids", "token_accuracy", "longest_run", "edit_similarity", "first_divergence", "nll")
COLUMNS = ("split", "index", "offset", "document", "prefix_ids", "suffix_ids", "exact_match", *MEANS)
SIGNIFICANT = 0.05

Key = tuple[str, int, int]


@dataclass(frozen=True)
class Items:
    """The windows of an audit: by (split, index, offset) the place in the columns and a fingerprint of the question."""

    places: dict[Key, tuple[int, int]]
    documents: list[str]
    columns: Mapping[str, Floats]


def compare(first: str | Path, second: str | Path) -> dict[str, Any]:
    """The differences second - first, split by split; compare.json, described in docs/audit.md.

    Exact match: exact McNemar. Means: paired bootstrap over documents.

    Raises:
        FileNotFoundError, ValueError: a folder that is no audit, or audits of different items.
    """
    audits = read(first), read(second)
    items = [_items(audit) for audit in audits]
    _require_same(audits, items)
    keys = list(items[0].places)
    order = [np.array([each.places[key][0] for key in keys]) for each in items]
    known: dict[tuple[str, str], int] = {}
    documents = np.array(
        [
            known.setdefault((key[0], items[0].documents[place]), len(known))
            for key, place in zip(keys, order[0], strict=True)
        ]
    )
    splits = {}
    for split in dict.fromkeys(key[0] for key in keys):
        here = np.array([key[0] == split for key in keys])
        a, b = ({name: column[where[here]] for name, column in each.columns.items()}
                for each, where in zip(items, order, strict=True))  # fmt: skip
        splits[split] = _paired(a, b, documents[here])
    names = [audit.name for audit in audits]
    if names[0] == names[1]:
        names = [f"{name} ({i})" for i, name in enumerate(names, 1)]
    result = {
        "schema": SCHEMA,
        "first": {"name": names[0], "checkpoint": audits[0].summary["checkpoint"]},
        "second": {"name": names[1], "checkpoint": audits[1].summary["checkpoint"]},
        "splits": splits,
    }
    return {**result, "sentence": _sentence(result)}


def write(result: Mapping[str, Any], output_dir: str | Path) -> Path:
    """compare.json and compare.md in a new or empty folder.

    Raises:
        FileExistsError: an output_dir that holds something.
    """
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder; choose another output folder or remove it")
    output.mkdir(parents=True, exist_ok=True)
    (output / "compare.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (output / "compare.md").write_text(markdown(result), encoding="utf-8")
    return output


def rows(result: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Split, figure, first, second, difference, as text."""
    told = []
    for split, values in result["splits"].items():
        match = values["exact_match"]
        n = match["n"]
        told.append((split, "exact match", f"{match['first']} of {n}", f"{match['second']} of {n}",
                     f"p = {match['p']:.2g}"))  # fmt: skip
        for name in MEANS:
            of = values[name]
            low, high = of["difference"]["lower95"], of["difference"]["upper95"]
            bounds = f" ({low:+.3g} to {high:+.3g})" if low is not None else ""
            told.append((split, name, f"{of['first']:.3g}", f"{of['second']:.3g}",
                         f"{of['difference']['mean']:+.3g}{bounds}"))  # fmt: skip
    return told


def table(result: Mapping[str, Any]) -> Table:
    """The comparison in the terminal, at most 80 columns for names of up to 12 letters."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left",
                  caption="difference: second - first, paired, with its 95% interval over documents")  # fmt: skip
    for heading in ("texts", "figure", result["first"]["name"], result["second"]["name"], "difference"):
        shown.add_column(Text(heading, overflow="ellipsis"), no_wrap=True, max_width=30)
    for row in rows(result):
        shown.add_row(*row)
    return shown


def markdown(result: Mapping[str, Any]) -> str:
    """The comparison for a pull request."""
    names = [literal(result[which]["name"]) for which in ("first", "second")]
    lines = [
        f"## goldfish compare: {names[0]} and {names[1]}", "", literal(result["sentence"]), "",
        f"| texts | figure | {names[0]} | {names[1]} | difference, paired, 95% interval |", "|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows(result)),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _items(audit: Audit) -> Items:
    places: dict[Key, tuple[int, int]] = {}
    documents: list[str] = []
    kept: dict[str, list[float]] = {name: [] for name in ("exact_match", *MEANS)}
    for batch in records(audit.folder, COLUMNS).to_batches(1024):
        for row in batch.to_pylist():
            question = hash((tuple(row["prefix_ids"]), tuple(row["suffix_ids"])))
            places[row["split"], row["index"], row["offset"]] = (len(documents), question)
            documents.append(row["document"])
            row["nll"] = sum(row["nll"]) / len(row["nll"])
            for name, values in kept.items():
                values.append(row[name])
    return Items(places, documents, {name: np.array(values, dtype=np.float64) for name, values in kept.items()})


def _require_same(audits: tuple[Audit, Audit], items: list[Items]) -> None:
    first, second = (each.places for each in items)
    only = [len(first.keys() - second.keys()), len(second.keys() - first.keys())]
    other = [key for key in first.keys() & second.keys() if first[key][1] != second[key][1]]
    if not (any(only) or other):
        return
    told = [f"{n} windows are only in {audit.folder}" for n, audit in zip(only, audits, strict=True) if n]
    if other:
        split, index, offset = min(other)
        told.append(f"{len(other)} windows hold other tokens, the first at {split} row {index}, offset {offset}")
    raise ValueError(
        f"{audits[0].folder} and {audits[1].folder} are audits of different items ({'; '.join(told)}); only the same "
        "items can be paired: audit both checkpoints with the same files, lengths, offsets and tokenizer"
    )


def _paired(a: Mapping[str, Floats], b: Mapping[str, Floats], documents: Codes) -> dict[str, Any]:
    one, two = a["exact_match"], b["exact_match"]
    place = np.unique(documents, return_inverse=True)[1]
    recited = [np.bincount(place, each) > 0 for each in (one, two)]  # documents: any of their windows
    only_first, only_second = int((recited[0] & ~recited[1]).sum()), int((recited[1] & ~recited[0]).sum())
    result: dict[str, Any] = {
        "n": len(one),
        "documents": len(recited[0]),
        "exact_match": {
            "n": len(one),
            "first": int(one.sum()),
            "second": int(two.sum()),
            "documents_only_first": only_first,
            "documents_only_second": only_second,
            "p": mcnemar(only_first, only_second),
            "difference": mean(two - one, documents),
        },
    }
    for name in MEANS:
        result[name] = {
            "first": float(a[name].mean()),
            "second": float(b[name].mean()),
            "difference": mean(b[name] - a[name], documents),
        }
    return result


def _sentence(result: Mapping[str, Any]) -> str:
    split = "members" if "members" in result["splits"] else "heldout"
    match = result["splits"][split]["exact_match"]
    names = result["first"]["name"], result["second"]["name"]
    windows = f"{'member' if split == 'members' else 'held-out'} windows"
    told = f"{names[0]} recites {match['first']}, {names[1]} {match['second']} of {match['n']} {windows}"
    if match["p"] >= SIGNIFICANT:
        return f"{told}: no difference that could not be chance (McNemar p = {match['p']:.2g})"
    fewer = names[1] if match["documents_only_first"] > match["documents_only_second"] else names[0]
    return f"{told}: {fewer} recites fewer (McNemar p = {match['p']:.2g})"
