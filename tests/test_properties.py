"""What holds for every rule and every text: hypothesis looks for a counterexample.

The examples are the same in every run.
"""

import os
import random
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from goldfish import Goldfish, spec
from goldfish.letters import Vocabulary
from goldfish.vocabulary import characters

settings.register_profile(
    "stable", derandomize=True, deadline=None, max_examples=60, database=None
)
stable = settings.get_profile("stable")

# A small vocabulary with all that makes letters hard: separators of one and several bytes, parts of
# characters, scripts without spaces, words with and without their space, letters that fold to more.
ENTRIES = [
    b" ",
    b"\n",
    b".",
    b"a",
    b"b",
    b" word",
    b" Word",
    b"two words",
    b"end ",
    b", x",
    b"\xc3",
    b"\xa9",
    b"\xc2",
    b"\xa0",
    b"\xe3\x80",
    b"\x80",
    b"\xe6\x88",
    b"\x91\xe4\xbb",
    b"\xac",
    "我们".encode(),
    "ß".encode(),
    "ﬁ".encode(),
    b"\xff",
    b"e\xcc\x81",
]
SEPARATOR = 0
VOCABULARY = Vocabulary(ENTRIES)

TOKEN = st.integers(0, len(ENTRIES) - 1)
DOCUMENT = st.lists(TOKEN, min_size=1, max_size=40)
SEEDS = st.sampled_from([0, 1, 2**64 - 1])


@st.composite
def rules(draw, strategies=("hash", "letters", "static"), **fixed) -> Goldfish:
    strategy = draw(st.sampled_from(strategies))
    options = {
        "k": draw(st.sampled_from([1.5, 2, 2.5, 4])),
        "h": draw(st.sampled_from([1, 2, 3, 13])),
        "seed": draw(SEEDS),
        "opening": draw(st.sampled_from(["short", "keep"])),
        "window": "preceding"
        if strategy == "letters"
        else draw(st.sampled_from(["preceding", "inclusive"])),
        "exempt": draw(st.sampled_from([(), (3, 5)])),
    }
    options |= fixed
    if (
        strategy in ("hash", "letters")
        and "max_kept" not in options
        and draw(st.booleans())
    ):
        options |= {"max_kept": draw(st.sampled_from([4, 5, 9])), "opening": "short"}
    return Goldfish(strategy=strategy, vocabulary=VOCABULARY, **options)


# No match has a space in it: the separator behind a document is part of its text.
SECRET = r"a(\S+)|word\S|[^\x00-\x7f]"
WITH_SECRETS = rules() | rules(secrets=SECRET)


def decide(rule: Goldfish, ids: list[int], **beside) -> list[bool]:
    beside = {
        name: torch.tensor(values, dtype=torch.int64) for name, values in beside.items()
    }
    return rule.dropped(torch.tensor(ids, dtype=torch.int64), **beside).tolist()


def natural_drops(rule: Goldfish, document: list[int]) -> list[bool]:
    """What a rule with max_kept drops by its hash: the keys below its own threshold."""
    plain = replace(rule, max_kept=None)
    plain._set(_limit=spec.natural_threshold(rule.k, rule.max_kept))
    return decide(plain, document)


def settled(rule: Goldfish, passage: list[int]) -> int:
    """From which token of a passage on its decisions do not depend on what comes before it."""
    if (
        rule.max_kept is not None
    ):  # from its first natural drop, which depends on its context alone
        begin = settled(replace(rule, max_kept=None), passage)
        natural = natural_drops(rule, passage)
        return next(
            (i for i in range(max(begin, 1), len(passage)) if natural[i]), len(passage)
        )
    if rule.strategy == "hash":
        return rule.h
    texts = [[ENTRIES[i] for i in passage[: i + 1]] for i in range(len(passage))]
    counts = [len(spec.letters_of(text[:-1], characters())) for text in texts]
    return next(
        (i for i, count in enumerate(counts) if count >= spec.LETTERS * rule.h),
        len(passage),
    )


# --- where a passage occurs


@stable
@given(
    rule=rules(("hash", "letters")),
    before=DOCUMENT,
    other=DOCUMENT,
    passage=DOCUMENT,
    after=DOCUMENT,
)
def test_a_passage_keeps_its_decisions_wherever_it_occurs(
    rule, before, other, passage, after
):
    """The passage begins with a separator, or its first bytes might complete another character."""
    passage = [SEPARATOR, *passage]
    begin = settled(rule, passage)
    alone = decide(rule, passage)[begin:]
    for context in (before, other, [], before + other):
        moved = decide(rule, context + passage + after)[
            len(context) + begin : len(context) + len(passage)
        ]
        if context or begin:  # a document's first token is never dropped
            assert moved == alone


@stable
@given(rule=rules(), ids=DOCUMENT, more=DOCUMENT)
def test_later_tokens_never_change_a_decision(rule, ids, more):
    assert decide(rule, ids + more)[: len(ids)] == decide(rule, ids)


@stable
@given(
    rule=rules(("hash", "letters"), window="preceding", exempt=()),
    ids=DOCUMENT,
    other=TOKEN,
    data=st.data(),
)
def test_a_token_has_no_part_in_its_own_decision(rule, ids, other, data):
    place = data.draw(st.integers(0, len(ids) - 1))
    changed = [*ids[:place], other, *ids[place + 1 :]]
    assert decide(rule, changed)[: place + 1] == decide(rule, ids)[: place + 1]


def test_an_inclusive_window_sees_its_target():
    """The same property fails where it should: the test above can fail."""
    rule = Goldfish(k=2, h=3, window="inclusive")
    assert len({decide(rule, [1, 2, 3, target])[3] for target in range(20)}) == 2


# --- max_kept


@stable
@given(
    rule=rules(("hash", "letters")),
    max_kept=st.integers(4, 9),
    documents=st.lists(
        st.lists(TOKEN, min_size=20, max_size=40), min_size=1, max_size=3
    ),
)
def test_never_more_than_max_kept_targets_in_a_row(rule, documents, max_kept):
    """In every document, from start to end; exempt ids are not counted. Natural drops stay."""
    rule = replace(rule, max_kept=max_kept, opening="short")
    dropped = iter(
        decide(
            rule,
            [*chain(*documents)],
            position_ids=[i for d in documents for i in range(len(d))],
        )
    )
    for document in documents:
        drops = [next(dropped) for _ in document]
        assert all(
            drop
            for drop, needed in zip(drops, natural_drops(rule, document), strict=True)
            if needed
        )
        targets = [
            drop
            for i, drop in zip(document[1:], drops[1:], strict=True)
            if i not in rule.exempt
        ]
        runs = "".join("01"[drop] for drop in targets).split("1")
        assert max(map(len, runs)) <= max_kept
        assert not any(
            drop for i, drop in zip(document, drops, strict=True) if i in rule.exempt
        )


# --- batches


@stable
@given(
    rule=WITH_SECRETS,
    documents=st.lists(DOCUMENT, min_size=1, max_size=4),
    end=st.integers(len(ENTRIES), 99),
)
def test_packed_is_alone(rule, documents, end):
    alone = [decide(rule, document) for document in documents]
    packed = [*chain(*documents)]
    positions = [i for document in documents for i in range(len(document))]
    assert decide(rule, packed, position_ids=positions) == [*chain(*alone)]
    # The same with a separator after each document, which belongs to the document that it ends.
    ended = decide(
        replace(rule, document_end=end),
        [i for document in documents for i in (*document, end)],
    )
    for document, expected in zip(documents, alone, strict=True):
        assert ended[: len(document)] == expected
        ended = ended[len(document) + 1 :]


@stable
@given(
    rule=WITH_SECRETS,
    ids=DOCUMENT,
    pad=TOKEN,
    left=st.integers(0, 5),
    right=st.integers(0, 5),
    packed=st.booleans(),
    data=st.data(),
)
def test_padding_changes_nothing(rule, ids, pad, left, right, packed, data):
    """Left, right and between: padding ends nothing and shifts nothing, even with position 0."""
    positions = [i % 11 for i in range(len(ids))]
    expected = decide(rule, ids, **({"position_ids": positions} if packed else {}))
    place = data.draw(st.integers(0, len(ids)))
    for before, between, after in (
        (left, 0, 0),
        (0, 0, right),
        (left, 0, right),
        (left, 3, right),
    ):

        def padded(values, value, before=before, between=between, after=after):
            return (
                [value] * before
                + values[:place]
                + [value] * between
                + values[place:]
                + [value] * after
            )

        beside = {"attention_mask": padded([1] * len(ids), 0)}
        if packed:
            beside["position_ids"] = padded(positions, 0)
        assert decide(rule, padded(ids, pad), **beside) == padded(expected, False)


@stable
@given(
    rule=WITH_SECRETS,
    documents=st.lists(DOCUMENT, min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
)
def test_the_rest_of_the_batch_changes_nothing(rule, documents, order):
    length = max(map(len, documents))
    ids = torch.tensor(
        [document + [0] * (length - len(document)) for document in documents]
    )
    attended = torch.tensor([[1] * len(d) + [0] * (length - len(d)) for d in documents])
    rows = list(range(len(documents)))
    order.shuffle(rows)
    dropped = rule.dropped(ids[rows], attention_mask=attended[rows])
    for place, row in enumerate(rows):
        document = documents[row]
        assert dropped[place].tolist() == decide(rule, document) + [False] * (
            length - len(document)
        )


@stable
@given(rule=rules(max_kept=None), ids=DOCUMENT, exempt=st.sets(TOKEN))
def test_exempt_ids_are_kept_and_are_context(rule, ids, exempt):
    dropped = decide(replace(rule, exempt=()), ids)
    assert decide(replace(rule, exempt=tuple(exempt)), ids) == [
        d and i not in exempt for d, i in zip(dropped, ids, strict=True)
    ]


@stable
@given(rule=rules(), ids=st.lists(DOCUMENT, min_size=2, max_size=2))
def test_dtype_and_memory_layout_change_nothing(rule, ids):
    length = min(map(len, ids))
    tensor = torch.tensor([row[:length] for row in ids])
    expected = rule.dropped(tensor)
    wide = torch.zeros(4, 3 * length, dtype=torch.int64)
    wide[::2, 1::3] = tensor
    for same in (
        tensor.to(torch.int32),
        tensor.to(torch.int16),
        tensor.T.contiguous().T,
        wide[::2, 1::3],
    ):
        assert torch.equal(rule.dropped(same), expected)
        assert torch.equal(rule.dropped(same[1]), expected[1])


# --- seeds


@pytest.mark.parametrize("strategy", ["hash", "letters"])
def test_every_bit_of_the_seed_counts(strategy):
    """With another seed half of the decisions of k = 2 differ, whichever bit was flipped."""
    pick = random.Random(0)
    if (
        strategy == "hash"
    ):  # contexts that do not repeat, so that decisions are independent
        ids, places = pick.choices(range(10**6), k=2000), torch.arange(20, 2000)
    else:
        ids = [i for _ in range(2000) for i in (SEPARATOR, *pick.choices((3, 4), k=8))]
        places = torch.arange(1, len(ids), 9)[
            20:
        ]  # one decision a word of eight letters
    base = torch.tensor(
        decide(Goldfish(k=2, strategy=strategy, vocabulary=VOCABULARY), ids)
    )
    for bit in range(64):
        other = torch.tensor(
            decide(
                Goldfish(k=2, seed=1 << bit, strategy=strategy, vocabulary=VOCABULARY),
                ids,
            )
        )
        share = (base != other)[places].float().mean().item()
        assert abs(share - 0.5) < 4.5 * (0.25 / len(places)) ** 0.5, bit


# --- compilers, workers, threads, processes


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, len(ENTRIES), (4, 300), generator=generator)
    positions = torch.arange(300).remainder(123).expand(4, -1)
    return ids, positions, (torch.rand(4, 300, generator=generator) < 0.9).long()


RULES = {
    "hash": Goldfish(k=3, h=5, exempt=(3,), document_end=7, max_kept=4),
    "letters": Goldfish(
        k=3,
        h=3,
        strategy="letters",
        exempt=(3,),
        document_end=7,
        max_kept=3,
        vocabulary=VOCABULARY,
    ),
    "static": Goldfish(k=2.5, strategy="static", document_end=7),
}


@pytest.mark.parametrize(
    ("strategy", "backend"),
    # Half a minute of C++ compiler, so only for the rule with the most to compile.
    [
        *((strategy, "aot_eager") for strategy in RULES),
        pytest.param("letters", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_is_eager(strategy, backend):
    rule, (ids, positions, attended) = RULES[strategy], batch()
    torch._dynamo.reset()

    def dropped(ids, positions, attended):
        return rule.dropped(ids, positions, attention_mask=attended)

    compiled = torch.compile(dropped, fullgraph=True, backend=backend)
    assert torch.equal(
        compiled(ids, positions, attended), dropped(ids, positions, attended)
    )


class Decisions(torch.utils.data.Dataset):
    """A row's decisions, taken wherever the row is read."""

    def __init__(self, rule: Goldfish) -> None:
        self.rule, (self.ids, *_) = rule, batch()

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> Tensor:
        return self.rule.dropped(self.ids.roll(i)[i % 4])


@pytest.mark.filterwarnings(
    "ignore:This DataLoader will create 8 worker processes:UserWarning"
)
@pytest.mark.parametrize("strategy", RULES)
def test_dataloader_workers_decide_the_same(strategy):
    dataset = Decisions(RULES[strategy])
    expected = torch.stack([dataset[i] for i in range(len(dataset))])
    assert 0.2 < expected.float().mean() < 0.5
    for workers in (0, 1, *([8] if strategy == "letters" else [])):
        assert torch.equal(
            torch.cat([*DataLoader(dataset, batch_size=4, num_workers=workers)]),
            expected,
        )


RANK = """
import os, sys, torch, torch.distributed as dist
from goldfish import Goldfish
from goldfish.letters import Vocabulary
rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1 + rank)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
# More elements than torch gives to one thread.
ids = torch.arange(8 * 9000).reshape(8, 9000) ** 2 % 251
vocabulary = Vocabulary([bytes([i]) for i in range(256)])
for strategy in ("hash", "letters", "static"):
    rule = Goldfish(strategy=strategy, vocabulary=vocabulary)
    shares = [torch.empty(4, 9000, dtype=torch.uint8) for _ in range(2)]
    dist.all_gather(shares, rule.dropped(ids[rank::2]).to(torch.uint8))
    together = torch.stack(shares, 1).reshape(8, 9000).bool()
    assert torch.equal(together, rule.dropped(ids)), strategy
    assert 0 < together.float().mean() < 0.5
    print(strategy, "".join(map(str, together[:, ::100].int().flatten().tolist())))
sys.stdout.flush()
os._exit(0)  # as in launch.py: a thread of gloo may abort Python's finalization
"""


def test_two_processes_with_other_thread_counts_decide_the_same(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    environment.pop("OMP_NUM_THREADS", None)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    answers = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    ids = torch.arange(8 * 9000).reshape(8, 9000) ** 2 % 251
    here = Goldfish().dropped(ids)[:, ::100].int().flatten().tolist()
    assert answers[0][0].splitlines()[0] == "hash " + "".join(map(str, here))
