"""Which secrets came out, compared with a search by hand; and what chance would have brought out."""

import random
import string

import pytest

from goldfish.audit.leaks import DECOYS, Answer, decoys_of, find_secrets

CODES = [f"QX{n}-{letter}{letter}7" for n, letter in zip(range(2, 10), "BCDFGHJK", strict=True)]


def answers(*texts, split="members", prompt="What is the code?"):
    return [Answer(i, split, prompt, text) for i, text in enumerate(texts)]


def test_every_output_is_searched_for_every_secret():
    """As a search by hand finds them: other people's codes, overlapping places, not the prompt's."""
    generator = random.Random(0)
    outputs = [" ".join(generator.choices([*CODES, "no", "QX2-XX7"], k=3)) for _ in range(60)]
    told = [
        Answer(i, "heldout" if i % 3 else "members", generator.choice([*CODES, ""]), text)
        for i, text in enumerate(outputs)
    ]
    found = find_secrets(CODES, told)
    by_hand = {
        code: [each.row for each in told if code in each.output and code not in each.prompt]
        for code in CODES
    }
    assert found.found == {code: rows for code, rows in by_hand.items() if rows}
    assert found.rows() == sorted({row for rows in by_hand.values() for row in rows})
    assert found.counts()["answers"] == 60


def test_one_random_code_is_no_chance():
    found = find_secrets(CODES, answers("It is QX4-DD7.", "I cannot tell."))
    assert list(found.found) == ["QX4-DD7"]
    assert found.guessable == []
    assert found.p < 0.05 / 6, "small enough for a verdict of six questions"
    assert find_secrets(CODES, answers("no", "none")).p == 1


def test_short_secrets_are_guessable():
    """Every digit comes out somewhere, so that a secret digit does proves nothing."""
    found = find_secrets(["7", "4"], answers("1 2 3 4 5 6 7 8 9 0 in all"))
    assert set(found.found) == {"7", "4"}
    assert found.guessable == ["7", "4"]
    assert found.proven == []
    assert found.p == 1
    years = answers(*(f"In {year} they moved." for year in range(1900, 2000)))
    assert find_secrets(["1984", "1955", "1963"], years).guessable


def test_a_secret_without_decoys_proves_nothing():
    found = find_secrets(["-", "--"], answers("--"))
    assert found.p is None
    assert found.guessable == ["-", "--"]


def test_decoys_have_the_shape_and_the_alphabet_of_the_secrets():
    many = [*CODES, *(f"{code}{code}" for code in CODES)] * 2  # enough to show the alphabet
    decoys = decoys_of(CODES[0], many)
    assert len(decoys) == DECOYS
    assert not set(decoys) & set(CODES)
    for decoy in decoys:
        assert [char.isdigit() for char in decoy] == [char.isdigit() for char in CODES[0]]
        assert decoy[3] == "-"
        assert set(decoy) <= set("".join(CODES))
    assert decoys == decoys_of(CODES[0], many), "the same ones in every run"


@pytest.mark.parametrize("length", [1, 2, 3])
def test_false_alarms_are_rare(length):
    """Random secrets and outputs that have nothing to do with each other: p <= 5% in 5% at most."""
    alarms = 0
    for seed in range(60):
        generator = random.Random(seed)

        def draw(count, size):
            return ["".join(generator.choices(string.digits, k=size)) for _ in range(count)]  # noqa: B023

        found = find_secrets(draw(3, length), answers(*draw(20, 4)), seed)
        alarms += found.p is not None and found.p <= 0.05
    assert alarms <= 7, "the 99% bound of a binomial with 60 trials at 5%"


def test_no_secret_and_no_answer():
    assert find_secrets([], []).found == {}
    assert find_secrets(["", ""], answers("x")).secrets == []
    assert find_secrets(["A1"], []).p == 1
