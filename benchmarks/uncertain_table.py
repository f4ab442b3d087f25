"""The tables of docs/results.md on uncertain tokens and on secrets, from results/uncertain.jsonl.

    python benchmarks/uncertain_table.py

Differences are paired: the same seed, and in it the same passages or questions. Their intervals
(95%, percentiles of 4,000 draws) come from drawing seeds, and in each drawn seed passages, both
with replacement. Three seeds are few for a bootstrap: intervals may be too narrow.
"""

import json
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import about
import numpy as np
from numpy.typing import NDArray
from scipy.stats import linregress, spearmanr

Result = dict[str, Any]
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
}
NAMES = SECRETS | UNCERTAIN
SAMPLES = 1000


def main() -> None:
    results = about.read_results(Path(about.RESULTS, "uncertain.jsonl"))
    for method in ("full", "lora"):
        private = of(results, "private", method)
        print(f"\n## Secrets, {method}\n\n{table(private, SECRETS, of_codes, of_loss)}")
        shown = table(private, UNCERTAIN, of_passages, of_loss, of_trust)
        print(f"\n## Uncertain tokens, {method}\n\n{shown}")
    for data in sorted({result["data"] for result in results} - {"private"}):
        shown = table(of(results, data, "full"), UNCERTAIN, of_passages, of_loss)
        print(f"\n## {data}\n\n{shown}")
    found = json.loads(Path(about.RESULTS, "uncertain_check.json").read_text("utf-8"))
    print(f"\n## Check before, codes afterwards\n\n{predicted(results, found)}")
    private = of(results, "private", "full")
    print(f"\n## By dropped tokens\n\n{by_dropped(private)}")
    print(f"\n## Promised bits\n\n{promised_bits(private)}")
    print(f"\nLast run: {about.source(results[-1])}")


def of(results: list[Result], data: str, method: str) -> list[Result]:
    return [r for r in results if (r["data"], r["method"]) == (data, method)]


def table(
    results: list[Result], names: dict[str, str], *parts: Callable[..., dict[str, str]]
) -> str:
    """In Markdown, a column for each rule; the parts give its rows."""
    groups: dict[str, list[Result]] = {}
    for name in names:
        group = [result for result in results if result["rule"] == name]
        if group:
            groups[name] = sorted(group, key=lambda result: int(result["seed"]))
    theirs = groups.get(BASELINE, [])
    columns = []
    for group in groups.values():
        column = {
            "seeds": listed(result["seed"] for result in group),
            "drop rate": each(group, lambda r: 1 - r["kept"] / r["targets"], 2),
        }
        for part in parts:
            column |= part(group, theirs)
        columns.append(column)
    # Untouched and standard models lack some rows; dict.fromkeys keeps the order.
    titles = list(dict.fromkeys(title for column in columns for title in column))
    rows = [[title, *(column.get(title, "") for column in columns)] for title in titles]
    return about.markdown(["", *(names[name] for name in groups)], rows)


def of_passages(group: list[Result], theirs: list[Result]) -> dict[str, str]:
    members = [result["members"] for result in group]
    verbatim = sum(run == 32 for part in members for run in part["longest_run"])
    passages = sum(len(part["longest_run"]) for part in members)
    log_p = [value for part in members for value in part["log_p"]]
    return {
        "recited word for word, members": f"{verbatim} of {passages}",
        "ROUGE-L, members": each(
            group, lambda r: statistics.fmean(r["members"]["rouge_l"]), 3
        ),
        "the same, held-out": each(
            group, lambda r: statistics.fmean(r["heldout"]["rouge_l"]), 2
        ),
        "ROUGE-L against `max_kept=4`": paired(group, theirs, rouge_l, 3),
        "longest run, tokens, members": each(
            group, lambda r: statistics.fmean(r["members"]["longest_run"]), 1
        ),
        "median log p of a suffix": f"{statistics.median(log_p):.1f}",
        "log p against `max_kept=4`": paired(group, theirs, log_p_of, 1),
        "expected share in 1,000 samples": f"{expected(log_p):.1g}",
        "right on dropped tokens": right_on_dropped(members),
        "membership by loss, AUC": each(group, membership, 2),
    }


def of_codes(group: list[Result], theirs: list[Result]) -> dict[str, str]:
    """Distinct codes; a code is out if any answer, to whatever question, contains it."""
    one: list[int] = []
    three: list[int] = []
    members: list[int] = []
    strangers: list[int] = []
    expected_codes: list[str] = []
    answered, asked = 0, 0
    for result in group:
        out = codes_out(result["answers"])
        trained = {row["code"]: row["person"] for row in result["codes"]}
        one.append(sum(trained[code] < 8 for code in out))
        three.append(sum(trained[code] >= 8 for code in out))
        # People 0 to 7 have one wording, 8 to 15 three; the rest are in no chat.
        to_strangers = [each for each in result["answers"] if each["person"] >= 16]
        to_members = [each for each in result["answers"] if each["person"] < 16]
        members.append(len(codes_out(to_members)))
        strangers.append(len(codes_out(to_strangers)))
        answered += sum(bool(each["real"]) for each in to_strangers)
        asked += len(to_strangers)
        chances = [drawn_at_all(bits) for bits in measured_bits(result).values()]
        expected_codes.append(f"{sum(chances):.1f}")
    distinct = sum(one) + sum(three)
    return {
        "**codes in any answer**": f"{distinct} of {16 * len(group)}",
        "in one wording (of 8)": listed(one),
        "in three wordings (of 8)": listed(three),
        "asked about members (of 16)": listed(members),
        "asked about strangers (of 16)": listed(strangers),
        "answers about strangers with a real code": f"{answered} of {asked}",
        "expected in 1,000 samples each (of 16)": listed(expected_codes),
        "drawn answers: distinct codes": drawn(group),
    }


def drawn_at_all(bits: float, samples: int = SAMPLES) -> float:
    """The chance that a code of so many bits is in at least one of the samples."""
    p = min(2.0**-bits, 1 - 1e-12)
    return float(-np.expm1(samples * np.log1p(-p)))


def drawn(group: list[Result]) -> str:
    """Distinct codes in answers that were really drawn, and what their bits let expect."""
    cells = []
    for result in group:
        if "sampled" not in result:
            continue
        asked = result["sampled"]
        codes = {code for each in asked for code in each["codes"]}
        people = {each["person"]: each["samples"] for each in asked}
        bits = measured_bits(result)
        owners = {row["code"]: row["person"] for row in result["codes"]}
        expected_codes = sum(
            drawn_at_all(bits[code], people[person])
            for code, person in owners.items()
            if person in people
        )
        cells.append(
            f"{len(codes)} in {sum(people.values())} (of those asked about expected: "
            f"{expected_codes:.1f})"
        )
    return listed(cells)


def of_loss(group: list[Result], theirs: list[Result]) -> dict[str, str]:
    return {
        "held-out loss at its best, nats/token": each(group, best, 3),
        "the same against `max_kept=4`": paired(group, theirs, lambda r: [best(r)], 3),
        "ordinary answers right": each(
            group, lambda r: 100 * statistics.fmean(right(r)), 1, "%"
        ),
        "the same against `max_kept=4`, points": paired(
            group, theirs, lambda r: [100 * value for value in right(r)], 1
        ),
    }


def of_trust(group: list[Result], theirs: list[Result]) -> dict[str, str]:
    """Is the model overconfident on held-out text?"""
    return {
        "confidence less accuracy, held-out, best epoch": each(
            group, lambda r: overconfidence(r, best_epoch(r)), 3
        ),
        "the same, last epoch": each(group, lambda r: overconfidence(r, -1), 3),
        "CPU seconds": listed(result["cpu_seconds"] for result in group),
    }


def overconfidence(result: Result, epoch: int) -> float:
    values = result["calibration"][epoch]
    return float(values["confidence"] - values["accuracy"])


def each(
    group: list[Result], figure: Callable[[Result], float], digits: int, unit: str = ""
) -> str:
    """The value of each seed."""
    return ", ".join(f"{figure(result):.{digits}f}{unit}" for result in group)


def listed(values: Any) -> str:
    return ", ".join(map(str, values))


def rouge_l(result: Result) -> list[float]:
    values: list[float] = result["members"]["rouge_l"]
    return values


def log_p_of(result: Result) -> list[float]:
    values: list[float] = result["members"]["log_p"]
    return values


def right(result: Result) -> list[int]:
    return [int(bit) for bit in result["ordinary"]]


def best_epoch(result: Result) -> int:
    """The epoch with the lowest held-out loss, of those with training.

    Near-duplicates teach nothing about other text: there the untrained model would be the best.
    """
    losses = result["heldout_loss"]
    return min(range(1, len(losses)), key=losses.__getitem__) if len(losses) > 1 else 0


def best(result: Result) -> float:
    return float(result["heldout_loss"][best_epoch(result)])


def expected(log_p: list[float]) -> float:
    """The mean chance that at least one of 1,000 samples is the true suffix."""
    return float(np.mean(-np.expm1(1000 * np.log1p(-np.exp(np.minimum(log_p, -1e-9))))))


def membership(result: Result) -> float:
    """The chance that a member has a lower mean loss than a held-out passage."""
    ours, others = (np.array(result[split]["loss"]) for split in ("members", "heldout"))
    return float(np.mean(ours[:, None] < others[None]))


def right_on_dropped(members: list[Result]) -> str:
    pairs = [
        (drop, bit)
        for part in members
        for drops, bits in zip(part.get("dropped", []), part["right"], strict=False)
        for drop, bit in zip(drops, bits, strict=True)
    ]
    dropped = [bit == "1" for drop, bit in pairs if drop == "1"]
    return f"{sum(dropped)} of {len(dropped)}" if dropped else ""


def paired(
    ours: list[Result],
    theirs: list[Result],
    figure: Callable[[Result], Any],
    digits: int,
) -> str:
    """Mean difference over the seeds of both, with its interval if there are two seeds or more."""
    other = {result["seed"]: result for result in theirs}
    shared = [result for result in ours if result["seed"] in other]
    if not shared or ours[0]["rule"] == BASELINE:
        return ""
    differences = np.array(
        [
            np.subtract(figure(result), figure(other[result["seed"]]))
            for result in shared
        ]
    )
    centre = f"{differences.mean():+.{digits}f}"
    if len(shared) == 1 and differences.size == 1:
        return centre
    lower, upper = np.quantile(bootstrap(differences), (0.025, 0.975))
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


def codes_out(answers: list[Result]) -> set[str]:
    return {code for answer in answers for code in answer["real"]}


def measured_bits(result: Result) -> dict[str, float]:
    """-log2 p of each code after its true prompt and answer, in its likeliest wording."""
    bits: dict[str, float] = {}
    for row in result["codes"]:
        here = sum(row["nll"]) / np.log(2)
        bits[row["code"]] = min(here, bits.get(row["code"], np.inf))
    return bits


def never_trained(result: Result) -> dict[str, list[int]]:
    """For each code, its tokens dropped in every row; the hyphen that all share is none."""
    places: dict[str, set[int]] = {}
    # A code has the same tokens in every wording: a space comes before it in all of them.
    for row in result["codes"]:
        dropped = {i for i, bit in enumerate(row["dropped"]) if bit == "1"}
        dropped -= {i for i, token in enumerate(row["tokens"]) if token.strip() == "-"}
        places[row["code"]] = places.get(row["code"], dropped) & dropped
    return {code: sorted(here) for code, here in places.items()}


def promised_bits(results: list[Result]) -> str:
    """Bits that the untrained model promises for tokens dropped everywhere, and measured bits."""
    untouched = {r["seed"]: r for r in results if r["rule"] == "untouched"}
    rows = []
    for name in SECRETS:
        pairs = []
        for result in results:
            if result["rule"] == name and result["seed"] in untouched:
                promise = promises(untouched[result["seed"]], never_trained(result))
                measured = measured_bits(result)
                pairs += [(promise[code], measured[code]) for code in promise]
        if not pairs or name in ("untouched", "standard"):
            continue
        promised, measured = np.array(pairs).T
        fit, rank = linregress(promised, measured), spearmanr(promised, measured)
        below = sum(m < p for p, m in pairs)
        rows.append(
            (
                NAMES[name],
                len(pairs),
                f"{promised.mean():.1f}",
                f"{measured.mean():.1f}",
                f"{fit.slope:.2f}",
                f"{fit.rvalue:.2f}, {rank.statistic:.2f}",
                f"{np.std(measured - promised):.1f}",
                f"{below} of {len(pairs)}",
                f"{np.min(measured - promised):.1f}",
            )
        )
    head = (
        "rule",
        "codes",
        "promised, mean",
        "measured, mean",
        "slope",
        "r, Spearman",
        "scatter (SD of the difference)",
        "measured below promised",
        "worst difference",
    )
    return about.markdown(head, rows)


def promises(untouched: Result, places: dict[str, list[int]]) -> dict[str, float]:
    """Bits of the tokens at these places, in the wording that makes them likeliest beforehand."""
    bits: dict[str, float] = {}
    for row in untouched["codes"]:
        here = sum(row["nll"][i] for i in places[row["code"]]) / np.log(2)
        bits[row["code"]] = min(here, bits.get(row["code"], np.inf))
    return bits


def predicted(results: list[Result], found: dict[str, dict[str, list[str]]]) -> str:
    """For each rule: codes that check, before the training, calls learnable whole; which came out?

    check cannot read the rules that are not in the package; for them the stored decisions are
    counted in the same way.
    """
    rows = []
    for method in ("full", "lora"):
        for name in SECRETS:
            group = [r for r in of(results, "private", method) if r["rule"] == name]
            counts: dict[tuple[bool, bool], int] = Counter()
            for result in group:
                places = never_trained(result)
                whole = {code for code in places if not places[code]}
                if name in found:
                    whole = set(found[name][str(result["seed"])])
                out = codes_out(result["answers"])
                counts.update((code in whole, code in out) for code in places)
            if counts and name != "untouched":
                cells = [
                    f"{counts[whole, True]} of {counts[whole, True] + counts[whole, False]}"
                    for whole in (True, False)
                ]
                rows.append((NAMES[name], method, len(group), *cells))
    head = (
        "rule",
        "finetuning",
        "seeds",
        "learnable whole: came out",
        "not learnable whole: came out",
    )
    return about.markdown(head, rows)


def by_dropped(results: list[Result]) -> str:
    """Codes by the number of their tokens that are dropped everywhere: how many came out."""
    rows = []
    for name in SECRETS:
        counts: dict[int, list[bool]] = {0: [], 1: [], 2: []}
        for result in results:
            if result["rule"] == name and name != "untouched":
                out = codes_out(result["answers"])
                for code, places in never_trained(result).items():
                    counts[min(len(places), 2)].append(code in out)
        cells = [f"{sum(outs)} of {len(outs)}" for outs in counts.values()]
        if any(counts.values()):
            rows.append((NAMES[name], *cells))
    head = ("codes that came out, by tokens dropped everywhere", 0, 1, "2 +")
    return about.markdown(head, rows)


if __name__ == "__main__":
    main()
