"""One Triton kernel: softmax, loss and the gradient of the logits for a chunk of rows, in place. Imported on CUDA only.

Each program owns one row and reads it twice: once for the maximum and the sum of exponentials, once to write the
gradient over the logits. Statistics are fp32 whatever the dtype of the logits.
"""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

_LOWEST = tl.constexpr(
    -3.0e38
)  # stands for minus infinity: the difference of two of it is 0, not NaN


@triton.jit
def _tanh(x):
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@triton.jit
def _logit(raw, scale, softcap, CAPPED: tl.constexpr):
    value = raw.to(tl.float32) * scale
    if CAPPED:
        value = softcap * _tanh(value / softcap)
    return value


@triton.jit
def _softmax_rows(
    logits,  # (rows, V), row stride `stride`; overwritten by d loss / d logits if GRAD
    stride,
    labels,  # (rows,) int64
    nll,  # (rows,) fp32, nats
    vocabulary,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # rows * V may pass 2**31
    logits += row * stride
    label = tl.load(labels + row)
    # Read before the reductions below, whose barriers stand between this load and the stores of the second pass.
    target = _logit(tl.load(logits + label), scale, softcap, CAPPED)
    lane = tl.arange(0, BLOCK)
    highest = tl.full(
        (BLOCK,), _LOWEST, tl.float32
    )  # one running maximum and sum per lane: no reduction in the loop
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + lane < vocabulary
        raw = tl.load(logits + start + lane, mask=inside, other=0.0)
        value = tl.where(inside, _logit(raw, scale, softcap, CAPPED), _LOWEST)
        higher = tl.maximum(highest, value)
        total = total * tl.exp(highest - higher) + tl.exp(value - higher)
        highest = higher
    peak = tl.max(highest, axis=0)
    denominator = tl.sum(total * tl.exp(highest - peak), axis=0)
    tl.store(
        nll + row, tl.log(denominator) + (peak - target)
    )  # the near-equal pair first: fp32 keeps its digits
    if GRAD:
        inverse = scale / denominator
        for start in range(0, vocabulary, BLOCK):
            inside = start + lane < vocabulary
            value = _logit(
                tl.load(logits + start + lane, mask=inside, other=0.0), scale, softcap, CAPPED
            )
            grad = tl.exp(value - peak) * inverse - tl.where(start + lane == label, scale, 0.0)
            if CAPPED:
                grad *= 1.0 - (value / softcap) * (value / softcap)
            tl.store(logits + start + lane, grad.to(logits.dtype.element_ty), mask=inside)


def softmax_rows(
    logits: Tensor, labels: Tensor, nll: Tensor, scale: float, softcap: float | None, grad: bool
) -> None:
    """Write each row's nll, and if `grad` overwrite the logits (rows, V) by the gradient of its nll."""
    rows, vocabulary = logits.shape
    block = min(4096, max(128, triton.next_power_of_2(vocabulary)))
    _softmax_rows[(rows,)](
        logits,
        logits.stride(0),
        labels,
        nll,
        vocabulary,
        float(scale),
        float(softcap or 1.0),
        CAPPED=softcap is not None,
        GRAD=grad,
        BLOCK=block,
        num_warps=8 if block == 4096 else 4,
    )
