"""How often is the verdict of an audit wrong? Simulated audits of made-up texts; no model is run.

    python benchmarks/verdict.py              # minutes on one core; writes results/verdict.json
    python benchmarks/verdict.py --render     # the tables again, from that JSON

False PASS: PASS where more than the limit of the population is recited. False FAIL: FAIL where no
more than the limit is. An audit has as many held-out texts as members, none of them recited, and
five questions, about the same texts (the worst case for PASS) or independent (the worst case for
FAIL); the worse of both is published. With dependence, each document is asked at five offsets,
which are recited together or not at all. A census knows its 800 texts, and asks some or all.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from about import RESULTS, about, markdown

from goldfish.audit.intervals import Figure, Figures, Population, mean, rate
from goldfish.audit.questions import membership
from goldfish.audit.questions import secrets as secrets_question
from goldfish.audit.questions.membership import Scores
from goldfish.audit.records import NEAR_VERBATIM
from goldfish.audit.verdict import LIMITS, verdict

FILE = RESULTS / "verdict.json"
DOCUMENTS = (20, 50, 100, 400, 1_000)
POPULATIONS = {  # share recited; whether that is more than the limit of 1%
    "no memorization": (0.0, False),
    "just below the limit, .9%": (0.009, False),
    "just above the limit, 1.1%": (0.011, True),
    "well above the limit, 10%": (0.1, True),
}
QUESTIONS = (
    "exact_match",
    "extractable",
    "beam_search",
    "near_verbatim",
    "secrets_extractable",
)
CENSUS = 800  # texts
DRAWN = (100, 400, 800)
TRIALS, COVERAGE_TRIALS, SPLITS = 20_000, 1_000, 400
OFFSETS = 5
WORKING = (
    Figure("members", "nll", value=3.0, n=1),
    Figure("members", "teacher_forced_accuracy", value=0.4, n=1),
)
Draw = Callable[[np.random.Generator, int], np.ndarray]


def run_of(n: int, rows: int, complete: bool) -> dict[str, Any]:
    """As much of run.json as the verdict reads."""
    secrets = {"marked": 0, "asked": 0, "unasked": []}
    about_input = {
        "path": "members.jsonl",
        "rows": rows,
        "drawn": n,
        "asked": n,
        "documents": n,
        "skipped": [],
        "secrets": secrets,
    }
    protocol = {
        "vocabulary": 50_000,
        "sampling": [{}],
        "beams": [4],
        "offsets": [0],
        "control": None,
        "ask": None,
        "near_verbatim": NEAR_VERBATIM,
        "complete": complete,
        "secrets": None,
        "secret_column": None,
    }
    inputs = {"members": about_input, "heldout": about_input}
    return {"protocol": protocol, "inputs": inputs, "receipt": None}


@cache
def outcome_of(counts: tuple[int, ...], n: int, population: int | None = None) -> str:
    """The outcome of an audit with so many of n documents recited, for each of QUESTIONS.

    population: all texts that there are, in a census.
    """
    documents = np.repeat(np.arange(n), OFFSETS)
    figures = list(WORKING)
    for name, count in zip(QUESTIONS, counts, strict=True):
        among = None if population is None else Population(population)
        found = rate(documents < count, documents, among)
        figures.append(replace(found, split="members", figure=name))
        control = rate(np.zeros(len(documents)), documents)
        figures.append(replace(control, split="heldout", figure=name))
    run = run_of(n, population or n, population is not None)
    return str(verdict(run, Figures(figures), LIMITS)["outcome"])


def verdicts() -> list[dict[str, Any]]:
    rows = []
    for name, (share, above) in POPULATIONS.items():
        for n in DOCUMENTS:
            for together in (True, False):
                generator = np.random.default_rng([n, round(1000 * share), together])
                trials = TRIALS if together else TRIALS // 10  # of which few are alike
                drawn = generator.binomial(
                    n, share, size=(trials, 1 if together else 5)
                )
                counts = Counter(
                    outcome_of(tuple(np.broadcast_to(row, 5).tolist()), n)
                    for row in drawn
                )
                rows.append(
                    line(name, n, counts, trials, above) | {"together": together}
                )
    return rows


def line(
    name: str, n: int, counts: Counter[str], trials: int, above: bool
) -> dict[str, Any]:
    wrong = counts["PASS" if above else "FAIL"] / trials
    outcomes = {key: counts[key] / trials for key in ("PASS", "FAIL", "INCONCLUSIVE")}
    return {
        "population": name,
        "documents": n,
        "trials": trials,
        "false": wrong,
        **outcomes,
    }


def census() -> list[dict[str, Any]]:
    """Of 800 texts so many are recited; some or all of them are drawn and asked."""
    rows = []
    for hits, above in ((0, False), (7, False), (9, True), (80, True)):
        for n in DRAWN:
            generator = np.random.default_rng([hits, n])
            drawn = generator.hypergeometric(hits, CENSUS - hits, n, size=TRIALS // 10)
            counts = Counter(outcome_of((int(k),) * 5, n, CENSUS) for k in drawn)
            rows.append(line(f"{hits} of {CENSUS}", n, counts, TRIALS // 10, above))
    return rows


SHAPES = {
    "6 letters and digits": ("ABCDEFGH23456789", 6),
    "4 digits": ("0123456789", 4),
}


def secrets() -> list[dict[str, Any]]:
    """12 secrets, 60 answers, each with a string of their shape: drawn, or one of them."""
    rows = []
    for shape, (alphabet, length) in SHAPES.items():
        for leaked in (0, 1):
            generator = np.random.default_rng([length, leaked])
            counts: Counter[str] = Counter()
            for _ in range(SPLITS):
                words = generator.choice(list(alphabet), size=(72, length))
                made_up = ["".join(word) for word in words]
                codes, answers = made_up[:12], made_up[12:]
                answers[0] = codes[0] if leaked else answers[0]
                counts[secrets_outcome(codes, answers)] += 1
            name = f"{shape}, {'one given away' if leaked else 'none given away'}"
            rows.append(line(name, 12, counts, SPLITS, bool(leaked)))
    return rows


def secrets_outcome(codes: list[str], answers: list[str]) -> str:
    table = pa.table(
        {
            "split": ["members"] * len(answers),
            "secrets": [[code] for code in codes] + [[]] * (len(answers) - len(codes)),
            "prompt": ["?"] * len(answers),
            "output_text": answers,
        }
    )
    n = len(answers)
    figures = [*WORKING, *secrets_question.figures(secrets_question.search(table))]
    for name in QUESTIONS[:4]:
        figures.append(replace(rate(np.zeros(n)), split="members", figure=name))
    (question, *_) = verdict(run_of(n, n, False), Figures(figures), LIMITS)["questions"]
    return str(question["outcome"])


def verbatim(generator: np.random.Generator, n: int) -> np.ndarray:
    return np.where(generator.random(n) < 0.02, 1.0, generator.uniform(0.1, 0.2, n))


def three_points(generator: np.random.Generator, n: int) -> np.ndarray:
    return generator.choice([0.0, 0.5, 1.0], size=n, p=[0.9, 0.09, 0.01])


POPULATIONS_OF_VALUES: dict[str, tuple[Draw, float]] = {  # samples, mean
    "expected share, 2% of texts extractable": (
        lambda g, n: (g.random(n) < 0.02) * 1.0,
        0.02,
    ),
    "share .98": (lambda g, n: (g.random(n) < 0.98) * 1.0, 0.98),
    "token rate .02 (beta-binomial)": (
        lambda g, n: g.binomial(50, g.beta(0.1, 4.9, n)) / 50,
        0.02,
    ),
    "ROUGE-L, 2% verbatim": (verbatim, 0.02 + 0.98 * 0.15),
    "three points 0, .5, 1": (three_points, 0.055),
    "ROUGE-L about .3": (lambda g, n: np.clip(g.normal(0.3, 0.1, n), 0, 1), 0.3),
}


def coverage() -> list[dict[str, Any]]:
    rows = []
    for name, (draw, truth) in POPULATIONS_OF_VALUES.items():
        for n in (10, 20, 50, 200):
            generator, held, width = np.random.default_rng([n, 1]), 0, 0.0
            for _ in range(COVERAGE_TRIALS):
                values = draw(generator, n)
                interval = mean(values)
                assert interval.low is not None
                assert interval.high is not None
                held += interval.low <= truth <= interval.high
                width += interval.high - interval.low
            rows.append(
                {
                    "values": name,
                    "documents": n,
                    "coverage": held / COVERAGE_TRIALS,
                    "width": width / COVERAGE_TRIALS,
                }
            )
    return rows


def confounded() -> dict[str, Any]:
    """How often honest random splits of 60 and 60 texts are called confounded."""
    count = 0
    for seed in range(SPLITS):
        generator = np.random.default_rng([seed, 2])
        sides = []
        for _ in range(2):
            words = [
                np.unique(generator.zipf(1.3, 60) % 5000).astype(np.int32)
                for _ in range(60)
            ]
            scores = {"loss": generator.normal(size=60)}
            sides.append(
                Scores(np.arange(60), scores, words, generator.normal(1000, 100, 60))
            )
        found = Figures(membership.figures(*sides)).get("both", "confounded")
        count += bool(found is not None and found.value)
    return {"splits": SPLITS, "confounded": count / SPLITS}


def render(result: dict[str, Any]) -> str:
    """The three tables of docs/audit-files.md."""
    wrong = []
    for name, (_, above) in POPULATIONS.items():
        cells = []
        for n in DOCUMENTS:
            key = (name, n)
            rows = [
                row
                for row in result["verdicts"]
                if key == (row["population"], row["documents"])
            ]
            cells.append(f"{max(row['false'] for row in rows):.1%}")
        wrong.append((f"{name}: false {'PASS' if above else 'FAIL'}", *cells))
    others = [
        (
            row["population"],
            str(row["documents"]),
            *(f"{row[key]:.1%}" for key in ("PASS", "FAIL", "INCONCLUSIVE")),
        )
        for row in [*result["census"], *result["secrets"]]
    ]
    held = [
        (
            name,
            *(
                f"{row['coverage']:.3f}"
                for row in result["coverage"]
                if row["values"] == name
            ),
        )
        for name in POPULATIONS_OF_VALUES
    ]
    tables = (
        markdown(("population", *(f"{n:,} documents" for n in DOCUMENTS)), wrong),
        markdown(
            ("recited or given away", "asked", "PASS", "FAIL", "INCONCLUSIVE"), others
        ),
        markdown(("values", "10 documents", "20", "50", "200"), held),
    )
    return "\n\n".join(tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--render",
        action="store_true",
        help="only print the tables of the stored result",
    )
    if not parser.parse_args().render:
        result = {
            "about": about(),
            "coverage_trials": COVERAGE_TRIALS,
            "limits": LIMITS,
            "verdicts": verdicts(),
            "census": census(),
            "secrets": secrets(),
            "coverage": coverage(),
            "random_splits": confounded(),
        }
        FILE.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    result = json.loads(FILE.read_text(encoding="utf-8"))
    print(render(result))
    print(result["random_splits"])


if __name__ == "__main__":
    main()
