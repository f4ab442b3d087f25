"""Two audits of the same windows, paired: does the second model recite less than the first?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich import box
from rich.table import Table
from rich.text import Text
from scipy.stats import binomtest

from goldfish.audit.intervals import Codes, Floats, decimals, difference
from goldfish.audit.records import dumps, read_records, sums
from goldfish.audit.render import literal, table_lines
from goldfish.audit.results import Audit, read
from goldfish.text.printable import plain

SCHEMA = "goldfish.compare/4"
MEANS = (
    "rouge_l_text",
    "rouge_l_ids",
    "token_accuracy",
    "longest_run",
    "edit_similarity",
    "first_divergence",
    "nll",
)
KEY = ["split", "index", "offset"]
QUESTION = ["prefix_ids", "suffix_ids"]
COLUMNS = [*KEY, *QUESTION, "document", "exact_match", *MEANS]
SIGNIFICANT = 0.05


def compare(first: str | Path, second: str | Path) -> dict[str, Any]:
    """The differences second - first of every split: compare.json with Figures; see docs/audit-files.md.

    Exact match: exact McNemar test over documents. Means: paired t intervals over documents.

    Raises:
        FileNotFoundError, ValueError: a folder that is not a finished audit, or audits of different windows.
    """
    audits = read(first), read(second)
    tables = [
        read_records(audit.folder, COLUMNS).sort_by([(key, "ascending") for key in KEY])
        for audit in audits
    ]
    _require_same(audits, tables)
    same = audits[0].name == audits[1].name
    splits = np.array(tables[0]["split"].to_pylist())
    result = {
        "schema": SCHEMA,
        **{
            which: {
                "name": f"{audit.name} ({i})" if same else audit.name,
                "checkpoint": audit.run["checkpoint"],
            }
            for i, (which, audit) in enumerate(
                zip(("first", "second"), audits, strict=True), 1
            )
        },
        "splits": {
            split: _paired(
                *(table.filter(pa.array(splits == split)) for table in tables)
            )
            for split in ("members", "heldout")
            if split in splits
        },
    }
    return {**result, "sentence": _sentence(result)}


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p of the exact McNemar test: do the items that only one of two models gets favour neither of them?"""
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


def write(result: Mapping[str, Any], output_dir: str | Path) -> Path:
    """Write compare.json and compare.md to a new or empty folder.

    Raises:
        FileExistsError: an output_dir that holds something.
    """
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"{output} exists and is not an empty folder; choose another output folder or remove it"
        )
    output.mkdir(parents=True, exist_ok=True)
    (output / "compare.json").write_text(dumps(result), encoding="utf-8")
    (output / "compare.md").write_text(markdown(result), encoding="utf-8")
    return output


def rows(result: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Split, figure, first, second and difference, as text."""
    lines = []
    for split, values in result["splits"].items():
        match = values["exact_match"]
        counts = [
            f"{match[which]:,} of {match['n']:,}" for which in ("first", "second")
        ]
        lines.append((split, "exact match", *counts, f"p = {match['p']:.2g}"))
        for name in MEANS:
            of = values[name]
            sign = "+" if of["difference"].value > 0 else ""
            lines.append(
                (
                    split,
                    name,
                    decimals(of["first"]),
                    decimals(of["second"]),
                    f"{sign}{of['difference']}",
                )
            )
    return lines


def table(result: Mapping[str, Any]) -> Table:
    """The comparison in the terminal, at most 80 columns for names of up to 12 letters."""
    shown = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption_justify="left",
        caption="difference: second - first, paired, with its 95% interval over documents",
    )
    for heading in (
        "texts",
        "figure",
        *(plain(result[which]["name"]) for which in ("first", "second")),
        "difference",
    ):
        shown.add_column(Text(heading, overflow="ellipsis"), no_wrap=True, max_width=30)
    for row in rows(result):
        shown.add_row(*row)
    return shown


def markdown(result: Mapping[str, Any]) -> str:
    """The comparison for a pull request."""
    names = [literal(plain(result[which]["name"])) for which in ("first", "second")]
    heading = ["texts", "figure", *names, "difference, paired, 95% interval"]
    lines = [
        f"## goldfish compare: {names[0]} and {names[1]}\n",
        literal(plain(result["sentence"], 1000)) + "\n",
    ]
    return "\n".join([*lines, *table_lines(heading, rows(result))])


def _require_same(audits: tuple[Audit, Audit], tables: list[pa.Table]) -> None:
    first, second = (
        {
            tuple(row[key] for key in KEY): [row[key] for key in QUESTION]
            for row in table.to_pylist()
        }
        for table in (each.select(KEY + QUESTION) for each in tables)
    )
    others = [
        key for key in first.keys() | second.keys() if first.get(key) != second.get(key)
    ]
    if others:
        split, index, offset = min(others)
        raise ValueError(
            f"{audits[0].folder} and {audits[1].folder} are audits of different windows: {len(others):,} are in one of "
            f"them only or hold other tokens, the first at {split} row {index}, offset {offset}; only the same windows "
            "can be paired: audit both checkpoints with the same files, lengths, offsets and tokenizer"
        )


def _paired(first: pa.Table, second: pa.Table) -> dict[str, Any]:
    documents: Codes = np.unique(first["document"].to_numpy(), return_inverse=True)[1]
    lengths = pc.list_value_length(first["suffix_ids"]).to_numpy()

    def columns(name: str) -> list[Floats]:
        if name == "nll":
            return [sums(each, name) / lengths for each in (first, second)]
        return [
            np.asarray(each[name].to_numpy(), dtype=np.float64)
            for each in (first, second)
        ]

    one, two = (
        np.bincount(documents, each) > 0 for each in columns("exact_match")
    )  # documents: any of their windows
    only_first, only_second = int((one & ~two).sum()), int((two & ~one).sum())
    result: dict[str, Any] = {"n": len(first), "documents": len(one)}
    result["exact_match"] = {
        "n": len(one),
        "first": int(one.sum()),
        "second": int(two.sum()),
        "only_first": only_first,
        "only_second": only_second,
        "p": mcnemar(only_first, only_second),
        "difference": difference(two.astype(np.float64) - one, np.arange(len(one))),
    }
    for name in MEANS:
        a, b = columns(name)
        result[name] = {
            "first": float(a.mean()),
            "second": float(b.mean()),
            "difference": difference(b - a, documents),
        }
    return result


def _sentence(result: Mapping[str, Any]) -> str:
    split = "members" if "members" in result["splits"] else "heldout"
    match = result["splits"][split]["exact_match"]
    names = result["first"]["name"], result["second"]["name"]
    texts = f"{'member' if split == 'members' else 'held-out'} texts"
    counts = f"{names[0]} recites {match['first']}, {names[1]} {match['second']} of {match['n']} {texts}"
    if match["p"] >= SIGNIFICANT:
        return f"{counts}: the difference may be chance (McNemar p = {match['p']:.2g})"
    fewer = names[1] if match["only_first"] > match["only_second"] else names[0]
    return f"{counts}: {fewer} recites fewer (McNemar p = {match['p']:.2g})"
