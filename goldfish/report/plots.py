"""The plots. A colour is a model; members are solid, held-out texts dashed or grey."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from goldfish.report.load import View
from goldfish.report.svg import DROPPED, HELDOUT, INK, MISS, colour, power_of_ten, svg

BINS = 25
ROWS = 48  # windows in the plot of divergences
DASHES = {"members": "-", "heldout": (0, (4, 3))}


def rouge_histograms(views: Sequence[View]) -> list[Markup]:
    """One panel a model, all with the same scales: share of windows by ROUGE-L."""

    def shares(table: pa.Table) -> Any:
        counts = np.histogram(table["rouge_l_ids"].to_numpy(), BINS, (0, 1))[0]
        return counts / max(counts.sum(), 1)

    heights = [
        {split: shares(table) for split, table in view.of_split.items()}
        for view in views
    ]
    top = max(share.max() for each in heights for share in each.values()) or 1.0

    def draw(i: int, axes: Any) -> None:
        for split, paint in (("heldout", HELDOUT), ("members", colour(i))):
            if split in views[i].splits:
                left = np.arange(BINS) / BINS
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
    return _sweep(views, "prefix", "tokens of prefix given", "prefix_sweep")


def by_offset(views: Sequence[View]) -> Markup | None:
    return _sweep(
        views, "offset", "tokens from the start of the document", "offset_sweep"
    )


def by_samples(views: Sequence[View]) -> dict[str, Markup | None]:
    """For each sampling setting: the texts among n samples with a probability of one half."""
    rows = [
        each for view in views for each in view.audit.rows.select(figure="extractable")
    ]
    settings = dict.fromkeys(each.setting for each in rows if each.x is not None)
    return {
        setting: _sweep(
            views, f"samples-{i}", "samples of each text", "extractable", setting
        )
        for i, setting in enumerate(settings)
    }


def _sweep(
    views: Sequence[View], name: str, label: str, figure: str, setting: str = ""
) -> Markup | None:
    """Share of texts recited, with its 95% interval, against x; None if no view has two points."""
    lists = []
    for i, view in enumerate(views):
        for split in view.splits:
            rows = view.audit.rows.select(split=split, figure=figure, setting=setting)
            points = {each.x: each for each in rows if each.x is not None and each.n}
            lists.append((i, split, dict(sorted(points.items()))))
    if all(len(points) < 2 for _, _, points in lists):
        return None

    def draw(axes: Any) -> None:
        for i, split, points in lists:
            rate, low, high = (
                [getattr(figure, field) for figure in points.values()]
                for field in ("value", "low", "high")
            )
            x = list(points)
            axes.plot(
                x,
                rate,
                color=colour(i),
                linestyle=DASHES[split],
                linewidth=2,
                marker="o",
                markersize=4,
                clip_on=False,
            )
            if split == "members":
                axes.fill_between(
                    x, low, high, color=colour(i), alpha=0.15, linewidth=0
                )
        axes.set(ylim=(0, 1), xlabel=label, ylabel="verbatim")
        if label.startswith("samples"):
            axes.set(xscale="log")
            axes.xaxis.set_major_formatter(lambda n, _: power_of_ten(np.log10(n)))

    return svg(name, f"Share of texts recited against {label}", draw)


def divergences(views: Sequence[View]) -> list[Markup | None]:
    """For each model, member windows as bars as long as the recitation, the dropped tokens reached, and the end."""
    tables = [view.of_split["members"] for view in views]
    longest = max(
        pc.max(pc.list_value_length(table["suffix_tokens"])).as_py() or 0
        for table in tables
    )

    def draw(i: int, windows: Sequence[Any], axes: Any) -> None:
        reached, stops = [], {True: [], False: []}  # type: ignore[var-annotated]
        for y, window in enumerate(windows):
            first, dropped = window["first_divergence"], window["dropped"] or ()
            reached += [(t + 0.5, y) for t in np.flatnonzero(dropped[:first])]
            if not window["exact_match"]:
                stops[bool(dropped) and dropped[first]].append((first + 0.5, y))
        thick = min(7.0, 190 / max(len(windows), 8))
        runs = [window["first_divergence"] for window in windows]
        axes.hlines(
            np.arange(len(windows)),
            0,
            runs,
            color=colour(i),
            linewidth=thick * 0.75,
            alpha=0.4,
        )
        for places, half, paint, width in (
            (reached, 0.42, DROPPED, 1.2),
            (stops[False], 0.48, INK, 2.5),
            (stops[True], 0.48, MISS, 2.5),
        ):
            x, y = np.reshape(places, (-1, 2)).T
            axes.vlines(x, y - half, y + half, color=paint, linewidth=width)
        axes.set(
            xlim=(0, longest + 1),
            ylim=(len(windows) - 0.4, -0.6),
            yticks=[],
            ylabel="windows",
            xlabel="tokens of the suffix",
        )
        axes.grid(visible=False)

    drawn: list[Markup | None] = []
    label = "How far each member window is recited, the dropped tokens on the way, and where it diverges"
    for i, table in enumerate(tables):
        ordered = np.argsort(-table["first_divergence"].to_numpy(), kind="stable")
        places = np.unique(
            np.linspace(0, max(len(ordered) - 1, 0), ROWS).round().astype(int)
        )[: len(ordered)]
        columns = table.select(["first_divergence", "dropped", "exact_match"])
        chosen = columns.take(pa.array(ordered[places])).to_pylist()
        drawn.append(
            svg(f"divergences-{i}", label, partial(draw, i, chosen), 280)
            if chosen
            else None
        )
    return drawn
