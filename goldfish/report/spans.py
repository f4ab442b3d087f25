"""The drill-down: the windows of one text in all audits, their tokens as coloured spans of HTML."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup
from numpy.typing import NDArray

from goldfish.audit.intervals import SPLITS
from goldfish.report.load import View
from goldfish.text.printable import counted, plain, visible

# Characters of a prefix on the page, its last ones; of one token at most 200.
PREFIX_SHOWN = 4000
PREFIX_REDACTED = 100  # a block is three bytes
AT_ONCE = 64  # texts that are Python objects at the same time

Window = dict[str, Any]  # a row of the records, with the columns of load.COLUMNS
# What names a text in all audits: split, row, offset, prompt, and the tokens of its suffix.
TextKey = tuple[str, int, int, str, str]
Token = tuple[str, str, bool]  # text, CSS class, dropped
Truth = tuple[
    list[int], Markup
]  # the audits whose rule dropped these tokens, and the suffix


@dataclass
class _Text:
    """A text on the page: its row in each audit, and what decides its place.

    rows: (audits,), -1 if an audit lacks the text. recited: ROUGE-L in the audits that have it.
    leaks: whether its answer gave a secret away in any of them.
    """

    rows: list[int]
    recited: list[float] = field(default_factory=list)
    leaks: bool = False


def order(views: Sequence[View]) -> NDArray[np.int64]:
    """The texts in the order of the page.

    Members come first; among them texts whose answer gave a secret away in any audit, then those
    recited most: the highest ROUGE-L in any audit, then the highest mean over audits.

    Returns (texts, audits): the row of each text in each audit, -1 if an audit lacks it.
    """
    texts: dict[TextKey, _Text] = {}
    for i, view in enumerate(views):
        rouge = view.windows["rouge_l_ids"].to_pylist()
        given_away = view.windows["given_away"].to_pylist()
        for row, key in enumerate(_keys(view)):
            text = texts.setdefault(key, _Text([-1] * len(views)))
            # A text that the audit asked twice is shown once, as asked last.
            text.rows[i] = row
            text.recited.append(rouge[row])
            text.leaks |= bool(given_away[row])

    def place(key: TextKey) -> tuple[Any, ...]:
        split, index, offset, *_ = key
        text = texts[key]
        return (
            list(SPLITS).index(split),
            not text.leaks,
            -max(text.recited),
            -np.mean(text.recited),
            index,
            offset,
        )

    rows = [texts[key].rows for key in sorted(texts, key=place)]
    return np.array(rows, dtype=np.int64).reshape(-1, len(views))


def _keys(view: View) -> Iterator[TextKey]:
    # Texts of one split and row may differ between audits of different files.
    names = ("split", "index", "offset", "prompt")
    columns = [view.windows[name].to_pylist() for name in names]
    suffixes = pc.binary_join(view.windows["suffix_tokens"], "\x00")
    return zip(*columns, suffixes.to_pylist(), strict=True)


def windows(
    views: Sequence[View], rows: NDArray[np.int64]
) -> Iterator[list[Window | None]]:
    """For each row of `order`, the window of every audit; None if an audit lacks the text."""
    for begin in range(0, len(rows), AT_ONCE):
        columns = []
        for view, at in zip(views, rows[begin : begin + AT_ONCE].T, strict=True):
            columns.append(view.windows.take(pa.array(at, mask=at < 0)).to_pylist())
        for group in zip(*columns, strict=True):
            yield [window if window["split"] else None for window in group]


def prefix(window: Window, redact: bool) -> Markup:
    """The end of the prefix, and how much of it is not shown."""
    text: str = window["prompt"]
    limit = PREFIX_SHOWN
    if redact:
        text = blocks(text)
        limit = PREFIX_REDACTED
    hidden = len(text) - limit
    end = show(text[-limit:], limit)
    if hidden <= 0:
        return end
    note = Markup("<em>[{} before this not shown]</em> ")
    return note.format(counted(hidden, "character")) + end


def truths(group: Sequence[Window | None], redact: bool) -> list[Truth]:
    """The true suffix, once for each set of dropped tokens, which are marked.

    Audits without a rule join the first set.
    """
    rules: dict[tuple[bool, ...], list[int]] = {}
    without_rule = []
    for i, window in enumerate(group):
        if window is None:
            continue
        example = window
        if window["dropped"] is None:
            without_rule.append(i)
        else:
            dropped = tuple(window["dropped"])
            rules.setdefault(dropped, []).append(i)
    tokens = example["suffix_tokens"]
    if not rules:
        none_dropped = (False,) * len(tokens)
        rules[none_dropped] = []
    next(iter(rules.values())).extend(without_rule)
    found = []
    for dropped, audits in rules.items():
        classes = [""] * len(tokens)
        plain_tokens = zip(tokens, classes, dropped, strict=True)
        shown = with_secrets(plain_tokens, example["secrets"])
        found.append((sorted(audits), marked(shown, redact)))
    return found


def output(window: Window, redact: bool) -> Markup:
    """What the model wrote, in classes that the style sheet colours.

    m: the start that matches the suffix. x: the first divergence. r: other runs of 12 tokens or
    more that the suffix holds too. k: a marked secret, of this text or of another. A token that
    equals one of the suffix is underlined if that one was dropped.
    """
    tokens = window["output_tokens"]
    dropped = window["dropped"] or ()
    first = window["first_divergence"]
    classes = [""] * len(tokens)
    # The token of the suffix that a token of the output repeats; -1 if it repeats none.
    aligned = [-1] * len(tokens)
    runs = sorted(window["common_runs"], key=lambda run: int(run[2]))
    # Runs may overlap: the longest, then the matching start, are written over the others.
    for start, there, length in [*runs, (0, 0, first)]:
        run = slice(start, start + length)
        classes[run] = ["r"] * length
        aligned[run] = range(there, there + length)
    classes[:first] = ["m"] * first
    if first < len(tokens):
        classes[first] = "x"
        aligned[first] = first
    lost = [0 <= at < len(dropped) and dropped[at] for at in aligned]
    secrets = [*window["secrets"], *window["given_away"]]
    classified = zip(tokens, classes, lost, strict=True)
    return marked(with_secrets(classified, secrets), redact)


def with_secrets(tokens: Iterable[Token], secrets: Sequence[str]) -> Iterator[Token]:
    """The tokens, those that share a character with a secret in class k too."""
    listed = list(tokens)
    text = "".join(token for token, _, _ in listed)
    # 1 for each character of a secret: a secret rarely begins or ends with a token.
    inside = bytearray(len(text))
    for secret in filter(None, secrets):
        begin = text.find(secret)
        while begin >= 0:
            end = begin + len(secret)
            inside[begin:end] = b"\1" * len(secret)
            begin = text.find(secret, begin + 1)
    end = 0
    for token, css, dropped in listed:
        begin = end
        end += len(token)
        if any(inside[begin:end]):
            css = f"{css} k".strip()
        yield token, css, dropped


def name_of(window: Window, redact: bool) -> str:
    """The document's name for people."""
    name: str = window["name"]
    if redact:
        return blocks(name[:60])
    return plain(name, 80)


def marked(tokens: Iterable[Token], redact: bool) -> Markup:
    """HTML of the tokens: <u> if dropped, else <i>; equal neighbours share one.

    Most of a page is these tags, so they are as short as HTML allows, and plain text has none.
    """
    hide = blocks if redact else str
    parts = []
    for (css, dropped), run in groupby(tokens, key=lambda token: token[1:]):
        inner = "".join(show(hide(text)) for text, _, _ in run)
        tag = "u" if dropped else "i"
        if css or dropped:
            inner = f"<{tag}{_attribute(css)}>{inner}</{tag}>"
        parts.append(inner)
    return Markup("".join(parts))


def _attribute(css: str) -> str:
    if " " in css:
        return f' class="{css}"'
    return f" class={css}" if css else ""


def show(text: str, limit: int = 200) -> Markup:
    """At most `limit` characters of `text` as HTML that can do nothing; visible escapes are in <s>.

    For the inside of an element with `white-space: pre-wrap`, never an attribute: quotes stay, they
    are a tenth of a page about code.
    """
    cut = escape(text[:limit], quote=False)
    if len(text) > limit:
        cut += "…"
    lines = map(_line, cut.split("\n"))
    return Markup("<s>↵</s>\n".join(lines))


def blocks(text: str) -> str:
    """A block for every character, spaces included: word lengths would give a known text away."""
    return "█" * len(text)


def _line(line: str) -> str:
    if line.isprintable():
        return line
    parts = []
    for char in line:
        seen = visible(char)
        if char != seen:
            seen = f"<s>{seen}</s>"
        parts.append(seen)
    # A tab keeps its width: the arrow stands before it.
    return "".join(parts).replace("<s>\\t</s>", "<s>⇥</s>\t")
