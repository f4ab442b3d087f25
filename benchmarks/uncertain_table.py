"""The tables of docs/results-log.md on uncertain tokens and on secrets, from uncertain.jsonl.

    python benchmarks/uncertain_table.py

Differences are paired: the same seed, and in it the same passages or questions. Their intervals
(95%, percentiles of 4,000 draws) come from drawing seeds, and in each drawn seed passages, both
with replacement. Three seeds are few for a bootstrap: intervals may be too narrow.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import about
import numpy as np
import uncertain_codes
from numpy.typing import NDArray

Result = dict[str, Any]
Figure = Callable[[Result], Any]
BASELINE = "hash-4-13-4"  # what the criterion compares with
# Columns, in this order.
SECRETS = {
    "untouched": "untouched",
    "standard": "standard",
    "hash-4-13": "`hash`, k=4",
    "hash-4-13-4": "k=4, `max_kept=4`",
    "hash-2-13-2": "k=2, `max_kept=2`",
    "entropy-4": "entropy, k=4",
    "standard+secrets": "secrets alone",
    "hash-4-13-4+secrets": "k=4, `max_kept=4` + secrets",
}
UNCERTAIN = {
    "untouched": "untouched",
    "standard": "standard",
    "hash-4-13": "`hash`, k=4",
    "hash-3-13": "`hash`, k=3",
    "hash-4-13-4": "k=4, `max_kept=4`",
    "entropy-4": "entropy, k=4",
    "entropy-6": "entropy, k=6",
    "entropy-8": "entropy, k=8",
    "windows-4": "control: hash in the same windows",
    "ngram-4": "control: entropy of trigrams",
    "low-4": "control: lowest entropy",
    "surprisal-4": "control: surprisal",
    "draw-4": "variant: drawn by entropy",
    "inside-4": "variant: no first token of an answer",
    "bits-4": "variant: 4 bits per window",
}
# Passages without chats, in this order.
VERSIONS = {
    "versions-0": "five exact copies",
    "versions-0-1 of 5": "one copy",
    "versions-0.02": "five versions, 2% of the words edited",
    "versions-0.05": "5%",
    "versions-0.1": "10%",
    "versions-0.05-reformatted": "5%, each in a layout of its own",
}


def main() -> None:
    results = about.read_results(Path(about.RESULTS, "uncertain.jsonl"))
    both = {}
    for method in ("full", "lora"):
        private = of(results, "private", method)
        secrets = groups_of(private, SECRETS)
        for rule, group in secrets.items():
            if rule != "untouched":
                both[f"{method}: {rule}"] = group
        print(f"\n## Secrets, {method}\n\n{table(secrets, of_codes, of_loss)}")
        uncertain = groups_of(private, UNCERTAIN)
        shown = table(uncertain, of_passages, of_loss, of_trust)
        print(f"\n## Uncertain tokens, {method}\n\n{shown}")
        print(f"\n## In short, {method}\n\n{in_short({'': uncertain})}")
    versions = {}
    for data, title in VERSIONS.items():
        groups = groups_of(of(results, data, "full"), UNCERTAIN)
        if groups:
            versions[title] = groups
    print(f"\n## In short, versions\n\n{in_short(versions)}")
    path = Path(about.RESULTS, "uncertain_check.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    print("\n## What check found before, and which codes came out\n")
    print(uncertain_codes.predictions(both, found, SECRETS))
    full = groups_of(of(results, "private", "full"), SECRETS)
    print(f"\n## Promised bits\n\n{uncertain_codes.promised_bits(full, SECRETS)}")
    print(f"\nLast run: {about.source(results[-1])}")


def of(results: list[Result], data: str, method: str) -> list[Result]:
    return [r for r in results if (r["data"], r["method"]) == (data, method)]


def groups_of(results: list[Result], names: dict[str, str]) -> dict[str, list[Result]]:
    """Rule -> its results by seed, in the order of the names."""
    groups = {}
    for name in names:
        group = [result for result in results if result["rule"] == name]
        if group:
            groups[name] = sorted(group, key=seed_of)
    return groups


def seed_of(result: Result) -> int:
    return int(result["seed"])


def table(
    groups: dict[str, list[Result]], *parts: Callable[..., dict[str, str]]
) -> str:
    """In Markdown, a column for each rule; the parts give its rows."""
    if not groups:
        return "no results"
    theirs = groups.get(BASELINE, [])
    columns = []
    for group in groups.values():
        column = {
            "seeds": ", ".join(str(seed_of(result)) for result in group),
            "drop rate": each(group, drop_rate, 2),
        }
        for part in parts:
            column |= part(group, theirs)
        columns.append(column)
    # Untouched and standard models lack some rows; dict.fromkeys keeps the order.
    titles = list(dict.fromkeys(title for column in columns for title in column))
    rows = []
    for title in titles:
        cells = [column.get(title, "") for column in columns]
        # Drawn answers, dropped tokens: some tables have none.
        if any(cells):
            rows.append((title, *cells))
    names = SECRETS | UNCERTAIN
    return about.markdown(["", *(names[name] for name in groups)], rows)


def in_short(data: dict[str, dict[str, list[Result]]]) -> str:
    """In Markdown, a row for each rule of each data set; differences as in the long tables."""
    rows = []
    for title, groups in data.items():
        theirs = groups.get(BASELINE, [])
        for rule, group in groups.items():
            rouge = statistics.fmean(map(mean_rouge, group))
            row = {
                "passages": title,
                "rule": UNCERTAIN[rule],
                "seeds": str(len(group)),
                "drop rate": f"{statistics.fmean(map(drop_rate, group)):.2f}",
                "ROUGE-L": f"{rouge:.2f}",
                "against `max_kept=4`": paired(group, theirs, rouge_l, 3),
                "log p, nats": paired(group, theirs, log_p_of, 1),
                "codes": uncertain_codes.out_of(group),
                "best held-out loss": paired(group, theirs, lambda r: [best(r)], 3),
                "ordinary answers, points": paired(group, theirs, percents, 1),
            }
            rows.append(row)
    # Passages of one kind need no title, and those without chats have no codes.
    head = [name for name in rows[0] if any(row[name] for row in rows)]
    cells = [[row[name] for name in head] for row in rows]
    return about.markdown(head, cells)


def of_codes(group: list[Result], theirs: list[Result]) -> dict[str, str]:
    return uncertain_codes.figures(group)


def of_passages(group: list[Result], theirs: list[Result]) -> dict[str, str]:
    runs = joined(group, "longest_run")
    log_p = joined(group, "log_p")
    verbatim = sum(run == 32 for run in runs)
    return {
        "recited word for word, members": f"{verbatim} of {len(runs)}",
        "ROUGE-L, members": each(group, mean_rouge, 3),
        "the same, held-out": each(group, heldout_rouge, 2),
        "ROUGE-L against `max_kept=4`": paired(group, theirs, rouge_l, 3),
        "longest run, tokens, members": each(group, mean_run, 1),
        "median log p of a suffix": f"{statistics.median(log_p):.1f}",
        "log p against `max_kept=4`": paired(group, theirs, log_p_of, 1),
        "expected share in 1,000 samples": f"{expected(log_p):.1g}",
        "right on dropped tokens": right_on_dropped(group),
        "membership by loss, AUC": each(group, membership, 2),
    }


def of_loss(group: list[Result], theirs: list[Result]) -> dict[str, str]:
    return {
        "held-out loss at its best, nats/token": each(group, best, 3),
        "loss against `max_kept=4`": paired(group, theirs, lambda r: [best(r)], 3),
        "ordinary answers right, %": each(group, percent_right, 1),
        "points against `max_kept=4`": paired(group, theirs, percents, 1),
    }


def of_trust(group: list[Result], theirs: list[Result]) -> dict[str, str]:
    """Is the model overconfident on held-out text?"""
    at_best = each(group, lambda r: overconfidence(r, best_epoch(r)), 3)
    at_end = each(group, lambda r: overconfidence(r, -1), 3)
    return {
        "confidence less accuracy, held-out, best epoch": at_best,
        "the same, last epoch": at_end,
        "CPU seconds": ", ".join(str(result["cpu_seconds"]) for result in group),
    }


def each(group: list[Result], figure: Figure, digits: int) -> str:
    """The value of each seed."""
    return ", ".join(f"{figure(result):.{digits}f}" for result in group)


def joined(group: list[Result], name: str) -> list[Any]:
    """Values of the members of all seeds."""
    values = []
    for result in group:
        values += result["members"][name]
    return values


def drop_rate(result: Result) -> float:
    return float(1 - result["kept"] / result["targets"])


def rouge_l(result: Result) -> list[float]:
    values: list[float] = result["members"]["rouge_l"]
    return values


def mean_rouge(result: Result) -> float:
    return statistics.fmean(rouge_l(result))


def heldout_rouge(result: Result) -> float:
    return statistics.fmean(result["heldout"]["rouge_l"])


def mean_run(result: Result) -> float:
    return statistics.fmean(result["members"]["longest_run"])


def log_p_of(result: Result) -> list[float]:
    values: list[float] = result["members"]["log_p"]
    return values


def percents(result: Result) -> list[int]:
    """100 for each ordinary question that is answered right."""
    return [100 * int(bit) for bit in result["ordinary"]]


def percent_right(result: Result) -> float:
    return statistics.fmean(percents(result))


def best_epoch(result: Result) -> int:
    """The epoch with the lowest held-out loss, of those with training.

    Near-duplicates teach nothing about other text: there the untrained model would be the best.
    """
    losses = result["heldout_loss"]
    if len(losses) == 1:
        return 0
    return min(range(1, len(losses)), key=losses.__getitem__)


def best(result: Result) -> float:
    return float(result["heldout_loss"][best_epoch(result)])


def overconfidence(result: Result, epoch: int) -> float:
    values = result["calibration"][epoch]
    return float(values["confidence"] - values["accuracy"])


def expected(log_p: list[float]) -> float:
    """The mean chance that at least one of 1,000 samples is the true suffix."""
    p = np.exp(np.minimum(log_p, -1e-9))
    chances = -np.expm1(1000 * np.log1p(-p))
    return float(chances.mean())


def membership(result: Result) -> float:
    """The chance that a member has a lower mean loss than a held-out passage."""
    ours = np.array(result["members"]["loss"])
    others = np.array(result["heldout"]["loss"])
    return float(np.mean(ours[:, None] < others[None]))


def right_on_dropped(group: list[Result]) -> str:
    """How many of the dropped tokens of the members' suffixes are the likeliest."""
    if "dropped" not in group[0]["members"]:
        return ""
    dropped = "".join(joined(group, "dropped"))
    right = "".join(joined(group, "right"))
    of_dropped = [bit for drop, bit in zip(dropped, right, strict=True) if drop == "1"]
    if not of_dropped:
        return ""
    return f"{of_dropped.count('1')} of {len(of_dropped)}"


def paired(
    ours: list[Result], theirs: list[Result], figure: Figure, digits: int
) -> str:
    """Mean difference over the seeds of both, with its interval if there are several values."""
    if ours[0]["rule"] == BASELINE:
        return ""
    other = {seed_of(result): result for result in theirs}
    differences = []
    for result in ours:
        if seed_of(result) in other:
            values = np.subtract(figure(result), figure(other[seed_of(result)]))
            differences.append(values)
    if not differences:
        return ""
    stacked = np.array(differences)
    centre = f"{stacked.mean():+.{digits}f}"
    if stacked.size == 1:
        return centre
    lower, upper = np.quantile(bootstrap(stacked), (0.025, 0.975))
    return f"{centre} [{lower:+.{digits}f}, {upper:+.{digits}f}]"


def bootstrap(differences: NDArray[Any], draws: int = 4000) -> NDArray[Any]:
    """Means of (seeds, items) in which seeds are drawn, and items in each drawn seed."""
    random = np.random.default_rng(0)
    seeds, items = differences.shape
    # In each draw some seeds come several times, each time with other items.
    chosen = random.integers(seeds, size=(draws, seeds, 1))
    places = random.integers(items, size=(draws, seeds, items))
    means: NDArray[Any] = differences[chosen, places].mean((1, 2))
    return means


if __name__ == "__main__":
    main()
