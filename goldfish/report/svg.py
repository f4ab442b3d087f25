"""A matplotlib figure -> inline SVG that holds no text from the data and takes its colours from the
page."""

import io
import re
from collections.abc import Callable
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

# Points, which are CSS pixels on the page: report.css shows every plot in this width, so that all
# labels have one size.
WIDTH = 420
LEFT, RIGHT, BOTTOM, TOP = 66, 16, 46, 10  # margins, for ticks and labels
COLOURS = 8  # --c0, --c1, ... in report.css; more audits or attacks begin again
# Colours that stand for CSS variables: matplotlib writes them, _inline turns them into var(--...).
# So a plot turns dark with the page, and is dark on paper.
INK, LINE, HELDOUT, DROPPED, MISS = (f"#00000{i}" for i in range(1, 6))
_NAMES = {
    INK: "ink",
    LINE: "line",
    HELDOUT: "heldout",
    DROPPED: "dropped",
    MISS: "miss",
}
_SERIES = 16  # the last two digits of the first model's stand-in, #000010
_FONT = 13
_STYLE = {
    "svg.fonttype": "none",
    "font.family": ["sans-serif"],
    "font.size": _FONT,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.axisbelow": True,
    "axes.labelcolor": INK,
    "axes.labelsize": _FONT,
    "xtick.labelsize": _FONT,
    "ytick.labelsize": _FONT,
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
    """The stand-in for the colour of the i-th model, --c0 to --c7.

    >>> colour(0), colour(9)
    ('#000010', '#000011')
    """
    return f"#0000{i % COLOURS + _SERIES:02x}"


def percent(value: float, _: int) -> str:
    """For an axis."""
    if value == 0 or value >= 0.001:
        return f"{100 * value:g}%"
    return f"{100 * value:.0e}%"


def power_of_ten(log10: float) -> str:
    """10^log10 for people: 0.98, 0.0031, 12,000, 10⁻⁵³."""
    if log10 == float("-inf"):
        return "0"
    if -4 < log10 < 5:
        return f"{10**log10:,.0f}" if log10 >= 1 else f"{10**log10:.2g}"
    raised = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return "10" + f"{log10:.0f}".translate(raised)


def svg(
    name: str, label: str, draw: Callable[[Any], None], height: int = 230
) -> Markup:
    """Draws WIDTH x `height` points; the y axis shows shares unless `draw` changes it.

    Args:
        name: no two figures share one.
        label: what the plot shows, for those who do not see it.
        draw: draws on the axes that it is given.
    """
    # A salt per figure: equal ids in two figures of one page would be invalid.
    with rc_context({**_STYLE, "svg.hashsalt": f"goldfish-{name}"}):
        figure = Figure(figsize=(WIDTH / 72, height / 72))  # inches
        # Placed by hand: a layout engine takes half of the time.
        width_inside = (WIDTH - LEFT - RIGHT) / WIDTH
        height_inside = (height - BOTTOM - TOP) / height
        box = (LEFT / WIDTH, BOTTOM / height, width_inside, height_inside)
        axes: Any = figure.add_axes(box)
        axes.yaxis.set_major_formatter(percent)
        draw(axes)
        file = io.StringIO()
        # No date: the same audits give the same bytes.
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _inline(file.getvalue(), label)


def _inline(drawn: str, label: str) -> Markup:
    """What is inside the <svg> that matplotlib wrote, in one of our own."""
    body = drawn[drawn.index("<svg") :]
    box = re.search(r'viewBox="[^"]*"', body)
    body = body[body.index(">") + 1 :]
    # Comments, metadata and styles: the page has its own.
    unwanted = r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>"
    body = re.sub(unwanted, "", body, flags=re.DOTALL)
    # Of the ids, those that something refers to: "#" also begins a colour, which keeps no id.
    used = set(re.findall(r"#(\w+)", body))

    def kept_if_used(match: re.Match[str]) -> str:
        return match[0] if match[1] in used else ""

    body = re.sub(r' id="([\w.]+)"', kept_if_used, body)
    body = body.replace("xlink:href", "href")
    # The size of a font, and the page's own family.
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", body)
    body = re.sub(r" font-family: [^;\"]*;", "", body)
    # Two decimals of coordinates, which are most of the bytes; not the labels of ticks.
    body = re.sub(r'(?<=[ "(-])(\d+\.\d\d)\d+', r"\1", body)
    for stand_in, variable in _NAMES.items():
        body = body.replace(stand_in, f"var(--{variable})")

    def variable_of(match: re.Match[str]) -> str:
        return f"var(--c{int(match[1], 16) - _SERIES})"

    body = re.sub(r"#0000(1[0-9a-f])\b", variable_of, body)
    view_box = box[0] if box else ""
    return Markup(f'<svg {view_box} role="img" aria-label="{label}">{body.strip()}')
