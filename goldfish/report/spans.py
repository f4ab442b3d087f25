"""The drill-down: the windows of one text in all audits, and their tokens as coloured spans of HTML."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup
from numpy.typing import NDArray

from goldfish.report.load import SPLITS, View
from goldfish.text.printable import plain, visible

PREFIX_SHOWN = (
    4000  # characters of a prefix on the page, its last ones; of one token at most 200
)
PREFIX_REDACTED = 100  # a block is three bytes
AT_ONCE = 64  # texts that are Python objects at the same time

Window = dict[str, Any]  # a row of the records, with the columns of load.COLUMNS


def order(views: Sequence[View]) -> NDArray[np.int64]:
    """(texts, audits): the row of each text in each audit, -1 where an audit lacks it. Members come first, then the
    texts recited most: the highest ROUGE-L in any audit, then the highest mean over audits."""
    places: dict[tuple[Any, ...], NDArray[np.int64]] = {}
    scores: dict[tuple[Any, ...], list[float]] = {}
    for i, view in enumerate(views):
        tokens = pc.binary_join(view.windows["suffix_tokens"], "\x00").to_pylist()
        columns = [
            view.windows[name].to_pylist()
            for name in ("split", "index", "offset", "prompt")
        ]
        for row, (*key, rouge) in enumerate(
            zip(*columns, tokens, view.windows["rouge_l_ids"].to_pylist(), strict=True)
        ):
            places.setdefault(tuple(key), np.full(len(views), -1))[i] = row
            scores.setdefault(tuple(key), []).append(rouge)

    def rank(key: tuple[Any, ...]) -> tuple[Any, ...]:
        return (
            list(SPLITS).index(key[0]),
            -max(scores[key]),
            -np.mean(scores[key]),
            *key[1:3],
        )

    return np.array(
        [places[key] for key in sorted(places, key=rank)], dtype=np.int64
    ).reshape(-1, len(views))


def windows(
    views: Sequence[View], rows: NDArray[np.int64]
) -> Iterator[list[Window | None]]:
    """For each row of `order`, the window of every audit; None where an audit lacks the text."""
    for begin in range(0, len(rows), AT_ONCE):
        pairs = zip(views, rows[begin : begin + AT_ONCE].T, strict=True)
        columns = [
            view.windows.take(pa.array(at, mask=at < 0)).to_pylist()
            for view, at in pairs
        ]
        for group in zip(*columns, strict=True):
            yield [window if window["split"] else None for window in group]


def prefix(window: Window, redact: bool) -> Markup:
    """The end of the prefix, and how much of it is not shown."""
    text, limit = window["prompt"], PREFIX_REDACTED if redact else PREFIX_SHOWN
    hidden, shown = len(text) - limit, text[-limit:]
    note = (
        Markup("<em>[{:,} characters before this are not shown]</em> ").format(hidden)
        if hidden > 0
        else Markup("")
    )
    return note + show(blocks(shown) if redact else shown, limit)


def truths(
    group: Sequence[Window | None], redact: bool
) -> list[tuple[list[int], Markup]]:
    """The true suffix, once for each set of dropped tokens, which are marked, with the audits whose rule dropped them;
    audits without a rule join the first set."""
    present = [(i, window) for i, window in enumerate(group) if window is not None]
    tokens = present[0][1]["suffix_tokens"]
    rules: dict[Sequence[bool], list[int]] = {}
    for i, window in present:
        if window["dropped"] is not None:
            rules.setdefault(tuple(window["dropped"]), []).append(i)
    rules = rules or {(False,) * len(tokens): []}
    next(iter(rules.values())).extend(
        i for i, window in present if window["dropped"] is None
    )
    return [
        (sorted(audits), _truth(tokens, dropped, present[0][1]["secrets"], redact))
        for dropped, audits in rules.items()
    ]


def _truth(
    tokens: Sequence[str], dropped: Sequence[bool], secrets: Sequence[str], redact: bool
) -> Markup:
    plain_tokens = zip(tokens, [""] * len(tokens), dropped, strict=True)
    return marked(_with_secrets(plain_tokens, secrets), redact)


def output(window: Window, redact: bool) -> Markup:
    """What the model wrote: the matching start (m), the first divergence (x), other runs of 12 tokens or more that
    the true suffix holds too (r), the rest plain. A token that equals one of the suffix is underlined if that one was
    dropped."""
    tokens, dropped, first = (
        window["output_tokens"],
        window["dropped"],
        window["first_divergence"],
    )
    classes = [""] * len(tokens)
    aligned = [-1] * len(
        tokens
    )  # the token of the suffix that a token of the output repeats
    for start, there, length in [
        *sorted(window["common_runs"], key=lambda run: run[2]),
        (0, 0, first),
    ]:
        classes[start : start + length] = ["r"] * length
        aligned[start : start + length] = range(there, there + length)
    classes[:first] = ["m"] * first
    if first < len(tokens):
        classes[first], aligned[first] = "x", first
    lost = [
        dropped is not None and 0 <= at < len(dropped) and dropped[at] for at in aligned
    ]
    secrets = [*window["secrets"], *window["given_away"]]
    return marked(
        _with_secrets(zip(tokens, classes, lost, strict=True), secrets), redact
    )


def _with_secrets(
    tokens: Iterable[tuple[str, str, bool]], secrets: Sequence[str]
) -> Iterator[tuple[str, str, bool]]:
    """The tokens, those that share a character with a secret in class k too."""
    listed = list(tokens)
    text = "".join(token for token, _, _ in listed)
    inside = bytearray(len(text))
    for secret in dict.fromkeys(secrets):
        begin = text.find(secret)
        while begin >= 0 and secret:
            inside[begin : begin + len(secret)] = b"\1" * len(secret)
            begin = text.find(secret, begin + 1)
    end = 0
    for token, css, dropped in listed:
        begin, end = end, end + len(token)
        yield token, f"{css} k".strip() if any(inside[begin:end]) else css, dropped


def name_of(window: Window, redact: bool) -> str:
    """The document's name for people."""
    return blocks(window["name"][:60]) if redact else plain(window["name"], 80)


def marked(tokens: Iterable[tuple[str, str, bool]], redact: bool) -> Markup:
    """HTML of (text, class, dropped) tokens: <u> where dropped, else <i>; equal neighbours share one."""
    parts = []
    for (css, dropped), run in groupby(tokens, key=lambda token: token[1:]):
        inner = "".join(show(blocks(text) if redact else text) for text, _, _ in run)
        tag = "u" if dropped else "i"
        parts.append(
            f"<{tag}{_attribute(css)}>{inner}</{tag}>" if css or dropped else inner
        )
    return Markup("".join(parts))


def _attribute(css: str) -> str:
    if not css:
        return ""
    return f' class="{css}"' if " " in css else f" class={css}"


def show(text: str, limit: int = 200) -> Markup:
    """At most `limit` characters of `text` as HTML that can do nothing; visible escapes are in <s>.

    For the inside of an element with `white-space: pre-wrap`, never an attribute: quotes stay, they are a tenth of a
    page about code.
    """
    cut = escape(text[:limit], quote=False) + ("…" if len(text) > limit else "")
    return Markup("<s>↵</s>\n".join(map(_line, cut.split("\n"))))


def blocks(text: str) -> str:
    """A block for every character, spaces included: word lengths would give away a text that the reader knows."""
    return "█" * len(text)


def _line(line: str) -> str:
    if line.isprintable():
        return line
    shown = ((char, visible(char)) for char in line)
    marked = "".join(char if char == seen else f"<s>{seen}</s>" for char, seen in shown)
    return marked.replace("<s>\\t</s>", "<s>⇥</s>\t")
