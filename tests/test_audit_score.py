"""Scores against the model's own forward and generate, one prefix at a time, and by hand."""

import types
from dataclasses import fields

import numpy as np
import pytest
import torch
from helpers import BEFORE_5, tiny_llama
from toy_models import ARCHITECTURES, SIZES, VOCABULARY, toy_model
from transformers import LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from goldfish.audit import model as model_module
from goldfish.audit import score as score_module
from goldfish.audit.model import cache_tokens
from goldfish.audit.score import Sampling, Scorer
from goldfish.audit.windows import Window, first_divergence

pytestmark = pytest.mark.core
PREFIX, SUFFIX = 11, 9


def generated(model, prefix, tokens=SUFFIX, **options):
    """What a user gets who asks at batch size 1."""
    ids = torch.tensor([prefix])
    options = {
        "do_sample": False,
        "pad_token_id": 0,
        "max_new_tokens": tokens,
        **options,
    }
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[
        0, len(prefix) :
    ].tolist()


def asked(model=None, count=8, prefix=PREFIX, suffix=SUFFIX):
    """Random windows; with a model, every second one recites it for a while, every fourth one to
    the end.
    """
    draw = torch.Generator().manual_seed(1)
    rows = torch.randint(
        2, VOCABULARY, (count, prefix + suffix), generator=draw
    ).tolist()
    if model is not None:
        for i in range(0, count, 2):
            own = generated(model, rows[i][:prefix], suffix)
            end = suffix if i % 4 == 0 else 1 + i % (suffix - 1)
            rows[i][prefix : prefix + end] = own[:end]
    return [Window("members", i, f"doc {i}", row, prefix) for i, row in enumerate(rows)]


def same(a, b):
    return all(
        np.array_equal(getattr(a, field.name), getattr(b, field.name))
        for field in fields(a)
    )


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_output_equals_generate_at_batch_1(kind):
    model = toy_model(kind)
    windows = asked(model, 12)
    found = Scorer(model).score(windows)
    outputs = [generated(model, window.ids[:PREFIX]) for window in windows]
    assert [score.output for score in found] == outputs
    assert (
        sum(
            output == window.suffix
            for output, window in zip(outputs, windows, strict=True)
        )
        >= 3
    )
    assert BEFORE_5 or not any(
        score.settled for score in found
    )  # its batches round otherwise


@pytest.mark.parametrize(
    ("budget", "sizes"), [(1, [1] * 57), (25, [6] * 3 + [1]), (160, [40, 17])]
)
def test_logits_come_in_parts_and_are_the_models_own(budget, sizes, monkeypatch):
    """budget: rows of logits alive at a time; several positions of a row, or several rows."""
    monkeypatch.setitem(model_module.LOGITS_BUDGET, "cpu", 4 * VOCABULARY * budget)
    model, ids = (
        toy_model("gemma2"),
        torch.tensor([window.ids for window in asked(count=3)]),
    )
    with torch.inference_mode():
        expected = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        parts = list(model_module.logits_of(model, ids, None))
    assert torch.allclose(
        torch.cat([logits for _, logits in parts]), expected, rtol=0, atol=1e-5
    )
    assert torch.cat([torch.arange(57)[rows] for rows, _ in parts]).tolist() == list(
        range(57)
    )
    assert [len(logits) for _, logits in parts][: len(sizes)] == sizes


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_arrays_token_by_token(kind):
    """Against double-precision formulas on the logits of each prefix alone."""
    model, window = toy_model(kind), asked(count=1)[0]
    (found,) = Scorer(model).score([window])
    for t in range(PREFIX + SUFFIX - 1):
        with torch.inference_mode():
            logits = (
                model(input_ids=torch.tensor([window.ids[: t + 1]]))
                .logits[0, -1]
                .double()
            )
        log_p, target = logits.log_softmax(-1), window.ids[t + 1]
        mean = sum(
            p * log for p, log in zip(log_p.exp().tolist(), log_p.tolist(), strict=True)
        )
        square = sum(
            p * log * log
            for p, log in zip(log_p.exp().tolist(), log_p.tolist(), strict=True)
        )
        order = logits.sort(descending=True)
        assert found.greedy[t] == order.indices[0]
        assert found.rank[t] == order.indices.tolist().index(target)
        assert found.nll[t] == pytest.approx(-log_p[target].item(), rel=1e-5)
        assert found.entropy_mean[t] == pytest.approx(mean, rel=1e-5)
        assert found.entropy_std[t] == pytest.approx(
            (square - mean**2) ** 0.5, rel=1e-4
        )
    kinds = {"greedy": "int64", "rank": "int64"}
    for name in ("greedy", "nll", "rank", "entropy_mean", "entropy_std"):
        column = getattr(found, name)
        assert (column.dtype, column.shape) == (
            kinds.get(name, "float32"),
            (PREFIX + SUFFIX - 1,),
        )


def test_windows_of_any_length_and_batch_agree(model, monkeypatch):
    """Padding on the right is seen by no token; every window alone gives the same answers."""
    windows = [
        *asked(model, 6),
        *asked(model, 3, prefix=5, suffix=3),
        *asked(model, 2, prefix=20, suffix=1),
    ]
    together = Scorer(model).score(windows)
    monkeypatch.setitem(score_module.PASS_TOKENS, "cpu", 1)
    monkeypatch.setitem(score_module.SEARCH_TOKENS, "cpu", 1)
    for window, one, all_ in zip(
        windows, Scorer(model).score(windows), together, strict=True
    ):
        assert one.output == all_.output
        assert np.array_equal(one.rank, all_.rank)
        assert np.allclose(one.nll, all_.nll, rtol=1e-5)
        assert all_.nll.shape == (len(window.ids) - 1,)
        assert all_.log_q.shape == (1, len(window.suffix))
    assert Scorer(model).score([]) == []


def test_generation_settings_of_the_checkpoint_are_ignored_and_restored(model):
    windows = asked(model)
    plain = Scorer(model).score(windows)
    settings = model.generation_config
    (
        settings.repetition_penalty,
        settings.no_repeat_ngram_size,
        settings.min_new_tokens,
    ) = 5.0, 2, 3
    settings.eos_token_id, settings.bos_token_id, settings.num_beams = (
        plain[1].output[0],
        3,
        4,
    )
    assert all(map(same, Scorer(model).score(windows), plain))
    assert model.generation_config is settings


def test_outputs_go_on_through_an_eos(model):
    """Up to the EOS they are what generate says with its EOS; BOS ids in the text change
    nothing.
    """
    window = asked(model)[1]
    window.ids[0] = 3
    plain = generated(model, window.ids[:PREFIX])
    model.generation_config.eos_token_id, model.generation_config.bos_token_id = (
        plain[2],
        3,
    )
    (found,) = Scorer(model).score([window])
    stopped = generated(model, window.ids[:PREFIX])
    assert found.output == plain
    assert len(stopped) <= 3
    assert found.output[: len(stopped)] == stopped


def test_ties_are_settled_as_generate_settles_them():
    """Every entry of the vocabulary has a twin with the same logit, so that every margin is 0."""
    model = toy_model("llama")
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight[VOCABULARY // 2 :] = weight[: VOCABULARY // 2]
    windows = asked(model)
    found = Scorer(model).score(windows)
    assert all(score.settled for score in found)
    for window, score in zip(windows, found, strict=True):
        assert score.output == generated(model, window.ids[:PREFIX])
        agree = np.array(score.output) == window.suffix
        until = SUFFIX if agree.all() else int(agree.argmin()) + 1
        assert score.greedy[PREFIX - 1 :][:until].tolist() == score.output[:until]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sixteen_bits_agree_with_generate_up_to_the_divergence(kind, dtype):
    """A row whose target is far from the largest logit is not ambiguous, however close the two
    largest are: every second window here."""
    model = toy_model(kind, dtype)
    windows = asked(model, 40)
    found = Scorer(model).score(windows)
    assert any(score.settled for score in found)
    assert not any(score.settled for score in found[1::2])
    assert_first_divergences_of_generate(model, windows, found)


def assert_first_divergences_of_generate(model, windows, found):
    """Row by row; if it was settled, also the token at which the output leaves the suffix."""
    for window, score in zip(windows, found, strict=True):
        truth = generated(model, window.ids[:PREFIX])
        until = first_divergence(truth, window.suffix)
        assert first_divergence(score.output, window.suffix) == until
        until += score.settled
        assert score.output[:until] == truth[:until]
        predicted = score.greedy[PREFIX - 1 :].tolist()
        assert predicted[:until] == truth[:until]
        assert len(score.output) == SUFFIX


class Batched(LlamaForCausalLM):
    """Its logits in a batch are up to 2% away from those of one row; it counts its calls."""

    calls = 0

    def forward(self, input_ids=None, **options):
        output = super().forward(input_ids=input_ids, **options)
        if len(input_ids) == 1:
            self.calls += 1
            return output
        draw = torch.Generator().manual_seed(int(input_ids[0, -1]))
        noise = torch.rand(output.logits.shape, generator=draw) * 0.04 - 0.02
        output.logits *= 1 + noise
        return output


def batched_model():
    model = toy_model("llama", torch.bfloat16)
    model.__class__ = Batched
    return model


def test_what_a_batch_would_decide_otherwise_is_decided_at_batch_size_1(monkeypatch):
    model = batched_model()
    windows = asked(model, 60)
    assert_first_divergences_of_generate(model, windows, Scorer(model).score(windows))
    # The same without settling.
    monkeypatch.setitem(score_module.AMBIGUOUS, torch.bfloat16, 0.0)
    with pytest.raises(AssertionError):
        assert_first_divergences_of_generate(
            model, windows, Scorer(model).score(windows)
        )


def test_settling_ends_at_the_first_divergence():
    """The suffixes have one token that the model would not choose, and go on as it would."""
    model = batched_model()
    windows = []
    for i, window in enumerate(asked(model, 16)):
        prefix = window.ids[:PREFIX]
        own = generated(model, prefix, 1 + i % 4)
        ids = [*prefix, *own[:-1], (own[-1] + 1) % VOCABULARY]
        ids += generated(model, ids, PREFIX + SUFFIX - len(ids))
        windows.append(Window("members", i, "", ids, PREFIX))
    model.calls = 0
    found = Scorer(model).score(windows)
    assert [
        first_divergence(score.output, window.suffix)
        for score, window in zip(found, windows, strict=True)
    ] == [0, 1, 2, 3] * 4
    settled = [1 + i % 4 for i, score in enumerate(found) if score.settled]
    assert 0 < model.calls <= sum(settled)


def test_batches_are_halved_when_memory_runs_out(model, monkeypatch, caplog):
    """Until they fit; said once. A single row that does not fit is an error."""
    windows = asked(model, 12)
    expected, tried = Scorer(model).score(windows), []
    forward = type(model).forward

    def limited(self, input_ids, **options):
        tried.append(input_ids.numel())
        if input_ids.numel() > limit:
            raise torch.OutOfMemoryError
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(type(model), "forward", limited)
    limit = 70
    scorer = Scorer(model)
    assert all(map(same_answers, scorer.score(windows), expected))
    assert max(tried) == 12 * 20
    assert (
        len([record for record in caplog.records if "Out of memory" in record.message])
        == 1
    )
    tried.clear()
    scorer.score(windows)
    assert max(tried) <= limit, "the next block begins where this one ended"
    limit = 19
    with pytest.raises(torch.OutOfMemoryError):
        scorer.score(windows)


def same_answers(a, b):
    return a.output == b.output and np.allclose(a.nll, b.nll, rtol=1e-5)


def test_the_search_takes_no_more_than_half_of_the_free_memory(model, monkeypatch):
    """Keys and values of two layers, two heads of eight numbers, four bytes each: 256 bytes a
    token.
    """
    free = types.SimpleNamespace(available=1000 * 2 * 256)
    monkeypatch.setattr(model_module.psutil, "virtual_memory", lambda: free)
    assert cache_tokens(model, 10**6) == 1000
    assert cache_tokens(model, 77) == 77
    assert cache_tokens(toy_model("mamba"), 77) == 77
    assert Scorer(model)._search_tokens == 1000
    assert Scorer(model, batch_tokens=50)._search_tokens == 50


SETTINGS = [
    Sampling(),
    Sampling(0.5),
    Sampling(1.7),
    Sampling(top_k=1),
    Sampling(top_k=7),
    Sampling(top_k=10**6),
    Sampling(top_p=0.3),
    Sampling(top_p=1e-9),
    Sampling(top_p=1.0),
    Sampling(0.7, 12, 0.8),
    Sampling(2.0, 40, 0.95),
]


def drawn_from(row, sampling):
    """The log-probabilities that a token is drawn with, by hand and in double precision: (V,)."""
    row = np.asarray(row, dtype=np.float64) / sampling.temperature
    order = np.argsort(row)
    if sampling.top_k is not None:
        row = np.where(row < row[order[-min(sampling.top_k, len(row))]], -np.inf, row)
    p = np.exp(row - row.max())
    p /= p.sum()
    if (
        sampling.top_p is not None
    ):  # the least probable go, as long as all that goes is at most 1 - top_p
        p[order[:-1][np.cumsum(p[order])[:-1] <= 1 - sampling.top_p]] = 0
    with np.errstate(divide="ignore"):
        return np.log(p / p.sum())


def test_log_q_by_hand():
    model = toy_model("llama")
    windows = asked(model)
    found = Scorer(model, SETTINGS).score(windows)
    cut = 0
    for window, score in zip(windows, found, strict=True):
        ids = torch.tensor([window.ids])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, PREFIX - 1 : -1].float()
        for row, sampling in zip(score.log_q, SETTINGS, strict=True):
            expected = [
                drawn_from(each, sampling)[target]
                for each, target in zip(logits, window.suffix, strict=True)
            ]
            assert row.dtype == np.float32
            assert np.array_equal(np.isneginf(row), np.isneginf(expected))
            assert np.allclose(row, expected, rtol=1e-5, atol=1e-5)
            cut += np.isneginf(row).sum()
    assert cut > 100


def test_log_q_of_ties_at_the_cut():
    """Entries that equal the k-th stay; of those at the edge of top-p, some go."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]]).repeat(6, 1)
    targets = torch.arange(6)

    def log_q(sampling):
        return score_module._reduce(logits, targets, [sampling], True)["log_q"][:, 0]

    for sampling in (
        Sampling(top_k=2),
        Sampling(top_k=3),
        Sampling(top_p=0.6),
        Sampling(0.5, 2, 0.7),
    ):
        assert np.allclose(
            sorted(log_q(sampling)), sorted(drawn_from(logits[0], sampling)), atol=1e-6
        )
    assert torch.isfinite(log_q(Sampling(top_k=2))).tolist() == [0, 1, 1, 1, 1, 0]


def test_log_q_is_the_frequency_with_which_generate_draws_the_suffix():
    """Monte Carlo: 4,000 samples of two tokens; the interval is five standard errors wide on each
    side.
    """
    model = toy_model("gpt2")
    sampling, draws = Sampling(0.8, 12, 0.9), 4000
    prefix = asked()[0].ids[:PREFIX]
    window = Window("members", 0, "", prefix + generated(model, prefix, 2), PREFIX)
    (found,) = Scorer(model, [sampling]).score([window])
    p = float(np.exp(found.log_q[0].astype(np.float64).sum()))
    torch.manual_seed(0)
    ids = torch.tensor([prefix]).repeat(draws, 1)
    options = {
        "temperature": 0.8,
        "top_k": 12,
        "top_p": 0.9,
        "do_sample": True,
        "max_new_tokens": 2,
    }
    drawn = model.generate(
        ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options
    )[:, PREFIX:]
    share = (drawn == torch.tensor(window.suffix)).all(-1).double().mean().item()
    assert 0.02 < p < 0.98
    assert abs(share - p) < 5 * (p * (1 - p) / draws) ** 0.5


def test_logits_that_a_model_forbids():
    """Minus infinity has probability 0, and 0 * log 0 is 0: no NaN anywhere, and the moments of the
    rest.
    """
    logits = torch.tensor(
        [[2.0, -torch.inf, 1.0, 0.0], [0.0, -torch.inf, -torch.inf, -torch.inf]]
    )
    settings = [Sampling(), Sampling(top_k=2), Sampling(top_p=0.8)]
    found = score_module._reduce(logits, torch.tensor([2, 1]), settings, True)
    log_p = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64).log_softmax(-1)
    mean = (log_p.exp() * log_p).sum().item()
    assert found["entropy_mean"].tolist() == pytest.approx([mean, 0.0], abs=1e-6)
    assert found["entropy_std"][0].item() == pytest.approx(
        ((log_p.exp() * (log_p - mean) ** 2).sum() ** 0.5).item()
    )
    assert found["nll"].tolist() == pytest.approx([-log_p[1].item(), torch.inf])
    assert found["rank"].tolist() == [1, 1]
    assert not any(column.isnan().any() for column in found.values())


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        (
            {"temperature": 0.0},
            "temperature must be above 0 and finite, got 0.0; greedy needs none",
        ),
        ({"top_k": 0}, "`top_k` has to be a strictly positive integer, but is 0"),
        ({"top_p": 1.5}, r"`top_p` has to be a float > 0 and < 1, but is 1.5"),
    ],
)
def test_sampling_settings_that_mean_nothing(setting, text):
    with pytest.raises(ValueError, match=text):
        Sampling(**setting)


def test_beams_equal_a_search_over_every_row(monkeypatch):
    """Suffixes are what searches of several widths say, so that some are found late and some
    never.
    """
    model = toy_model("llama")
    tried, suffix = (1, 2, 4, 8), 4
    rows = [window.ids[:PREFIX] for window in asked(count=12)]
    windows = []
    for i, prefix in enumerate(rows):
        said = generated(model, prefix, suffix, num_beams=(1, 2, 8)[i % 3])
        windows.append(
            Window(
                "members",
                i,
                "",
                prefix + said if i < 9 else asked(count=12)[i].ids[: PREFIX + 4],
                PREFIX,
            )
        )
    searches = []
    generate = score_module.least_beams.__globals__["generate"]

    def counting(model, prefixes, tokens, **options):
        searches.append((options.get("settings") or {}).get("num_beams"))
        return generate(model, prefixes, tokens, **options)

    monkeypatch.setitem(score_module.least_beams.__globals__, "generate", counting)
    found = [score.beams for score in Scorer(model, beams=tried).score(windows)]
    expected = [
        next(
            (
                b
                for b in tried
                if generated(model, w.ids[:PREFIX], suffix, num_beams=b) == w.suffix
            ),
            0,
        )
        for w in windows
    ]
    assert found == expected
    assert len(set(expected)) >= 3
    assert sum(b is not None for b in searches) < len(windows) * len(tried)


def test_nll_under_a_control(model):
    windows, other = asked(model, 3), tiny_llama(num_hidden_layers=1)
    for score, window in zip(
        Scorer(model, control=other).score(windows), windows, strict=True
    ):
        ids = torch.tensor([window.ids])
        with torch.inference_mode():
            expected = other.eval()(input_ids=ids, labels=ids).loss.item()
        assert score.control_nll.shape == (len(window.ids) - 1,)
        assert score.control_nll.mean() == pytest.approx(expected, rel=1e-5)
    (plain,) = Scorer(model).score(windows[:1])
    assert (plain.control_nll, plain.beams) == (None, None)


def test_windows_that_cross_a_switch_of_the_rotary_factors():
    """LongRoPE: the whole row has other factors than its prefix. Rows beside it that stay below the
    switch keep their own."""
    scaling = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [30.0] * 4,
        "original_max_position_embeddings": 20,
    }
    config = Phi3Config(
        **SIZES,
        rope_parameters={**scaling, "rope_theta": 100.0},
        original_max_position_embeddings=20,
    )
    torch.manual_seed(0)
    model = Phi3ForCausalLM(config).eval()
    windows = []
    for length in (6, 12, 18):
        prefix = torch.randint(
            VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length)
        )
        made = model.generate(prefix, max_new_tokens=8, do_sample=False, pad_token_id=0)
        windows.append(Window("members", length, "", made[0].tolist(), length))
    scores = Scorer(model).score(windows)
    assert [
        score.output == window.suffix
        for score, window in zip(scores, windows, strict=True)
    ] == [True] * 3
    assert [score.settled for score in scores] == [False, False, True]
    alone = [Scorer(model).score([window])[0].nll for window in windows[:2]]
    for score, nll in zip(scores, alone, strict=False):
        assert np.allclose(score.nll, nll, atol=1e-5), "whatever is in the batch"


def test_outputs_go_on_behind_a_suffix_that_is_recited(model):
    """As far as the context goes; against generate at batch size 1."""
    prefix = torch.arange(2, 12)[None]
    made = model.generate(prefix, max_new_tokens=118, do_sample=False, pad_token_id=0)[
        0
    ].tolist()
    recited = Window("members", 0, "", made[:14], 10)
    other = Window("members", 1, "", [*made[:13], (made[13] + 1) % 320], 10)
    for length, expected in ((2, 4), (30, 30), (500, 118)):
        first, second = Scorer(model, output_length=length).score([recited, other])
        assert first.output == second.output == made[10 : 10 + expected]
        assert (len(first.nll), len(second.nll)) == (13, 13), "scores are of the window"
