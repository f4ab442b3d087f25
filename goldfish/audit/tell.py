"""What an audit says, described once and shown as a terminal's table, as Markdown for a pull request, as JUnit for CI.

Names and texts of an audit come from strangers: everything is written with visible escapes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from goldfish.audit.estimate import dumps, percent
from goldfish.audit.results import estimates, exit_code, judge, parse
from goldfish.audit.summary import ABOUT, COLUMNS, summarize, summary_of
from goldfish.audit.verdict import strongest_blind
from goldfish.pieces import plain

COLOURS = {"PASS": "bold green", "FAIL": "bold red", "INCONCLUSIVE": "bold yellow"}
MARKS = {"PASS": "✅", "FAIL": "❌", "INCONCLUSIVE": "⚠️", "passed": "✅", "violated": "❌", "inconclusive": "⚠️"}
ELEMENTS = {"violated": "failure", "inconclusive": "error", "FAIL": "failure", "INCONCLUSIVE": "skipped"}  # of JUnit
ROWS = (  # of the table: label, the estimate's name in a split
    ("texts recited word for word", "exact_match"),
    ("  without trivial suffixes", "exact_match_nontrivial"),
    ("  in 1,000 samples, p=0.5", "extractable"),
    ("  by beam search", "beam_search"),
    ("  near-verbatim", "near_verbatim"),
    ("secrets given away", "secrets"),
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

    questions, explanations: (name, question, outcome or answer, why). checks: (condition, outcome, why).
    rows: (label, one cell a split).
    """

    title: str
    outcome: str
    sentence: str
    splits: list[str]
    questions: list[tuple[str, ...]]
    explanations: list[tuple[str, ...]]
    checks: list[tuple[str, ...]]
    rows: list[tuple[str, list[str]]]
    notes: list[str]


def publish(
    folder: str | Path, limits: Sequence[str] = (), require: Sequence[str] = (), fail_on: Sequence[str] = ()
) -> dict[str, Any]:
    """Summarize an audit whose records are complete, and write summary.md, junit.xml and, last, summary.json.

    Args:
        limits, require: as for `summary_of`. fail_on: conditions such as "em.upper95 > 0.01".

    Returns:
        The summary, with the conditions' outcomes and the exit code.
    """
    summary = summarize(folder, limits, require)
    checks = judge(estimates(summary), [parse(text) for text in fail_on])
    summary |= {
        "conditions": [{"condition": each.condition.text, "outcome": each.outcome, "why": each.why} for each in checks],
        "exit_code": exit_code(checks),
    }
    description = describe(summary)
    files = {"summary.md": markdown(description), "junit.xml": junit(description), "summary.json": dumps(summary)}
    for name, text in files.items():
        part = Path(folder) / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(Path(folder) / name)
    return summary


def require_known(
    fail_on: Sequence[str], limits: Sequence[str], protocol: Mapping[str, Any], splits: Sequence[str]
) -> None:
    """ValueError for a limit or a condition that an audit of this protocol could not judge; known before the work.

    The names are those of an audit of one made-up window a split.
    """
    row: dict[str, Any] = dict.fromkeys(COLUMNS, 0)
    row |= {"count": None, "words": [1], "suffix_ids": [0], "dropped": [False]}
    row |= {"prefix_sweep": [False] * len(protocol["prefix_grid"]), "log_p": [-1.0] * len(protocol["sampling"])}
    row |= {"offset": protocol["offsets"][0], "document": "", "mia_lowercase": 0 if protocol["lowercase"] else None}
    row |= {"mia_reference": 0 if protocol["control"] else None, "secret_recited": 0 if protocol["secrets"] else None}
    run = dict.fromkeys(ABOUT) | {"protocol": {**protocol, "vocabulary": 2}, "receipt": None}
    run["inputs"] = {split: {"rows": 1, "skipped": []} for split in splits}
    table = pa.Table.from_pylist([{**row, "split": split, "cluster": i} for i, split in enumerate(splits)])
    conditions = [parse(text) for text in fail_on]
    # The strata depend on the counts in the input.
    judge(estimates(summary_of(run, table, limits)), [each for each in conditions if "strata@" not in each.figure])


def describe(summary: Mapping[str, Any]) -> Description:
    """All that the outputs say about a summary."""
    verdict, protocol = summary["verdict"], summary["protocol"]
    limits = ", ".join(f"{name}={percent(limit)}" for name, limit in verdict["limits"].items())
    weights = next(iter((summary["weights"] or [{}])[0].values()), "not read")[:12]
    inputs = [f"{split} {each['path']} (SHA-256 {each['sha256'][:12]})" for split, each in summary["inputs"].items()]
    notes = [
        *(f"Warning: {warning}" for warning in verdict["warnings"]),
        verdict["sanity"],
        *verdict["skipped"],
        f"{task(summary)}; {protocol['dtype']}. 95% intervals over documents; -: not measured, or too few to say",
        f"Limits: {limits}",
        f"Not tested: {'; '.join(verdict['not_tested'])}",
        f"{summary['checkpoint']} (weights {weights}); {'; '.join(inputs)}; {summary['date']}; goldfish "
        f"{summary['versions'].get('goldfish', '?')}",
    ]

    def texts(entries: Sequence[Mapping[str, Any]], *keys: str) -> list[tuple[str, ...]]:
        return [tuple(plain(each[key], 1000) for key in keys) for each in entries]

    return Description(
        title=f"Audit of {plain(summary['name'], 60)}",
        outcome=verdict["outcome"],
        sentence=plain(verdict["sentence"], 1000),
        splits=["held-out" if split == "heldout" else split for split in summary["splits"]],
        questions=texts([{**each, "why": _why(each)} for each in verdict["questions"]],
                        "question", "asks", "outcome", "why"),
        explanations=texts(verdict["explanations"], "question", "asks", "answer", "why"),
        checks=texts(summary["conditions"], "condition", "outcome", "why"),
        rows=_rows(summary),
        notes=[plain(note, 1000) for note in notes],
    )  # fmt: skip


def task(summary: Mapping[str, Any]) -> str:
    """What the model was given and had to say."""
    protocol, inputs = summary["protocol"], summary["inputs"].values()
    windows = sum(each.get("completions", 0) for each in inputs), sum(each.get("windows", 1) for each in inputs)
    if windows[0] == windows[1]:
        return "Of chats the prompt is given, the assistant's answer to recite"
    also = f"; of {windows[0]:,} chats the prompt given, the answer to recite" if windows[0] else ""
    return f"{protocol['prefix_length']} tokens given, {protocol['suffix_length']} to recite{also}"


def _why(question: Mapping[str, Any]) -> str:
    """With the names of the recited texts, of which a PASS or an INCONCLUSIVE may have some too."""
    names = [plain(name, 60) for name in question.get("recited", ())]
    return f"{question['why']}. Recited: {', '.join(names)}" if names else str(question["why"])


def _rows(summary: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    known, splits = estimates(summary), list(summary["splits"])
    widest = f"beam_search@{max(summary['protocol']['beams'] or [0])}"
    rows = []
    for label, name in ROWS:
        row = [known.get(f"{split}.{widest if name == 'beam_search' else name}") for split in splits]
        if any(each is not None and (each.value is not None or each.lower95 is not None) for each in row):
            rows.append((label, [_cell(each) for each in row]))
    if summary["membership"]:
        blind = strongest_blind(summary["membership"])
        rows.append(("membership, AUC", [_cell(known["mia.auc"]), f"blind: {blind.point()}"]))
        rows.append(("membership, TPR at 1% FPR", [_cell(known["mia.tpr@1%"]), ""]))
    return rows


def _cell(estimate: Any) -> str:
    return "-" if estimate is None or (estimate.value is None and estimate.lower95 is None) else str(estimate)


def terminal(description: Description) -> Group:
    """The description for a terminal of at least 80 columns; its last line is the verdict."""
    table = Table(title=Text(description.title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
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
        *(
            Text(f"{asks} {outcome}: {why}")
            for _, asks, outcome, why in [*description.questions, *description.explanations]
        ),
        *(Text(f"{condition}: {outcome} ({why})") for condition, outcome, why in description.checks),
        verdict,
    )


def markdown(description: Description) -> str:
    """The description for a pull request; text from the audit is escaped."""
    questions = [[asks, f"{MARKS[outcome]} {outcome}", literal(why)] for _, asks, outcome, why in description.questions]
    explanations = [[asks, answer, literal(why)] for _, asks, answer, why in description.explanations]
    checks = [[literal(text), f"{MARKS[outcome]} {outcome}", literal(why)] for text, outcome, why in description.checks]
    rows = [[label.strip(), *cells] for label, cells in description.rows]
    mark = f"{MARKS[description.outcome]} {description.outcome}"
    lines = [f"## goldfish: {literal(description.title)}: {mark}", ""]
    for heading, table in (
        (["question", "outcome", "why"], questions),
        (["beside it", "answer", "why"], explanations),
        (["fails on", "outcome", ""], checks),
        (["", *description.splits], rows),
    ):
        if table:
            lines += [f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *table)]
            lines.append("")
    lines.insert(2, f"{literal(description.sentence)}\n")
    return "\n".join([*lines, *(f"{literal(note)}.\n" for note in description.notes)])


def junit(description: Description) -> str:
    """A test case for every condition (failure: violated, error: inconclusive); without conditions, for every
    question of the verdict (failure: FAIL, skipped: INCONCLUSIVE)."""
    cases = description.checks or [(name, outcome, why) for name, _, outcome, why in description.questions]
    kinds = [ELEMENTS.get(outcome) for _, outcome, _ in cases]
    counts = {"failures": kinds.count("failure"), "errors": kinds.count("error"), "skipped": kinds.count("skipped")}
    name = f"goldfish: {description.title}"
    sizes = {key: str(count) for key, count in {"tests": len(cases), **counts}.items()}
    suite = ElementTree.Element("testsuite", {"name": name, **sizes})
    for (text, _, why), kind in zip(cases, kinds, strict=True):
        case = ElementTree.SubElement(suite, "testcase", classname=name, name=text)
        if kind:
            ElementTree.SubElement(case, kind, message=why)
        else:
            ElementTree.SubElement(case, "system-out").text = why
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def literal(text: str) -> str:
    """Text in a Markdown table that is shown as it is: punctuation escaped."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text).replace("\\<", "&lt;").replace("\\>", "&gt;")
