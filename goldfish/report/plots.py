"""The plots. A colour is a model; members are solid, held-out texts dashed or grey."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from goldfish.audit.sampling import log10_samples_needed, setting_name
from goldfish.report.load import View
from goldfish.report.svg import DROPPED, HELDOUT, INK, LINE, MISS, colour, count, percent, svg

BINS = 25
ROWS = 48  # windows in the plot of divergences
MOST_SAMPLES = 6  # log10
LEAST_NLL, MOST_NLL = 1e-3, 30.0  # the ends of the axis of losses; what lies beyond is counted at the ends
DASHES = {"members": "-", "heldout": (0, (4, 3))}
BLIND = {"words": (0, (5, 2)), "length": (0, (1, 1.5))}


def rouge_histograms(views: Sequence[View]) -> list[Markup]:
    """One panel a model, all with the same scales: share of windows by ROUGE-L."""

    def shares(table: pa.Table) -> Any:
        counts = np.histogram(table["rouge_l_ids"].to_numpy(), BINS, (0, 1))[0]
        return counts / max(counts.sum(), 1)

    heights = [{split: shares(table) for split, table in view.of_split.items()} for view in views]
    top = max(share.max() for each in heights for share in each.values()) or 1.0

    def draw(i: int, axes: Any) -> None:
        for split, paint in (("heldout", HELDOUT), ("members", colour(i))):
            if split in views[i].splits:
                left = np.arange(BINS) / BINS
                axes.bar(left, heights[i][split], 1 / BINS, align="edge", color=paint, alpha=0.65, linewidth=0)
        axes.set(xlim=(0, 1), ylim=(0, top * 1.05), xlabel="ROUGE-L of token ids", ylabel="share of windows")

    label = "Histogram of ROUGE-L, members in colour and held-out in grey"
    return [svg(f"histogram-{i}", label, partial(draw, i)) for i in range(len(views))]


def sweep(views: Sequence[View], key: str, at: str, label: str) -> Markup | None:
    """Exact match against `at` of the summary's list `key`, with its 95% intervals; None where no list has two."""
    lists = [(i, split, view.audit.summary["splits"][split][key]) for i, view in enumerate(views)
             for split in view.splits]  # fmt: skip
    if all(len(points) < 2 for _, _, points in lists):
        return None

    def draw(axes: Any) -> None:
        for i, split, points in lists:
            known = sorted((point for point in points if point["exact_match"].n), key=lambda point: point[at])
            x = [point[at] for point in known]
            rate, low, high = (
                [getattr(point["exact_match"], name) for point in known] for name in ("value", "lower95", "upper95")
            )
            axes.plot(x, rate, color=colour(i), linestyle=DASHES[split], linewidth=2, marker="o", markersize=4,
                      clip_on=False)  # fmt: skip
            if split == "members":
                axes.fill_between(x, low, high, color=colour(i), alpha=0.15, linewidth=0)
        axes.set(ylim=(0, 1), xlabel=label, ylabel="verbatim")

    return svg(key, f"Share of windows recited against {label}", draw)


def extractable(views: Sequence[View]) -> list[tuple[str, Markup]]:
    """For each sampling setting: the share of windows that n samples hold with probability p, p = 0.5 and 0.999."""
    settings = [list(map(setting_name, view.audit.summary["protocol"]["sampling"])) for view in views]

    def draw(name: str, axes: Any) -> None:
        windows = [(i, split, view.of_split[split]) for i, view in enumerate(views) for split in view.splits]
        for i, split, table in windows:
            if name not in settings[i] or not len(table):
                continue
            log_p = pc.list_element(table["log_p"], settings[i].index(name)).to_numpy()
            for p, width in ((0.5, 2), (0.999, 0.9)):
                needed = np.sort(log10_samples_needed(log_p, p))
                needed = needed[needed <= MOST_SAMPLES]
                x = 10 ** np.concatenate([[0], needed, [MOST_SAMPLES]])
                y = np.concatenate([np.arange(len(needed) + 1), [len(needed)]]) / len(table)
                axes.plot(x, y, color=colour(i), drawstyle="steps-post", linestyle=DASHES[split], linewidth=width,
                          clip_on=False)  # fmt: skip
        axes.set(xscale="log", xlim=(1, 10**MOST_SAMPLES), ylim=(0, 1), xlabel="samples n of each window",
                 ylabel="extractable")  # fmt: skip
        axes.xaxis.set_major_formatter(count)

    label = "Share of windows extracted by n samples, with probability 0.5 and 0.999"
    names = dict.fromkeys(name for each in settings for name in each)
    return [(name, svg(f"samples-{i}", label, partial(draw, name))) for i, name in enumerate(names)]


def divergences(views: Sequence[View]) -> list[Markup | None]:
    """For each model, member windows as bars as long as the recitation, the dropped tokens reached, and the end."""
    tables = [view.of_split["members"] for view in views]
    longest = max(pc.max(pc.list_value_length(table["suffix_tokens"])).as_py() or 0 for table in tables)

    def draw(i: int, windows: Sequence[Any], axes: Any) -> None:
        runs, reached, stops = [], [], {True: [], False: []}  # type: ignore[var-annotated]
        for y, window in enumerate(windows):
            first, dropped = window["first_divergence"], window["dropped"] or ()
            runs.append([(0, y), (first, y)])
            reached += [[(t + 0.5, y - 0.42), (t + 0.5, y + 0.42)] for t in np.flatnonzero(dropped[:first])]
            if not window["exact_match"]:
                stops[bool(dropped) and dropped[first]].append([(first + 0.5, y - 0.48), (first + 0.5, y + 0.48)])
        thick = min(7.0, 190 / max(len(windows), 8))
        for strokes, paint, width, alpha in (
            (runs, colour(i), thick * 0.75, 0.4), (reached, DROPPED, 1.2, 1), (stops[False], INK, 2.5, 1),
            (stops[True], MISS, 2.5, 1),
        ):  # fmt: skip
            # One line with gaps, which is one element of the SVG.
            ends = np.pad(np.array(strokes, dtype=float).reshape(-1, 2, 2), ((0, 0), (0, 1), (0, 0)),
                          constant_values=np.nan)  # fmt: skip
            axes.plot(*ends.reshape(-1, 2).T, color=paint, linewidth=width, alpha=alpha, solid_capstyle="butt")
        axes.set(xlim=(0, longest + 1), ylim=(len(windows) - 0.4, -0.6), yticks=[], ylabel="windows",
                 xlabel="tokens of the suffix")  # fmt: skip
        axes.grid(visible=False)

    drawn: list[Markup | None] = []
    label = "How far each member window is recited, the dropped tokens on the way, and where it diverges"
    for i, table in enumerate(tables):
        ordered = np.argsort(-table["first_divergence"].to_numpy(), kind="stable")
        places = np.unique(np.linspace(0, max(len(ordered) - 1, 0), ROWS).round().astype(int))[: len(ordered)]
        columns = table.select(["first_divergence", "dropped", "exact_match"])
        chosen = columns.take(pa.array(ordered[places])).to_pylist()
        drawn.append(svg(f"divergences-{i}", label, partial(draw, i, chosen), 280) if chosen else None)
    return drawn


def losses(views: Sequence[View]) -> list[Markup | None]:
    """For each model with a rule: share of dropped and of kept tokens by loss; members filled, held-out outlined."""
    edges = np.geomspace(LEAST_NLL, MOST_NLL, 41)

    def draw(i: int, axes: Any) -> None:
        for split, table in views[i].of_split.items():
            ruled = table.filter(pc.is_valid(table["dropped"]))
            nll = pc.list_flatten(ruled["nll"]).to_numpy().clip(LEAST_NLL, MOST_NLL)
            dropped = pc.list_flatten(ruled["dropped"]).to_numpy(zero_copy_only=False).astype(bool)
            style: dict[str, Any] = {"fill": True, "alpha": 0.55, "linewidth": 0}
            if split == "heldout":
                style = {"linestyle": DASHES[split], "linewidth": 1.4}
            for these, paint in ((nll[~dropped], colour(i)), (nll[dropped], DROPPED)):
                if len(these):
                    axes.stairs(np.histogram(these, edges)[0] / len(these), edges, color=paint, **style)
        axes.set(xscale="log", xlim=(LEAST_NLL, MOST_NLL), ylim=(0, None), ylabel="share of tokens",
                 xlabel="loss of the token, nats")  # fmt: skip
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")

    label = "Histogram of the loss of dropped and of kept tokens"
    ruled = [pc.any(pc.is_valid(view.of_split["members"]["dropped"])).as_py() for view in views]
    return [svg(f"losses-{i}", label, partial(draw, i)) if known else None for i, known in enumerate(ruled)]


def roc(views: Sequence[View]) -> list[Markup | None]:
    """For each model with both splits, on log-log axes: the headline attack thick, the others thin, all in the model's
    colour; the blind baselines dashed and dotted."""

    def draw(i: int, membership: Any, axes: Any) -> None:
        best = (membership["headline"] or {}).get("attack")
        curves: list[tuple[Any, Any, str, float]]
        curves = [(attack["roc"], "-", colour(i), 2.6 if name == best else 0.8)
                  for name, attack in membership["attacks"].items()]  # fmt: skip
        curves += [(blind["roc"], BLIND[name], INK, 1.4) for name, blind in membership["blind"].items()]
        positive = [share for points, *_ in curves for point in points for share in point if share > 0]
        least = 10 ** np.floor(np.log10(min(0.1, *positive)) + 1e-9)
        axes.plot([least, 1], [least, 1], color=LINE, linestyle=":", linewidth=1.5)
        for points, dashes, paint, width in curves:
            x, y = np.maximum(points, least).T
            axes.plot(x, y, color=paint, drawstyle="steps-post", linestyle=dashes, linewidth=width)
        axes.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1.02), xlabel="false positive rate",
                 ylabel="true positive rate")  # fmt: skip
        axes.grid(visible=True, axis="both")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(percent)

    label = "ROC of the membership attacks, both axes logarithmic"
    known = [view.audit.summary["membership"] for view in views]
    return [svg(f"roc-{i}", label, partial(draw, i, each), 340) if each else None for i, each in enumerate(known)]
