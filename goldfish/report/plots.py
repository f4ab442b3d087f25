"""The engineer's plots. Members are drawn solid and in the audit's colour, held-out texts dashed or in grey."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from goldfish.audit.sampling import log10_samples_needed, setting_name
from goldfish.report.load import Audit, Window
from goldfish.report.svg import HELDOUT, HOLE, INK, LINE, MISS, colour, count, percent, svg

HALF = (560, 210)
BINS = 25
ROWS = 48  # windows in the plot of divergences
MOST_SAMPLES = 6  # log10
LEAST_NLL, MOST_NLL = 1e-3, 30.0  # the ends of the axis of losses; what lies beyond is counted at the ends
_DASHES = (("members", "-"), ("heldout", (0, (4, 3))))


def rouge_histograms(audits: Sequence[Audit]) -> list[Markup]:
    """One panel an audit, with the same scales: share of windows by ROUGE-L, members in colour, held-out in grey."""
    shares = [[_shares(audit.of_split(split)) for split in ("members", "heldout")] for audit in audits]
    top = max(max(share, default=0.0) for pair in shares for share in pair) or 1.0
    left = [i / BINS for i in range(BINS)]

    def panel(i: int) -> Callable[[Any], None]:
        def draw(axes: Any) -> None:
            members, heldout = shares[i]
            if heldout:
                axes.bar(left, heldout, 1 / BINS, align="edge", color=HELDOUT, alpha=0.55, linewidth=0)
            if members:
                axes.bar(left, members, 1 / BINS, align="edge", color=colour(i), alpha=0.75, linewidth=0)
            axes.set(xlim=(0, 1), ylim=(0, top * 1.05), xlabel="ROUGE-L of token ids", ylabel="share of windows")
            axes.yaxis.set_major_formatter(percent)

        return draw

    names = ", members in colour and held-out in grey"
    return [svg(f"histogram-{i}", "Histogram of ROUGE-L" + names, HALF, panel(i)) for i in range(len(audits))]


def survival(audits: Sequence[Audit]) -> Markup:
    """Share of windows whose first t tokens all match, over those with t tokens."""

    def draw(axes: Any) -> None:
        longest = 1
        for i, audit in enumerate(audits):
            for split, dashes in _DASHES:
                shares = verbatim_shares(audit.of_split(split))
                longest = max(longest, len(shares) - 1)
                axes.plot(range(len(shares)), shares, color=colour(i), drawstyle="steps-post", linestyle=dashes,
                          linewidth=2, clip_on=False)  # fmt: skip
        axes.set(xlim=(0, longest), ylim=(0, 1), xlabel="tokens t of the suffix", ylabel="verbatim after t tokens")
        axes.yaxis.set_major_formatter(percent)

    return svg("survival", "Share of windows still verbatim after t tokens", HALF, draw)


def sweep(audits: Sequence[Audit], key: str, at: str, label: str) -> Markup | None:
    """Exact match against `at` of the summary's list `key`, with its 95% intervals; None where no list has two."""
    if all(len(split[key]) < 2 for audit in audits for split in audit.summary["splits"].values()):
        return None

    def draw(axes: Any) -> None:
        for i, audit in enumerate(audits):
            for split, dashes in _DASHES:
                points = sorted(audit.summary["splits"].get(split, {key: []})[key], key=lambda point: point[at])
                points = [point for point in points if point["exact_match"]["rate"] is not None]
                x = [point[at] for point in points]
                rate, low, high = (
                    [point["exact_match"][name] for point in points] for name in ("rate", "lower95", "upper95")
                )
                axes.plot(x, rate, color=colour(i), linestyle=dashes, linewidth=2, marker="o", markersize=4,
                          clip_on=False)  # fmt: skip
                if split == "members":
                    axes.fill_between(x, low, high, color=colour(i), alpha=0.15, linewidth=0)
        axes.set(ylim=(0, 1), xlabel=label, ylabel="verbatim")
        axes.yaxis.set_major_formatter(percent)

    return svg(key, f"Share of windows recited against {label}", HALF, draw)


def extractable(audits: Sequence[Audit]) -> list[tuple[str, Markup]]:
    """For each sampling setting: the share of windows that n samples hold with probability p, p = 0.5 and 0.999."""
    places = [
        {setting_name(setting): i for i, setting in enumerate(audit.summary["protocol"]["sampling"])}
        for audit in audits
    ]
    names = list(dict.fromkeys(name for each in places for name in each))

    def panel(name: str) -> Callable[[Any], None]:
        def draw(axes: Any) -> None:
            for i, audit in enumerate(audits):
                for split, dashes in _DASHES:
                    windows = audit.of_split(split)
                    if name not in places[i] or not windows:
                        continue
                    log_p = np.array([window.log_p[places[i][name]] for window in windows])
                    for p, width in ((0.5, 2), (0.999, 0.9)):
                        needed = np.sort(log10_samples_needed(log_p, p))
                        needed = needed[needed <= MOST_SAMPLES]
                        x = 10 ** np.concatenate([[0], needed, [MOST_SAMPLES]])
                        y = np.concatenate([np.arange(len(needed) + 1), [len(needed)]]) / len(windows)
                        axes.plot(x, y, color=colour(i), drawstyle="steps-post", linestyle=dashes, linewidth=width,
                                  clip_on=False)  # fmt: skip
            axes.set(xscale="log", xlim=(1, 10**MOST_SAMPLES), ylim=(0, 1), xlabel="samples n of each window",
                     ylabel="come out")  # fmt: skip
            axes.xaxis.set_major_formatter(count)
            axes.yaxis.set_major_formatter(percent)

        return draw

    label = "Share of windows that n samples hold, for odds of 0.5 and of 0.999"
    return [(name, svg(f"samples-{i}", label, HALF, panel(name))) for i, name in enumerate(names)]


def divergences(audits: Sequence[Audit]) -> list[Markup | None]:
    """For each audit its member windows as bars as long as the recitation, the dropped tokens reached, and the end."""
    longest = max((len(w.suffix_tokens) for audit in audits for w in audit.of_split("members")), default=0)

    def panel(i: int, windows: Sequence[Window]) -> Callable[[Any], None]:
        def draw(axes: Any) -> None:
            runs, holes, ends = _Strokes(), _Strokes(), {True: _Strokes(), False: _Strokes()}
            for y, window in enumerate(windows):
                d, dropped = window.first_divergence, window.dropped or ()
                runs.add(0, y, d, y)
                for t in np.flatnonzero(dropped[:d]):
                    holes.add(t + 0.5, y - 0.42, t + 0.5, y + 0.42)
                if not window.exact_match:
                    ends[bool(dropped) and dropped[d]].add(d + 0.5, y - 0.48, d + 0.5, y + 0.48)
            thick = min(9.0, 250 / max(len(windows), 8))
            axes.plot(*runs.xy, color=colour(i), linewidth=thick * 0.75, alpha=0.4, solid_capstyle="butt")
            axes.plot(*holes.xy, color=HOLE, linewidth=1.2, solid_capstyle="butt")
            axes.plot(*ends[False].xy, color=INK, linewidth=3, solid_capstyle="butt")
            axes.plot(*ends[True].xy, color=MISS, linewidth=3, solid_capstyle="butt")
            axes.set(xlim=(0, longest + 1), ylim=(len(windows) - 0.4, -0.6), yticks=[], ylabel="windows",
                     xlabel="tokens of the suffix")  # fmt: skip
            axes.grid(visible=False)

        return draw

    drawn: list[Markup | None] = []
    for i, audit in enumerate(audits):
        ordered = sorted(audit.of_split("members"), key=lambda window: -window.first_divergence)
        chosen = [ordered[j] for j in np.unique(np.linspace(0, len(ordered) - 1, ROWS).round().astype(int))
                  ] if ordered else []  # fmt: skip
        label = "How far each member window is recited, the dropped tokens on the way, and where it diverges"
        drawn.append(svg(f"divergences-{i}", label, (560, 300), panel(i, chosen)) if chosen else None)
    return drawn


def losses(audits: Sequence[Audit]) -> list[Markup | None]:
    """For each audit with a rule: share of dropped and of kept tokens by loss; members filled, held-out outlined."""
    edges = np.geomspace(LEAST_NLL, MOST_NLL, 41)

    def shares(windows: Sequence[Window], dropped: bool) -> Any:
        ruled = [window for window in windows if window.dropped is not None]
        nll = np.array([x for w in ruled for x, hole in zip(w.nll, w.dropped or (), strict=True) if hole == dropped])
        return np.histogram(nll.clip(LEAST_NLL, MOST_NLL), edges)[0] / len(nll) if len(nll) else None

    def panel(i: int, audit: Audit) -> Callable[[Any], None]:
        def draw(axes: Any) -> None:
            for dropped, paint in ((False, colour(i)), (True, HOLE)):
                members, heldout = (shares(audit.of_split(split), dropped) for split in ("members", "heldout"))
                if members is not None:
                    axes.stairs(members, edges, fill=True, color=paint, alpha=0.55, linewidth=0)
                if heldout is not None:
                    axes.stairs(heldout, edges, color=paint, linestyle=(0, (4, 3)), linewidth=1.4)
            axes.set(xscale="log", xlim=(LEAST_NLL, MOST_NLL), ylim=(0, None), ylabel="share of tokens",
                     xlabel="loss of the token, nats")  # fmt: skip
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
            axes.yaxis.set_major_formatter(percent)

        return draw

    label = "Histogram of the loss of dropped and of kept tokens"
    return [
        svg(f"losses-{i}", label, HALF, panel(i, audit)) if any(w.dropped for w in audit.of_split("members")) else None
        for i, audit in enumerate(audits)
    ]


def roc(audits: Sequence[Audit]) -> list[Markup | None]:
    """For each audit with both splits: every attack on log-log axes, the blind baselines dashed, chance dotted."""

    def panel(membership: Any) -> Callable[[Any], None]:
        curves = [*membership["attacks"].values(), *membership["blind"].values()]
        positive = [share for curve in curves for point in curve["roc"] for share in point if share > 0]
        least = 10 ** np.floor(np.log10(min(0.1, *positive)) + 1e-9)
        best = (membership["headline"] or {}).get("attack")

        def draw(axes: Any) -> None:
            axes.plot([least, 1], [least, 1], color=LINE, linestyle=":", linewidth=1.5)
            for i, (name, attack) in enumerate(membership["attacks"].items()):
                x, y = np.maximum(attack["roc"], least).T
                axes.plot(x, y, color=colour(i), drawstyle="steps-post", linewidth=2.6 if name == best else 1.2,
                          clip_on=False)  # fmt: skip
            for dashes, attack in zip(((0, (5, 2)), (0, (1, 1.5))), membership["blind"].values(), strict=False):
                x, y = np.maximum(attack["roc"], least).T
                axes.plot(x, y, color=INK, drawstyle="steps-post", linewidth=1.6, linestyle=dashes)
            axes.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1.02), xlabel="false positive rate",
                     ylabel="true positive rate")  # fmt: skip
            axes.grid(visible=True, axis="both")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(percent)

        return draw

    label = "ROC of the membership attacks, both axes logarithmic"
    found = [audit.summary["membership"] for audit in audits]
    return [svg(f"roc-{i}", label, (460, 400), panel(each)) if each else None for i, each in enumerate(found)]


def verbatim_shares(windows: Sequence[Window]) -> list[float]:
    """For t = 0, 1, ...: of the windows with at least t suffix tokens, the share whose first t tokens all match."""
    lengths = [len(window.suffix_tokens) for window in windows]
    shares = []
    for t in range(max(lengths, default=-1) + 1):
        reached = [window for window, length in zip(windows, lengths, strict=True) if length >= t]
        shares.append(sum(window.first_divergence >= t for window in reached) / len(reached))
    return shares


class _Strokes:
    """Many strokes as one line with gaps, which is one element of the SVG."""

    def __init__(self) -> None:
        self.xy: tuple[list[float], list[float]] = ([], [])

    def add(self, x0: float, y0: float, x1: float, y1: float) -> None:
        self.xy[0].extend((x0, x1, np.nan))
        self.xy[1].extend((y0, y1, np.nan))


def _shares(windows: Sequence[Window]) -> list[float]:
    counts = [0] * BINS
    for window in windows:
        counts[min(int(window.rouge_l_ids * BINS), BINS - 1)] += 1
    return [number / len(windows) for number in counts] if windows else []
