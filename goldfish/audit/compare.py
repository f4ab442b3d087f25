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

from goldfish.audit.intervals import (
    SPLITS,
    Codes,
    Figure,
    Floats,
    decimals,
    difference,
    sums,
)
from goldfish.audit.records import dumps, read_records
from goldfish.audit.render import literal, table_lines
from goldfish.audit.results import Audit, read
from goldfish.text.printable import counted, plain

SCHEMA = "goldfish.compare/4"
# Figures with one value for each window, of which the comparison shows means.
MEANS = (
    "rouge_l_text",
    "rouge_l_ids",
    "token_accuracy",
    "longest_run",
    "edit_similarity",
    "first_divergence",
    "nll",
)
KEY = ["split", "index", "offset"]  # what names a window
QUESTION = ["prefix_ids", "suffix_ids"]  # what it asks
COLUMNS = [*KEY, *QUESTION, "document", "exact_match", *MEANS]
SIGNIFICANT = 0.05  # of McNemar's p: above it, a difference may be chance


def compare(first: str | Path, second: str | Path) -> dict[str, Any]:
    """The differences second - first of every split, as in compare.json; see docs/audit-files.md.

    Exact match: exact McNemar test over documents. Means: paired t intervals over documents.

    Raises:
        FileNotFoundError: a folder that is not a finished audit.
        ValueError: a damaged one, or audits of different windows.
    """
    audits = read(first), read(second)
    tables = _windows(audits[0]), _windows(audits[1])
    _require_same(audits, tables)
    result: dict[str, Any] = {"schema": SCHEMA}
    same_name = audits[0].name == audits[1].name  # often both are called "model"
    for number, which in enumerate(("first", "second")):
        audit = audits[number]
        name = f"{audit.name} ({number + 1})" if same_name else audit.name
        result[which] = {"name": name, "checkpoint": audit.run["checkpoint"]}
    result["splits"] = {}
    for split in audits[0].splits:
        of_split = pc.field("split") == split
        a = tables[0].filter(of_split)
        b = tables[1].filter(of_split)
        if len(a):
            result["splits"][split] = _paired(a, b)
    result["sentence"] = _sentence(result)
    return result


def _windows(audit: Audit) -> pa.Table:
    """The records in an order of their own: row by row, those of two audits are pairs."""
    table = read_records(audit.folder, COLUMNS)
    return table.sort_by([(key, "ascending") for key in KEY])


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p of the exact McNemar test.

    Were both models equal, a text that one of them alone recites would be the first's as often as
    the second's, like heads and tails.

    >>> mcnemar(5, 0)
    0.0625
    """
    discordant = only_first + only_second
    if not discordant:
        return 1.0
    return float(binomtest(only_first, discordant).pvalue)


def write(result: Mapping[str, Any], output_dir: str | Path) -> Path:
    """Write compare.json and compare.md to a new or empty folder.

    Raises:
        FileExistsError: an output_dir that holds something.
    """
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"{output} exists and is not an empty folder; choose another output folder or remove "
            "it"
        )
    output.mkdir(parents=True, exist_ok=True)
    files = {
        "compare.json": dumps(result),
        "compare.md": markdown(result),
    }
    for name, text in files.items():
        (output / name).write_text(text, encoding="utf-8")
    return output


def rows(result: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Split, figure, first, second and difference, as text."""
    lines = []
    for split, values in result["splits"].items():
        match = values["exact_match"]
        first = f"{match['first']:,} of {match['n']:,}"
        second = f"{match['second']:,} of {match['n']:,}"
        lines.append(
            (SPLITS[split], "exact match", first, second, f"p = {match['p']:.2g}")
        )
        for name in MEANS:
            of = values[name]
            first = decimals(of["first"])
            second = decimals(of["second"])
            change: Figure = of["difference"]
            # A minus is written by the figure itself.
            sign = "+" if (change.value or 0.0) > 0 else ""
            lines.append((SPLITS[split], name, first, second, f"{sign}{change}"))
    return lines


def table(result: Mapping[str, Any]) -> Table:
    """The comparison in the terminal, at most 80 columns for names of up to 12 letters."""
    shown = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption_justify="left",
        caption="difference: second - first, paired, with its 95% interval over documents",
    )
    for heading in ("texts", "figure", *_names(result), "difference"):
        shown.add_column(Text(heading, overflow="ellipsis"), no_wrap=True, max_width=30)
    for row in rows(result):
        shown.add_row(*row)
    return shown


def markdown(result: Mapping[str, Any]) -> str:
    """The comparison for a pull request."""
    first, second = map(literal, _names(result))
    heading = ["texts", "figure", first, second, "difference, paired, 95% interval"]
    lines = [
        f"## goldfish compare: {first} and {second}\n",
        literal(plain(result["sentence"], 1000)) + "\n",
    ]
    return "\n".join([*lines, *table_lines(heading, rows(result))])


def _names(result: Mapping[str, Any]) -> tuple[str, str]:
    """Names are untrusted: plain() writes out what a terminal would obey."""
    return plain(result["first"]["name"]), plain(result["second"]["name"])


def _require_same(
    audits: tuple[Audit, Audit], tables: tuple[pa.Table, pa.Table]
) -> None:
    """ValueError for audits whose windows differ, in place or in tokens."""
    first = _questions(tables[0])
    second = _questions(tables[1])
    everywhere = first.keys() | second.keys()
    others = []
    for key in everywhere:
        if first.get(key) != second.get(key):
            others.append(key)
    if others:
        split, index, offset = min(others)
        raise ValueError(
            f"{audits[0].folder} and {audits[1].folder} are audits of different windows: "
            f"{counted(len(others), 'window')} in one of them only or with other tokens, the first "
            f"at {split} row {index}, offset {offset}; only the same windows can be paired: audit "
            "both checkpoints with the same files, lengths, offsets and tokenizer"
        )


def _questions(table: pa.Table) -> dict[tuple[Any, ...], list[Any]]:
    """What the windows ask, by what names them; a chat has one for each turn at one place."""
    places = [table[name].to_pylist() for name in KEY]
    ids = [table[name].to_pylist() for name in QUESTION]
    # Rows of both columns: ([1, 2], [3]) for the prefix 1 2 and the suffix 3.
    asked = zip(*ids, strict=True)
    keys = zip(*places, strict=True)
    questions: dict[tuple[Any, ...], list[Any]] = {}
    for key, ids_of_key in zip(keys, asked, strict=True):
        of_key = questions.setdefault(key, [])
        of_key.append(ids_of_key)
    return questions


def _paired(first: pa.Table, second: pa.Table) -> dict[str, Any]:
    """The figures of one split, from two tables whose rows are pairs."""
    documents: Codes
    _, documents = np.unique(first["document"].to_numpy(), return_inverse=True)
    # A document is recited if any of its windows is: (documents,) for each model.
    one = np.bincount(documents, _column(first, "exact_match")) > 0
    two = np.bincount(documents, _column(second, "exact_match")) > 0
    # Documents that both recite, or neither, tell nothing about which model recites more.
    only_first = int((one & ~two).sum())
    only_second = int((two & ~one).sum())
    change = two.astype(np.float64) - one
    result: dict[str, Any] = {"n": len(first), "documents": len(one)}
    result["exact_match"] = {
        "n": len(one),
        "first": int(one.sum()),
        "second": int(two.sum()),
        "only_first": only_first,
        "only_second": only_second,
        "p": mcnemar(only_first, only_second),
        "difference": difference(change, np.arange(len(one))),
    }
    for name in MEANS:
        a = _column(first, name)
        b = _column(second, name)
        result[name] = {
            "first": float(a.mean()),
            "second": float(b.mean()),
            # The windows of a document are no independent evidence: they count as one.
            "difference": difference(b - a, documents),
        }
    return result


def _column(table: pa.Table, name: str) -> Floats:
    """(windows,): a figure of each window; its loss is the mean over the tokens of its suffix."""
    if name == "nll":
        lengths: Floats = pc.list_value_length(table["suffix_ids"]).to_numpy()
        return sums(table, name) / lengths
    return np.asarray(table[name].to_numpy(), dtype=np.float64)


def _sentence(result: Mapping[str, Any]) -> str:
    """Who recites fewer, of members if there are any."""
    splits = result["splits"]
    texts = "member text" if "members" in splits else "held-out text"
    match = next(iter(splits.values()))["exact_match"]
    first = result["first"]["name"]
    second = result["second"]["name"]
    counts = (
        f"{first} recites {match['first']:,}, {second} {match['second']:,} of "
        f"{counted(match['n'], texts)}"
    )
    p = f"McNemar p = {match['p']:.2g}"
    if match["p"] >= SIGNIFICANT:
        return f"{counts}: the difference may be chance ({p})"
    fewer = first
    if match["only_first"] > match["only_second"]:
        fewer = second
    return f"{counts}: {fewer} recites fewer ({p})"
