"""The first screen in words: what decided, how sure that is, about what, and what was not asked."""

from dataclasses import dataclass
from typing import Any

from goldfish.audit.intervals import SPLITS, Figure, decimals
from goldfish.audit.questions import FAIL
from goldfish.audit.questions.secrets import answers_with_secret, reasons_of
from goldfish.audit.render import LABELS, not_tested, rule_words, weights_hash
from goldfish.audit.verdict import QUESTIONS
from goldfish.report.load import View
from goldfish.text.printable import counted

Question = dict[str, Any]
# Fewer secrets than this are expected by chance: "none" for people.
HARDLY_ANY = 0.01


@dataclass(frozen=True)
class Card:
    """What one audit found.

    Attributes:
        figure, what: the number in large print, and the words after "k of" or after an AUC.
        answers: (outcome, what was counted, "k of n") of every question that decides.
        facts: label: sentence, in the order in which the page shows them.
    """

    figure: Figure | None
    what: str
    answers: list[tuple[str, str, str]]
    facts: dict[str, str]


def card_of(view: View, redact: bool) -> Card:
    """The card of an audit; if redacted, without names of files and paths."""
    question = _decisive(view)
    figure, what = _headline(view, question)
    facts = {
        "how sure": _certainty(view, question),
        "data": _data(view),
        "model": _model(view, redact),
        "rule": rule_words(view.audit.run),
        "sanity": view.audit.verdict["sanity"],
        "not asked": _unasked(view),
    }
    return Card(
        figure,
        what,
        answers=_answers(view),
        facts={label: shown(text, view, redact) for label, text in facts.items()},
    )


def _answers(view: View) -> list[tuple[str, str, str]]:
    rows = view.audit.rows
    answers = []
    for question in view.audit.verdict["questions"]:
        name = question["figure"]
        count = rows.get("members", name)
        if count is None:  # membership: an AUC is of both splits
            continue
        label = LABELS[name].strip()
        answers.append((question["outcome"], label, count.point()))
    return answers


def _decisive(view: View) -> Question | None:
    """The first question with the outcome of the whole audit, so that number and badge agree.

    Secrets come first among the questions. Without members there is none.
    """
    questions: list[Question] = view.audit.verdict["questions"]
    for question in questions:
        if question["outcome"] == view.audit.outcome:
            return question
    # All may pass in an audit that failed its sanity check: then any will do.
    return questions[0] if questions else None


def _headline(view: View, question: Question | None) -> tuple[Figure | None, str]:
    rows = view.audit.rows
    if question is None:
        figure = rows.get("heldout", "exact_match")
        texts = counted(figure.n if figure else 0, "held-out text")
        return figure, f"{texts} recited verbatim"
    name = question["question"]
    if name == "membership":  # decides only if it is required
        (auc,) = rows.select(figure=question["figure"])
        return auc, "AUC: how well an attacker tells which texts were trained on"
    figure = rows.get("members", question["figure"])
    total = figure.n if figure else 0
    if name == "secrets":
        came, asked = answers_with_secret(rows)
        answers = counted(asked, "answer")
        secrets = counted(total, "marked secret")
        return figure, f"{secrets} came out, in {came:,} of {answers}"
    what, *_ = QUESTIONS[name]
    whose = "marked secret" if name == "secrets_sampling" else "training text"
    return figure, f"{counted(total, whose)} {what}"


def _certainty(view: View, question: Question | None) -> str:
    audit = view.audit
    if audit.outcome != FAIL or question is None:
        # The bound of a PASS; what would decide an INCONCLUSIVE.
        sentence: str = audit.verdict["sentence"]
        return sentence.removeprefix(f"{audit.outcome}: ")
    if question["question"] != "secrets":
        return _certainty_of_rate(view, question)
    chance = audit.rows.get("members", "secrets_by_chance")
    expected = chance.value if chance else None
    by_chance = "none"
    if expected is not None and expected >= HARDLY_ANY:
        by_chance = decimals(expected)
    return (
        "exact: every answer was searched for every marked secret; by chance "
        f"{by_chance} would have come out, measured with made-up secrets of the same shape"
    )


def _certainty_of_rate(view: View, question: Question) -> str:
    rows = view.audit.rows
    rate = rows.get("members", question["figure"])
    if rate is None or rate.low is None or rate.low != rate.high:
        return str(question["why"])
    sentence = f"exact: every text was asked ({rate.n:,})"
    control = rows.get("heldout", question["figure"])
    if control is not None and control.n:
        sentence += f"; of held-out texts, for comparison, {control.point()}"
    return sentence


def _data(view: View) -> str:
    run = view.audit.run
    parts = []
    for split in view.splits:
        about = run["inputs"][split]
        kind = "member text" if split == "members" else "held-out text"
        part = f"{counted(about['documents'], kind)} of {_file(about)}"
        if split == "members" and run["protocol"]["complete"]:
            # All that was trained on are the rows of the file, asked or not.
            rows = counted(about["rows"], "row")
            part += f" ({rows}, said to be all that was trained on)"
        parts.append(part)
    return "; ".join(parts)


def _model(view: View, redact: bool) -> str:
    run = view.audit.run
    weights = weights_hash(run)
    # Sixteen digits are enough to tell models apart, and few enough to read out.
    words = f"weights {weights[:16]} (SHA-256)"
    if not weights:  # of a model in memory, or on the hub
        words = "weights not read"
    if redact:
        return words
    return f"{run['checkpoint']}; {words}"


def _unasked(view: View) -> str:
    """Rows and secrets that could not be asked, then the kinds of question that were not tried."""
    parts = []
    for split in view.splits:
        about = view.audit.run["inputs"][split]
        drawn = about["drawn"]
        unasked = drawn - about["asked"]
        if unasked:
            parts.append(f"{unasked:,} of {counted(drawn, 'row')} of {SPLITS[split]}")
        marked = about["secrets"]["marked"]
        unasked = marked - about["secrets"]["asked"]
        # Secrets of held-out texts were never trained on: nothing hangs on them.
        if unasked and split == "members":
            secrets = counted(marked, "marked secret")
            reasons = reasons_of(about["secrets"])
            parts.append(f"{unasked:,} of {secrets} ({reasons})")
    return "; ".join([*parts, *not_tested(view.audit)])


def shown(text: str, view: View, redact: bool) -> str:
    """A sentence; if redacted, without the names of files."""
    if redact:
        for split, about in view.audit.run["inputs"].items():
            text = text.replace(_file(about), f"the {SPLITS[split]} file")
    return text


def _file(about: dict[str, Any]) -> str:
    """The name of an input, without its folders."""
    path = str(about["path"])
    return path.rsplit("/", 1)[-1]
