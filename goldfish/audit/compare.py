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
# Figures that have a value for each window. The comparison shows their means.
MEANS = (
    "rouge_l_text",
    "rouge_l_ids",
    "token_accuracy",
    "longest_run",
    "edit_similarity",
    "first_divergence",
    "nll",
)
PLACE = ["split", "index", "offset"]  # of a window
QUESTION = ["prefix_ids", "suffix_ids"]
COLUMNS = [*PLACE, *QUESTION, "document", "exact_match", *MEANS]
SIGNIFICANT = 0.05  # McNemar's p from which on a difference may be chance
# What compare.json holds.
Result = Mapping[str, Any]
Row = tuple[str, str, str, str, str]
Place = tuple[str, int, int]


def compare(first: str | Path, second: str | Path) -> dict[str, Any]:
    """The differences second - first of every split, as in compare.json; see docs/audit-files.md.

    Exact match: exact McNemar test over documents. Means: paired t intervals over documents.

    Raises:
        FileNotFoundError: a folder that is not a finished audit.
        ValueError: a damaged one, or audits of different windows.
    """
    audits = read(first), read(second)
    a, b = audits
    tables = _windows(a), _windows(b)
    _require_same(audits, tables)
    names = a.name, b.name
    if a.name == b.name:  # often both are called "model"
        names = f"{a.name} (1)", f"{b.name} (2)"
    splits = {}
    # The windows are the same, so the second audit has the same splits.
    for split in a.splits:
        of_split = pc.field("split") == split
        first_records, second_records = (table.filter(of_split) for table in tables)
        if len(first_records):
            splits[split] = _paired(first_records, second_records)
    return {
        "schema": SCHEMA,
        "first": {"name": names[0], "checkpoint": a.run["checkpoint"]},
        "second": {"name": names[1], "checkpoint": b.run["checkpoint"]},
        "splits": splits,
        "sentence": _sentence(*names, splits),
    }


def _windows(audit: Audit) -> pa.Table:
    """The records sorted by place, so that equal rows of two audits are pairs."""
    table = read_records(audit.folder, COLUMNS)
    ascending = [(name, "ascending") for name in PLACE]
    return table.sort_by(ascending)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p of the exact McNemar test.

    If the models recite equally often, a text that only one of them recites is as likely to be the
    first's as the second's, like heads and tails.

    Args:
        only_first, only_second: how many texts only one of them recites.

    >>> mcnemar(5, 0)
    0.0625
    """
    discordant = only_first + only_second
    if not discordant:
        return 1.0
    return float(binomtest(only_first, discordant).pvalue)


def write(result: Result, output_dir: str | Path) -> Path:
    """Write compare.json and compare.md to a new or empty folder.

    Raises:
        FileExistsError: an output_dir that is not empty.
    """
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"{output} exists and is not an empty folder; choose another output folder or remove "
            "it"
        )
    output.mkdir(parents=True, exist_ok=True)
    as_json = output / "compare.json"
    as_json.write_text(dumps(result), encoding="utf-8")
    as_markdown = output / "compare.md"
    as_markdown.write_text(markdown(result), encoding="utf-8")
    return output


def rows(result: Result) -> list[Row]:
    """Split, figure, first, second and difference, as text."""
    lines: list[Row] = []
    for split, values in result["splits"].items():
        texts = SPLITS[split]
        match = values["exact_match"]
        of_all = f"of {match['n']:,}"
        first = f"{match['first']:,} {of_all}"
        second = f"{match['second']:,} {of_all}"
        p = f"p = {match['p']:.2g}"
        lines.append((texts, "exact match", first, second, p))
        for name in MEANS:
            means = values[name]
            first = decimals(means["first"])
            second = decimals(means["second"])
            change: Figure = means["difference"]
            written = str(change)
            # A figure writes its own minus, but no plus.
            if change.value is not None and change.value > 0:
                written = f"+{written}"
            lines.append((texts, name, first, second, written))
    return lines


def table(result: Result) -> Table:
    """The comparison for the terminal, at most 80 columns if names have up to 12 letters."""
    shown = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption_justify="left",
        caption="difference: second - first, paired, with its 95% interval over documents",
    )
    for heading in ("texts", "figure", *_names(result), "difference"):
        # As a Text, so that brackets in a name are no markup.
        name = Text(heading, overflow="ellipsis")
        shown.add_column(name, no_wrap=True, max_width=30)
    for row in rows(result):
        shown.add_row(*row)
    return shown


def markdown(result: Result) -> str:
    """The comparison for a pull request."""
    # Text from checkpoints must not be read as markup.
    first, second = map(literal, _names(result))
    heading = ["texts", "figure", first, second, "difference, paired, 95% interval"]
    sentence = plain(result["sentence"], 1000)
    lines = [
        f"## goldfish compare: {first} and {second}\n",
        f"{literal(sentence)}\n",
        *table_lines(heading, rows(result)),
    ]
    return "\n".join(lines)


def _names(result: Result) -> tuple[str, str]:
    """The names of both audits, which are untrusted, with escapes made visible."""
    first = result["first"]["name"]
    second = result["second"]["name"]
    return plain(first), plain(second)


def _require_same(
    audits: tuple[Audit, Audit],
    tables: tuple[pa.Table, pa.Table],
) -> None:
    """ValueError for audits whose windows differ, in place or in tokens."""
    first, second = map(_questions, tables)
    others = []
    for place in first.keys() | second.keys():
        if first.get(place) != second.get(place):
            others.append(place)
    if others:
        a, b = audits
        split, index, offset = min(others)
        raise ValueError(
            f"{a.folder} and {b.folder} are audits of different windows: "
            f"{counted(len(others), 'window')} in one of them only or with other tokens, the first "
            f"at {split} row {index}, offset {offset}; only the same windows can be paired: audit "
            "both checkpoints with the same files, lengths, offsets and tokenizer"
        )


def _questions(table: pa.Table) -> dict[Place, list[Any]]:
    """The tokens of windows by place. A chat has one window for each turn at one place."""
    questions: dict[Place, list[Any]] = {}
    windows = table.select([*PLACE, *QUESTION])
    for row in windows.to_pylist():
        place = row["split"], row["index"], row["offset"]
        tokens = row["prefix_ids"], row["suffix_ids"]
        of_place = questions.setdefault(place, [])
        of_place.append(tokens)
    return questions


def _paired(first: pa.Table, second: pa.Table) -> dict[str, Any]:
    """The figures of one split, from two tables whose rows are pairs."""
    numbers = first["document"].to_numpy()
    # For each window its document, numbered from 0 without gaps.
    documents: Codes
    _, documents = np.unique(numbers, return_inverse=True)
    first_hits = np.bincount(documents, _column(first, "exact_match"))
    second_hits = np.bincount(documents, _column(second, "exact_match"))
    # A document is recited if any of its windows is: (documents,) for each model.
    by_first = first_hits > 0
    by_second = second_hits > 0
    # A document that both recite, or neither, tells nothing about which model recites more.
    only_first = int(np.sum(by_first & ~by_second))
    only_second = int(np.sum(by_second & ~by_first))
    n = len(by_first)
    change = by_second.astype(np.float64) - by_first
    result: dict[str, Any] = {"n": len(first), "documents": n}
    result["exact_match"] = {
        "n": n,
        "first": int(by_first.sum()),
        "second": int(by_second.sum()),
        "only_first": only_first,
        "only_second": only_second,
        "p": mcnemar(only_first, only_second),
        "difference": difference(change, np.arange(n)),
    }
    for name in MEANS:
        a = _column(first, name)
        b = _column(second, name)
        result[name] = {
            "first": float(a.mean()),
            "second": float(b.mean()),
            # The windows of a document are not independent: they count as one.
            "difference": difference(b - a, documents),
        }
    return result


def _column(table: pa.Table, name: str) -> Floats:
    """A figure of each window, float64 (windows,); "nll" is the mean over its suffix."""
    if name == "nll":
        lengths = pc.list_value_length(table["suffix_ids"])
        means: Floats = sums(table, name) / lengths.to_numpy()
        return means
    values = table[name].to_numpy()
    return np.asarray(values, dtype=np.float64)


def _sentence(first: str, second: str, splits: Mapping[str, Any]) -> str:
    """Which of two models recites fewer texts: members, if there are any."""
    split = "heldout"
    texts = "held-out text"
    if "members" in splits:
        split = "members"
        texts = "member text"
    match = splits[split]["exact_match"]
    total = counted(match["n"], texts)
    of_first = f"{first} recites {match['first']:,}"
    of_second = f"{second} {match['second']:,}"
    counts = f"{of_first}, {of_second} of {total}"
    p = f"McNemar p = {match['p']:.2g}"
    if match["p"] >= SIGNIFICANT:
        return f"{counts}: the difference may be chance ({p})"
    # What both recite does not count.
    fewer = first
    if match["only_first"] > match["only_second"]:
        fewer = second
    return f"{counts}: {fewer} recites fewer ({p})"
