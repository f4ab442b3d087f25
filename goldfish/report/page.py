"""The page: figures in words, the tables' rows, and as many documents as fit."""

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from goldfish.report import plots, spans
from goldfish.report.load import SPLITS, Audit, Mean, Proportion, Split
from goldfish.report.text import plain

PAGE_BYTES = 4_700_000  # all windows with hover values where that fits, then without, then the first ones only


def render(audits: Sequence[Audit], *, redact: bool) -> str:
    """The whole page as a string that encodes to UTF-8, whatever the audits hold."""
    environment = Environment(
        loader=PackageLoader("goldfish.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(plain=plain, percent=percent, of=k_of_n, interval=interval, decimals=decimals)
    names = [plain(audit.name, 60) for audit in audits]
    script, style = _asset("report.js"), _asset("report.css")
    groups = spans.group_windows(audits)

    def page(windows: Sequence[Markup], hover: int) -> str:
        return environment.get_template("report.html").render(
            audits=audits,
            names=names,
            verdicts=[verdict(audit) for audit in audits],
            drop_shares=[{split: drop_share(audit, split) for split in audit.splits} for audit in audits],
            histograms=histograms,
            survival=survival,
            windows=windows,
            total=len(groups),
            hover=hover,
            split_names=SPLITS,
            mixed=len({repr([a.protocol.get(key) for key in ("prefix_length", "suffix_length")]) for a in audits}) > 1,
            redact=redact,
            script=Markup(script),
            style=Markup(style),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            series=plots.SERIES,
        )

    histograms, survival = plots.rouge_histograms(audits), plots.survival(audits)
    template = environment.get_template("window.html")

    def window(group: spans.Group, hover: bool) -> Markup:
        shown = template.render(
            group=group,
            first=group is groups[0],
            names=names,
            name=spans.name_of(group.any, redact),
            split=SPLITS[group.any.split],
            prefix=spans.prefix(group, redact),
            truths=spans.truths(group, redact, hover),
            outputs=[(i, w, spans.output(w, redact)) for i, w in group.present],
            series=plots.SERIES,
        )
        return Markup(shown)

    room = PAGE_BYTES - _size(page([], 0))
    short, long = [], []
    for group in groups:
        short.append(window(group, hover=False))
        room -= _size(short[-1])
        if room < 0:
            room += _size(short.pop())
            break
    for group, html in zip(groups, short, strict=False):
        long.append(window(group, hover=True))
        room -= _size(long[-1]) - _size(html)
        if room < 0:
            long.pop()
            break
    return page([*long, *short[len(long) :]], len(long))


def verdict(audit: Audit) -> dict[str, Any]:
    """One audit in words. `mark` is bad, unsure or good, for the colour; `label` says the same."""
    members, heldout = audit.splits.get("members"), audit.splits.get("heldout")
    told = []
    if members:
        told.append(f"{_counted(members)} member {_windows(members)} verbatim ({_interval95(members)})")
    else:
        told.append("no member windows were audited")
    if heldout:
        held = f"held-out {_counted(heldout)} ({interval(heldout.exact_match)})"
        told.append(
            held if members else f"{_counted(heldout)} held-out {_windows(heldout)} verbatim ({_interval95(heldout)})"
        )
    else:
        told.append("no held-out windows were audited")
    mark, label = "unsure", "no members audited"
    if members and members.exact_match.n:
        mark, label = _mark(members.exact_match, heldout.exact_match if heldout else None)
    return {"mark": mark, "label": label, "sentence": "; ".join(told) + "."}


def _mark(members: Proportion, heldout: Proportion | None) -> tuple[str, str]:
    if members.k == 0:
        return "good", "none verbatim"
    if heldout is None or not heldout.n:
        return "unsure", "verbatim, without a control"
    if (members.lower95 or 0.0) > (1.0 if heldout.upper95 is None else heldout.upper95):
        return "bad", "recites its members"
    return "unsure", "verbatim, not clearly above held-out"


def drop_share(audit: Audit, split: str) -> Proportion | None:
    """How many of the suffix tokens the rule dropped: what a share of divergences on dropped tokens compares with."""
    rows = [window.dropped for window in audit.of_split(split) if window.dropped is not None]
    total = sum(map(len, rows))
    return Proportion(sum(map(sum, rows)), total) if total else None


def percent(share: float) -> str:
    """0 and 1 only where exact: '<0.1%' and '>99.9%' beside them."""
    if share in (0, 1):
        return f"{share:.0%}"
    return "<0.1%" if share < 0.0005 else ">99.9%" if share > 0.9995 else f"{100 * share:.1f}".removesuffix(".0") + "%"


def k_of_n(value: Proportion) -> str:
    return f"{value.k:,} of {value.n:,}"


def interval(value: Proportion | Mean) -> str:
    if value.lower95 is None or value.upper95 is None:
        return "no interval"
    if isinstance(value, Mean):
        return f"{value.lower95:.2f}–{value.upper95:.2f}"
    low, high = percent(value.lower95), percent(value.upper95)
    return f"{low.removesuffix('%')}–{high}"


def decimals(value: float) -> str:
    return f"{value:.2f}"


def _counted(split: Split) -> str:
    return k_of_n(split.exact_match)


def _windows(split: Split) -> str:
    return "window comes out" if split.exact_match.n == 1 else "windows come out"


def _interval95(split: Split) -> str:
    return f"95% interval {interval(split.exact_match)}"


def _size(html: str) -> int:
    return len(html.encode("utf-8"))


def _asset(name: str) -> str:
    return (resources.files("goldfish.report") / "templates" / name).read_text(encoding="utf-8")
