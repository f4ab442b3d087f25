"""An audit for other readers: Markdown for a pull request, JUnit XML for CI."""

import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from goldfish.audit.gate import Check
from goldfish.audit.results import Figure, figures
from goldfish.audit.table import ROWS, figure_text

MARKS = {"PASS": "✅", "FAIL": "❌", "INCONCLUSIVE": "⚠️", "passed": "✅", "violated": "❌", "inconclusive": "⚠️"}


def markdown(summary: Mapping[str, Any], checks: Sequence[Check] = ()) -> str:
    """The verdict, its questions, the conditions and the figures; text from the audit does nothing in it."""
    verdict, known, splits = summary["verdict"], figures(summary), list(summary["splits"])
    lines = [
        f"## goldfish audit of {literal(summary['name'])}: {MARKS[verdict['outcome']]} {verdict['outcome']}",
        "",
        "| question | outcome | why |",
        "|---|---|---|",
        *(
            f"| {each['asks']} | {MARKS[each['outcome']]} {each['outcome']} | {each['why']} |"
            for each in verdict["questions"]
        ),
        "",
    ]
    if checks:
        lines += ["| fails on | outcome | |", "|---|---|---|"]
        lines += [
            f"| {literal(c.condition.text)} | {MARKS[c.outcome]} {c.outcome} | {literal(c.says)} |" for c in checks
        ]
        lines.append("")
    lines += [f"| | {' | '.join(splits)} |", "|---" * (1 + len(splits)) + "|"]
    for label, name in ROWS:
        row: list[Figure | None] = [known.get(f"{split}.{name}") for split in splits]
        if any(row):
            lines.append(f"| {label.strip()} | {' | '.join(figure_text(each) if each else '-' for each in row)} |")
    protocol = summary["protocol"]
    lines += [
        "",
        f"{protocol['prefix_length']} tokens given, {protocol['suffix_length']} to recite; {protocol['dtype']}. "
        "Intervals are of 95%, over documents.",
        f"Not tested: {'; '.join(verdict['not_tested'])}.",
    ]
    return "\n".join(lines) + "\n"


def junit(summary: Mapping[str, Any], checks: Sequence[Check] = ()) -> str:
    """A test case for every condition (failure: violated, error: inconclusive); without conditions, for every
    question of the verdict (failure: FAIL, skipped: INCONCLUSIVE)."""
    cases = [(check.condition.text, check.outcome, check.says) for check in checks]
    if not checks:
        cases = [(each["question"], each["outcome"], each["why"]) for each in summary["verdict"]["questions"]]
    kinds = {"violated": "failure", "inconclusive": "error", "FAIL": "failure", "INCONCLUSIVE": "skipped"}
    found = [kinds.get(outcome) for _, outcome, _ in cases]
    counts = {kind: str(found.count(name)) for kind, name in
              (("failures", "failure"), ("errors", "error"), ("skipped", "skipped"))}  # fmt: skip
    name = _xml(f"goldfish audit {summary['name']}")
    suite = ElementTree.Element("testsuite", {"name": name, "tests": str(len(cases)), **counts})
    for text, outcome, says in cases:
        case = ElementTree.SubElement(suite, "testcase", classname=name, name=_xml(text))
        if kind := kinds.get(outcome):
            ElementTree.SubElement(case, kind, message=_xml(says))
        else:
            ElementTree.SubElement(case, "system-out").text = _xml(says)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def literal(text: str) -> str:
    """Text in a Markdown table that is shown as it is: punctuation escaped, on one line."""
    return re.sub(r"([^\w\s])", r"\\\1", " ".join(text.split())).replace("\\<", "&lt;").replace("\\>", "&gt;")


def _xml(text: str) -> str:
    """Without what XML 1.0 cannot hold."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
