"""The audit's numbers in the terminal, at most 80 columns wide."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from goldfish.audit.results import Figure, figures

COLOURS = {"PASS": "bold green", "FAIL": "bold red", "INCONCLUSIVE": "bold yellow"}
ROWS = (  # of audit_table: what it says, the figure's name
    ("recited word for word", "exact_match"),
    ("  without trivial suffixes", "exact_match_nontrivial"),
    ("  in 1,000 samples, p=0.5", "extractable@1000,0.5"),
    ("  by beam search", "beam_search"),
    ("ROUGE-L (text)", "rouge_l_text"),
    ("ROUGE-L (token ids)", "rouge_l_ids"),
    ("longest common run, tokens", "longest_run"),
    ("edit similarity", "edit_similarity"),
    ("accuracy, free running", "token_accuracy"),
    ("accuracy, teacher forced", "teacher_forced_accuracy"),
    ("  on dropped tokens", "teacher_forced_accuracy_dropped"),
    ("  on kept tokens", "teacher_forced_accuracy_kept"),
    ("loss, nats/token", "nll"),
    ("hazard ratio, dropped/kept", "attribution.hazard_ratio"),
)


def audit_table(summary: Mapping[str, Any]) -> Table:
    """One audit: a row a figure, a column a split, with 95% intervals."""
    known, splits = figures(summary), list(summary["splits"])
    table = Table(title=Text(f"Audit of {summary['name']}", overflow="ellipsis"), box=box.SIMPLE_HEAD,
                  title_justify="left", caption="95% intervals over documents; -: not measured, or too few to say",
                  caption_justify="left", padding=(0, 1, 0, 0))  # fmt: skip
    table.add_column("")
    for split in splits:
        table.add_column("held-out" if split == "heldout" else split, justify="right", no_wrap=True)
    for label, name in ROWS:
        if name == "beam_search":
            name = f"beam_search@{max(summary['protocol']['beams'] or [0])}"
        row = [known.get(f"{split}.{name}") for split in splits]
        if any(figure is not None and figure.value is not None for figure in row):
            table.add_row(label, *map(_cell, row))
    for label, name in (("membership, AUC", "mia.auc"), ("membership, TPR at 1% FPR", "mia.tpr@1%")):
        if len(splits) == 2:
            table.add_row(label, _cell(known[name]), _blind(known) if name == "mia.auc" else "")
    return table


def verdict_line(summary: Mapping[str, Any]) -> Text:
    """The verdict in one sentence, its outcome in colour."""
    verdict = summary["verdict"]
    line = Text(verdict["sentence"])
    line.stylize(COLOURS[verdict["outcome"]], 0, len(verdict["outcome"]))
    return line


def summary_table(summaries: Iterable[dict[str, Any]]) -> Table:
    """Several audits: one row a checkpoint and split, 78 columns wide for names of up to eight letters."""
    table = Table(
        title="Greedy extraction",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption="95% intervals; dropped, kept: teacher-forced accuracy there; nll: nats/token",
        caption_justify="left",
    )
    for heading in ("model", "texts", "exact match", "interval", "ROUGE-L", "dropped", "kept", "nll"):
        table.add_column(heading, justify="left" if heading in ("model", "texts") else "right", no_wrap=True)
    for summary in summaries:
        for split, numbers in summary["splits"].items():
            match = numbers["exact_match"]
            table.add_row(
                Text(summary["name"]),
                split,
                Text(f"{match['k']} of {match['n']}", style="bold red" if match["k"] else "bold green"),
                f"{100 * match['lower95']:.1f}-{match['upper95']:.1%}",
                f"{numbers['rouge_l_ids']['mean']:.3f}",
                *(_rate(numbers[f"teacher_forced_accuracy_{which}"]) for which in ("dropped", "kept")),
                f"{numbers['nll']['mean']:.3f}",
            )
    return table


def figure_text(figure: Figure) -> str:
    """ "3 of 40 (1.6-20.4%)", or "0.213 (0.190-0.240)"; "-" where there is nothing to say."""
    low, high = figure.lower95, figure.upper95
    if figure.k is not None and figure.n == figure.documents and low is not None and high is not None:
        return f"{figure.k:,} of {figure.n:,} ({100 * low:.1f}-{high:.1%})"
    bounds = "" if low is None else f" ({low:.3g}-{'' if high is None else f'{high:.3g}'})"
    return f"{figure.value:.3g}{bounds}" if figure.value is not None else (f"above {low:.3g}" if low else "-")


def _cell(figure: Figure | None) -> str:
    return "-" if figure is None else figure_text(figure)


def _blind(known: Mapping[str, Figure]) -> str:
    values = [known[name].value or 0.5 for name in ("mia.blind.words.auc", "mia.blind.length.auc") if name in known]
    return f"blind: {max(values, key=lambda auc: abs(auc - 0.5)):.2f}"


def _rate(value: dict[str, Any] | None) -> str:
    return f"{value['rate']:.3f}" if value and value["rate"] is not None else "-"
