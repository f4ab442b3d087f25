"""Which codes came out of the trainings of uncertain.py? The tables of uncertain_table.py on them.

A code is out if any answer contains it, whoever the question was about. People 0 to 7 have their
code in one wording, 8 to 15 in three; the rest are strangers, who are in no chat.
"""

from typing import Any

import about
import numpy as np
from scipy.stats import linregress, spearmanr

Result = dict[str, Any]
ONE_WORDING = 8
MEMBERS = 16
SAMPLES = 1000


def figures(group: list[Result]) -> dict[str, str]:
    """Rows of a table; the values of the seeds of one rule."""
    sums = [expected(result) for result in group]
    return {
        "**codes in any answer**": out_of(group),
        "in one wording (of 8)": counts([in_one_wording(r) for r in group]),
        "in three wordings (of 8)": counts([in_three_wordings(r) for r in group]),
        "asked about members (of 16)": counts([about_members(r) for r in group]),
        "asked about strangers (of 16)": counts([about_strangers(r) for r in group]),
        "answers about strangers with a real code": misdirected(group),
        "expected in 1,000 samples each (of 16)": ", ".join(f"{x:.1f}" for x in sums),
        "really drawn, distinct codes": ", ".join(map(drawn, group)).strip(", "),
    }


def out_of(group: list[Result]) -> str:
    """How many codes came out, of how many; "" if no chats were trained on."""
    if "answers" not in group[0]:
        return ""
    distinct = sum(len(codes_in(result["answers"])) for result in group)
    return f"{distinct} of {MEMBERS * len(group)}"


def counts(found: list[set[str]]) -> str:
    return ", ".join(str(len(codes)) for codes in found)


def codes_in(answers: list[Result]) -> set[str]:
    result: set[str] = set()
    for answer in answers:
        result.update(answer["real"])
    return result


def owners(result: Result) -> dict[str, int]:
    """Code -> number of the person."""
    return {row["code"]: row["person"] for row in result["codes"]}


def in_one_wording(result: Result) -> set[str]:
    owner = owners(result)
    out = codes_in(result["answers"])
    return {code for code in out if owner[code] < ONE_WORDING}


def in_three_wordings(result: Result) -> set[str]:
    return codes_in(result["answers"]) - in_one_wording(result)


def about_members(result: Result) -> set[str]:
    answers = result["answers"]
    return codes_in([answer for answer in answers if answer["person"] < MEMBERS])


def about_strangers(result: Result) -> set[str]:
    return codes_in(to_strangers(result))


def to_strangers(result: Result) -> list[Result]:
    return [answer for answer in result["answers"] if answer["person"] >= MEMBERS]


def misdirected(group: list[Result]) -> str:
    answers = []
    for result in group:
        answers += to_strangers(result)
    given = sum(bool(answer["real"]) for answer in answers)
    return f"{given} of {len(answers)}"


def measured_bits(result: Result) -> dict[str, float]:
    """-log2 p of each code after its true prompt and answer, in its likeliest wording."""
    result_bits: dict[str, float] = {}
    for row in result["codes"]:
        bits = sum(row["nll"]) / np.log(2)
        other = result_bits.get(row["code"], np.inf)
        result_bits[row["code"]] = min(bits, other)
    return result_bits


def chance(bits: float, samples: int) -> float:
    """That a code of so many bits is in at least one of the samples."""
    p = min(2.0**-bits, 1 - 1e-12)
    return float(-np.expm1(samples * np.log1p(-p)))


def expected(result: Result) -> float:
    """Codes that come out, if 1,000 answers are drawn for each."""
    return sum(chance(bits, SAMPLES) for bits in measured_bits(result).values())


def drawn(result: Result) -> str:
    """Distinct codes in the drawn answers, and how many their bits let expect."""
    if "sampled" not in result:
        return ""
    codes: set[str] = set()
    samples = {}
    for asked in result["sampled"]:
        codes.update(asked["codes"])
        samples[asked["person"]] = asked["samples"]
    bits = measured_bits(result)
    sums = 0.0
    for code, person in owners(result).items():
        # Codes of people who were not asked about can come out, too, but have no estimate.
        sums += chance(bits[code], samples.get(person, 0))
    total = sum(samples.values())
    return (
        f"{len(codes)} in {total} answers (of those asked about: {sums:.1f} expected)"
    )


def never_trained(result: Result) -> dict[str, list[int]]:
    """For each code, its tokens dropped in every row; the hyphen that all share is none."""
    places: dict[str, set[int]] = {}
    # A code has the same tokens in every wording: a space comes before it in all of them.
    for row in result["codes"]:
        dropped = set()
        for i, token in enumerate(row["tokens"]):
            if row["dropped"][i] == "1" and token.strip() != "-":
                dropped.add(i)
        before = places.get(row["code"], dropped)
        places[row["code"]] = before & dropped
    return {code: sorted(here) for code, here in places.items()}


def predicted(
    group: list[Result], found: dict[str, list[str]] | None
) -> tuple[str, str, str]:
    """Codes that came out: of those that can be learned whole, of the others, of one token.

    Args:
        found: by seed, what check calls learnable whole. Rules that are not in the package have
            none; for them the stored decisions are counted in the same way.
    """
    whole, others, single = [], [], []
    for result in group:
        dropped = never_trained(result)
        exposed = [code for code, places in dropped.items() if not places]
        if found is not None:
            exposed = found[str(result["seed"])]
        out = codes_in(result["answers"])
        for code, places in dropped.items():
            came = code in out
            (whole if code in exposed else others).append(came)
            if len(places) == 1:
                single.append(came)
    return share(whole), share(others), share(single)


def share(came: list[bool]) -> str:
    return f"{sum(came)} of {len(came)}"


def promised(group: list[Result], untouched: dict[int, Result]) -> tuple[str, ...]:
    """Bits that the untrained model promises for tokens dropped everywhere, and measured bits."""
    pairs = []
    for result in group:
        before = untouched.get(result["seed"])
        if before is None:
            continue
        promise = promises(before, never_trained(result))
        measured = measured_bits(result)
        pairs += [(promise[code], measured[code]) for code in promise]
    if not pairs:
        return ()
    first, second = np.array(pairs).T
    fit = linregress(first, second)
    rank = spearmanr(first, second).statistic
    difference = second - first
    below = int((difference < 0).sum())
    return (
        str(len(pairs)),
        f"{first.mean():.1f}",
        f"{second.mean():.1f}",
        f"{fit.slope:.2f}",
        f"{fit.rvalue:.2f}, {rank:.2f}",
        f"{difference.std():.1f}",
        f"{below} of {len(pairs)}",
        f"{difference.min():.1f}",
    )


def promises(untouched: Result, places: dict[str, list[int]]) -> dict[str, float]:
    """Bits of the tokens at these places, in the wording that makes them likeliest beforehand."""
    result: dict[str, float] = {}
    for row in untouched["codes"]:
        code = row["code"]
        nats = sum(row["nll"][i] for i in places[code])
        other = result.get(code, np.inf)
        result[code] = min(nats / np.log(2), other)
    return result


def predictions(
    groups: dict[str, list[Result]], found: dict[str, Any], names: dict[str, str]
) -> str:
    """In Markdown, a row for each rule and way of finetuning."""
    rows = []
    for group in groups.values():
        rule, method = group[0]["rule"], group[0]["method"]
        cells = predicted(group, found.get(rule))
        rows.append((names[rule], method, len(group), *cells))
    head = (
        "rule",
        "finetuning",
        "seeds",
        "can be learned whole: came out",
        "cannot: came out",
        "of these, with one dropped token",
    )
    return about.markdown(head, rows)


def promised_bits(groups: dict[str, list[Result]], names: dict[str, str]) -> str:
    """In Markdown, a row for each rule that drops tokens."""
    untouched = {result["seed"]: result for result in groups.get("untouched", [])}
    rows = []
    for rule, group in groups.items():
        if rule in ("untouched", "standard"):
            continue
        cells = promised(group, untouched)
        if cells:
            rows.append((names[rule], *cells))
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
