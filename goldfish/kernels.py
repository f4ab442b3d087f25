"""One Triton kernel: softmax, loss and the gradient of the logits for a chunk of rows, in place.

Imported on CUDA only. Each program owns one row and reads it twice: once for the maximum and the
sum of exponentials, once to write the gradient over the logits. Statistics are fp32 whatever the
dtype of the logits.
"""

# mypy: ignore-errors
# (Triton's functions have no types, and it is not installed where types are checked.)

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _tanh(x):
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@triton.jit
def _logit(
    raw,
    scale,
    softcap,
    CAPPED: tl.constexpr,
):
    value = raw.to(tl.float32) * scale
    if CAPPED:
        value = softcap * _tanh(value / softcap)
    return value


@triton.jit
def _softmax_rows(
    logits,  # (rows, pitch); overwritten by d loss / d logits if GRAD
    pitch,  # elements from one row to the next; at least `vocabulary`
    labels,  # (rows,) int64
    nll,  # (rows,) fp32, nats
    vocabulary,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A thread loads 4 or 8 neighbouring logits by one instruction only if Triton knows that a mask
    # never splits them. It does for `< pitch`, a multiple of 16, and not for `< vocabulary`. So
    # loads and stores are masked by the pitch, and values by the vocabulary: for GPT-2's 50,257
    # logits in rows of 50,272, 15 values that nobody reads are loaded and overwritten.
    # 64 bits, since rows * pitch may pass 2**31: 4,096 rows of 524,288 logits do.
    row = tl.program_id(0).to(tl.int64)
    logits += row * pitch
    label = tl.load(labels + row)
    # Read before the reductions below, whose barriers stand between this load and the stores of the
    # second pass.
    target = _logit(tl.load(logits + label), scale, softcap, CAPPED)
    lane = tl.arange(0, BLOCK)
    # One running maximum and one running sum for each lane: no reduction inside the loop. With
    # BLOCK = 4,096 lane 5 reads the logits 5, 4101, 8197, ... If they are 1, 3, 2, then `highest`
    # becomes 1, 3, 3 and `total` becomes 1, exp(-2) + 1, exp(-2) + 1 + exp(-1).
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, pitch, BLOCK):
        column = start + lane
        raw = tl.load(logits + column, mask=column < pitch, other=0.0)
        value = tl.where(
            column < vocabulary, _logit(raw, scale, softcap, CAPPED), float("-inf")
        )
        higher = tl.maximum(highest, value)
        # A lane that saw only -inf so far must add exp(-inf) = 0, not exp(-inf + inf) = NaN.
        reference = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - reference) + tl.exp(value - reference)
        highest = higher
    peak = tl.max(highest, axis=0)
    # In a row of -inf alone peak is -inf, and this is NaN as in torch.
    denominator = tl.sum(total * tl.exp(highest - peak), axis=0)
    # The near-equal pair is subtracted first: fp32 keeps its digits.
    tl.store(nll + row, tl.log(denominator) + (peak - target))
    if GRAD:
        inverse = scale / denominator
        for start in range(0, pitch, BLOCK):
            column = start + lane
            raw = tl.load(logits + column, mask=column < pitch, other=0.0)
            value = _logit(raw, scale, softcap, CAPPED)
            grad = tl.exp(value - peak) * inverse - tl.where(
                column == label, scale, 0.0
            )
            if CAPPED:
                grad *= 1.0 - (value / softcap) * (value / softcap)
            tl.store(
                logits + column, grad.to(logits.dtype.element_ty), mask=column < pitch
            )


def softmax_rows(
    logits: Tensor,
    labels: Tensor,
    nll: Tensor,
    scale: float,
    softcap: float | None,
    grad: bool,
) -> None:
    """Write each row's nll; if `grad`, overwrite the logits (rows, V) by the gradient of the nll.

    The logits are `buffer[:, :V]` of a contiguous buffer (rows, pitch), of which the columns from V
    on may be overwritten too. With a pitch that is a multiple of 16 memory is read by vectors.
    """
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
