"""The plots. A colour is a model; members are solid, held-out texts dashed or grey."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup
from numpy.typing import NDArray

from goldfish.audit.intervals import Figure
from goldfish.report.load import View
from goldfish.report.svg import DROPPED, HELDOUT, INK, MISS, colour, power_of_ten, svg

BINS = 25
ROWS = 48  # windows in the plot of divergences
DASHES = {"members": "-", "heldout": (0, (4, 3))}
Place = tuple[float, int]  # a token of the suffix, a window
Curve = tuple[int, str, list[Figure]]  # the place of its model, its split, its points


def rouge_histograms(views: Sequence[View]) -> list[Markup]:
    """One panel a model, all with the same scales: share of windows by ROUGE-L."""

    def shares_of(table: pa.Table) -> NDArray[np.float64]:
        counts, _ = np.histogram(table["rouge_l_ids"].to_numpy(), BINS, (0, 1))
        shares: NDArray[np.float64] = counts / max(counts.sum(), 1)
        return shares

    heights = []
    for view in views:
        tables = view.of_split.items()
        heights.append({split: shares_of(table) for split, table in tables})
    # One scale for all panels, or the eye compares areas that mean different shares.
    tops = [share.max() for each in heights for share in each.values()]
    top = max(tops) or 1.0

    def draw(i: int, axes: Any) -> None:
        left = np.arange(BINS) / BINS
        # Members are drawn over held-out texts, and both are transparent.
        paints = {
            "heldout": HELDOUT,
            "members": colour(i),
        }
        for split, paint in paints.items():
            if split not in views[i].splits:
                continue
            axes.bar(
                left,
                heights[i][split],
                1 / BINS,
                align="edge",
                color=paint,
                alpha=0.65,
                linewidth=0,
            )
        axes.set(
            xlim=(0, 1),
            ylim=(0, top * 1.05),
            xlabel="ROUGE-L of token ids",
            ylabel="share of windows",
        )

    label = "Histogram of ROUGE-L, members in colour and held-out in grey"
    return [svg(f"histogram-{i}", label, partial(draw, i)) for i in range(len(views))]


def by_prefix(views: Sequence[View]) -> Markup | None:
    """Share of texts recited, by the number of tokens given."""
    return _sweep(views, "prefix", "tokens of prefix given", "prefix_sweep")


def by_offset(views: Sequence[View]) -> Markup | None:
    """Share of texts recited, by the place in the document."""
    label = "tokens from the start of the document"
    return _sweep(views, "offset", label, "offset_sweep")


def by_samples(views: Sequence[View]) -> dict[str, Markup | None]:
    """For each sampling setting: the texts among n samples with a probability of one half."""
    settings: dict[str, None] = {}  # in the order of the first audit
    for view in views:
        for each in view.audit.rows.select(figure="extractable"):
            if each.x is not None:
                settings[each.setting] = None
    label = "samples of each text"
    plots = {}
    for i, setting in enumerate(settings):
        name = f"samples-{i}"
        plots[setting] = _sweep(views, name, label, "extractable", setting)
    return plots


def _sweep(
    views: Sequence[View],
    name: str,
    label: str,
    figure: str,
    setting: str = "",
) -> Markup | None:
    """Share of texts recited, with its 95% interval, against x; None if no view has two points."""
    curves: list[Curve] = []
    for i, view in enumerate(views):
        for split in view.splits:
            rows = view.audit.rows.select(split=split, figure=figure, setting=setting)
            # One point for each x: a curve that is also a single number has that without x.
            points = {each.x: each for each in rows if each.x is not None and each.n}
            in_order = [points[x] for x in sorted(points)]
            curves.append((i, split, in_order))
    if all(len(points) < 2 for _, _, points in curves):
        return None

    def draw(axes: Any) -> None:
        for curve in curves:
            _draw_curve(axes, *curve)
        axes.set(ylim=(0, 1), xlabel=label, ylabel="verbatim")
        if label.startswith("samples"):  # 1 to a million
            axes.set(xscale="log")
            axes.xaxis.set_major_formatter(lambda n, _: power_of_ten(np.log10(n)))
        else:
            axes.xaxis.get_major_locator().set_params(integer=True)  # tokens

    return svg(name, f"Share of texts recited against {label}", draw)


def _draw_curve(axes: Any, i: int, split: str, points: Sequence[Figure]) -> None:
    x = [each.x for each in points]
    axes.plot(
        x,
        [each.value for each in points],
        color=colour(i),
        linestyle=DASHES[split],
        linewidth=2,
        marker="o",
        markersize=4,
        # Points at 0% and 100% would be cut in half by the frame.
        clip_on=False,
    )
    if split == "members":
        axes.fill_between(
            x,
            [each.low for each in points],
            [each.high for each in points],
            color=colour(i),
            alpha=0.15,
            linewidth=0,
        )


def divergences(views: Sequence[View]) -> list[Markup | None]:
    """For each model, how far its member windows are recited; None for a model without members.

    A window is a bar as long as the recitation, with the dropped tokens reached, and the end.
    """
    tables = [view.of_split["members"] for view in views]
    longest = 0
    for table in tables:
        lengths = pc.list_value_length(table["suffix_tokens"])
        longest = max(longest, pc.max(lengths).as_py() or 0)
    label = (
        "How far each member window is recited, the dropped tokens on the way, and where it "
        "diverges"
    )
    drawn: list[Markup | None] = []
    for i, table in enumerate(tables):
        chosen = _evenly_chosen(table)
        if not chosen:
            drawn.append(None)
            continue
        draw = partial(_draw_divergences, i, chosen, longest)
        drawn.append(svg(f"divergences-{i}", label, draw, 280))
    return drawn


def _evenly_chosen(table: pa.Table) -> list[Any]:
    """At most ROWS windows, evenly spaced from the longest recitation to the shortest."""
    runs = table["first_divergence"].to_numpy()
    ordered = np.argsort(-runs, kind="stable")
    if not len(ordered):
        return []
    places = np.linspace(0, len(ordered) - 1, ROWS).round().astype(int)
    # Of fewer windows than ROWS, each once.
    rows = ordered[np.unique(places)]
    columns = table.select(["first_divergence", "dropped", "exact_match"])
    chosen: list[Any] = columns.take(pa.array(rows)).to_pylist()
    return chosen


def _draw_divergences(
    i: int,
    windows: Sequence[Any],
    longest: int,
    axes: Any,
) -> None:
    # (token, window) of what is marked: dropped tokens that were recited all the same, and the
    # ends of recitations at a kept token and at a dropped one. A token is drawn at its middle.
    reached: list[Place] = []
    kept_ends: list[Place] = []
    dropped_ends: list[Place] = []
    for y, window in enumerate(windows):
        end = window["first_divergence"]
        dropped = window["dropped"] or ()
        reached += [(t + 0.5, y) for t in np.flatnonzero(dropped[:end])]
        if window["exact_match"]:
            continue
        if dropped and dropped[end]:
            dropped_ends.append((end + 0.5, y))
        else:
            kept_ends.append((end + 0.5, y))
    # Three quarters of the plot's height are bars; few windows have no thicker ones.
    axes.hlines(
        np.arange(len(windows)),
        0,
        [window["first_divergence"] for window in windows],
        color=colour(i),
        linewidth=min(5.0, 140 / len(windows)),
        alpha=0.4,
    )
    _draw_ticks(axes, reached, 0.42, DROPPED, 1.2)
    _draw_ticks(axes, kept_ends, 0.48, INK, 2.5)
    _draw_ticks(axes, dropped_ends, 0.48, MISS, 2.5)
    axes.set(
        xlim=(0, longest + 1),
        ylim=(len(windows) - 0.4, -0.6),
        yticks=[],
        xlabel="tokens of the suffix",
        ylabel="windows",
    )
    axes.grid(visible=False)


def _draw_ticks(
    axes: Any,
    places: Sequence[Place],
    half: float,
    paint: str,
    width: float,
) -> None:
    """Vertical ticks at the places, from `half` a row above to `half` a row below."""
    x, y = np.reshape(places, (-1, 2)).T
    axes.vlines(
        x,
        y - half,
        y + half,
        color=paint,
        linewidth=width,
    )
