"""The page: the templates filled in, with as many texts as fit."""

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from math import log
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from goldfish.audit.compare import compare
from goldfish.audit.figures import NO_RULE, notes
from goldfish.audit.intervals import Figure, decimals, percent
from goldfish.audit.render import (
    LABELS,
    MEMBERSHIP_LABELS,
    figure_rows,
    rule_words,
    weights_hash,
)
from goldfish.audit.verdict import QUESTIONS, strongest_blind
from goldfish.report import asked, plots, spans
from goldfish.report.load import SPLITS, View
from goldfish.report.svg import COLOURS, power_of_ten
from goldfish.text.printable import plain

PAGE_BYTES = (
    3_000_000  # of texts, the most recited ones: browsers open such a page in a second
)
ASKED = (
    "prefix_length",
    "suffix_length",
    "offsets",
    "sampling",
    "beams",
)  # the question put
# Of run.json, if redacted. The hashes stay: they tell which model was audited.
HIDDEN = (
    "name",
    "checkpoint",
    "command",
    "control",
    "path",
    "receipt",
    "secrets",
    "secret_column",
)
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
        paired=LABELS,
        by_text=by_text,
        attack_names=ATTACKS,
        plots=plots,
        hidden=HIDDEN,
        headline=headline,
        rule_words=rule_words,
        weights_hash=weights_hash,
        notes=notes,
        key=_key,
        shown=shown,
        strongest_blind=strongest_blind,
    )
    names = [
        f"model {i + 1}" if redact else plain(view.name, 60)
        for i, view in enumerate(views)
    ]
    script, style = (
        LOADER.get_source(environment, name)[0] for name in ("report.js", "report.css")
    )
    rows = spans.order(views)
    figures = [(view.splits, dict(figure_rows(view.audit))) for view in views]
    every = dict.fromkeys(_key(each) for view in views for each in view.audit.rows)
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
        answers_of=[asked.answers(view, redact) for view in views],
        labels=[label for label in _labels() if any(label in of for _, of in figures)],
        figures=figures,
        mixed=len(
            {repr([view.audit.run["protocol"][key] for key in ASKED]) for view in views}
        )
        > 1,
        every=every,
        marked=any("secrets" in view.audit.counted for view in views),
        attacks=_attacks(views),
        tested=[i for i, view in enumerate(views) if len(view.splits) == 2],
        comparisons=list(comparisons(views, baseline)),
        script=Markup(script),
        style=Markup(style),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _texts(
    environment: Environment,
    common: Mapping[str, Any],
    views: Sequence[View],
    rows: Any,
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
            outputs=[
                (i, w, spans.output(w, redact))
                for i, w in enumerate(group)
                if w is not None
            ],
            first=not texts,
        )
        size += len(html.encode("utf-8"))
        if size > PAGE_BYTES:
            break
        texts.append(Markup(html))
    return texts


def _key(figure: Figure) -> tuple[str, str, str, float | None]:
    return figure.split, figure.figure, figure.setting, figure.x


def _labels() -> list[str]:
    """The rows of the table of figures, in one order for all models."""
    return [*LABELS.values(), *MEMBERSHIP_LABELS.values()]


def _attacks(views: Sequence[View]) -> list[tuple[str, str]]:
    """(attack or blind, its name), as far as any audit has them."""
    found: dict[tuple[str, str], None] = {}
    for view in views:
        for kind in ("attack", "blind"):
            for each in view.audit.rows.select(figure=f"{kind}_auc"):
                found[kind, each.setting] = None
    return sorted(found, key=lambda each: each[0] == "blind")


def headline(view: View) -> tuple[Figure | None, str]:
    """The number in large print, and what it counts: what decided, secrets before texts."""
    audit = view.audit
    questions = audit.verdict["questions"]
    deciding = [
        each for each in questions if each["outcome"] == audit.outcome
    ] or questions
    secrets = [each for each in questions if each["question"] == "secrets"]
    for question in [*secrets, *deciding]:
        figure = audit.rows.get("members", question["figure"])
        if question["question"] == "secrets":
            answers = [
                audit.rows.get(split, "answers_with_secret") for split in view.splits
            ]
            came = sum(each.k or 0 for each in answers if each is not None)
            total = sum(each.n for each in answers if each is not None)
            return figure, f"marked secrets came out, in {came:,} of {total:,} answers"
        if figure is not None:
            return figure, f"training texts {QUESTIONS[question['question']][0]}"
    figure = audit.rows.get(view.splits[0], "exact_match")
    return figure, "held-out texts recited verbatim"


def shown(text: str, view: View, redact: bool) -> str:
    """A sentence; if redacted, without the names of files."""
    if redact:
        for split, about in view.audit.run["inputs"].items():
            text = text.replace(
                str(about["path"]).rsplit("/", 1)[-1], f"the {SPLITS[split]} file"
            )
    return text


def by_text(views: Sequence[View], *keys: str) -> dict[str, list[tuple[int, Any]]]:
    """The sentences or questions of the verdicts: each text once, with the audits that have it and their entries."""
    grouped: dict[str, list[tuple[int, Any]]] = {}
    for i, view in enumerate(views):
        for entry in (entry for key in keys for entry in view.audit.verdict[key]):
            grouped.setdefault(
                entry if isinstance(entry, str) else entry["asks"], []
            ).append((i, entry))
    return grouped


def comparisons(
    views: Sequence[View], baseline: str | None = None
) -> Iterator[dict[str, Any]]:
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
            yield {
                **compare(views[first].audit.folder, views[second].audit.folder),
                **pair,
            }
        except ValueError as error:
            yield {"reason": str(error), **pair}


def signed(value: float) -> str:
    """A difference, with its sign."""
    return f"{'−' if value < 0 else '+'}{decimals(abs(value))}" if value else "0"


def _finalize(value: Any) -> Any:
    return (
        plain(value, 1000)
        if isinstance(value, str) and not isinstance(value, Markup)
        else value
    )
