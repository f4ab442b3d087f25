"""Strategy "letters": equal to the specification, and the same for every formatting of a text."""

import pickle
import random
import unicodedata
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from toy_tokenizers import ALPHABETIC, KINDS, SCRIPTS, TEXTS, letters_of

from goldfish import Goldfish, spec
from goldfish.letters import Vocabulary
from goldfish.vocabulary import characters, fold

FOLD = characters()


def letter_decisions(
    rule: Goldfish, tokenizer: Tokenizer, text: str
) -> list[bool | None]:
    """The decision of each letter that its token begins with, located by the token's offset.

    None for letters inside a token. A letter of several tokens belongs to the last of them.
    """
    encoding = tokenizer.encode(text, add_special_tokens=False)
    drop = rule.dropped(torch.tensor(encoding.ids)).tolist()
    token_at = {
        c: token for token, span in enumerate(encoding.offsets) for c in range(*span)
    }
    result, decided = [], None
    for i, character in enumerate(text):
        for _ in fold(character):
            token = token_at[i]
            result.append(None if token == decided else drop[token])
            decided = token
    assert len(result) == len(letters_of(text))
    return result


def agree(one: list[bool | None], other: list[bool | None]) -> int:
    """How many letters are decided in both; fails unless all those decisions are equal."""
    both = [
        (a, b)
        for a, b in zip(one, other, strict=True)
        if a is not None and b is not None
    ]
    assert [a for a, _ in both] == [b for _, b in both]
    return len(both)


# --- the specification

PIECES = [
    b"a",
    b"B",
    b" ",
    b".",
    b"\n",
    b"word",
    b" two words",
    *(
        bytes([b])
        for b in bytes.fromhex("c2c3a9a0e38081e2ada980f09f92edf4e090efb7bac0ffe6898b")
    ),
]
TOKENS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map(b"".join)
VOCABULARIES = [
    [
        b"".join(random.Random(seed).choices(PIECES, k=1 + i % 7))
        + bytes([i]) * (i % 3)
        for i in range(256)
    ]
    for seed in range(2)
] + [[bytes([i]) for i in range(256)]]


@pytest.fixture(scope="module")
def vocabularies() -> list[Vocabulary]:
    return [Vocabulary(entries) for entries in VOCABULARIES]


@pytest.mark.core
@settings(max_examples=150, deadline=None)
@given(
    which=st.integers(0, 2),
    ids=st.lists(st.integers(0, 255), max_size=60),
    h=st.sampled_from([1, 2, 3, 50]),
    k=st.sampled_from([1.5, 2, 4]),
    seed=st.integers(0, 2**64 - 1),
    opening=st.sampled_from(["short", "keep"]),
    exempt=st.sampled_from([(), (3, 97)]),
    end=st.sampled_from([None, 10]),
    data=st.data(),
)
def test_equals_the_specification(
    vocabularies, which, ids, h, k, seed, opening, exempt, end, data
):
    flags = st.lists(st.integers(0, 5), min_size=len(ids), max_size=len(ids))
    positions = data.draw(st.none() | flags)
    attended = data.draw(st.none() | flags)
    options = {
        "k": k,
        "h": h,
        "seed": seed,
        "opening": opening,
        "exempt": exempt,
        "document_end": end,
        "strategy": "letters",
    }
    if opening == "short":
        options["max_kept"] = data.draw(st.sampled_from([None, 4, 6]))
    options["secrets"] = data.draw(
        st.sampled_from([None, r"a+", r"(?s)B.(\S?.)", r"[^ -z]+"])
    )
    expected = spec.dropped(
        ids, positions, attended, vocabulary=VOCABULARIES[which], fold=FOLD, **options
    )
    as_row = lambda x: None if x is None else torch.tensor([x], dtype=torch.int64)  # noqa: E731
    rule = Goldfish(**options, vocabulary=vocabularies[which])
    actual = rule.dropped(
        as_row(ids), as_row(positions), attention_mask=as_row(attended)
    )
    assert actual[0].tolist() == expected


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.characters(codec="utf-8"), max_size=40)
    | st.text(st.sampled_from(SCRIPTS), max_size=60),
)
def test_bytes_of_any_text_equal_the_specification(vocabularies, text):
    ids = list(text.encode())
    expected = spec.dropped(
        ids, k=2, h=3, strategy="letters", vocabulary=VOCABULARIES[2], fold=FOLD
    )
    rule = Goldfish(k=2, h=3, strategy="letters", vocabulary=vocabularies[2])
    assert rule.dropped(torch.tensor(ids, dtype=torch.int64)).tolist() == expected


BROKEN = [
    "c1 81",
    "e0 81 81",
    "f0 80 81 81",
    "f0 81 81 81",  # letters in more bytes than they need
    "ed a0 80",
    "f4 90 80 80",
    "ff",
    "80",
    "c3 c3 a9",
    "e2 82 20",
    "e2 82 c3 a9",
    "f0 9d 92 c3 a9",
    "c3 a9a0",
    "e2 82aca9",
    "c3 a9a0a0",
    "f0 9d92 9ca0",
    "c3 a9a062",
    "e3 808063 64",  # more than was missing
    "c3 | a9",
    "e2 82 | ac",
    "f0 | 9d 92 9c",
    "c3 | a9a0",  # a document starts within
]


def test_broken_characters_equal_the_specification():
    """Between letters, so that a character wrongly read becomes part of a word, or ends one."""
    rows = [["78", "20", "6b", *broken.split(), "7a", "20", "79"] for broken in BROKEN]
    tokens = sorted(
        {bytes.fromhex(token) for row in rows for token in row if token != "|"}
    )
    vocabulary = Vocabulary(tokens)
    for row, seed in product(rows, range(12)):
        ids = [tokens.index(bytes.fromhex(token)) for token in row if token != "|"]
        positions = [*range(1, len(ids) + 1)]
        if "|" in row:
            positions[row.index("|")] = 0
        options = {"k": 2, "h": 2, "strategy": "letters", "seed": seed}
        rule = Goldfish(**options, vocabulary=vocabulary)
        expected = spec.dropped(ids, positions, vocabulary=tokens, fold=FOLD, **options)
        assert (
            rule.dropped(torch.tensor(ids), torch.tensor(positions)).tolist()
            == expected
        ), row


def test_the_specification_by_hand():
    entries = [b"The", b" quick", b"br", b"own", b" fox", b",", b" ", b"\n"]
    letters = lambda *ids: spec.letters_of([entries[i] for i in ids], FOLD)  # noqa: E731
    assert letters() == letters(6) == ""
    assert letters(0) == letters(0, 6) == letters(0, 5) == "the"
    assert letters(0, 1, 7, 2) == "thequickbr"
    assert letters(0, 1, 7, 2, 3) == letters(0, 1, 7, 2, 3, 5) == "thequickbrown"
    # A letter of two bytes counts with its second.
    assert spec.letters_of([b"a", b"\xc3"], FOLD) == "a"
    assert spec.letters_of([b"a", b"\xc3", b"\xa9"], FOLD) == "ae"


# --- what must not change a decision


def rewrap(text: str, rng: random.Random) -> str:
    return "".join(
        rng.choice((" ", "\n", "\r\n", "  ", "\t", "\u00a0", "\u3000", "\n    "))
        if c.isspace()
        else c
        for c in text
    )


REFORMATTINGS = {
    "white space": rewrap,
    "upper case": lambda text, rng: text.upper(),
    "random case": lambda text, rng: "".join(
        rng.choice((c.upper(), c.lower())) for c in text
    ),
    "indented": lambda text, rng: text.replace("\n", "\n\t      "),
    "no punctuation": lambda text, rng: "".join(
        " " if unicodedata.category(c)[0] == "P" else c for c in text
    ),
    "decomposed": lambda text, rng: unicodedata.normalize("NFKD", text),
    "other quotes": lambda text, rng: (
        text.replace("'", "’").replace('"', "“").replace("-", "–")
    ),
}


@pytest.mark.parametrize("reformat", REFORMATTINGS.values(), ids=REFORMATTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_reformatting_changes_no_decision(tokenizers, rules, kind, reformat):
    rng, tested = random.Random(0), 0
    for text in [t[:1500] for t in TEXTS[:8]] + [ALPHABETIC * 3]:
        changed = reformat(text, rng)
        if not has_unknown(tokenizers[kind], changed):
            assert letters_of(changed) == letters_of(text)
            expected = letter_decisions(rules[kind], tokenizers[kind], text)
            decided = agree(
                letter_decisions(rules[kind], tokenizers[kind], changed), expected
            )
            assert decided > 0.15 * len(expected), "tokens begin at the same letters"
            assert {True, False} <= set(expected)
            tested += 1
    assert tested >= (
        8 if kind in ("wordpiece", "unigram") else 9
    )  # which have no bytes for a character not seen


def has_unknown(tokenizer: Tokenizer, text: str) -> bool:
    return tokenizer.token_to_id("<unk>") in tokenizer.encode(text).ids


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "byte_level"])
def test_another_tokenizer_takes_the_same_decisions(tokenizers, rules, kind):
    compared = 0
    for text in [*TEXTS[:20], ALPHABETIC * 3]:
        if not has_unknown(tokenizers[kind], text):
            expected = letter_decisions(
                rules["byte_level"], tokenizers["byte_level"], text
            )
            compared += agree(
                letter_decisions(rules[kind], tokenizers[kind], text), expected
            )
    assert compared > 5000


# --- scripts without spaces, code


@pytest.mark.parametrize(
    "text",
    [
        "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
        "我们在北京大学学习自然语言处理，今天天气很好。",
    ],
)
def test_scripts_without_spaces_decide_by_character(vocabularies, text):
    rule = Goldfish(
        k=2, h=4, strategy="letters", vocabulary=vocabularies[2]
    )  # every byte is a token

    def by_character(t):
        return [
            rule.dropped(torch.tensor(list(t.encode())))[len(t[:i].encode()) + 2].item()
            for i, c in enumerate(t)
            if c.isalnum()
        ]

    expected = by_character(text)
    assert len(expected) == sum(c.isalnum() for c in text)
    assert 0 < sum(expected) < len(expected)
    # Line breaks anywhere, or spaces between all characters, change nothing.
    assert by_character("\n".join(text)) == expected
    assert by_character(text.replace("。", " ").replace("，", "\u3000")) == expected
    # The context of a character is the 5 h before it.
    assert by_character("犬" + text[1:])[21:] == expected[21:]


def test_code_formatting_changes_nothing(tokenizers, rules):
    compact, spaced = (
        "def f(a,b):\n\treturn snake_case[a]+b.c",
        "def f( a, b ):\n    return snake_case[ a ] + b . c",
    )
    for kind in KINDS:
        expected = letter_decisions(rules[kind], tokenizers[kind], compact)
        assert (
            agree(letter_decisions(rules[kind], tokenizers[kind], spaced), expected)
            >= 6
        )


# --- the rule


def test_unbound_and_inclusive_are_refused():
    with pytest.raises(ValueError, match=r"rule = rule\.bind\(tokenizer\)"):
        Goldfish(strategy="letters").dropped(torch.tensor([1, 2]))
    with pytest.raises(
        ValueError,
        match=r'strategy="letters" needs window="preceding", got window="incl',
    ):
        Goldfish(strategy="letters", window="inclusive")


def test_binding_is_no_part_of_the_rule(tokenizers, rules):
    bound, bare = rules["byte_level"], Goldfish(strategy="letters", h=4, k=3)
    assert bound == bare
    assert hash(bound) == hash(bare)
    assert repr(bound) == repr(bare)
    assert bound.to_dict() == bare.to_dict()
    assert Goldfish(**bound.to_dict()) == bound
    hashed = Goldfish(strategy="hash")
    assert hashed.bind(tokenizers["byte_level"]) is hashed


def test_a_rule_of_another_tokenizer_is_refused(tokenizers, rules):
    bound = rules["byte_level"]
    assert bound.bind(tokenizers["byte_level"]) is bound
    with pytest.raises(ValueError, match="this rule is bound to another tokenizer"):
        bound.bind(tokenizers["wordpiece"])
    more = Tokenizer.from_str(tokenizers["byte_level"].to_str())
    more.add_tokens(["<one more>"])
    with pytest.raises(ValueError, match="before tokens were added"):
        bound.bind(more)


def test_survives_pickling(rules):
    ids = torch.arange(300)
    copy = pickle.loads(pickle.dumps(rules["byte_level"]))
    assert torch.equal(copy.dropped(ids), rules["byte_level"].dropped(ids))


def test_degenerate_sizes(rules):
    rule = rules["byte_level"]
    assert rule.dropped(torch.empty(0, dtype=torch.int64)).shape == (0,)
    assert rule.dropped(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0)
    assert rule.dropped(torch.tensor([5])).tolist() == [False]
    assert Goldfish(strategy="letters", vocabulary=Vocabulary([])).dropped(
        torch.tensor([0, 1])
    ).tolist() == [
        False,
        False,
    ]
