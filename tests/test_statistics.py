"""On real text a rule drops like a coin with probability 1/k: rates, runs, seeds, and no two
windows with one key.

The text is the language reference that comes with Python. Repeated contexts are decided alike,
which is the point of the rule, so they are no independent draws: everything here counts each
distinct context once. Then the number of drops is binomial, and a bound of 4 sigma fails by chance
once in 16,000 times.
"""

import re
from itertools import combinations
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from goldfish import Goldfish, spec
from goldfish.letters import Vocabulary

KS = (2, 3, 4, 8, 16, 32, 64, 128)
HS = (1, 2, 4, 8, 13, 32, 64)
TEXTS = [topics[name] for name in sorted(topics)]
# of every test with a p-value; the text and the rules are fixed, so it passes always or never
ALPHA = 1e-3


class Corpus(NamedTuple):
    ids: Tensor  # int64 (T,), documents one after the other
    positions: Tensor  # int64 (T,), 0 where a document starts
    vocabulary: Vocabulary | None = None
    before: tuple[
        tuple[str, int], ...
    ] = ()  # of every token its document's letters, and how many of them precede it

    def dropped(self, **options) -> np.ndarray:
        return (
            Goldfish(**options, vocabulary=self.vocabulary)
            .dropped(self.ids, self.positions)
            .numpy()
        )

    def first(self, h: int) -> np.ndarray:
        """Where each distinct context of up to h tokens (or 5 h letters) stands for the first time,
        in order.
        """
        if self.before:
            seen: dict[str, int] = {}
            for place, (letters, end) in enumerate(self.before):
                if end > 0:
                    seen.setdefault(letters[max(0, end - 5 * h) : end], place)
            return np.array([*seen.values()])
        keys = Goldfish(h=h).drops_and_keys(self.ids, self.positions)[1].numpy()
        places = np.unique(keys, return_index=True)[1]
        return np.sort(places[self.positions.numpy()[places] > 0])


def pack(documents: list[list[int]]) -> Corpus:
    ids = torch.tensor([i for document in documents for i in document])
    return Corpus(
        ids, torch.cat([torch.arange(len(document)) for document in documents])
    )


def pack_text(documents: list[list[str]]) -> Corpus:
    """An id for each distinct piece of text."""
    number: dict[str, int] = {}
    packed = pack(
        [
            [number.setdefault(piece, len(number)) for piece in document]
            for document in documents
        ]
    )
    before: list[tuple[str, int]] = []
    for document in documents:
        letters = "".join(document).replace(" ", "")
        ends = np.cumsum([0, *(len(piece.strip()) for piece in document)])[:-1]
        before += [(letters, int(end)) for end in ends]
    return packed._replace(
        vocabulary=Vocabulary([piece.encode() for piece in number]),
        before=tuple(before),
    )


@pytest.fixture(scope="module")
def corpora() -> dict[str, Corpus]:
    """Ids of a byte-level BPE; one id for each of the text's words and marks; pieces of up
    to three letters for "letters"."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=6000, initial_alphabet=alphabet, show_progress=False
        ),
    )
    words: dict[str, int] = {}
    # word number n has the id n * 16381 modulo a prime: a large vocabulary, ids all over it
    spread = 131_071
    pieces = [re.findall(r"\w+|[^\w\s]|\s+", text) for text in TEXTS]
    plain = [
        [f" {word}" for word in re.findall("[a-z0-9]+", text.lower())] for text in TEXTS
    ]
    number = [
        [words.setdefault(w, len(words)) * 16_381 % spread for w in document]
        for document in pieces
    ]
    return {
        "BPE": pack([bpe.encode(text).ids for text in TEXTS]),
        "large vocabulary": pack(number),
        "letters": pack_text(
            [
                re.findall(" ?[a-z0-9]{1,3}", "".join(document))
                for document in plain[:200]
            ]
        ),
    }


IDS = ("BPE", "large vocabulary")
NAMES = (*IDS, "letters")


def strategy(name: str) -> str:
    return "hash" if name in IDS else name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("h", HS)
def test_one_distinct_context_in_k_is_dropped(corpora, name, h):
    corpus = corpora[name]
    first = corpus.first(h)
    for k in KS:
        drops, n = (
            corpus.dropped(k=k, h=h, strategy=strategy(name))[first].sum(),
            len(first),
        )
        assert abs(drops - n / k) < 4 * (n / k * (1 - 1 / k)) ** 0.5, (k, n)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("k", "h"), [(4, 13), (3, 4), (8, 32), (2, 2)])
def test_undropped_runs_have_geometric_lengths(corpora, name, k, h):
    """A run ends after each token with probability 1/k, however long it has become."""
    corpus = corpora[name]
    dropped = corpus.dropped(k=k, h=h, strategy=strategy(name))[
        corpus.first(h)
    ]  # a text without repeats
    runs = np.diff(np.flatnonzero(dropped)) - 1
    law = stats.geom(1 / k, loc=-1)
    longest = int(
        law.isf(10 / len(runs))
    )  # at least ten runs are expected to be longer
    observed = [
        *(np.sum(runs == n) for n in range(longest + 1)),
        np.sum(runs > longest),
    ]
    expected = [*(law.pmf(range(longest + 1))), law.sf(longest)] * np.array(len(runs))
    assert longest > k
    assert stats.chisquare(observed, expected).pvalue > ALPHA
    # And the longest of all is what the law says, up to one chance in a thousand on either side.
    assert law.cdf(runs.max()) ** len(runs) > ALPHA
    assert 1 - law.cdf(runs.max() - 1) ** len(runs) > ALPHA


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("h", [1, 4, 13, 64])
def test_distinct_windows_have_distinct_keys(corpora, name, h):
    corpus = corpora[name]
    keys = Goldfish(h=h).drops_and_keys(corpus.ids, corpus.positions)[1].tolist()
    ids, positions = corpus.ids.tolist(), corpus.positions.tolist()
    windows = {}
    for i, (key, offset) in enumerate(zip(keys, positions, strict=True)):
        window = tuple(ids[i - min(h, offset) : i])
        assert windows.setdefault(window, key) == key
    assert len(windows) > 2000
    assert len(set(windows.values())) == len(windows)


@pytest.mark.parametrize("name", IDS)
def test_keys_are_uniform_in_every_bit(corpora, name):
    corpus = corpora[name]
    keys = (
        Goldfish(h=4)
        .drops_and_keys(corpus.ids, corpus.positions)[1]
        .numpy()
        .view(np.uint64)[corpus.first(4)]
    )
    sigma = len(keys) ** -0.5 / 2
    for bit in range(64):
        assert (
            abs(((keys >> np.uint64(bit)) & np.uint64(1)).mean() - 0.5) < 4.5 * sigma
        ), bit
    assert (
        stats.chisquare(
            np.bincount((keys >> np.uint64(54)).astype(int), minlength=1024)
        ).pvalue
        > ALPHA
    )


@pytest.mark.parametrize("name", NAMES)
def test_seeds_are_uncorrelated(corpora, name):
    """Neighbours, single bits and both ends; all pairs together are chi-square, and no pair stands
    out.
    """
    corpus, k = corpora[name], 3
    first = corpus.first(4)
    seeds = (0, 1, 2, 3, 4, 1000, 2**31, 2**32, 2**63, 2**64 - 2, 2**64 - 1)
    centred = [
        corpus.dropped(k=k, h=4, seed=s, strategy=strategy(name))[first] - 1 / k
        for s in seeds
    ]
    scores = [
        np.dot(a, b) / (len(first) ** 0.5 * (1 - 1 / k) / k)
        for a, b in combinations(centred, 2)
    ]
    assert max(map(abs, scores)) < 4.5
    assert ALPHA < stats.chi2(len(scores)).cdf(np.square(scores).sum()) < 1 - ALPHA


def test_neighbouring_decisions_are_uncorrelated(corpora):
    """Windows that share all but one token decide as if they shared nothing."""
    for name in NAMES:
        corpus, k = corpora[name], 4
        first = corpus.first(13)
        centred = corpus.dropped(k=k, h=13, strategy=strategy(name))[first] - 1 / k
        for lag in range(1, 20):
            n = len(first) - lag
            assert (
                abs(np.dot(centred[lag:], centred[:-lag]))
                < 4.5 * n**0.5 * (1 - 1 / k) / k
            ), (
                name,
                lag,
            )


def test_the_reference_fails_these_tests(corpora):
    """The same figures of the original at h = 50: products of many ids are multiples of 2**64, and
    decided alike.
    """
    corpus, k, h = corpora["large vocabulary"], 50, 50
    ids = corpus.ids.tolist()
    keys = {}
    for i in range(h, len(ids)):
        window = tuple(ids[i - h + 1 : i + 1])
        keys[window] = spec._reference_key(list(window))
    values = list(keys.values())
    assert values.count(0) > 0.1 * len(values)
    assert len(set(values)) < 0.9 * len(values)
    dropped = (
        Goldfish(k=k, h=h, strategy="reference")
        .dropped(corpus.ids)
        .numpy()[corpus.first(h)]
    )
    n = len(dropped)
    assert abs(dropped.sum() - n / k) > 4 * (n / k * (1 - 1 / k)) ** 0.5
