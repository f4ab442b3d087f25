"""The style of every picture that recipes and benchmarks draw."""

from contextlib import AbstractContextManager
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

STYLE = {
    # Text stays text, and equal figures give equal files.
    "svg.fonttype": "none",
    "svg.hashsalt": "goldfish",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def style() -> AbstractContextManager[None]:
    """A context in which figures are drawn and saved."""
    context: AbstractContextManager[None] = rc_context(STYLE)
    return context


def save(figure: Figure, path: Path) -> None:
    """Write an SVG file without the date or anything else that differs between two runs."""
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
