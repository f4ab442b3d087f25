"""Answers to simple prompts, beside the documents that they recite."""

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from goldfish.audit.ask import read_asked
from goldfish.report import spans
from goldfish.report.load import View
from goldfish.text.printable import plain

SHOWN = 20  # answers of an audit, those with the longest runs
PROMPT_SHOWN = 300  # characters


@dataclass(frozen=True)
class Answer:
    """One answer on the page; `record` is its row of the audit's `asked/`."""

    record: dict[str, Any]
    prompt: str
    output: Markup
    document: Markup


def answers(view: View, redact: bool) -> list[Answer]:
    """Those of an audit that recite other documents, then those with the longest runs.

    Members come first; [] if nothing was asked.
    """
    if not view.audit.run["protocol"].get("ask"):
        return []
    records = read_asked(view.audit.folder).to_pylist()
    # Members before held-out documents, as everywhere.
    records.sort(
        key=lambda each: (
            each["split"] != "members",
            not each["elsewhere"],
            -each["longest_run"],
        )
    )
    return [_answer(record, redact) for record in records[:SHOWN]]


def _answer(record: dict[str, Any], redact: bool) -> Answer:
    tokens = record["output_tokens"]
    classes = [""] * len(tokens)
    for start, _, length in record["common_runs"]:
        classes[start : start + length] = ["r"] * length
    undropped = [False] * len(tokens)
    output = spans.marked(
        zip(
            tokens,
            classes,
            undropped,
            strict=True,
        ),
        redact,
    )
    prompt, text = record["prompt"], record["document_text"]
    if redact:
        prompt, text = record["template"], spans.blocks(text)
    return Answer(
        record,
        plain(prompt, PROMPT_SHOWN),
        output,
        spans.show(text, 2_000),
    )
