"""linear_cross_entropy against the plain lines beside it, in fp64 where rounding matters."""

import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from helpers import DEVICES
from operations import Operations
from torch import Tensor

from goldfish.linear import (
    _adds_into,
    _pitch,
    _scale,
    _softmax_rows,
    kept_rows,
    linear_cross_entropy,
    loss_sum,
)
from goldfish.linear import plain_linear_cross_entropy as plain

IGNORED = -100


def case(
    rows: int = 300,
    width: int = 32,
    vocabulary: int = 500,
    keep: float = 0.75,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocabulary, (rows,), generator=g)
    labels[torch.rand(rows, generator=g) >= keep] = IGNORED
    inputs = {
        "hidden": torch.randn(rows, width, generator=g),
        "weight": torch.randn(vocabulary, width, generator=g) * 0.3,
        "bias": torch.randn(vocabulary, generator=g),
        "labels": labels,
    }
    return {name: t.to(device) for name, t in inputs.items()}


@pytest.fixture
def in_chunks_of(monkeypatch):
    """Sets how many rows of logits exist at a time, which a budget of memory decides otherwise."""
    return lambda rows: monkeypatch.setattr(
        "goldfish.linear._chunk_rows", lambda *_: rows
    )


def training(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: t.requires_grad_() if t.is_floating_point() else t
        for name, t in inputs.items()
    }


def loss_and_gradients(
    function, inputs: dict[str, Tensor], dtype: torch.dtype, **options
) -> dict[str, Tensor]:
    inputs = {
        name: t.detach().to(dtype, copy=True).requires_grad_()
        if t.is_floating_point()
        else t
        for name, t in inputs.items()
    }
    loss = function(**inputs, **options)
    loss.backward()
    return {"loss": loss.detach()} | {
        name: t.grad for name, t in inputs.items() if t.is_floating_point()
    }


def error(result: Tensor, truth: Tensor) -> float:
    return ((result.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [{}, {"scale": 0.25}, {"softcap": 5.0, "scale": 0.7, "num_items": 1234}],
    ids=str,
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_no_further_from_fp64_than_plain_cross_entropy(
    dtype, options, with_bias, monkeypatch, in_chunks_of
):
    monkeypatch.setitem(
        sys.modules["goldfish.linear"]._SOFTMAX_BLOCK, "cpu", 3 * 500 * 4
    )  # three rows of logits at a time
    inputs = case()
    if not with_bias:
        del inputs["bias"]
    inputs = {
        name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()
    }
    truth = loss_and_gradients(plain, inputs, torch.float64, **options)
    baseline = loss_and_gradients(plain, inputs, dtype, **options)
    in_chunks_of(64)
    ours = loss_and_gradients(linear_cross_entropy, inputs, dtype, **options)
    assert ours["loss"].dtype == torch.float32
    # The backward pass scales a 16-bit gradient: one more rounding than in the baseline.
    rounding = torch.finfo(dtype).eps / 2
    for name, exact in truth.items():
        allowed = error(baseline[name], exact) + (rounding if name != "loss" else 1e-6)
        assert error(ours[name], exact) <= allowed, name
        if name != "loss":
            assert ours[name].dtype == dtype


def test_fp64_gradients_by_finite_differences(in_chunks_of):
    in_chunks_of(2)
    inputs = training(
        {
            k: t.double() if t.is_floating_point() else t
            for k, t in case(6, 4, 7, seed=2).items()
        }
    )
    labels = inputs.pop("labels")

    def function(hidden, weight, bias):
        return linear_cross_entropy(
            hidden, weight, labels, bias, softcap=2.0, scale=0.7
        )

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


def test_two_rows_by_hand():
    hidden = torch.eye(2, requires_grad=True)
    weight = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]], requires_grad=True)
    loss = linear_cross_entropy(
        hidden, weight, torch.tensor([2, IGNORED])
    )  # three equal logits
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(3.0).log())
    torch.testing.assert_close(
        weight.grad, torch.tensor([[1 / 3, 0], [1 / 3, 0], [-2 / 3, 0]])
    )
    assert hidden.grad[1].eq(0).all()


@pytest.mark.parametrize("rows", [1, 7, 64, 10_000])
def test_the_chunk_changes_nothing(rows, in_chunks_of):
    in_chunks_of(rows)
    inputs = case()
    whole = loss_and_gradients(plain, inputs, torch.float64)
    ours = loss_and_gradients(linear_cross_entropy, inputs, torch.float64)
    for name, exact in whole.items():
        torch.testing.assert_close(ours[name], exact, rtol=1e-12, atol=1e-13)


def test_dropped_rows_are_as_good_as_absent():
    inputs = case()
    kept = inputs["labels"] != IGNORED
    subset = inputs | {
        "hidden": inputs["hidden"][kept],
        "labels": inputs["labels"][kept],
    }
    whole, part = (
        loss_and_gradients(linear_cross_entropy, x, torch.float32)
        for x in (inputs, subset)
    )
    assert torch.equal(whole["loss"], part["loss"])
    assert torch.equal(whole["weight"], part["weight"])
    assert torch.equal(whole["hidden"][kept], part["hidden"])
    assert not whole["hidden"][~kept].any()


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 262_144])
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_extremes(vocabulary, kept):
    inputs = case(rows=9, width=4, vocabulary=vocabulary, keep=1.0)
    inputs["labels"][kept:] = IGNORED
    ours = loss_and_gradients(linear_cross_entropy, inputs, torch.float32)
    if kept == 0:
        assert all(not t.any() for t in ours.values())  # zero, and the graph is alive
        assert all(
            not t.any()
            for t in loss_and_gradients(
                linear_cross_entropy, inputs, torch.float32, num_items=torch.tensor(0)
            ).values()
        )
        return
    subset = inputs | {
        "hidden": inputs["hidden"][:kept],
        "labels": inputs["labels"][:kept],
    }
    baseline = loss_and_gradients(
        plain, subset, torch.float32
    )  # of as many rows: BLAS sums one row otherwise than nine
    for name, exact in loss_and_gradients(plain, subset, torch.float64).items():
        result = ours[name][:kept] if name == "hidden" else ours[name]
        assert (result - exact).abs().max() <= 3 * (
            baseline[name] - exact
        ).abs().max() + 1e-6, name


def test_logits_too_large_for_exp():
    hidden = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([2, 1]))
    loss.backward()
    assert loss == 250.0  # row one: 1000 - 500, row two: 0
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize(
    "trainable", [("hidden",), ("weight",), ("bias",), ("hidden", "bias")], ids="+".join
)
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_only_where_required(trainable, device):
    inputs = case(device=device)
    for name in trainable:
        inputs[name].requires_grad_()
    loss = linear_cross_entropy(**inputs)
    saved = sum(t.numel() for t in loss.grad_fn.next_functions[0][0].saved_tensors)
    assert saved == sum(inputs[name].numel() for name in trainable)
    loss.backward()
    every = loss_and_gradients(plain, inputs, torch.float32)
    for name in ("hidden", "weight", "bias"):
        assert (inputs[name].grad is not None) == (name in trainable)
        if name in trainable:
            torch.testing.assert_close(
                inputs[name].grad, every[name], rtol=1e-4, atol=1e-6
            )


def test_nothing_but_the_loss_without_grad(monkeypatch):
    asked = []

    def kernel(*arguments):
        asked.append(arguments[-1])
        return _softmax_rows(*arguments)

    monkeypatch.setattr("goldfish.linear._row_kernel", lambda *_: kernel)
    inputs = case() | {"weight": case()["weight"].requires_grad_()}
    with torch.no_grad():
        loss = linear_cross_entropy(**inputs, softcap=3.0)
    assert not loss.requires_grad
    torch.testing.assert_close(
        loss, linear_cross_entropy(**inputs, softcap=3.0).detach()
    )
    assert asked == [False, True]


@pytest.mark.parametrize("rows", [64, 2048])
def test_memory_is_that_of_one_chunk(in_chunks_of, rows):
    """The largest tensor made is a chunk of logits or a gradient."""
    inputs = training(case(2048, 16, 1000, keep=1.0))
    in_chunks_of(rows)
    with Operations() as made:
        linear_cross_entropy(**inputs).backward()
    logits_of_chunk, gradient_of_hidden = rows * 1000 * 4, 2048 * 16 * 4
    assert made.largest == max(logits_of_chunk, gradient_of_hidden)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_autocast(dtype, device):
    inputs = case(device=device)

    def under_autocast(function):
        def run(**kwargs):
            with torch.autocast(device, dtype):
                return function(**kwargs)

        return run

    truth = loss_and_gradients(plain, inputs, torch.float64)
    baseline = loss_and_gradients(under_autocast(plain), inputs, torch.float32)
    ours = loss_and_gradients(
        under_autocast(linear_cross_entropy), inputs, torch.float32
    )
    for name, exact in truth.items():
        assert ours[name].dtype == torch.float32
        assert error(ours[name], exact) <= 1.05 * error(baseline[name], exact) + 1e-6, (
            name
        )
        assert (
            error(ours[name], exact) > 1e-6 or name == "loss"
        )  # it did compute in the smaller dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_large_loss_scale_is_neither_rounded_nor_overflows(dtype):
    """65,537 and 3,001 have no 16-bit representation; unscaled, small gradients vanish in fp16."""
    inputs = {k: t.to(dtype) if t.is_floating_point() else t for k, t in case().items()}
    options = {"num_items": 3001}
    scaled, one = (
        loss_and_gradients(
            lambda f=f, **k: linear_cross_entropy(**k, **options) * f, inputs, dtype
        )
        for f in (65_537.0, 1.0)
    )
    truth = loss_and_gradients(lambda **k: plain(**k, **options), inputs, torch.float64)
    for name in ("hidden", "weight", "bias"):
        assert scaled[name].isfinite().all()
        assert error(scaled[name] / 65_537.0, truth[name]) <= 2 * torch.finfo(dtype).eps
        assert error(one[name], truth[name]) <= (
            2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.05
        )


@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.bfloat16, 1.25 + 2**-8), (torch.float16, 70_000.0)]
)
def test_the_upstream_gradient_is_not_rounded_to_16_bits(dtype, factor):
    """In bf16 the first factor would become 1.25, in fp16 the second infinity."""
    inputs = {
        k: t.mul(0.5).to(dtype) if t.is_floating_point() else t
        for k, t in case().items()
    }
    result = loss_and_gradients(
        lambda **k: linear_cross_entropy(**k, num_items=1) * factor, inputs, dtype
    )["hidden"]
    truth = loss_and_gradients(
        lambda **k: plain(**k, num_items=1) * factor, inputs, torch.float64
    )["hidden"]
    assert (
        (result.double() * truth).sum() / truth.square().sum()
    ).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_backward_twice(device):
    inputs = training(case(device=device))
    loss = linear_cross_entropy(**inputs)
    first = torch.autograd.grad(loss, inputs["weight"], retain_graph=True)[0]
    again = torch.autograd.grad(3 * loss, inputs["weight"], retain_graph=True)[0]
    last = torch.autograd.grad(loss, inputs["weight"])[0]
    torch.testing.assert_close(again, 3 * first)
    assert torch.equal(first, last)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_calls_that_share_a_graph_or_make_it_again():
    inputs = case()
    once = loss_and_gradients(linear_cross_entropy, inputs, torch.float32)
    twice = loss_and_gradients(
        lambda **k: linear_cross_entropy(**k) + linear_cross_entropy(**k),
        inputs,
        torch.float32,
    )

    def checkpointed(**kwargs):
        return torch.utils.checkpoint.checkpoint(
            lambda: linear_cross_entropy(**kwargs), use_reentrant=False
        )

    again = loss_and_gradients(checkpointed, inputs, torch.float32)
    for name in once:
        torch.testing.assert_close(twice[name], 2 * once[name])
        assert torch.equal(once[name], again[name])


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("device", DEVICES)
def test_second_derivatives_are_refused(device):
    with pytest.raises(RuntimeError, match="no second derivatives"):
        linear_cross_entropy(**training(case(device=device))).backward(
            create_graph=True
        )


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("device", DEVICES)
def test_compile_without_a_graph_break(device):
    inputs = case(40, 8, 50, device=device)

    def step(**kwargs):
        return (
            linear_cross_entropy(
                **kwargs | {"hidden": kwargs["hidden"] * 2}, softcap=4.0
            )
            * 3
        )

    eager = loss_and_gradients(step, inputs, torch.float32)
    compiled = loss_and_gradients(
        torch.compile(step, fullgraph=True, backend="aot_eager"), inputs, torch.float32
    )
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name])


def test_shapes_batch_time():
    inputs = case(rows=60)
    flat = loss_and_gradients(linear_cross_entropy, inputs, torch.float32)
    shaped = inputs | {
        "hidden": inputs["hidden"].view(3, 20, -1),
        "labels": inputs["labels"].view(3, 20).int(),
    }
    shaped = loss_and_gradients(linear_cross_entropy, shaped, torch.float32)
    assert torch.equal(flat["loss"], shaped["loss"])
    assert torch.equal(flat["hidden"].view(3, 20, -1), shaped["hidden"])
    none = torch.zeros(2, 0, 4, requires_grad=True)
    loss = linear_cross_entropy(
        none, torch.ones(5, 4), torch.zeros(2, 0, dtype=torch.long)
    )
    loss.backward()
    assert loss == 0
    assert none.grad.shape == (2, 0, 4)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            {"labels": torch.tensor([500] + [0] * 299)},
            IndexError,
            r"label 500 is outside the vocabulary of 500",
        ),
        (
            {"labels": torch.tensor([-1] + [0] * 299)},
            IndexError,
            r"label -1 is outside .*1 of 300",
        ),
        (
            {"labels": torch.zeros(299, dtype=torch.long)},
            ValueError,
            r"one label per row .*\(300,\).*\(299,\)",
        ),
        ({"labels": torch.zeros(300)}, TypeError, "integers.*float32"),
        ({"weight": torch.zeros(500, 31)}, ValueError, r"\(300, 32\) and \(500, 31\)"),
        (
            {"weight": torch.zeros(500, 32).bfloat16()},
            TypeError,
            "float32 and weight torch.bfloat16",
        ),
        ({"bias": torch.zeros(499)}, ValueError, r"bias \(500,\), got \(499,\)"),
        ({"softcap": 0.0}, ValueError, "softcap must be above 0.*0.0"),
        ({"num_items": 0}, ValueError, "num_items.*above 0"),
    ],
)
def test_errors(change, kind, message):
    with pytest.raises(kind, match=message):
        linear_cross_entropy(**case() | change)


# The rows of logits: Triton's kernel against torch's


@pytest.fixture
def triton_rows():
    """The Triton kernel; without a GPU its interpreter runs it (conftest.py)."""
    pytest.importorskip(
        "triton",
        reason="Triton comes with torch for CUDA, and is in the extra `kernel`",
    )
    if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
        pytest.skip("needs CUDA or Triton's interpreter")
    from goldfish.kernels import softmax_rows

    return softmax_rows


def row_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def padded_rows(
    rows: int, vocabulary: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A buffer whose rows are padded as on a GPU, with a row behind it; and its logits."""
    pitch = -(-vocabulary // 16) * 16
    buffer = torch.full((rows + 1, pitch), 999.0, dtype=dtype)
    buffer[:rows, :vocabulary] = torch.randn(rows, vocabulary) * 4
    buffer = buffer.to(row_device())
    return buffer, buffer[:rows, :vocabulary]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("vocabulary", [1, 7, 16, 130, 5000])
def test_the_kernel_does_what_torch_does(triton_rows, dtype, vocabulary):
    for (softcap, scale), grad in product([(None, 1.0), (3.0, 2.0)], [True, False]):
        torch.manual_seed(0)
        buffer, logits = padded_rows(3, vocabulary, dtype)
        logits[1, vocabulary // 2], logits[2] = 300, logits[2] - 500
        labels = torch.randint(vocabulary, (3,)).to(logits.device)
        before, theirs = buffer.clone(), logits.clone()
        nll, expected = (torch.empty(3, device=logits.device) for _ in range(2))
        triton_rows(logits, labels, nll, scale, softcap, grad)
        _softmax_rows(theirs, labels, expected, scale, softcap, grad)
        torch.testing.assert_close(nll, expected, rtol=2e-6, atol=2e-6)
        assert torch.equal(buffer[3:], before[3:]), (
            "nothing behind the last row is written"
        )
        if grad:
            tolerance = torch.finfo(dtype).eps
            torch.testing.assert_close(logits, theirs, rtol=tolerance, atol=1e-6)
        else:
            assert torch.equal(buffer, before)


@pytest.mark.parametrize("kind", ["torch", "triton"])
def test_rows_with_infinities_agree_with_cross_entropy(kind, request):
    """A row of -inf alone is NaN, as in torch; single -inf are logits that nothing predicts."""
    rows = _softmax_rows if kind == "torch" else request.getfixturevalue("triton_rows")
    _, logits = padded_rows(5, 130, torch.float32)
    infinity = float("inf")
    logits[0] = -infinity
    logits[1, 64:] = -infinity
    logits[2, 5] = -infinity
    logits[3, 5] = infinity
    labels = torch.full((5,), 5, device=logits.device)
    plain_logits = logits.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(plain_logits, labels, reduction="none")
    expected.sum().backward()
    nll = torch.empty(5, device=logits.device)
    rows(logits, labels, nll, 1.0, None, True)
    assert expected.isnan().tolist() == [True, False, False, True, False]
    torch.testing.assert_close(nll, expected.detach(), equal_nan=True)
    torch.testing.assert_close(logits[[1, 2, 4]], plain_logits.grad[[1, 2, 4]])
    assert logits[0].isnan().all()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 5.0, "scale": 0.7, "num_items": 1234}], ids=str
)
def test_the_kernel_inside_the_loss(
    triton_rows, dtype, options, monkeypatch, in_chunks_of
):
    """With the padded rows that a GPU has, of a vocabulary that is no multiple of 16."""
    monkeypatch.setattr("goldfish.linear._row_kernel", lambda *_: triton_rows)
    monkeypatch.setattr(
        "goldfish.linear._pitch", lambda vocabulary, _: -(-vocabulary // 16) * 16
    )
    in_chunks_of(16)
    inputs = {
        name: t.to(dtype) if t.is_floating_point() else t
        for name, t in case(rows=50, vocabulary=501, device=row_device()).items()
    }
    truth = loss_and_gradients(plain, inputs, torch.float64, **options)
    baseline = loss_and_gradients(plain, inputs, dtype, **options)
    ours = loss_and_gradients(linear_cross_entropy, inputs, dtype, **options)
    rounding = torch.finfo(dtype).eps / 2
    for name, exact in truth.items():
        allowed = error(baseline[name], exact) + (rounding if name != "loss" else 1e-6)
        assert error(ours[name], exact) <= allowed, name


def test_the_kernel_runs_on_the_device_of_its_tensors(monkeypatch):
    """Triton launches on the current device, which need not be the one of the tensors."""
    guarded = []

    class Guard:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            guarded.append(self.tensor.device)

        def __exit__(self, *_):
            guarded.pop()

    def kernel(logits, *arguments):
        assert guarded == [logits.device]
        return _softmax_rows(logits, *arguments)

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    monkeypatch.setattr("goldfish.linear._row_kernel", lambda *_: kernel)
    assert linear_cross_entropy(**case()) > 0
    assert guarded == []


def test_pitch():
    assert [_pitch(size, "cuda") for size in (1, 16, 50_257, 128_256)] == [
        16,
        16,
        50_272,
        128_256,
    ]
    assert _pitch(50_257, "cpu") == 50_257


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_torch_that_adds_16_bit_products_to_fp32(dtype, monkeypatch, in_chunks_of):
    """As CUDA does since torch 2.8; nothing is rounded to 16 bits in between."""
    plain_addmm = torch.addmm

    def addmm(total, left, right, out_dtype=None, *, beta=1, out=None):
        return plain_addmm(
            total, left.to(total.dtype), right.to(total.dtype), beta=beta, out=out
        )

    in_chunks_of(4)
    inputs = {k: t.to(dtype) if t.is_floating_point() else t for k, t in case().items()}
    truth = loss_and_gradients(plain, inputs, torch.float64)["weight"]
    _adds_into.cache_clear()
    rounded = loss_and_gradients(linear_cross_entropy, inputs, dtype)["weight"]
    assert not _adds_into(torch.float32, dtype, torch.device("cpu"))
    monkeypatch.setattr(torch, "addmm", addmm)
    _adds_into.cache_clear()
    summed = loss_and_gradients(linear_cross_entropy, inputs, dtype)["weight"]
    assert _adds_into(torch.float32, dtype, torch.device("cpu"))
    _adds_into.cache_clear()
    assert not torch.equal(summed, rounded)
    assert error(summed, truth) <= error(rounded, truth) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("failure", [TypeError, NotImplementedError, RuntimeError])
def test_a_torch_that_cannot(failure, monkeypatch):
    """torch 2.6 and 2.7 do not know the argument; ROCm may not implement it."""

    def addmm(*_, **__):
        raise failure("addmm")

    _adds_into.cache_clear()
    monkeypatch.setattr(torch, "addmm", addmm)
    assert not _adds_into(torch.float32, torch.bfloat16, torch.device("cpu"))
    _adds_into.cache_clear()


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str
)
@pytest.mark.parametrize(
    "stored", [torch.bfloat16, torch.float16, torch.float32], ids=str
)
def test_a_gradient_is_scaled_in_one_pass_to_the_same_bits(stored, dtype):
    gradient = (torch.randn(200, 30) * 3).to(stored)
    for value in (1 / 3001, 1.25 + 2**-8, 70_000.0):
        factor = torch.tensor([value])
        expected = (gradient.float() * factor).to(dtype)
        assert torch.equal(_scale(gradient, factor, dtype, False), expected)
        assert torch.equal(_scale(gradient.clone(), factor, dtype, True), expected)


def test_rows_that_are_known_already():
    inputs = case()
    once = loss_sum(**inputs)
    assert torch.equal(loss_sum(**inputs, rows=kept_rows(inputs["labels"])), once)
    few = kept_rows(inputs["labels"])[:3]
    part = inputs | {"hidden": inputs["hidden"][few], "labels": inputs["labels"][few]}
    torch.testing.assert_close(loss_sum(**inputs, rows=few), loss_sum(**part))


def test_the_operator_is_not_for_cuda_graphs():
    """It counts its rows on the host."""
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip("this torch has no such tag")
    operator = torch.ops.goldfish.linear_cross_entropy.default
    assert torch.Tag.cudagraph_unsafe in operator.tags


# On CUDA. A file of its own would not see that these are the cases above on another device.


def on_cuda(test):
    return pytest.mark.gpu(
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")(test)
    )


def assert_as_good_on_cuda(dtype, vocabulary, **options):
    """No further from fp64 than torch's own loss in the same dtype."""
    inputs = case(3000, 64, vocabulary, device="cuda")
    inputs = {
        name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()
    }
    truth, baseline, ours = (
        loss_and_gradients(f, inputs, d, **options)
        for f, d in (
            (plain, torch.float64),
            (plain, dtype),
            (linear_cross_entropy, dtype),
        )
    )
    for name, exact in truth.items():
        assert error(ours[name], exact) <= error(baseline[name], exact) + max(
            torch.finfo(dtype).eps / 2, 1e-6
        ), name


@on_cuda
@pytest.mark.parametrize(
    "vocabulary", [7, 128, 5001, 8192]
)  # whole rows of 16 bytes and others; one block and more
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 5.0, "scale": 0.7, "num_items": 1234}], ids=str
)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64]
)
def test_cuda_against_fp64(dtype, options, vocabulary):
    """Three chunks; 16-bit products are added up in fp32 by cuBLAS; fp64 goes without Triton."""
    assert_as_good_on_cuda(dtype, vocabulary, **options)


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_without_triton(dtype, monkeypatch):
    linear = sys.modules["goldfish.linear"]
    monkeypatch.setitem(sys.modules, "goldfish.kernels", None)  # importing it fails
    linear._row_kernel.cache_clear()
    assert linear._row_kernel("cuda", dtype) is _softmax_rows
    assert_as_good_on_cuda(dtype, 5001, softcap=5.0)
    linear._row_kernel.cache_clear()


@on_cuda
def test_cuda_rows_beyond_two_to_the_31():
    """Offsets of 64 bits: the last of 4,096 rows of 600,000 logits."""
    rows, vocabulary = 4096, 600_000
    if torch.cuda.mem_get_info()[0] < 8e9:
        pytest.skip("needs 8 GB of free GPU memory")
    from goldfish.kernels import softmax_rows

    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    labels, nll = torch.arange(rows, device="cuda"), torch.empty(rows, device="cuda")
    softmax_rows(logits, labels, nll, 1.0, None, True)
    torch.testing.assert_close(nll, torch.full_like(nll, vocabulary).log())
    assert (logits[torch.arange(rows), labels] == -1).all()
    assert logits[-1].float().sum().abs() < 0.01


@on_cuda
def test_cuda_label_outside_the_vocabulary():
    """A device-side assertion, which ends the process's use of CUDA: so in another process."""
    code = (
        "import torch; torch.set_default_device('cuda');"
        "from goldfish import linear_cross_entropy as f;"
        "f(torch.randn(4, 8), torch.randn(9, 8), torch.tensor([1, 2, 9, 3]));"
        "torch.cuda.synchronize()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert "assert" in done.stderr.lower()
