"""The drill-down: windows grouped over audits, and their tokens as coloured spans of HTML."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from goldfish.pieces import plain
from goldfish.report.load import SPLITS, Audit, Window
from goldfish.report.text import blocks, show

PREFIX_SHOWN = 4000  # characters of a prefix on the page, its last ones; of one token at most 200
PREFIX_REDACTED = 100  # a block is three bytes


@dataclass(frozen=True)
class Group:
    """One text: the same prefix and suffix at the same row, and its window in each audit (None: not in that one)."""

    windows: tuple[Window | None, ...]

    @property
    def present(self) -> list[tuple[int, Window]]:
        return [(i, window) for i, window in enumerate(self.windows) if window is not None]

    @property
    def any(self) -> Window:
        return self.present[0][1]


@dataclass(frozen=True)
class Text:
    """A text on the page and the audits it speaks of, by their place in the order given."""

    audits: tuple[int, ...]
    html: Markup
    values: str = ""  # for report.js: the loss and rank of every token under each of the audits


def group_windows(audits: Sequence[Audit]) -> list[Group]:
    """Every text once, members first, then the most recited: by highest ROUGE-L, then by the mean over audits."""
    rows: dict[tuple[object, ...], list[Window | None]] = {}
    for i, audit in enumerate(audits):
        for window in audit.windows:
            key = (window.split, window.index, window.offset, window.prefix_text, window.suffix_tokens)
            row = rows.setdefault(key, [None] * len(audits))
            if row[i] is not None:  # a text that one audit holds twice is shown twice
                row = rows.setdefault((*key, i, len(rows)), [None] * len(audits))
            row[i] = window

    def rank(group: Group) -> tuple[object, ...]:
        scores = [window.rouge_l_ids for _, window in group.present]
        return (
            list(SPLITS).index(group.any.split),
            -max(scores),
            -sum(scores) / len(scores),
            group.any.index,
            group.any.offset,
        )

    return sorted((Group(tuple(row)) for row in rows.values()), key=rank)


def prefix(group: Group, redact: bool) -> Markup:
    text = group.any.prefix_text
    limit = PREFIX_REDACTED if redact else PREFIX_SHOWN
    hidden = len(text) - limit
    shown = text[-limit:]
    note = Markup("<em>[{:,} characters before this are not shown]</em> ").format(hidden) if hidden > 0 else Markup("")
    return note + show(blocks(shown) if redact else shown, limit)


def truths(group: Group, redact: bool, hover: bool) -> list[Text]:
    """The true suffix, once for each set of dropped tokens; audits without a rule join the first set.

    With `hover`, every token is an element of its own, and the values that report.js shows beside it come along.
    """
    rules: list[tuple[bool, ...] | None]
    rules = list(dict.fromkeys(window.dropped for _, window in group.present if window.dropped is not None))
    texts = []
    for dropped in rules or [None]:
        named = [
            (i, window)
            for i, window in group.present
            if window.dropped == dropped or (window.dropped is None and dropped in rules[:1])
        ]
        tokens = group.any.suffix_tokens
        holes = dropped or (False,) * len(tokens)
        html = _spans(zip(tokens, [""] * len(tokens), holes, strict=True), redact, apart=hover)
        values = ";".join(_values(window) for _, window in named) if hover else ""
        texts.append(Text(tuple(i for i, _ in named), html, values))
    return texts


def _values(window: Window) -> str:
    """Of each token its loss in hundredths of a nat and, after a dot, its rank where that is not 0, in base 36."""
    pairs = zip(window.nll, window.rank, strict=True)
    return " ".join(_base36(min(nll, 1e4) * 100) + (f".{_base36(rank)}" if rank else "") for nll, rank in pairs)


def _base36(number: float) -> str:
    left, digits = round(max(number, 0)), ""
    while left or not digits:
        left, digit = divmod(left, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits


def output(window: Window, redact: bool) -> Markup:
    """What the model wrote: the matching run (m), the first divergence (x), the rest plain.

    Dropped tokens are marked up to the first divergence; after it the positions mean something else.
    """
    d = window.first_divergence
    classes = ["m" if t < d else "x" if t == d else "" for t in range(len(window.output_tokens))]
    dropped = [window.dropped is not None and t <= d and t < len(window.dropped) and window.dropped[t]
               for t in range(len(window.output_tokens))]  # fmt: skip
    html = _spans(zip(window.output_tokens, classes, dropped, strict=True), redact)
    if d >= len(window.output_tokens) and not window.exact_match:
        html += Markup('<i class="x end">[stops here]</i>')
    return html


def _spans(tokens: Iterable[tuple[str, str, bool]], redact: bool, apart: bool = False) -> Markup:
    """HTML of (text, class, dropped) tokens: <u> where dropped, else <i>; equal neighbours share one unless `apart`."""
    parts = []
    for (_, css, dropped), run in groupby(enumerate(tokens), key=lambda token: (token[0] * apart, *token[1][1:])):
        inner = Markup("").join(show(blocks(token[0]) if redact else token[0]) for _, token in run)
        if not (css or dropped or apart):
            parts.append(inner)
            continue
        tag = "u" if dropped else "i"
        parts.append(Markup(f"<{tag}{f' class={css}' if css else ''}>{inner}</{tag}>"))
    return Markup("").join(parts)


def name_of(window: Window, redact: bool) -> str:
    """The document's name for people, or its place in the file."""
    if not window.document:
        return f"row {window.index}"
    return blocks(window.document[:60]) if redact else plain(window.document, 80)
