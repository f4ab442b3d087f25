"""The page: the templates filled in, with as many documents as fit."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from math import log
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from goldfish.audit.compare import compare
from goldfish.audit.results import NO_RULE
from goldfish.audit.table import ROWS
from goldfish.pieces import plain
from goldfish.report import plots, spans, words
from goldfish.report.load import SPLITS, Audit
from goldfish.report.svg import COLOURS

PAGE_BYTES = 4_700_000  # all windows with hover values where that fits, then without, then the first ones only
BADGES = {"PASS": "good", "FAIL": "bad", "INCONCLUSIVE": "unsure"}

ATTACK_NAMES = {
    "min_k": "Min-K%",
    "min_k_plus_plus": "Min-K%++",
    "kept_loss": "kept loss",
    "dropped_gap": "dropped gap",
}


def render(audits: Sequence[Audit], *, redact: bool) -> str:
    """The whole page as a string that encodes to UTF-8, whatever the audits hold."""
    environment = _environment()
    names = [plain(audit.name, 60) for audit in audits]
    script, style = _asset("report.js"), _asset("report.css")
    groups = spans.group_windows(audits)
    common = {"audits": audits, "names": names, "split_names": SPLITS, "series": COLOURS, "redact": redact}
    shown = {
        "questions": questions(audits),
        "gaps": gaps(audits),
        "rows": figure_rows(audits),
        "every": sorted({name: None for audit in audits for name in audit.figures}, key=_order),
        "comparisons": comparisons(audits),
        "histograms": plots.rouge_histograms(audits),
        "survival": plots.survival(audits),
        "prefix_sweep": plots.sweep(audits, "prefix_sweep", "prefix_length", "tokens of prefix given"),
        "offset_sweep": plots.sweep(audits, "offset_sweep", "offset", "tokens from the start of the document"),
        "extractable": plots.extractable(audits),
        "divergences": plots.divergences(audits),
        "losses": plots.losses(audits),
        "roc": plots.roc(audits),
        "strata": any(split["strata"] for audit in audits for split in audit.summary["splits"].values()),
        "mixed": len({repr([a.summary["protocol"][f"{key}_length"] for key in ("prefix", "suffix")]) for a in audits})
        > 1,
        "script": Markup(script),
        "style": Markup(style),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }

    def page(windows: Sequence[Markup], hover: int) -> str:
        template = environment.get_template("report.html")
        return template.render(**common, **shown, windows=windows, total=len(groups), hover=hover)

    template = environment.get_template("window.html")

    def window(group: spans.Group, hover: bool) -> Markup:
        html = template.render(
            **common,
            group=group,
            first=group is groups[0],
            name=spans.name_of(group.any, redact),
            prefix=spans.prefix(group, redact),
            truths=spans.truths(group, redact, hover),
            outputs=[(i, w, spans.output(w, redact)) for i, w in group.present],
        )
        return Markup(html)

    room = PAGE_BYTES - _size(page([], 0))
    short, long = [], []
    for group in groups:
        short.append(window(group, hover=False))
        room -= _size(short[-1])
        if room < 0:
            room += _size(short.pop())
            break
    for group, html in zip([] if redact else groups, short, strict=False):  # ranks would give a text away
        long.append(window(group, hover=True))
        room -= _size(long[-1]) - _size(html)
        if room < 0:
            long.pop()
            break
    return page([*long, *short[len(long) :]], len(long))


def questions(audits: Sequence[Audit]) -> list[tuple[str, list[tuple[int, Mapping[str, Any]]]]]:
    """Each question of the verdicts once, with the audits that answer it."""
    asked: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for i, audit in enumerate(audits):
        for question in audit.summary["verdict"]["questions"]:
            asked.setdefault(question["asks"], []).append((i, question))
    return list(asked.items())


def gaps(audits: Sequence[Audit]) -> list[tuple[str, list[int]]]:
    """What was not tested, and in which audits."""
    found: dict[str, list[int]] = {}
    for i, audit in enumerate(audits):
        for gap in audit.summary["verdict"]["not_tested"]:
            found.setdefault(gap, []).append(i)
    return list(found.items())


def figure_rows(audits: Sequence[Audit]) -> list[tuple[str, list[Any]]]:
    """The terminal's figures: what each says, and its value in every audit and split; rows without any left out."""
    rows = []
    for label, name in ROWS:
        values = []
        for audit in audits:
            most = f"@{max(audit.summary['protocol']['beams'] or [0])}" if name == "beam_search" else ""
            values += [audit.figures.get(f"{split}.{name}{most}") for split in audit.splits]
        if any(value is not None for value in values):
            rows.append((label, values))
    return rows


def comparisons(audits: Sequence[Audit]) -> list[dict[str, Any]]:
    """Every audit paired with the first; where the items differ, `reason` says so."""
    told = []
    for i, audit in enumerate(audits[1:], 1):
        try:
            told.append({"other": i, **compare(audits[0].folder, audit.folder)})
        except ValueError as error:
            told.append({"other": i, "reason": str(error)})
    return told


def _environment() -> Environment:
    """Escapes what a template prints, and writes invisible characters out: no template can forget it."""

    def visible(value: Any) -> Any:
        return plain(value, 1000) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=PackageLoader("goldfish.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=visible,
    )
    formats = (
        words.percent,
        words.decimals,
        words.signed,
        words.point,
        words.interval,
        words.bound,
        words.power_of_ten,
    )
    environment.filters.update({each.__name__: each for each in formats}, figure=words.of_estimate, plain=plain)
    labels = {name: label.strip() for label, name in ROWS}
    environment.globals.update(badges=BADGES, no_rule=NO_RULE, ln10=log(10), labels=labels, attacks=ATTACK_NAMES)
    return environment


def _order(name: str) -> int:
    """Members, held-out, membership; in each the order of the summary."""
    return ("members", "heldout", "mia").index(name.split(".")[0])


def _size(html: str) -> int:
    return len(html.encode("utf-8"))


def _asset(name: str) -> str:
    return (resources.files("goldfish.report") / "templates" / name).read_text(encoding="utf-8")
