"""Linear layer and cross-entropy in one, over the kept rows only, a chunk of rows at a time.

The logits of a dropped token are never computed, those of a kept one live for a moment. Gradients are computed in the
forward (three matrix products instead of the four of a recomputation), so that backward only scales them.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

from goldfish.masking import IGNORE_INDEX

_ROW_BLOCK = {
    "cpu": 2**20,
    "other": 2**26,
}  # bytes of fp32 logits under softmax at a time; on CPU per thread: its L2
_CHUNK_CPU = (
    2**27
)  # bytes of logits alive at a time; from 1,024 rows on (of 16 bits) more would not be faster


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    num_items: int | Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """The loss and the gradients of these three lines, without the logits:

        logits = scale * (hidden @ weight.T + bias)
        logits = softcap * tanh(logits / softcap)
        loss = cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="sum") / num_items

    Args:
        hidden: (..., D), fp16, bf16, fp32 or fp64; gradients only for what requires them. Under autocast the matrix
            products run in autocast's dtype.
        weight: (V, D).
        labels: integers (...), already aligned with hidden (shifted). Rows that hold `ignore_index` cost nothing.
        bias: (V,).
        num_items: what the sum is divided by; a number or a 0-dim tensor. Default: the number of kept rows.
        softcap: bound of the logits, as in Gemma 2.
        scale: factor of the logits, as in Cohere and Granite.

    Returns:
        0-dim, nats per item; fp32 (fp64 for fp64 inputs), with fp32 statistics and sums. 0, and differentiable, if
        no row is kept.

    Raises:
        ValueError, TypeError: for shapes or dtypes that do not fit.
        IndexError: for a label outside 0 ... V - 1 (on CUDA as a device-side assertion, as torch's own loss does).
        RuntimeError: for second derivatives, which the gradients computed in the forward do not have.
    """
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden (..., D) and weight (V, D), got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"expected one label per row of hidden, {tuple(hidden.shape[:-1])}, got labels {tuple(labels.shape)}; "
            "labels are already shifted here: logits of token t against token t + 1"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias ({weight.shape[0]},), got {tuple(bias.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be token ids (integers), got {labels.dtype}")
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}; cast one of them, or use autocast"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0 (or None for no cap), got {softcap!r}")
    if isinstance(num_items, (int, float)) and not num_items > 0:
        raise ValueError(f"num_items, the divisor of the loss, must be above 0, got {num_items!r}")
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    labels = labels.reshape(-1)
    rows = hidden.reshape(-1, hidden.shape[-1])
    arguments = (rows, weight, labels, bias, softcap, float(scale), ignore_index, dtype)
    grads = [
        torch.is_grad_enabled() and t is not None and t.requires_grad
        for t in (hidden, weight, bias)
    ]
    loss_sum: Tensor = (
        _Gradients.apply(*arguments, grads) if any(grads) else _forward(*arguments, grads)[0]
    )  # type: ignore[no-untyped-call]
    return loss_sum / divisor((labels != ignore_index).sum(), num_items)


def divisor(count: Tensor, num_items: int | Tensor | None) -> Tensor:
    """What a sum over `count` (0-dim) kept rows is divided by: num_items, or the count; 1 if there are none.

    A Python number is not made a tensor first: its copy to the GPU would wait.
    """
    if num_items is None:
        return count.clamp(min=1)
    return torch.where(
        count == 0, 1, num_items.to(count.device) if isinstance(num_items, Tensor) else num_items
    )


@torch.library.custom_op("goldfish::linear_cross_entropy", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    ignore_index: int,
    dtype: torch.dtype,
    grads: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of the nll and its gradients for hidden (N, D), weight and bias; empty where a gradient is not asked for.

    One operator to torch.compile, which so need not know how many rows are kept.
    """
    total, (vocabulary, width) = _statistics_dtype(dtype), weight.shape
    rows = (
        (labels != ignore_index).nonzero().squeeze(-1)
    )  # makes CUDA wait once, as Trainer's check for NaN does
    labels = labels[rows].long()
    _check_range(labels, vocabulary)
    grad_hidden = torch.zeros_like(hidden) if grads[0] else hidden.new_empty(0)
    grad_weight = weight.new_empty((vocabulary, width) if grads[1] else 0, dtype=total)
    grad_bias = weight.new_zeros(vocabulary if grads[2] else 0, dtype=total)
    nll = hidden.new_empty(rows.numel(), dtype=total)
    if rows.numel() == 0:
        return nll.sum(), grad_hidden, grad_weight.zero_(), grad_bias
    chunk = _chunk_rows(weight, dtype, grads[1])
    # Rows of 16 bytes let cuBLAS use its fast kernels whatever the vocabulary.
    pitch = -(-vocabulary // 8) * 8 if hidden.is_cuda else vocabulary
    buffer = torch.empty(min(chunk, rows.numel()) * pitch, dtype=dtype, device=hidden.device)
    softmax = _row_kernel(hidden.device.type, dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        weight = weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
        for begin in range(0, rows.numel(), chunk):
            index = rows[begin : begin + chunk]
            part = hidden.index_select(0, index).to(dtype)
            logits = buffer[: len(index) * pitch].view(-1, pitch)[:, :vocabulary]
            if bias is None:
                torch.mm(part, weight.T, out=logits)
            else:
                torch.addmm(bias, part, weight.T, out=logits)
            here = slice(begin, begin + len(index))
            softmax(logits, labels[here], nll[here], scale, softcap, any(grads))
            if grads[0]:
                grad_hidden.index_copy_(0, index, (logits @ weight).to(hidden.dtype))
            if grads[1]:
                _accumulate(grad_weight, logits, part, first=begin == 0)
            if grads[2]:
                grad_bias += logits.sum(0, dtype=total)
    return nll.sum(), grad_hidden, grad_weight, grad_bias


@_forward.register_fake
def _(hidden, weight, labels, bias, softcap, scale, ignore_index, dtype, grads):  # type: ignore[no-untyped-def]
    total = _statistics_dtype(dtype)
    return (
        hidden.new_empty((), dtype=total),
        hidden.new_empty(hidden.shape if grads[0] else 0),
        weight.new_empty(weight.shape if grads[1] else 0, dtype=total),
        weight.new_empty(weight.shape[0] if grads[2] else 0, dtype=total),
    )


class _Gradients(torch.autograd.Function):
    """Carries the gradients from `_forward` to backward, which scales them.

    They are sums over rows, not yet divided by the number of items: fp16 would lose what that division makes small.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        hidden, weight, _, bias = arguments[:4]
        loss_sum, *gradients = _forward(*arguments)
        ctx.save_for_backward(*gradients)
        ctx.grads = arguments[-1]
        ctx.dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        return loss_sum  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() and not compiling:
            raise RuntimeError(
                "linear_cross_entropy has no second derivatives: call backward without create_graph=True, "
                "or compute cross_entropy on the logits"
            )
        # With retain_graph backward may be called again, so the saved tensors must stay. Older versions do not say.
        keeps_graph = getattr(
            torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
        )
        reuse = not (compiling or keeps_graph())
        results: list[Tensor | None] = []
        for wanted, gradient, dtype in zip(ctx.grads, ctx.saved_tensors, ctx.dtypes, strict=True):
            if not wanted:
                results.append(None)
            elif reuse and gradient.dtype == grad.dtype:
                results.append(gradient.mul_(grad).to(dtype))
            else:  # CUDA would round a 0-dim factor to the gradient's own dtype: 1/3001 in bf16, 70,000 in fp16
                results.append((gradient.to(grad.dtype) * grad).to(dtype))
        return results[0], results[1], None, results[2], *[None] * 5


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_range(labels: Tensor, vocabulary: int) -> None:
    if labels.device.type == "cpu":
        wrong = labels[(labels < 0) | (labels >= vocabulary)]
        if len(wrong):
            raise IndexError(
                f"label {int(wrong[0])} is outside the vocabulary of {vocabulary} ids (0 ... {vocabulary - 1}); "
                f"{len(wrong)} of {len(labels)} kept labels are. Was the model resized for this tokenizer?"
            )
    elif labels.device.type == "cuda":
        within = ((labels >= 0) & (labels < vocabulary)).all()
        torch._assert_async(within, f"a label is outside the vocabulary of {vocabulary} ids")


def _chunk_rows(weight: Tensor, dtype: torch.dtype, weight_grad: bool) -> int:
    """How many rows of logits to hold: few enough to be small, enough to keep the matrix products efficient."""
    vocabulary, width = weight.shape
    if weight.device.type == "cpu":
        return max(128, min(2048, _CHUNK_CPU // vocabulary) // dtype.itemsize)
    # Every chunk reads and writes the fp32 gradient of the weight once: hold as many logits as it has bytes.
    return min(4096, max(1024, 4 * width // dtype.itemsize)) if weight_grad else 1024


def _accumulate(total: Tensor, grad_logits: Tensor, part: Tensor, first: bool) -> None:
    """total += grad_logits.T @ part, in total's precision; (V, D), (rows, V) and (rows, D)."""
    beta = 0 if first else 1  # 0: whatever `total` held is not read
    if grad_logits.dtype == total.dtype:
        torch.addmm(total, grad_logits.T, part, beta=beta, out=total)
    elif total.is_cuda:
        torch.addmm(total, grad_logits.T, part, total.dtype, beta=beta, out=total)
    else:  # no such product on CPU: add blocks of it while they are in the cache
        block = max(256, 2**21 // (part.shape[1] * part.dtype.itemsize))
        for begin in range(0, len(total), block):
            product = grad_logits[:, begin : begin + block].T @ part
            here = total[begin : begin + block]
            (here.copy_ if first else here.add_)(product)


@cache
def _row_kernel(device: str, dtype: torch.dtype) -> Callable[..., None]:
    if device == "cuda" and dtype != torch.float64:
        with suppress(ImportError):  # torch for Windows comes without Triton
            from goldfish.kernels import softmax_rows

            return softmax_rows
    return _softmax_rows


def _softmax_rows(
    logits: Tensor, labels: Tensor, nll: Tensor, scale: float, softcap: float | None, grad: bool
) -> None:
    """Write each row's nll, and if `grad` overwrite the logits (rows, V) by the gradient of its nll.

    Goes over a few rows at a time, so that all passes but the first find them in the cache.
    """
    budget = (
        _ROW_BLOCK["cpu"] * torch.get_num_threads()
        if logits.device.type == "cpu"
        else _ROW_BLOCK["other"]
    )
    block = max(1, budget // (logits.shape[1] * nll.dtype.itemsize))
    scratch = (
        None if logits.dtype == nll.dtype else torch.empty_like(logits[:block], dtype=nll.dtype)
    )
    for begin in range(0, len(logits), block):
        here = logits[begin : begin + block]
        label = labels[begin : begin + block, None]
        x = here if scratch is None else scratch[: len(here)].copy_(here)
        slope = None
        if scale != 1:
            x.mul_(scale)
        if softcap is not None:
            x.div_(softcap).tanh_()
            slope = 1 - x * x if grad else None
            x.mul_(softcap)
        x.sub_(x.amax(1, keepdim=True))
        target = x.gather(1, label)
        total = x.exp_().sum(1, keepdim=True)
        nll[begin : begin + block] = (total.log() - target).squeeze(1)
        if not grad:
            continue
        x.mul_(scale / total)
        x.scatter_add_(1, label, torch.full_like(target, -scale))
        if slope is not None:
            x.mul_(slope)
        if x is not here:
            here.copy_(x)
