"""The audit's numbers in the terminal."""

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text


def summary_table(summaries: Iterable[dict[str, Any]]) -> Table:
    """One row a checkpoint and split, 78 columns wide for names of up to eight letters."""
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


def _rate(value: dict[str, Any] | None) -> str:
    return f"{value['rate']:.3f}" if value else "-"
