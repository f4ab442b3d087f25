"""The report's two plots as inline SVG. They hold no text from the data, and their colours are the page's."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from goldfish.report.load import Audit, Window

SERIES = 6  # colours in report.css; more audits begin again
# Colours that stand for CSS variables: matplotlib writes them, _inline turns them into var(--...).
_INK, _LINE, _HELDOUT = "#000001", "#000002", "#000003"
_STYLE = {
    "svg.fonttype": "none",
    "font.family": ["sans-serif"],
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "axes.labelsize": 11,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.7,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "ytick.major.size": 0,
    "text.parse_math": False,
}
BINS = 25


def rouge_histograms(audits: Sequence[Audit]) -> list[Markup]:
    """One panel an audit, with the same scales: share of windows by ROUGE-L, members in colour, held-out in grey."""
    shares = [[_shares(audit.of_split(split)) for split in ("members", "heldout")] for audit in audits]
    top = max(max(share, default=0.0) for pair in shares for share in pair) or 1.0
    left = [i / BINS for i in range(BINS)]

    def panel(i: int) -> Callable[[Any], None]:
        def draw(axes: Any) -> None:
            members, heldout = shares[i]
            if heldout:
                axes.bar(left, heldout, 1 / BINS, align="edge", color=_HELDOUT, alpha=0.55, linewidth=0)
            if members:
                axes.bar(left, members, 1 / BINS, align="edge", color=_colour(i), alpha=0.75, linewidth=0)
            axes.set(xlim=(0, 1), ylim=(0, top * 1.05), xlabel="ROUGE-L of token ids", ylabel="share of windows")
            axes.yaxis.set_major_formatter(_percent)

        return draw

    names = ", members in colour and held-out in grey"
    return [_svg(f"histogram-{i}", "Histogram of ROUGE-L" + names, (560, 210), panel(i)) for i in range(len(audits))]


def survival(audits: Sequence[Audit]) -> Markup:
    """Share of windows whose first t tokens all match, over those with t tokens: members solid, held-out dashed."""

    def draw(axes: Any) -> None:
        longest = 1
        for i, audit in enumerate(audits):
            for split, dashes in (("members", "-"), ("heldout", (0, (4, 3)))):
                shares = verbatim_shares(audit.of_split(split))
                longest = max(longest, len(shares) - 1)
                axes.plot(
                    range(len(shares)),
                    shares,
                    color=_colour(i),
                    drawstyle="steps-post",
                    linestyle=dashes,
                    linewidth=2,
                    clip_on=False,
                )
        axes.set(
            xlim=(0, longest), ylim=(0, 1), xlabel="tokens t of the suffix", ylabel="still verbatim after t tokens"
        )
        axes.yaxis.set_major_formatter(_percent)

    return _svg("survival", "Share of windows still verbatim after t tokens", (1140, 260), draw)


def verbatim_shares(windows: Sequence[Window]) -> list[float]:
    """For t = 0, 1, ...: of the windows with at least t suffix tokens, the share whose first t tokens all match."""
    lengths = [len(window.suffix_tokens) for window in windows]
    shares = []
    for t in range(max(lengths, default=-1) + 1):
        reached = [window for window, length in zip(windows, lengths, strict=True) if length >= t]
        shares.append(sum(window.first_divergence >= t for window in reached) / len(reached))
    return shares


def _shares(windows: Sequence[Window]) -> list[float]:
    counts = [0] * BINS
    for window in windows:
        counts[min(int(window.rouge_l_ids * BINS), BINS - 1)] += 1
    return [count / len(windows) for count in counts] if windows else []


def _percent(value: float, _: int) -> str:
    return f"{100 * value:.0f}%"


def _colour(i: int) -> str:
    return f"#0000{i % SERIES + 16:02x}"


def _svg(name: str, label: str, size: tuple[int, int], draw: Callable[[Any], None]) -> Markup:
    """Draws `size` points wide and high, which the page scales to its width."""
    # A salt per figure: equal ids in two figures of one page would be invalid.
    with rc_context({**_STYLE, "svg.hashsalt": f"goldfish-{name}"}):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _inline(file.getvalue(), label)


def _inline(svg: str, label: str) -> Markup:
    body = svg[svg.index("<svg") :]
    box = re.search(r'viewBox="[^"]*"', body)
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    used = set(re.findall(r"#(\w+)", body))
    body = re.sub(r' id="([\w.]+)"', lambda match: match[0] if match[1] in used else "", body)
    body = body.replace("xlink:href", "href")
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", body)
    body = re.sub(r" font-family: [^;\"]*;", "", body)  # the page's own font
    for colour, variable in ((_INK, "ink"), (_LINE, "line"), (_HELDOUT, "heldout")):
        body = body.replace(colour, f"var(--{variable})")
    body = re.sub(r"#0000(1[0-9a-f])\b", lambda match: f"var(--c{int(match[1], 16) - 16})", body)
    return Markup(f'<svg {box[0] if box else ""} role="img" aria-label="{label}">{body.strip()}')
