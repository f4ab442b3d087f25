"""An audit in words: a terminal's table, and Markdown for a pull request or a model card.

Names and texts of an audit are untrusted input: everything is written with visible escapes.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from goldfish.audit.intervals import SPLITS, Figure, percent
from goldfish.audit.questions.membership import strongest_blind
from goldfish.audit.questions.proof import NO_RULE
from goldfish.audit.records import dumps
from goldfish.audit.results import SUMMARY, Audit, write_text
from goldfish.text.printable import counted, plain

COLOURS = {"PASS": "bold green", "FAIL": "bold red", "INCONCLUSIVE": "bold yellow"}
MARKS = {"PASS": "✅", "FAIL": "❌", "INCONCLUSIVE": "⚠️"}
# Figures that are single numbers, in the order of every table, with labels that no two share.
LABELS = {
    "secrets": "marked secrets that came out",
    "secrets_by_chance": "  expected by chance",
    "secrets_extractable": "  secrets in 1,000 samples",
    "answers_with_secret": "  answers with such a secret",
    "asked_with_secret": "  when asked by simple prompts",
    "exact_match": "texts recited verbatim",
    "extractable": "  texts in 1,000 samples",
    "extractable_bound": "    under any setting, at most",
    "beam_search": "  by beam search",
    "near_verbatim": "  near-verbatim",
    "asked": "  when asked for",
    "asked_elsewhere": "  when asked for another text",
    "rouge_l_text": "ROUGE-L (text)",
    "rouge_l_ids": "ROUGE-L (token ids)",
    "longest_run": "longest common run, tokens",
    "longest_run_words": "  words",
    "longest_run_characters": "  characters",
    "asked_run": "longest run when asked for, tokens",
    "asked_run_words": "  in words",
    "asked_run_characters": "  in characters",
    "first_divergence": "first divergence, token",
    "edit_similarity": "edit similarity",
    "token_accuracy": "accuracy, free running",
    "teacher_forced_accuracy": "accuracy, teacher forced",
    "teacher_forced_accuracy_dropped": "  on dropped tokens",
    "teacher_forced_accuracy_kept": "  on kept tokens",
    "nll": "loss, nats/token",
    "rule_p": "p, the claimed rule",
}
MEMBERSHIP_LABELS = {"auc": "membership, AUC", "tpr": "membership, TPR at 1% FPR"}


@dataclass(frozen=True)
class Description:
    """An audit in words; no string holds an invisible character.

    answers: (what is asked, outcome, why, whether it counts). rows: (label, cells by split).
    """

    title: str
    outcome: str
    sentence: str
    splits: list[str]
    answers: list[tuple[str, str, str, bool]]
    rows: list[tuple[str, list[str]]]
    notes: list[str]


def write(audit: Audit, folder: str | Path) -> None:
    """Write summary.md and, last, summary.json.

    Raises:
        FileExistsError: a folder that has the summary of another audit, or of this one under other
            limits.
    """
    is_other = Path(folder).resolve() != audit.folder.resolve()
    if is_other and (Path(folder) / SUMMARY).exists():
        raise FileExistsError(
            f"{folder} has a {SUMMARY} already; choose another output folder or remove it"
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_text(Path(folder) / "summary.md", markdown(describe(audit)))
    write_text(Path(folder) / SUMMARY, dumps(audit.to_json()))


def describe(audit: Audit, share: bool = False) -> Description:
    """All that the outputs tell about an audit; with `share`, without paths and names of texts."""
    return Description(
        title=f"goldfish audit of {plain(audit.name, 60)}",
        outcome=audit.outcome,
        sentence=plain(audit.verdict["sentence"], 1000),
        splits=[SPLITS[split] for split in audit.splits],
        answers=_answers(audit, share),
        rows=figure_rows(audit),
        notes=[plain(note, 1000) for note in _notes(audit, share)],
    )


def _notes(audit: Audit, share: bool) -> list[str]:
    """What may change a reader's mind comes first, provenance last."""
    run = audit.run
    verdict = audit.verdict
    notes = [f"Warning: {warning}" for warning in verdict["warnings"]]
    # A check that failed is among the warnings.
    if verdict["sanity"] not in verdict["warnings"]:
        notes.append(verdict["sanity"])
    notes += skipped(audit)
    notes.append(
        f"{task(run)}; {run['protocol']['dtype']}. Rates: 95% intervals over documents; "
        "-: not measured, or too few to tell"
    )
    limits = [f"{name}={percent(limit)}" for name, limit in audit.limits.items()]
    notes.append(f"Limits: {', '.join(limits)}")
    notes.append(f"Not tested: {'; '.join(not_tested(audit))}")
    if not share:
        sources = [str(run["checkpoint"])]
        for split, each in run["inputs"].items():
            sha256 = each["sha256"][:12]
            sources.append(f"{split} {each['path']} (SHA-256 {sha256})")
        notes.append("; ".join(sources))
    weights = weights_hash(run)[:12] or "not read"
    notes.append(f"Weights: {weights}; rule: {rule_words(run)}")
    versions = [f"{name} {version}" for name, version in run["versions"].items()]
    notes.append(f"{run['date']}; {', '.join(versions)}")
    return notes


def _answers(audit: Audit, share: bool) -> list[tuple[str, str, str, bool]]:
    answers = []
    verdict = audit.verdict
    examples = audit.examples.get("members", {})
    for question in [*verdict["questions"], *verdict["explanations"]]:
        asks = plain(question["asks"], 1000)
        why = question["why"]
        names = examples.get(question["figure"], [])
        # The names of texts are for whoever ran the audit.
        if names and not share:
            shown = [plain(name, 60) for name in names]
            why += f". Recited: {', '.join(shown)}"
        why = plain(why, 1000)
        # What counts has an outcome, what only explains an answer.
        counts = "outcome" in question
        outcome = question["outcome"] if counts else question["answer"]
        answers.append((asks, outcome, why, counts))
    return answers


def weights_hash(run: Mapping[str, Any]) -> str:
    """The SHA-256 of the audited weights, of several files that of their hashes; "" if unknown."""
    files: Mapping[str, str] = (run["weights"] or [{}])[0]
    hashes: list[str] = []
    # Pickles last: beside safetensors, a .bin is the settings of the training or its optimiser.
    for kinds in ((".safetensors", ".gguf", "in memory"), (".bin", ".pt", ".pth")):
        names = [name for name in sorted(files) if name.endswith(kinds)]
        hashes = [files[name] for name in names]
        if hashes:
            break
    joined = "".join(hashes)
    if len(hashes) < 2:
        return joined
    return hashlib.sha256(joined.encode()).hexdigest()


def rule_words(run: Mapping[str, Any]) -> str:
    """The rule of the training, for people: hash, k = 4, h = 13, max_kept = 4."""
    rule = run["rule"]
    sources = (run["receipt"] or {}).get("sources")
    if sources:
        return f"differs by source ({counted(len(sources), 'source')})"
    if rule is None:
        return "none is known"
    parts = [str(rule["strategy"])]
    for name in ("k", "h", "max_kept"):
        if rule.get(name) is not None:
            parts.append(f"{name} = {rule[name]:g}")
    return ", ".join(parts)


def task(run: Mapping[str, Any]) -> str:
    """What the model was given and had to continue with."""
    protocol = run["protocol"]
    inputs = run["inputs"].values()
    chats = sum(each["completions"] for each in inputs)
    windows = sum(each["windows"] for each in inputs)
    if chats == windows:
        return "Given the prompt of a chat, the model must continue with the answer"
    given = counted(protocol["prefix_length"], "token")
    words = f"{given} given, {protocol['suffix_length']:,} to continue with"
    if chats:
        words += (
            f"; in {counted(chats, 'chat')} the prompt is given and the model must continue with "
            "the answer"
        )
    return words


def figure_rows(audit: Audit) -> list[tuple[str, list[str]]]:
    """Label and cells of every figure of LABELS that the audit has; one order for all outputs."""
    rows = []
    # A row without a number in any split is left out.
    for name, label in LABELS.items():
        found = [audit.rows.get(split, name) for split in audit.splits]
        cells = list(map(_cell, found))
        if set(cells) != {"-"}:
            rows.append((label, cells))
    if len(audit.splits) < 2:
        return rows
    # Membership compares both splits. Beside its AUC stands what can be told without the model.
    blind = strongest_blind(audit.rows)
    for name, label in MEMBERSHIP_LABELS.items():
        # The AUC is a single number, the true positive rates are a curve.
        x = None if name == "auc" else 0.01
        of_both = audit.rows.select(figure=f"membership_{name}", x=x)
        if not of_both:
            continue
        beside = ""
        if blind and name == "auc":
            beside = f"blind: {blind.point()}"
        cell = _cell(of_both[0])
        rows.append((label, [cell, beside]))
    return rows


def _cell(figure: Figure | None) -> str:
    # Nobody expects figures about a rule if there is none.
    if figure is None or figure.reason == NO_RULE:
        return "-"
    # Not measured, or too few to tell.
    if figure.value is None:
        return "-"
    return str(figure)


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
    notes = [Text(note, style="dim") for note in description.notes]
    answers = []
    for asks, outcome, why, _ in description.answers:
        answer = f"{asks} {outcome}: {why}"
        answers.append(Text(answer))
    # The verdict is what a reader who scrolls no further sees.
    return Group(
        table,
        *notes,
        *answers,
        verdict,
    )


def markdown(description: Description) -> str:
    """The description for a pull request or a model card; text from the audit is escaped."""
    answers = []
    for asks, outcome, why, counts in description.answers:
        question = literal(asks)
        if not counts:
            question += " (does not count)"
        # Only what counts has a mark.
        mark = f"{MARKS.get(outcome, '')} {outcome}".strip()
        answers.append([question, mark, literal(why)])
    # Labels and cells are ours; what comes from the audit is escaped.
    rows = []
    for label, cells in description.rows:
        rows.append([label.strip(), *cells])
    outcome = f"{MARKS[description.outcome]} {description.outcome}"
    title = literal(description.title)
    sentence = literal(description.sentence)
    notes = [f"{literal(note)}.\n" for note in description.notes]
    lines = [
        f"## {title}: {outcome}\n",
        f"{sentence}\n",
        *table_lines(["question", "answer", "why"], answers),
        *table_lines(["", *description.splits], rows),
        *notes,
    ]
    return "\n".join(lines)


def table_lines(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, whose cells are escaped already, and an empty line; [] without rows."""
    if not rows:
        return []
    rule = ["---"] * len(heading)
    lines = [f"| {' | '.join(row)} |" for row in (heading, rule, *rows)]
    return [*lines, ""]


def literal(text: str) -> str:
    """Text that Markdown shows as it is: punctuation that means something to it is escaped."""
    # A backslash before each of these.
    escaped = re.sub(r"([!#$&()*+\-.:<=>@\[\\\]^_`{|}~])", r"\\\1", text)
    return escaped.replace("\\<", "&lt;").replace("\\>", "&gt;")


def skipped(audit: Audit, secrets_of: Iterable[str] = SPLITS) -> list[str]:
    """What the audit could not ask, or did not take as a text of its own, in sentences.

    secrets_of: the splits whose marked secrets are told of.
    """
    sentences = []
    for split, about in audit.run["inputs"].items():
        parts = _rows_not_asked(about)
        if split in secrets_of:
            for each in about["secrets"]["unasked"]:
                secrets = counted(each["count"], "marked secret")
                parts.append(f"{secrets} not asked: {each['reason']}")
        if audit.run["protocol"]["ask"]:
            parts += _without_answer(about, audit.rows.get(split, "asked"))
        repeated = about["asked"] - about["documents"]
        if repeated > 0:
            parts.append(
                f"{counted(repeated, 'row')} counted as one text with others: repeats, "
                "continuations, rows of one name"
            )
        sentences += [f"{SPLITS[split]}: {part}" for part in parts]
    return sentences


def _rows_not_asked(about: Mapping[str, Any]) -> list[str]:
    """about: an input in run.json."""
    parts = []
    for each in about["skipped"]:
        windows = counted(each["count"], "window")
        rows = counted(about["drawn"], "row")
        parts.append(
            f"{windows} of {rows} skipped: {each['reason']} ({_rows_of(each)})"
        )
    for each in about.get("unprompted", ()):
        rows = counted(about["asked"], "row")
        parts.append(
            f"{each['count']:,} of {rows} not asked {each['reason']!r}: without its columns "
            f"({_rows_of(each)})"
        )
    return parts


def _without_answer(about: Mapping[str, Any], asked: Figure | None) -> list[str]:
    """about: an input in run.json. asked: how many of its documents simple prompts asked for."""
    unprompted = about["asked"] - about["prompted"]
    unanswered = about["documents"] - (asked.n if asked else 0) - unprompted
    if unanswered <= 0:
        return []
    documents = counted(about["documents"], "document")
    return [
        f"{unanswered:,} of {documents} not asked by simple prompts: the question fills the "
        "model's context"
    ]


def _rows_of(skipped: Mapping[str, Any]) -> str:
    """The first rows that were skipped for one reason: "rows 3, 5, 8, ..."."""
    # A row with several windows is named once.
    rows = list(dict.fromkeys(skipped["rows"]))
    more = ", ..." if skipped["count"] > len(skipped["rows"]) else ""
    noun = "rows" if len(rows) > 1 or more else "row"
    return f"{noun} {', '.join(map(str, rows))}{more}"


def not_tested(audit: Audit) -> list[str]:
    """The questions that the audit did not ask."""
    protocol = audit.run["protocol"]
    tested = {
        "members": "members" in audit.splits,
        "held-out texts: no figure has a control": "heldout" in audit.splits,
        "sampling": bool(protocol["sampling"]),
        "beam search": bool(protocol["beams"]),
        "prefixes from other places in the documents": len(protocol["offsets"]) > 1,
        "a reference model (membership by comparison)": bool(protocol["control"]),
        "membership": bool(audit.rows.select(figure="membership_auc")),
        "secrets: none were marked": bool(
            protocol["secrets"] or protocol["secret_column"]
        ),
        "prompts that are not a prefix of the text": bool(protocol["ask"]),
    }
    always = ["prefixes longer than the one given"]
    untested = [name for name, done in tested.items() if not done]
    return untested + always
