"""Which rows does the audit take for one document? Both errors, in made-up texts.

    python benchmarks/documents.py

Pages of random words are crawled ten times each, with a date before them and some words replaced:
40 documents are right, 400 mean that no copy was found. Forms of one page with random codes in it:
as many documents as forms are right.
"""

import random
from collections.abc import Callable
from functools import partial
from pydoc_data.topics import topics

import numpy as np

from goldfish.audit.documents import (
    SIMILAR_FROM,
    connected,
    normal_letters,
    similar_pairs,
    sketch,
)

LENGTHS = (150, 250, 400, 1000)
EDITS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.1)
# How many forms, with how many codes in each.
FORMS = (12, 1), (400, 1), (400, 10)
SEEDS = range(3)
VOCABULARY = sorted(
    {word for text in topics.values() for word in text.split() if word.isalpha()}
)


def documents(texts: list[str]) -> int:
    """How many documents similarity alone finds."""
    letters = [normal_letters(text) for text in texts]
    long = [i for i, text in enumerate(letters) if len(text) >= SIMILAR_FROM]
    if not long:
        return len(texts)
    sketches = np.stack([sketch(letters[i]) for i in long])
    pairs = similar_pairs(sketches, np.zeros(len(long), dtype=np.int64))
    groups = connected(len(long), pairs)
    return len(texts) - len(long) + len(set(groups.tolist()))


def crawls(length: int, edits: float, choose: random.Random) -> list[str]:
    texts = []
    for _ in range(40):
        page = choose.choices(VOCABULARY, k=length)
        for day in range(10):
            words = ["day", str(17 * day)]
            for word in page:
                replaced = choose.random() < edits
                words.append(choose.choice(VOCABULARY) if replaced else word)
            texts.append(" ".join(words))
    return texts


def forms(length: int, count: int, codes: int, choose: random.Random) -> list[str]:
    page = choose.choices(VOCABULARY, k=length)
    places = choose.sample(range(length), codes)
    texts = []
    for _ in range(count):
        copy = list(page)
        for place in places:
            copy[place] = f"{choose.randrange(10**8):08d}"
        texts.append(" ".join(copy))
    return texts


def least_and_most(made: Callable[[random.Random], list[str]]) -> str:
    """Documents found in the texts of each seed."""
    found = [documents(made(random.Random(seed))) for seed in SEEDS]
    return f"{min(found)} to {max(found)}"


def main() -> None:
    titles = ["words"]
    titles += [f"{edits:.0%} of words replaced" for edits in EDITS]
    for count, codes in FORMS:
        titles.append(f"{count} forms with {codes} codes")
    print(f"| {' | '.join(titles)} |")
    print("|---" * len(titles) + "|")
    for length in LENGTHS:
        cells = [str(length)]
        for edits in EDITS:
            made = partial(crawls, length, edits)
            cells.append(least_and_most(made))
        for count, codes in FORMS:
            made = partial(forms, length, count, codes)
            cells.append(least_and_most(made))
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
