"""What an audit says, described once and shown as a terminal's table, as Markdown for a pull request, as JUnit for CI.

Names and texts of an audit are untrusted input: everything is written with visible escapes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from goldfish.audit.estimate import dumps, percent
from goldfish.audit.folder import write_text
from goldfish.audit.results import estimates
from goldfish.audit.summary import summarize
from goldfish.audit.verdict import strongest_blind
from goldfish.text.printable import plain

COLOURS = {"PASS": "bold green", "FAIL": "bold red", "INCONCLUSIVE": "bold yellow"}
MARKS = {
    "PASS": "✅",
    "FAIL": "❌",
    "INCONCLUSIVE": "⚠️",
    "passed": "✅",
    "violated": "❌",
    "inconclusive": "⚠️",
}
ROWS = (  # of the table: label, the estimate's name in a split
    ("texts recited verbatim", "exact_match"),
    ("  in 1,000 samples, p=0.5", "extractable"),
    ("    under any setting, at most", "extractable_bound"),
    ("  by beam search", "beam_search"),
    ("  near-verbatim", "near_verbatim"),
    ("texts whose output has a secret", "secrets"),
    ("ROUGE-L (text)", "rouge_l_text"),
    ("ROUGE-L (token ids)", "rouge_l_ids"),
    ("longest common run, tokens", "longest_run"),
    ("edit similarity", "edit_similarity"),
    ("accuracy, free running", "token_accuracy"),
    ("accuracy, teacher forced", "teacher_forced_accuracy"),
    ("  on dropped tokens", "teacher_forced_accuracy_dropped"),
    ("  on kept tokens", "teacher_forced_accuracy_kept"),
    ("loss, nats/token", "nll"),
    ("hazard ratio, dropped/kept", "attribution.hazard_ratio"),
)


@dataclass(frozen=True)
class Description:
    """An audit in words; no string holds an invisible character.

    answers: (question, explanation or condition; its name; what is asked; outcome; why). rows: (label, cells by split).
    """

    title: str
    outcome: str
    sentence: str
    splits: list[str]
    answers: list[tuple[str, str, str, str, str]]
    rows: list[tuple[str, list[str]]]
    notes: list[str]


def publish(
    folder: str | Path, limits: Sequence[str] = (), require: Sequence[str] = ()
) -> dict[str, Any]:
    """Summarize an audit whose records are complete; write summary.md and, last, summary.json.

    Args:
        folder: of the audit. limits: such as "recited=0.1%", in place of the verdict's defaults.
        require: explanations that count towards the verdict too; "membership" is the only one.

    Returns the summary.
    """
    summary = summarize(folder, limits, require)
    files = {"summary.md": markdown(describe(summary)), "summary.json": dumps(summary)}
    for name, text in files.items():
        write_text(Path(folder) / name, text)
    return summary


def describe(summary: Mapping[str, Any], share: bool = False) -> Description:
    """All that the outputs say about a summary; with `share`, without paths and names of texts."""
    verdict, protocol = summary["verdict"], summary["protocol"]
    limits = ", ".join(f"{name}={percent(limit)}" for name, limit in verdict["limits"].items())
    weights = next(iter((summary["weights"] or [{}])[0].values()), "not read")[:12]
    inputs = [
        f"{split} {each['path']} (SHA-256 {each['sha256'][:12]})"
        for split, each in summary["inputs"].items()
    ]
    notes = [
        *(f"Warning: {warning}" for warning in verdict["warnings"]),
        verdict["sanity"],
        *verdict["skipped"],
        f"{task(summary)}; {protocol['dtype']}. 95% intervals over documents; -: not measured, or too few to say",
        f"Limits: {limits}",
        f"Not tested: {'; '.join(verdict['not_tested'])}",
        *([] if share else [f"{summary['checkpoint']} (weights {weights}); {'; '.join(inputs)}"]),
        f"{summary['date']}; {', '.join(f'{name} {version}' for name, version in summary['versions'].items())}",
    ]
    answers = []
    for question in [*verdict["questions"], *verdict["explanations"]]:
        # Of the recited texts a PASS or an INCONCLUSIVE may have some too.
        names = () if share else [plain(name, 60) for name in question.get("recited", ())]
        why = f"{question['why']}. Recited: {', '.join(names)}" if names else question["why"]
        kind = "question" if "outcome" in question else "explanation"
        outcome = question["outcome" if kind == "question" else "answer"]
        answers.append((kind, question["question"], question["asks"], outcome, plain(why, 1000)))
    return Description(
        title=f"goldfish audit of {plain(summary['name'], 60)}",
        outcome=verdict["outcome"],
        sentence=plain(verdict["sentence"], 1000),
        splits=["held-out" if split == "heldout" else split for split in summary["splits"]],
        answers=answers,
        rows=_rows(summary),
        notes=[plain(note, 1000) for note in notes],
    )


def task(summary: Mapping[str, Any]) -> str:
    """What the model was given and had to say."""
    protocol, inputs = summary["protocol"], summary["inputs"].values()
    windows = (
        sum(each.get("completions", 0) for each in inputs),
        sum(each.get("windows", 1) for each in inputs),
    )
    if windows[0] == windows[1]:
        return "Given the prompt of a chat, the model must continue with the answer"
    also = (
        f"; in {windows[0]:,} chats the prompt is given and the model must continue with the answer"
        if windows[0]
        else ""
    )
    return f"{protocol['prefix_length']} tokens given, {protocol['suffix_length']} to continue with{also}"


def _rows(summary: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    known, splits = estimates(summary), list(summary["splits"])
    rows = []
    for label, name in ROWS:
        cells = [_cell(known.get(f"{split}.{name}")) for split in splits]
        if set(cells) != {"-"}:
            rows.append((label, cells))
    if "secrets" in known:
        rows.insert(0, ("secrets given away", [str(known["secrets"]), *[""] * (len(splits) - 1)]))
    if summary["membership"]:
        blind = strongest_blind(summary["membership"])
        rows.append(("membership, AUC", [_cell(known["mia.auc"]), f"blind: {blind.point()}"]))
        rows.append(("membership, TPR at 1% FPR", [_cell(known["mia.tpr@1%"]), ""]))
    return rows


def _cell(estimate: Any) -> str:
    return (
        "-"
        if estimate is None or (estimate.value is None and estimate.lower95 is None)
        else str(estimate)
    )


def terminal(description: Description) -> Group:
    """The description for a terminal of at least 80 columns; its last line is the verdict."""
    table = Table(
        title=Text(description.title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("")
    for split in description.splits:
        table.add_column(split, justify="right", no_wrap=True)
    for label, cells in description.rows:
        table.add_row(label, *cells)
    verdict = Text(description.sentence)
    verdict.stylize(COLOURS[description.outcome], 0, len(description.outcome))
    return Group(
        table,
        *(Text(note, style="dim") for note in description.notes),
        *(Text(f"{asks} {outcome}: {why}") for _, _, asks, outcome, why in description.answers),
        verdict,
    )


def markdown(description: Description) -> str:
    """The description for a pull request or a model card; text from the audit is escaped."""
    answers = []
    for kind, _, asks, outcome, why in description.answers:
        aside = " (does not count)" if kind == "explanation" else ""
        answers.append(
            [literal(asks) + aside, f"{MARKS.get(outcome, '')} {outcome}".strip(), literal(why)]
        )
    rows = [[label.strip(), *cells] for label, cells in description.rows]
    lines = [
        f"## {literal(description.title)}: {MARKS[description.outcome]} {description.outcome}\n",
        f"{literal(description.sentence)}\n",
        *table_lines(["question", "answer", "why"], answers),
        *table_lines(["", *description.splits], rows),
        *(f"{literal(note)}.\n" for note in description.notes),
    ]
    return "\n".join(lines)


def table_lines(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, whose cells are escaped already, and an empty line; nothing without rows."""
    if not rows:
        return []
    return [*(f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows)), ""]


def literal(text: str) -> str:
    """Text that Markdown shows as it is: punctuation escaped, but for that which means nothing to it."""
    return (
        re.sub(r"([!#$&()*+\-.:<=>@\[\\\]^_`{|}~])", r"\\\1", text)
        .replace("\\<", "&lt;")
        .replace("\\>", "&gt;")
    )
