"""Which rows does the audit take for one document? Both errors, in made-up texts.

    python benchmarks/documents.py

Pages of random words are crawled ten times each, with a date before them and some words replaced:
40 documents are right, 400 mean that no copy was found. Forms of one page with random codes in it:
as many documents as forms are right.
"""

import random
from pydoc_data.topics import topics

import numpy as np

from goldfish.audit.windows import SIMILAR_FROM, Groups, normal_letters, sketch

LENGTHS = (150, 250, 400, 1000)
EDITS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.1)
SEEDS = range(3)
VOCABULARY = sorted(
    {word for text in topics.values() for word in text.split() if word.isalpha()}
)


def documents(texts: list[str]) -> int:
    """How many documents similarity alone finds."""
    letters = [normal_letters(text) for text in texts]
    long = [i for i, text in enumerate(letters) if len(text) >= SIMILAR_FROM]
    groups = Groups(len(texts))
    if long:
        sketches = np.stack([sketch(letters[i]) for i in long])
        groups.join_similar(
            sketches, np.array(long), np.zeros(len(long), dtype=np.int64)
        )
    return len({groups.root(i) for i in range(len(texts))})


def crawls(length: int, edits: float, choose: random.Random) -> list[str]:
    texts = []
    for _ in range(40):
        page = choose.choices(VOCABULARY, k=length)
        for day in range(10):
            copy = [
                w if choose.random() >= edits else choose.choice(VOCABULARY)
                for w in page
            ]
            texts.append(" ".join([f"day {17 * day}", *copy]))
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


def main() -> None:
    print(
        "| words | " + " | ".join(f"{edits:.0%} of words replaced" for edits in EDITS),
        end="",
    )
    print(" | 12 forms, one code | 400 forms, one code | 400 forms, ten codes |")
    print("|---" * (len(EDITS) + 4) + "|")
    for length in LENGTHS:
        cells = []
        for edits in EDITS:
            found = [
                documents(crawls(length, edits, random.Random(seed))) for seed in SEEDS
            ]
            cells.append(f"{min(found)} to {max(found)}")
        for count, codes in ((12, 1), (400, 1), (400, 10)):
            found = [
                documents(forms(length, count, codes, random.Random(s))) for s in SEEDS
            ]
            cells.append(f"{min(found)} to {max(found)}")
        print(f"| {length} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
