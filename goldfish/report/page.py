"""The page: the templates filled in, with as many texts as fit."""

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from math import log
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from numpy.typing import NDArray

from goldfish.audit.compare import compare
from goldfish.audit.intervals import SPLITS, Figure, decimals, percent
from goldfish.audit.questions.membership import ATTACKS, strongest_blind
from goldfish.audit.questions.proof import NO_RULE
from goldfish.audit.render import LABELS, skipped
from goldfish.audit.verdict import QUESTIONS
from goldfish.report import asked, plots, spans
from goldfish.report.card import card_of, shown
from goldfish.report.load import View
from goldfish.report.svg import COLOURS, power_of_ten
from goldfish.text.printable import counted, plain

# Of texts, the most recited ones: browsers open such a page in a second.
PAGE_BYTES = 3_000_000
# Of the protocol: what makes two audits ask different questions.
ASKED = ("prefix_length", "suffix_length", "offsets", "sampling", "beams")
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
    "unasked_secrets",
)
BADGES = {"PASS": "good", "FAIL": "bad", "INCONCLUSIVE": "unsure"}
LOADER = PackageLoader("goldfish.report", "templates")

# Split, figure, setting and x: what names a row of the table of figures.
Key = tuple[str, str, str, float | None]


def render(views: Sequence[View], *, redact: bool, baseline: str | None = None) -> str:
    """The whole page as a string that encodes to UTF-8, whatever the audits hold.

    Raises:
        ValueError: `baseline` is the name of no audit.
    """
    environment = _environment()
    names = [plain(view.name, 60) for view in views]
    if redact:
        names = [f"model {i + 1}" for i in range(len(views))]
    # What every template may need.
    common = {
        "views": views,
        "names": names,
        "split_names": SPLITS,
        "series": COLOURS,
        "redact": redact,
    }
    rows = spans.order(views)
    script, _, _ = LOADER.get_source(environment, "report.js")
    style, _, _ = LOADER.get_source(environment, "report.css")
    # The page forbids every script but this one: training text cannot bring one along.
    digest = hashlib.sha256(script.encode()).digest()
    questions = {repr([_protocol(view)[key] for key in ASKED]) for view in views}
    return environment.get_template("report.html").render(
        **common,
        cards=[card_of(view, redact) for view in views],
        texts=_texts(environment, common, views, rows),
        total=len(rows),
        prompted=[asked.answers(view, redact) for view in views],
        labels=_labels(views),
        mixed=len(questions) > 1,
        every=_every(views),
        marked=any("secrets" in view.audit.counted for view in views),
        ruled=any(view.has_rule for view in views),
        attacks=_attacks(views),
        tested=[i for i, view in enumerate(views) if len(view.splits) == 2],
        comparisons=list(comparisons(views, baseline)),
        script=Markup(script),
        style=Markup(style),
        script_hash=base64.b64encode(digest).decode(),
    )


def _environment() -> Environment:
    # Escapes what a template prints, and writes invisible characters out: none can forget it.
    environment = Environment(
        loader=LOADER,
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    for each in (percent, decimals, signed, power_of_ten, plain, counted):
        environment.filters[each.__name__] = each
    environment.globals.update(
        badges=BADGES,
        no_rule=NO_RULE,
        ln10=log(10),
        paired=LABELS,
        warnings_of=warnings_of,
        skipped_of=skipped_of,
        questions_of=questions_of,
        attack_names=ATTACKS,
        plots=plots,
        hidden=HIDDEN,
        doubts=doubts,
        shown=shown,
        strongest_blind=strongest_blind,
    )
    return environment


def _finalize(value: Any) -> Any:
    # Markup is ours: spans and plots, whose text is escaped already.
    if isinstance(value, str) and not isinstance(value, Markup):
        return plain(value, 1000)
    return value


def _texts(
    environment: Environment,
    common: Mapping[str, Any],
    views: Sequence[View],
    rows: NDArray[Any],
) -> list[Markup]:
    """The texts that fit on the page, in the order of `rows`."""
    template, redact = environment.get_template("window.html"), common["redact"]
    texts: list[Markup] = []
    size = 0
    for group in spans.windows(views, rows):
        present = [(i, window) for i, window in enumerate(group) if window is not None]
        example = present[0][1]  # the audits agree on the text, not on the output
        html = template.render(
            **common,
            group=group,
            example=example,
            name=spans.name_of(example, redact),
            prefix=spans.prefix(example, redact),
            truths=spans.truths(group, redact),
            outputs=[
                (i, window, spans.output(window, redact)) for i, window in present
            ],
            first=not texts,
        )
        # In bytes: a page in Greek has twice as many as letters.
        size += len(html.encode("utf-8"))
        if size > PAGE_BYTES:
            break
        texts.append(Markup(html))
    return texts


def _protocol(view: View) -> Mapping[str, Any]:
    protocol: Mapping[str, Any] = view.audit.run["protocol"]
    return protocol


def _labels(views: Sequence[View]) -> list[tuple[str, str]]:
    """(figure, label) of the table of figures: one order, whatever the audits measured."""
    measured = {
        each.figure
        for view in views
        for each in view.audit.rows
        if each.x is None and each.reason != NO_RULE
    }
    return [(name, label) for name, label in LABELS.items() if name in measured]


def _every(views: Sequence[View]) -> list[Key]:
    """The names of all figures that any audit has, in one order: by split, figure, setting, x."""
    rows = [each for view in views for each in view.audit.rows]
    keys = {(each.split, each.figure, each.setting, each.x) for each in rows}
    splits = [*SPLITS, "both"]
    figures = list(dict.fromkeys(each.figure for each in rows))

    def place(key: Key) -> tuple[Any, ...]:
        split, figure, setting, x = key
        return (
            splits.index(split),
            figures.index(figure),
            setting,
            # A single number stands before the curve of the same name.
            -1.0 if x is None else x,
        )

    return sorted(keys, key=place)


def _attacks(views: Sequence[View]) -> list[tuple[str, str]]:
    """(attack or blind, its name) of any audit, the blind baselines last."""
    # A dictionary is a set that keeps the order of the first audit.
    found: dict[tuple[str, str], None] = {}
    for kind in ("attack", "blind"):
        for view in views:
            rows: Sequence[Figure] = view.audit.rows.select(figure=f"{kind}_auc")
            found.update({(kind, each.setting): None for each in rows})
    return list(found)


def warnings_of(views: Sequence[View]) -> dict[str, list[int]]:
    """The warnings of the verdicts."""
    return _grouped([view.audit.verdict["warnings"] for view in views])


def skipped_of(views: Sequence[View]) -> dict[str, list[int]]:
    """What was not asked, without the members' secrets: the card has them, with the reasons."""
    return _grouped([skipped(view.audit, secrets_of=["heldout"]) for view in views])


def _grouped(sentences: Iterable[Iterable[str]]) -> dict[str, list[int]]:
    """Each sentence once, with the numbers of the audits that have it."""
    grouped: dict[str, list[int]] = {}
    for i, of_audit in enumerate(sentences):
        for sentence in of_audit:
            grouped.setdefault(sentence, []).append(i)
    return grouped


def questions_of(views: Sequence[View]) -> dict[str, list[tuple[int, Any]]]:
    """What was asked: (audit, its answer) of every audit that asked it; secrets come first."""
    # Audits with other limits, or of a census, ask another question: a heading of its own.
    grouped: dict[str, list[tuple[int, Any]]] = {}
    for i, view in enumerate(views):
        verdict = view.audit.verdict
        for question in [*verdict["questions"], *verdict["explanations"]]:
            grouped.setdefault(question["asks"], []).append((i, question))
    kinds = ["secrets", *QUESTIONS]

    def place(asks: str) -> int:
        kind = grouped[asks][0][1]["question"]
        return kinds.index(kind) if kind in kinds else len(kinds)

    return {asks: grouped[asks] for asks in sorted(grouped, key=place)}


def comparisons(
    views: Sequence[View], baseline: str | None = None
) -> Iterator[dict[str, Any]]:
    """Every pair of audits, or every audit with `baseline`: places and differences.

    Audits of different windows cannot be compared: `reason` says so instead.
    """
    names = [view.name for view in views]
    if baseline is not None and baseline not in names:
        raise ValueError(
            f"baseline must be the name of one of the audits ({', '.join(names)}), got "
            f"{baseline!r:.80}"
        )
    for first, second in combinations(range(len(views)), 2):
        if baseline not in (None, names[first], names[second]):
            continue
        if names[second] == baseline:
            first, second = second, first
        places = {"first": first, "second": second}
        try:
            result = compare(views[first].audit.folder, views[second].audit.folder)
            yield {**result, **places}
        except ValueError as error:
            yield {"reason": str(error), **places}


def signed(value: float) -> str:
    """A difference, with its sign."""
    if not value:
        return "0"
    return f"{'−' if value < 0 else '+'}{decimals(abs(value))}"


def doubts(receipt: Mapping[str, Any] | None) -> list[str]:
    """What in a checkpoint's goldfish.json speaks against one rule for every text."""
    if receipt is None:
        return []
    # Of sources with rules of their own, or one for everything.
    entries = receipt.get("sources", {"": receipt})
    rules = [entry["rule"] for entry in entries.values()]
    strategies = {rule["strategy"] for rule in rules if rule}
    sentences = []
    if "before" in receipt:
        sentences.append(
            "trained before under another rule: every text may have been seen under both"
        )
    if "random" in strategies:
        sentences.append(
            'strategy "random" drops other tokens in every epoch: a text seen often was seen whole'
        )
    if strategies & {"static", "reference"}:
        sentences.append(
            '"static" and "reference" depend on where a training row starts: other tokens were '
            "dropped"
        )
    if len(set(map(str, rules))) > 1:
        sentences.append(
            "rules differ between sources: a text that is in two of them was seen under both"
        )
    return sentences
