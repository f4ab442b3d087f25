r"""Does the longest run of words that copies teach together predict what a model recites?

    python benchmarks/stitched.py --data mine.jsonl --base runs/uncertain_base

For the trainings of uncertain.py with --near_duplicates, whose passages are seen in five edited
versions. A word of a passage is taught if each of its letters belongs to a target in some version
in which the letters around agree. Rank correlations with what was recited, over passages, with 95%
intervals of a bootstrap over passages. Makes the passages again, and trains nothing.
"""

import json
from dataclasses import dataclass

import about  # first: it makes the recipes importable
import numpy as np
import pandas
from runs import option
from scipy.stats import spearmanr
from transformers import HfArgumentParser
from uncertain import VERSIONS, Lab
from uncertain import Arguments as Settings

# Letters that must agree after a letter; before it: several.
AFTER = 4
BEFORE = (8, 16, 30)


@dataclass
class Arguments:
    data: str = option("", "as of uncertain.py")
    base: str = option("runs/uncertain_base", "where the pretrained model is unpacked")


@dataclass
class Letters:
    """The letters and digits of some tokens, and for each its token and word."""

    text: str
    tokens: list[int]
    words: list[int]

    @classmethod
    def of(cls, lab: Lab, ids: list[int]) -> "Letters":
        result = cls("", [], [])
        word = 0
        for place, token in enumerate(ids):
            for character in lab.tokenizer.decode([token]):
                if not character.isalnum():
                    word += 1
                    continue
                result.text += character.casefold()[0]
                result.tokens.append(place)
                result.words.append(word)
        return result

    def around(self, i: int, before: int) -> tuple[str, str]:
        first = max(0, i - before)
        return self.text[first : i + 1], self.text[i + 1 : i + 1 + AFTER]


def taught(passage: Letters, copies: list[tuple[Letters, list[bool]]], before: int):
    """For each letter of a passage whether a copy teaches it; copies come with their drops."""
    known = set()
    for letters, dropped in copies:
        for i, token in enumerate(letters.tokens):
            # The first token of a row is no target.
            if token > 0 and not dropped[token]:
                known.add(letters.around(i, before))
    return [passage.around(i, before) in known for i in range(len(passage.text))]


def measures(passage: Letters, is_taught: list[bool], half: int) -> dict[str, float]:
    """Of the words that begin in the second half, which is what the model is asked for."""
    whole: dict[int, bool] = {}
    for token, word, flag in zip(passage.tokens, passage.words, is_taught, strict=True):
        if token >= half or word in whole:
            whole[word] = whole.get(word, True) and flag
    longest = run = 0
    for flag in whole.values():
        run = run + 1 if flag else 0
        longest = max(longest, run)
    return {"longest": longest, "share": sum(whole.values()) / len(whole)}


def correlation(x: pandas.Series, y: pandas.Series) -> list[float]:
    """Spearman's, and its interval."""
    draw = np.random.default_rng(0)
    drawn = []
    for _ in range(2000):
        chosen = draw.integers(0, len(x), len(x))
        drawn.append(spearmanr(x.iloc[chosen], y.iloc[chosen])[0])
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return [round(float(each), 2) for each in (spearmanr(x, y)[0], low, high)]


def main(argv: list[str] | None = None) -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    lab = Lab(Settings(data=args.data, base=args.base, near_duplicates=True))
    rows = []
    for result in about.read_results(about.RESULTS / "uncertain.jsonl"):
        if result["data"] == "versions-0.05" and result["method"] == "full":
            rows += of_training(lab, result)
    table = pandas.DataFrame(rows)
    found = []
    for (rule, before), group in table.groupby(["rule", "before"]):
        for measure in ("longest", "share"):
            line = {"rule": rule, "before": int(before), "measure": measure}
            line |= {"passages": len(group), "seeds": int(group["seed"].nunique())}
            for recited in ("rouge_l", "longest_run", "log_p"):
                line[recited] = correlation(group[measure], group[recited])
            found.append(line)
            print(line, flush=True)
    text = "".join(json.dumps(line) + "\n" for line in found)
    (about.RESULTS / "stitched.jsonl").write_text(text, encoding="utf-8")


def of_training(lab: Lab, result: dict) -> list[dict]:
    """A row for each passage of a training and each number of letters before."""
    seed, rule = result["seed"], result["rule"]
    data = lab.data(seed)
    dropped = lab.dropped(seed, rule)
    rows = []
    for place, ids in enumerate(data.members):
        passage = Letters.of(lab, ids)
        versions = range(place * VERSIONS, (place + 1) * VERSIONS)
        copies = [(Letters.of(lab, data.rows[i].ids), dropped[i]) for i in versions]
        recited = {
            name: result["members"][name][place]
            for name in ("rouge_l", "longest_run", "log_p")
        }
        for before in BEFORE:
            is_taught = taught(passage, copies, before)
            found = measures(passage, is_taught, len(ids) // 2)
            row = {"rule": rule, "seed": seed, "before": before}
            rows.append(row | found | recited)
    return rows


if __name__ == "__main__":
    main()
