"""A matplotlib figure -> inline SVG that holds no text from the data and takes its colours from the page."""

import io
import re
from collections.abc import Callable
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

WIDTH = 420
COLOURS = 8  # --c0, --c1, ... in report.css; more audits or attacks begin again
# Colours that stand for CSS variables: matplotlib writes them, _inline turns them into var(--...).
INK, LINE, HELDOUT, DROPPED, MISS = (
    "#000001",
    "#000002",
    "#000003",
    "#000004",
    "#000005",
)
_NAMES = {
    INK: "ink",
    LINE: "line",
    HELDOUT: "heldout",
    DROPPED: "dropped",
    MISS: "miss",
}
_STYLE = {
    "svg.fonttype": "none",
    "font.family": ["sans-serif"],
    "font.size": 13,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.axisbelow": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 13,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}


def colour(i: int) -> str:
    return f"#0000{i % COLOURS + 16:02x}"


def percent(value: float, _: int) -> str:
    """For an axis."""
    return (
        f"{100 * value:g}%" if value == 0 or value >= 0.001 else f"{100 * value:.0e}%"
    )


def power_of_ten(log10: float) -> str:
    """10^log10 for people: 0.98, 0.0031, 12,000, 10⁻⁵³."""
    if log10 == float("-inf"):
        return "0"
    if -4 < log10 < 5:
        return f"{10**log10:,.0f}" if log10 >= 1 else f"{10**log10:.2g}"
    return "10" + f"{log10:.0f}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def svg(
    name: str, label: str, draw: Callable[[Any], None], height: int = 230
) -> Markup:
    """Draws WIDTH x `height` points, which the page scales to its width; the y axis shows shares unless `draw` changes
    it. `name`: no two figures share one."""
    # A salt per figure: equal ids in two figures of one page would be invalid.
    with rc_context({**_STYLE, "svg.hashsalt": f"goldfish-{name}"}):
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        left, right, bottom, top = (
            66 / WIDTH,
            1 - 16 / WIDTH,
            46 / height,
            1 - 10 / height,
        )
        # Placed by hand: a layout engine takes half of the time.
        axes: Any = figure.add_axes((left, bottom, right - left, top - bottom))
        axes.yaxis.set_major_formatter(percent)
        draw(axes)
        file = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _inline(file.getvalue(), label)


def _inline(drawn: str, label: str) -> Markup:
    body = drawn[drawn.index("<svg") :]
    box = re.search(r'viewBox="[^"]*"', body)
    body = body[body.index(">") + 1 :]
    body = re.sub(
        r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>",
        "",
        body,
        flags=re.DOTALL,
    )
    used = set(re.findall(r"#(\w+)", body))
    body = re.sub(
        r' id="([\w.]+)"', lambda match: match[0] if match[1] in used else "", body
    )
    body = body.replace("xlink:href", "href")
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", body)
    body = re.sub(r" font-family: [^;\"]*;", "", body)  # the page's own font
    body = re.sub(
        r'(?<=[ "(-])(\d+\.\d\d)\d+', r"\1", body
    )  # coordinates, not the labels of ticks
    for stand_in, variable in _NAMES.items():
        body = body.replace(stand_in, f"var(--{variable})")
    body = re.sub(
        r"#0000(1[0-9a-f])\b", lambda match: f"var(--c{int(match[1], 16) - 16})", body
    )
    return Markup(
        f'<svg {box[0] if box else ""} role="img" aria-label="{label}">{body.strip()}'
    )
