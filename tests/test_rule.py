"""The vectorised rule against the specification and the reference implementation; its errors."""

import json
import random
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from goldfish import Goldfish, spec
from goldfish.rule import _STRATEGIES, Strategy

GOLDEN = json.loads(
    (Path(__file__).parent / "golden" / "reference_masks.json").read_text()
)


def spec_rows(rule: Goldfish, ids, positions=None, attended=None, draw=0):
    """The specification, row by row."""

    def row(tensor, b):
        return None if tensor is None else tensor[b].tolist()

    settings = {**rule.to_dict(), "exempt": rule.exempt}
    del settings["guide"]  # the specification takes its entropies

    return [
        spec.dropped(
            ids[b].tolist(),
            row(positions, b),
            row(attended, b),
            row=b,
            draw=draw,
            **settings,
        )
        for b in range(len(ids))
    ]


@pytest.mark.parametrize(
    "case", GOLDEN["cases"], ids=lambda c: f"k{c['k']}-h{c['h']}-v{c['vocab']}"
)
def test_reference_is_bit_exact_with_the_reference_implementation(case):
    targets = torch.tensor(case["targets"])
    ids = torch.cat([torch.full((len(targets), 1), 7), targets], dim=1)
    dropped = Goldfish(k=case["k"], h=case["h"], strategy="reference").dropped(ids)
    assert dropped[:, 1:].int().tolist() == case["dropped"]
    assert not dropped[:, 0].any()


def test_reference_equals_its_specification_under_padding():
    ids = torch.randint(0, 50_000, (2, 60), generator=torch.Generator().manual_seed(0))
    rule = Goldfish(k=3, h=5, strategy="reference")
    table = torch.rand(
        spec.TABLE_SIZE, generator=torch.Generator().manual_seed(2971215073)
    )
    drops = (table < 1 / 3).tolist()
    expected = [
        spec.dropped(row, h=5, strategy="reference", table=drops)
        for row in ids.tolist()
    ]
    assert rule.dropped(ids).tolist() == expected
    attended = torch.ones_like(ids)
    attended[:, 50:] = 0
    assert rule.dropped(ids, attention_mask=attended).tolist() == [
        [*row[:50], *[False] * 10] for row in expected
    ]


@pytest.mark.parametrize("trial", range(150))
def test_rule_equals_specification(trial):
    pick = random.Random(trial)
    shape = (pick.choice([1, 2, 3]), pick.choice([1, 2, 5, 20, 60]))
    generator = torch.Generator().manual_seed(trial)
    ids = torch.randint(0, pick.choice([3, 100, 2**31 - 1]), shape, generator=generator)
    strategy = pick.choice(["hash", "hash", "static", "random"])
    max_kept = pick.choice([None, 4, 7]) if strategy == "hash" else None
    rule = Goldfish(
        k=pick.choice([2, 3, 4, 2.5, 1.1, 10 / 3] + [50, 10**9] * (max_kept is None)),
        h=pick.choice([1, 4, 13, 50]),
        strategy=strategy,
        max_kept=max_kept,
        seed=pick.choice([0, 5, 2**64 - 1]),
        window=pick.choice(["preceding", "inclusive"]),
        opening=pick.choice(["short", "keep"]) if max_kept is None else "short",
        exempt=pick.choice([(), (1, 2)]),
        document_end=pick.choice([None, 0, 1]),
    )
    positions = pick.choice([None, torch.randint(0, 6, shape, generator=generator)])
    attended = pick.choice([None, torch.randint(0, 2, shape, generator=generator)])
    dropped = rule.dropped(ids, positions, attention_mask=attended, draw=trial)
    assert dropped.dtype == torch.bool
    assert dropped.shape == ids.shape
    assert dropped.tolist() == spec_rows(rule, ids, positions, attended, trial)


def test_mix_is_splitmix64():
    assert spec.mix(0) == 0xE220A8397B1DCDAF, "the published first output with seed 0"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
@pytest.mark.parametrize("shape", [(0,), (1,), (2, 0), (0, 5), (1, 1), (3, 2)])
@pytest.mark.parametrize("strategy", ["hash", "static", "random", "reference"])
def test_degenerate_shapes(shape, dtype, strategy):
    ids = torch.ones(shape, dtype=dtype)
    rule = Goldfish(strategy=strategy)
    for dropped in (
        rule.dropped(ids),
        rule.dropped(ids, torch.zeros_like(ids), attention_mask=torch.zeros_like(ids)),
    ):
        assert dropped.shape == ids.shape
        assert dropped.dtype == torch.bool


def test_lists_are_welcome():
    ids = torch.arange(200).reshape(2, 100)
    expected = Goldfish().dropped(ids)
    assert torch.equal(Goldfish().dropped(ids.tolist()), expected)
    assert torch.equal(Goldfish().dropped(ids[0], [*range(100)]), expected[0])


def test_to_dict_survives_json():
    for rule in (
        Goldfish(),
        Goldfish(
            k=2.5,
            h=3,
            strategy="static",
            seed=2**64 - 1,
            exempt=(5, 2, 2),
            document_end=1,
        ),
        Goldfish(max_kept=5),
    ):
        again = Goldfish(**json.loads(json.dumps(rule.to_dict())))
        assert again == rule
        assert hash(again) == hash(rule)
    assert Goldfish(exempt=[5, 2, 2]).exempt == (2, 5)
    assert Goldfish(exempt=(token for token in (5, 2))).exempt == (2, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"k": 1}, ValueError, "k must be a finite number above 1.*got 1;"),
        ({"k": 0.5}, ValueError, "got 0.5"),
        ({"k": float("nan")}, ValueError, "got nan"),
        ({"k": float("inf")}, ValueError, "train without a rule"),
        ({"k": "4"}, TypeError, "k must be a number above 1, got '4'"),
        ({"k": True}, TypeError, "got True"),
        ({"h": 0}, ValueError, "h must be at least 1"),
        ({"h": 2.0}, TypeError, "h must be the length of the context, got 2.0"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"seed": 2**64}, ValueError, "below 2\\*\\*64"),
        (
            {"strategy": "hashed"},
            ValueError,
            "strategy must be one of 'hash', 'letters'.*got 'hashed'",
        ),
        (
            {"window": "centre"},
            ValueError,
            "window must be one of 'preceding', 'inclusive'",
        ),
        (
            {"opening": None},
            ValueError,
            "opening must be one of 'short', 'keep', got None",
        ),
        ({"exempt": 3}, TypeError, "collection of token ids"),
        ({"exempt": None}, TypeError, "collection of token ids"),
        ({"exempt": (-1,)}, ValueError, "every id in exempt must be at least 0"),
        (
            {"max_kept": 4.0},
            TypeError,
            "max_kept must be a number of tokens or None, got 4.0",
        ),
        (
            {"max_kept": 3},
            ValueError,
            "max_kept must be at least k=4 and at most 1000, got 3",
        ),
        ({"max_kept": 1001}, ValueError, "at most 1000, got 1001"),
        (
            {"max_kept": 4, "strategy": "static"},
            ValueError,
            'max_kept needs .*got strategy="static", opening="short"',
        ),
        (
            {"max_kept": 4, "opening": "keep"},
            ValueError,
            'got strategy="hash", opening="keep"',
        ),
        (
            {"document_end": "</s>"},
            TypeError,
            "document_end must be a token id or None",
        ),
    ],
)
def test_bad_rules(arguments, error, text):
    with pytest.raises(error, match=text):
        Goldfish(**arguments)


def test_bad_ids():
    rule = Goldfish()
    with pytest.raises(TypeError, match=r"integer token ids, got torch\.float32"):
        rule.dropped(torch.zeros(3))
    with pytest.raises(TypeError, match=r"for an empty row pass torch\.empty"):
        rule.dropped([])
    with pytest.raises(ValueError, match=r"shape \(T,\) or \(B, T\), got \(1, 2, 3\)"):
        rule.dropped(torch.zeros((1, 2, 3), dtype=torch.int64))
    ids = torch.zeros((2, 3), dtype=torch.int64)
    with pytest.raises(
        ValueError,
        match=r"position_ids must have the shape of input_ids, \(2, 3\), got \(2, 4\)",
    ):
        rule.dropped(ids, torch.zeros((2, 4)))
    with pytest.raises(ValueError, match="attention_mask must have the shape"):
        rule.dropped(ids, attention_mask=torch.ones(3))
    with pytest.raises(ValueError, match="position_ids on meta; move one of them"):
        rule.dropped(ids, torch.zeros((2, 3), device="meta"))


def test_numpy_numbers_are_numbers():
    rule = Goldfish(
        k=np.int64(4),
        h=np.int32(8),
        seed=np.uint64(2**64 - 1),
        exempt=np.array([3, 1]),
        document_end=np.int8(2),
    )
    assert rule == Goldfish(k=4, h=8, seed=2**64 - 1, exempt=(1, 3), document_end=2)
    assert json.loads(json.dumps(rule.to_dict())) == rule.to_dict()
    assert json.dumps(Goldfish(k=np.float32(2.5)).to_dict()["k"]) == "2.5"


@pytest.mark.parametrize(
    ("k", "max_kept"), [(2, 2), (3, 3), (4, 4), (4, 9), (2.5, 3), (20, 60)]
)
def test_max_kept_drops_one_in_k_evenly(k, max_kept):
    """On contexts that never repeat. Even drops vary less than independent ones (4 sigma)."""
    ids = torch.randint(
        0, 2**31, (1, 100_000), generator=torch.Generator().manual_seed(0)
    )
    dropped = Goldfish(k=k, max_kept=max_kept).dropped(ids)[0, 1:]
    assert (
        abs(dropped.sum() - len(dropped) / k)
        < 4 * (len(dropped) / k * (1 - 1 / k)) ** 0.5
    )
    runs = (dropped.nonzero()[:, 0].diff() - 1).bincount(minlength=max_kept + 1)
    assert len(runs) == max_kept + 1, "the longest kept run is max_kept"
    shorter = (
        runs[:max_kept].double() / runs.sum()
    )  # a natural drop ends a run with its rate, however long it is
    natural = spec.natural_threshold(k, max_kept) / 2**32
    expected = torch.tensor(
        [natural * (1 - natural) ** n for n in range(max_kept)], dtype=torch.float64
    )
    assert ((shorter - expected).abs() < 4.5 * (expected / runs.sum()).sqrt()).all()


def test_every_strategy_has_a_function():
    assert {*_STRATEGIES, "reference"} == {*get_args(Strategy)}


DOCUMENTS = (13, 1, 21, 9)


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("strategy", ["hash", "static"])
def test_documents_are_found_whatever_their_first_position(strategy, first):
    rule = Goldfish(k=2, h=3, strategy=strategy)
    documents = torch.randint(0, 99, (44,)).split(DOCUMENTS)
    alone = torch.cat([rule.dropped(document) for document in documents])
    packed = torch.cat(documents)
    positions = torch.cat([torch.arange(first, first + n) for n in DOCUMENTS])
    assert torch.equal(rule.dropped(packed, positions), alone)
    # In a row of its own, with padding whose position is less than every other.
    padded = torch.cat([torch.zeros(3, dtype=torch.int64), packed])
    beside = torch.cat([torch.zeros(3, dtype=torch.int64), positions])
    mask = torch.tensor([0] * 3 + [1] * 44)
    assert torch.equal(rule.dropped(padded, beside, attention_mask=mask)[3:], alone)
    # Documents that begin at different positions, each lower than the one before.
    falling = torch.cat(
        [torch.arange(9 - 2 * i, 9 - 2 * i + n) for i, n in enumerate(DOCUMENTS)]
    )
    long = torch.cat([documents[i] for i in (0, 2, 3)])
    places = torch.cat([falling[:13], falling[14:35], falling[35:]])
    expected = torch.cat([rule.dropped(documents[i]) for i in (0, 2, 3)])
    assert torch.equal(rule.dropped(long, places), expected)


def test_an_attention_mask_can_number_documents():
    """As LLaMA-Factory's neat packing does."""
    rule = Goldfish(k=2, h=3, max_kept=3)
    documents = torch.randint(0, 99, (44,)).split(DOCUMENTS)
    alone = torch.cat([rule.dropped(document) for document in documents])
    numbers = torch.cat([torch.full((n,), i) for i, n in enumerate(DOCUMENTS, 1)])
    assert torch.equal(
        rule.dropped(torch.cat(documents), attention_mask=numbers), alone
    )
    assert torch.equal(
        rule.dropped(torch.cat(documents), attention_mask=-numbers), alone
    )


def test_a_list_can_be_an_attention_mask():
    ids = torch.arange(40)
    mask = [0] * 7 + [1] * 33
    expected = Goldfish(k=2).dropped(ids, attention_mask=torch.tensor(mask))
    assert torch.equal(Goldfish(k=2).dropped(ids, attention_mask=mask), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"h": 2**48}, r"h must be below 2\*\*48 \(the length of the context\), got"),
        ({"seed": 2**64}, r"seed must be below 2\*\*64"),
        ({"exempt": [2**70]}, r"every id in exempt must be below 2\*\*48"),
        ({"document_end": 2**64}, r"document_end must be below 2\*\*48"),
        ({"k": 10**400}, "k must be a finite number above 1"),
    ],
)
def test_numbers_that_no_tensor_takes(arguments, message):
    with pytest.raises(ValueError, match=message):
        Goldfish(**arguments)
    largest = Goldfish(h=2**48 - 1, exempt=[2**48 - 1], document_end=2**48 - 1)
    assert (
        largest.dropped(torch.arange(9)).tolist()
        == Goldfish().dropped(torch.arange(9)).tolist()
    )


def test_a_rule_is_shown_as_the_code_that_makes_it():
    """Copied into a script, it is equal: no number is rounded and no argument is left out."""
    for rule in (
        Goldfish(k=4, h=13, max_kept=4, secrets=r"code (\d+)"),
        Goldfish(k=10 / 3, secrets="it's \\d", seed=2**63),
        Goldfish(k=1234567.25, h=5, window="inclusive", exempt=(1, 2), document_end=0),
        Goldfish(k=2, strategy="letters", opening="keep", secrets="\x1b\\d\u202e'"),
        Goldfish(k=2, strategy="entropy", guide="0" * 16),
    ):
        code = str(rule)
        assert code.isprintable()
        assert eval(code, {"Goldfish": Goldfish}) == rule
    assert repr(Goldfish(k=4.0)) == "Goldfish(k=4, h=13)"
