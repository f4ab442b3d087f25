"""Answers to simple prompts, beside the documents that they recite."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from goldfish.audit.questions.ask import read_asked
from goldfish.audit.questions.secrets import marked_secrets
from goldfish.report import spans
from goldfish.report.load import View
from goldfish.text.printable import plain

SHOWN = 20  # answers of an audit
PROMPT_SHOWN = 300  # characters


@dataclass(frozen=True)
class Answer:
    """One answer on the page.

    record: its row of the audit's `asked/`. given_away: how many of the members' secrets it has.
    """

    record: dict[str, Any]
    prompt: str
    output: Markup
    document: Markup
    given_away: int


def answers(view: View, redact: bool) -> tuple[list[Answer], int]:
    """The answers of an audit that tell most, and how many there are.

    Members come first; among them answers that gave a secret away, then those that recite other
    documents, then those with the longest runs.
    """
    if not view.audit.run["protocol"].get("ask"):
        return [], 0
    marked = marked_secrets(view.windows, "members")
    # Any answer may have them, though no question was about them.
    marked += view.audit.run["unasked_secrets"]
    ranked = []
    for record in read_asked(view.audit.folder).to_pylist():
        given_away = [
            secret
            for secret in marked
            if secret in record["output_text"] and secret not in record["prompt"]
        ]
        place = (
            record["split"] != "members",
            not given_away,
            not record["elsewhere"],
            -record["longest_run"],
        )
        ranked.append((place, record, given_away))
    ranked.sort(key=lambda each: each[0])
    shown = [_answer(record, found, redact) for _, record, found in ranked[:SHOWN]]
    return shown, len(ranked)


def _answer(record: dict[str, Any], given_away: Sequence[str], redact: bool) -> Answer:
    tokens = record["output_tokens"]
    classes = [""] * len(tokens)
    for start, _, length in record["common_runs"]:
        classes[start : start + length] = ["r"] * length
    undropped = [False] * len(tokens)
    classified = zip(tokens, classes, undropped, strict=True)
    output = spans.marked(spans.with_secrets(classified, given_away), redact)
    prompt, text = record["prompt"], record["document_text"]
    if redact:
        prompt, text = record["template"], spans.blocks(text)
    return Answer(
        record,
        plain(prompt, PROMPT_SHOWN),
        output,
        spans.show(text, 2_000),
        len(given_away),
    )
