"""The page: the templates filled in, with as many texts as fit."""

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from math import log
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from goldfish.audit.compare import compare
from goldfish.audit.estimate import decimals, percent
from goldfish.audit.results import NO_RULE
from goldfish.audit.tell import ROWS, describe
from goldfish.report import plots, spans
from goldfish.report.load import SPLITS, View
from goldfish.report.svg import COLOURS, power_of_ten
from goldfish.text.printable import plain

PAGE_BYTES = 3_000_000  # of texts, the most recited ones: browsers open such a page within a second
ASKED = (
    "prefix_length",
    "suffix_length",
    "offsets",
    "sampling",
    "beams",
)  # of a protocol: the question put
RESULTS = (
    "schema",
    "name",
    "splits",
    "membership",
    "secrets",
    "sanity",
    "verdict",
)  # the rest is provenance
HIDDEN = (
    "name",
    "checkpoint",
    "command",
    "control",
    "path",
    "receipt",
    "secrets",
    "weights",
)  # if redacted
BADGES = {"PASS": "good", "FAIL": "bad", "INCONCLUSIVE": "unsure"}
ATTACKS = {
    "min_k": "Min-K%",
    "min_k_plus_plus": "Min-K%++",
    "kept_loss": "kept loss",
    "dropped_gap": "dropped gap",
    "wbc": "WBC",
}
LOADER = PackageLoader("goldfish.report", "templates")


def render(views: Sequence[View], *, redact: bool, baseline: str | None = None) -> str:
    """The whole page as a string that encodes to UTF-8, whatever the audits hold.

    Raises:
        ValueError: `baseline` is the name of no audit.
    """
    # Escapes what a template prints, and writes invisible characters out: no template can forget it.
    environment = Environment(
        loader=LOADER,
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    for each in (percent, decimals, signed, power_of_ten, plain):
        environment.filters[each.__name__] = each
    environment.globals.update(
        badges=BADGES,
        no_rule=NO_RULE,
        ln10=log(10),
        paired={name: label for label, name in ROWS},
        by_text=by_text,
        attack_names=ATTACKS,
        plots=plots,
        results=RESULTS,
        hidden=HIDDEN,
    )
    names = [f"model {i + 1}" if redact else plain(view.name, 60) for i, view in enumerate(views)]
    script, style = (
        LOADER.get_source(environment, name)[0] for name in ("report.js", "report.css")
    )
    rows = spans.order(views)
    figures = [(view.splits, dict(describe(view.audit.summary).rows)) for view in views]
    every = dict.fromkeys(name for view in views for name in view.audit.estimates)
    common = {
        "views": views,
        "names": names,
        "split_names": SPLITS,
        "series": COLOURS,
        "redact": redact,
    }
    return environment.get_template("report.html").render(
        **common,
        texts=_texts(environment, common, views, rows),
        total=len(rows),
        labels=dict.fromkeys(label for _, rows in figures for label in rows),
        figures=figures,
        mixed=len({repr([view.audit.summary["protocol"][key] for key in ASKED]) for view in views})
        > 1,
        every=every,
        attacks=[name[4:-4] for name in every if re.fullmatch(r"mia\.\w.*\.auc", name)],
        tested=[i for i, view in enumerate(views) if view.audit.summary["membership"]],
        comparisons=list(comparisons(views, baseline)),
        script=Markup(script),
        style=Markup(style),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _texts(
    environment: Environment, common: Mapping[str, Any], views: Sequence[View], rows: Any
) -> list[Markup]:
    """The texts that fit on the page, in the order of `rows`."""
    template, redact = environment.get_template("window.html"), common["redact"]
    texts: list[Markup] = []
    size = 0
    for group in spans.windows(views, rows):
        example = next(window for window in group if window is not None)
        html = template.render(
            **common,
            group=group,
            example=example,
            name=spans.name_of(example, redact),
            prefix=spans.prefix(example, redact),
            truths=spans.truths(group, redact),
            outputs=[(i, w, spans.output(w, redact)) for i, w in enumerate(group) if w is not None],
            first=not texts,
        )
        size += len(html.encode("utf-8"))
        if size > PAGE_BYTES:
            break
        texts.append(Markup(html))
    return texts


def by_text(views: Sequence[View], *keys: str) -> dict[str, list[tuple[int, Any]]]:
    """The sentences or questions of the verdicts: each text once, with the audits that have it and their entries."""
    grouped: dict[str, list[tuple[int, Any]]] = {}
    for i, view in enumerate(views):
        for entry in (entry for key in keys for entry in view.audit.summary["verdict"][key]):
            grouped.setdefault(entry if isinstance(entry, str) else entry["asks"], []).append(
                (i, entry)
            )
    return grouped


def comparisons(views: Sequence[View], baseline: str | None = None) -> Iterator[dict[str, Any]]:
    """Every pair of audits, or every audit against `baseline`; where the windows differ, `reason` says so."""
    names = [view.name for view in views]
    if baseline is not None and baseline not in names:
        raise ValueError(
            f"baseline must be the name of one of the audits ({', '.join(names)}), got {baseline!r:.80}"
        )
    for first, second in combinations(range(len(views)), 2):
        if baseline not in (None, names[first], names[second]):
            continue
        if names[second] == baseline:
            first, second = second, first
        pair = {"first": first, "second": second}
        try:
            yield {**compare(views[first].audit.folder, views[second].audit.folder), **pair}
        except ValueError as error:
            yield {"reason": str(error), **pair}


def signed(value: float) -> str:
    """A difference, with its sign."""
    return f"{'−' if value < 0 else '+'}{decimals(abs(value))}" if value else "0"


def _finalize(value: Any) -> Any:
    return plain(value, 1000) if isinstance(value, str) and not isinstance(value, Markup) else value
