"""How often is the verdict of an audit wrong? Simulated audits of made-up populations of texts; no model is run.

    python benchmarks/verdict.py              # minutes on one core; writes results/verdict.json and prints the tables
    python benchmarks/verdict.py --render     # the tables again, from that JSON

False PASS: PASS where more than the limit of the population is recited. False FAIL: FAIL where no more than the limit
is. Every audit has as many held-out texts as members, none of them recited. The questions (greedy, sampling,
near-verbatim) are either about the same texts, the worst case for PASS, or independent, the worst case for FAIL.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from about import RESULTS, about, markdown

from goldfish.audit.estimate import Estimate, mean, rate
from goldfish.audit.membership import Side, membership_figures
from goldfish.audit.verdict import LIMITS, verdict

FILE = RESULTS / "verdict.json"
DOCUMENTS = (20, 50, 100, 400, 1_000)
POPULATIONS = {  # share recited; whether that is more than the limit of 1%
    "no memorization": (0.0, False),
    "just below the limit, .9%": (0.009, False),
    "just above the limit, 1.1%": (0.011, True),
    "well above the limit, 10%": (0.1, True),
}
TRIALS, COVERAGE_TRIALS, SPLITS = 20_000, 1_000, 400
WORKING = {
    "nll": Estimate(3.0),
    "teacher_forced_accuracy": Estimate(0.4),
    "longest_run": Estimate(3.0, None, 1, 1, 2, 4),
}
Draw = Callable[[np.random.Generator, int], np.ndarray]


@cache
def outcome_of(counts: tuple[int, int, int], n: int) -> str:
    """The outcome of an audit with so many of n texts recited greedily, by sampling, near-verbatim."""
    keys = ("exact_match", "extractable", "near_verbatim")
    hits = {key: np.arange(n) < count for key, count in zip(keys, counts, strict=True)}
    common = {
        "beam_search": None,
        "attribution": None,
        "recited": dict.fromkeys(keys, ()),
        **WORKING,
    }
    splits = {
        "members": {**{key: rate(hits[key]) for key in keys}, **common},
        "heldout": {**{key: rate(np.zeros(n)) for key in keys}, **common},
    }
    protocol = {
        "vocabulary": 50_000,
        "sampling": [{}],
        "beams": None,
        "offsets": [0],
        "control": None,
    }
    summary = {"splits": splits, "membership": None, "protocol": protocol, "inputs": {}}
    return str(verdict(summary, LIMITS)["outcome"])


def verdicts() -> list[dict[str, Any]]:
    rows = []
    for name, (share, above) in POPULATIONS.items():
        for n in DOCUMENTS:
            for together in (True, False):
                generator = np.random.default_rng([n, round(1000 * share), together])
                trials = TRIALS if together else TRIALS // 10  # of which few are alike
                drawn = generator.binomial(n, share, size=(trials, 1 if together else 3))
                counts = Counter(
                    outcome_of(tuple(np.broadcast_to(row, 3).tolist()), n) for row in drawn
                )
                wrong = counts["PASS" if above else "FAIL"]
                rows.append(
                    {
                        "population": name,
                        "share": share,
                        "documents": n,
                        "together": together,
                        "trials": trials,
                        "false": wrong / trials,
                        **{key: counts[key] / trials for key in ("PASS", "FAIL", "INCONCLUSIVE")},
                    }
                )
    return rows


def verbatim(generator: np.random.Generator, n: int) -> np.ndarray:
    return np.where(generator.random(n) < 0.02, 1.0, generator.uniform(0.1, 0.2, n))


def three_points(generator: np.random.Generator, n: int) -> np.ndarray:
    return generator.choice([0.0, 0.5, 1.0], size=n, p=[0.9, 0.09, 0.01])


POPULATIONS_OF_VALUES: dict[
    str, tuple[Draw, float, float]
] = {  # samples, mean, greatest possible value
    "expected share, 2% of texts extractable": (lambda g, n: (g.random(n) < 0.02) * 1.0, 0.02, 1),
    "share .98": (lambda g, n: (g.random(n) < 0.98) * 1.0, 0.98, 1),
    "token rate .02 (beta-binomial)": (
        lambda g, n: g.binomial(50, g.beta(0.1, 4.9, n)) / 50,
        0.02,
        1,
    ),
    "token rate .98 (beta-binomial)": (
        lambda g, n: 1 - g.binomial(50, g.beta(0.1, 4.9, n)) / 50,
        0.98,
        1,
    ),
    "ROUGE-L, 2% verbatim": (verbatim, 0.02 + 0.98 * 0.15, 1),
    "three points 0, .5, 1": (three_points, 0.055, 1),
    "ROUGE-L about .3": (lambda g, n: np.clip(g.normal(0.3, 0.1, n), 0, 1), 0.3, 1),
    "loss, lognormal(0, 1), bound ln 50,000": (
        lambda g, n: g.lognormal(0, 1, n),
        float(np.exp(0.5)),
        np.log(50_000),
    ),
}


def coverage() -> list[dict[str, Any]]:
    rows = []
    for name, (draw, truth, greatest) in POPULATIONS_OF_VALUES.items():
        for n in (10, 20, 50, 200):
            generator, held, width = np.random.default_rng([n, 1]), 0, 0.0
            for _ in range(COVERAGE_TRIALS):
                values = draw(generator, n)
                interval = mean(values, bounds=(0.0, max(greatest, float(values.max()))))
                assert interval.lower95 is not None
                assert interval.upper95 is not None
                held += interval.lower95 <= truth <= interval.upper95
                width += interval.upper95 - interval.lower95
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
            words = [np.unique(generator.zipf(1.3, 60) % 5000).astype(np.int32) for _ in range(60)]
            scores = {"loss": generator.normal(size=60)}
            sides.append(Side(np.arange(60), scores, words, generator.normal(1000, 100, 60)))
        count += bool(membership_figures(*sides)["confounded"])
    return {"splits": SPLITS, "confounded": count / SPLITS}


def render(result: dict[str, Any]) -> str:
    wrong = []
    for name, (_, above) in POPULATIONS.items():
        cells = []
        for n in DOCUMENTS:
            rows = [
                row
                for row in result["verdicts"]
                if (row["population"], row["documents"]) == (name, n)
            ]
            cells.append(f"{max(row['false'] for row in rows):.1%}")
        wrong.append((f"{name}: false {'PASS' if above else 'FAIL'}", *cells))
    held = [
        (name, *(f"{row['coverage']:.3f}" for row in result["coverage"] if row["values"] == name))
        for name in POPULATIONS_OF_VALUES
    ]
    heads = (
        ("population", *(f"{n:,} documents" for n in DOCUMENTS)),
        ("values", "10 documents", "20", "50", "200"),
    )
    return f"{markdown(heads[0], wrong)}\n\n{markdown(heads[1], held)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--render", action="store_true", help="only print the tables of the stored result"
    )
    if not parser.parse_args().render:
        result = {
            "about": about(),
            "coverage_trials": COVERAGE_TRIALS,
            "limits": LIMITS,
            "verdicts": verdicts(),
            "coverage": coverage(),
            "random_splits": confounded(),
        }
        FILE.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    result = json.loads(FILE.read_text(encoding="utf-8"))
    print(render(result))
    print(result["random_splits"])


if __name__ == "__main__":
    main()
