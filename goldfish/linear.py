"""Linear layer and cross-entropy in one, over the kept rows only, a chunk of rows at a time.

The logits of a dropped token are never computed; those of a kept token exist for a moment. The
gradients are computed in the forward pass (three matrix products; recomputing the logits in the
backward pass takes four), so that the backward pass only scales them.
"""

import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from goldfish.masking import IGNORE_INDEX

# Bytes of fp32 logits that a pass of the softmax covers. On a CPU, for each thread: its L2 cache.
# 32,000 logits are 128 kB, so a thread takes 8 rows through all passes before the next 8.
_SOFTMAX_BLOCK = {"cpu": 2**20, "other": 2**26}
# Bytes of a 16-bit product that is added to an fp32 sum at once. On a CPU it stays in the cache.
# With D = 512 in bf16 that is the gradient of 2,048 entries of the vocabulary.
_PRODUCT_BLOCK = {"cpu": 2**21, "other": 2**26}
# Bytes of logits that exist at a time on a CPU.
_CHUNK_CPU = 2**27


def plain_linear_cross_entropy(
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
    """`linear_cross_entropy` as one would write it, with the logits of all rows; for tests.

    Its gradients are autograd's. Without a kept row and without num_items it is NaN.
    """
    logits = scale * nn.functional.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.to(_statistics_dtype(logits.dtype)).flatten(0, -2)
    targets = labels.flatten().long()
    count = (targets != ignore_index).sum() if num_items is None else num_items
    loss_sum = nn.functional.cross_entropy(
        logits, targets, ignore_index=ignore_index, reduction="sum"
    )
    return loss_sum / count


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
    """Cross-entropy of the logits of a linear layer, without ever holding those logits.

    The loss and the gradients of these lines (`plain_linear_cross_entropy`):

        logits = scale * (hidden @ weight.T + bias)
        logits = softcap * tanh(logits / softcap)
        loss = cross_entropy(logits.float(), labels, reduction="sum") / num_items

    Args:
        hidden: (..., D), fp16, bf16, fp32 or fp64. Under autocast the matrix products run in
            autocast's dtype. Gradients are computed only for what requires them.
        weight: (V, D).
        labels: integers (...), already shifted: the label of a row is the token after it. A row
            whose label is `ignore_index` costs nothing.
        bias: (V,).
        num_items: what the sum is divided by; a number or a 0-dim tensor. Default: the number of
            kept rows.
        softcap: bound of the logits, as in Gemma 2.
        scale: factor of the logits, as in Cohere and Granite.
        ignore_index: the label that means "no target".

    Returns:
        0-dim, nats per item; fp32 (fp64 for fp64 inputs), with fp32 statistics and sums. 0, and
        differentiable, if no row is kept.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
        IndexError: a label outside 0 ... V - 1 (on CUDA a device-side assertion, as in torch's
            own loss).
        RuntimeError: second derivatives, which gradients computed in the forward pass lack.

    >>> import torch
    >>> from goldfish import linear_cross_entropy
    >>> hidden = torch.zeros(3, 4, requires_grad=True)  # 3 positions, width 4
    >>> weight = torch.randn(8, 4)  # a vocabulary of 8
    >>> loss = linear_cross_entropy(hidden, weight, torch.tensor([5, -100, 2]))
    >>> round(loss.item(), 4)  # all logits are 0: log 8
    2.0794
    >>> loss.backward()
    >>> hidden.grad[1].tolist()  # this position was dropped
    [0.0, 0.0, 0.0, 0.0]
    """
    _check_arguments(hidden, weight, labels, bias, num_items, softcap)
    total = loss_sum(
        hidden,
        weight,
        labels,
        bias,
        softcap=softcap,
        scale=scale,
        ignore_index=ignore_index,
    )
    return total / divisor((labels != ignore_index).sum(), num_items)


def _check_arguments(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    num_items: int | Tensor | None,
    softcap: float | None,
) -> None:
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "expected hidden (..., D) and weight (V, D), got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"expected one label per row of hidden, {tuple(hidden.shape[:-1])}, got labels "
            f"{tuple(labels.shape)}; labels are already shifted here: the logits of token t "
            "against token t + 1"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias ({weight.shape[0]},), got {tuple(bias.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be token ids (integers), got {labels.dtype}")
    # Autocast casts both to one dtype: a bf16 backbone may have an fp32 head there.
    casts = torch.is_autocast_enabled(hidden.device.type)
    if hidden.dtype != weight.dtype and not casts:
        raise TypeError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}; cast one of them, or use autocast"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(
            f"softcap must be above 0 (or None for no cap), got {softcap!r}"
        )
    if isinstance(num_items, (int, float)) and not num_items > 0:
        raise ValueError(
            f"num_items, the divisor of the loss, must be above 0, got {num_items!r}"
        )


def divisor(count: Tensor, num_items: int | Tensor | None) -> Tensor:
    """What a sum over `count` (0-dim) kept rows is divided by: num_items or the count; 1 for none.

    A Python number is not made a tensor first: copying it to the GPU would wait for the GPU.
    """
    if num_items is None:
        return count.clamp(min=1)
    if isinstance(num_items, Tensor):
        num_items = num_items.to(count.device)
    # A micro-batch without a kept row has the sum 0. Its num_items may be 0 too (the whole step was
    # dropped), and 0 / 0 would put NaN into every gradient.
    return torch.where(count == 0, 1, num_items)


def kept_rows(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """The indices of the rows that have a label, int64 (kept,), among the flattened labels.

    The host waits for the GPU here, because it must know how many there are.
    """
    return (labels.reshape(-1) != ignore_index).nonzero().squeeze(-1)


def loss_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    rows: Tensor | None = None,
) -> Tensor:
    """The loss of `linear_cross_entropy` before it is divided; its arguments are not checked.

    Args:
        rows: `kept_rows(labels)`, if the caller knows them already.
    """
    device = hidden.device.type
    dtype = hidden.dtype
    # Autocast does not cast for an operator of our own, so the operator gets the dtype.
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    flat = hidden.reshape(-1, hidden.shape[-1])
    needs_grad = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden, weight, bias)
    ]
    arguments = (
        flat,
        weight,
        labels.reshape(-1),
        bias,
        softcap,
        float(scale),
        ignore_index,
        dtype,
        rows,
        needs_grad,
    )
    if any(needs_grad):
        total: Tensor = _ScaledInBackward.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        total = _forward(*arguments)[0]
    return total


def _operator_tags() -> dict[str, Any]:
    """The operator counts its rows on the host, which a CUDA graph cannot replay.

    torch 2.6 has no such tag; its compiler finds the `nonzero` by itself.
    """
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    takes_tags = "tags" in inspect.signature(torch.library.custom_op).parameters
    return {"tags": (tag,)} if tag is not None and takes_tags else {}


@torch.library.custom_op(
    "goldfish::linear_cross_entropy", mutates_args=(), **_operator_tags()
)
def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    ignore_index: int,
    dtype: torch.dtype,
    rows: Tensor | None,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of the nll, and its gradients for hidden (N, D), weight (V, D) and bias (V,).

    `needs_grad` is about those three; a gradient that is not needed is empty. It is one operator
    so that torch.compile does not look inside: the number of kept rows, which differs from batch to
    batch, would make it compile again.

    A chunk of rows goes through four steps, all in one buffer of logits:

        logits = part @ weight.T + bias        # (rows, V)
        nll, grad_logits = softmax(logits)     # overwrites the logits
        grad_hidden[index] = grad_logits @ weight
        grad_weight += grad_logits.T @ part
    """
    statistics = _statistics_dtype(dtype)
    vocabulary, width = weight.shape
    for_hidden, for_weight, for_bias = needs_grad
    rows = kept_rows(labels, ignore_index) if rows is None else rows
    labels = labels[rows].long()
    _check_range(labels, vocabulary)
    # Dropped rows keep a gradient of 0. The weight's gradient is summed over chunks, so it is fp32
    # even for a bf16 weight; it need not be zeroed, as the first chunk overwrites it.
    grad_hidden = torch.zeros_like(hidden) if for_hidden else hidden.new_empty(0)
    grad_weight = weight.new_empty(
        (vocabulary, width) if for_weight else 0, dtype=statistics
    )
    grad_bias = weight.new_zeros(vocabulary if for_bias else 0, dtype=statistics)
    nll = hidden.new_empty(len(rows), dtype=statistics)
    if len(rows) == 0:
        return nll.sum(), grad_hidden, grad_weight.zero_(), grad_bias
    # One buffer for all chunks: on a CPU a new one for each would be mapped and zeroed again.
    chunk = min(_chunk_rows(weight, dtype, for_weight), len(rows))
    pitch = _pitch(vocabulary, hidden.device.type)
    buffer = torch.empty(chunk, pitch, dtype=dtype, device=hidden.device)
    softmax = _row_kernel(hidden.device.type, dtype)
    # Triton launches on the current device, which need not be that of the tensors: a model that is
    # spread over several GPUs has its head on the last one.
    on_device = torch.cuda.device_of(hidden)  # type: ignore[no-untyped-call]
    with torch.autocast(hidden.device.type, enabled=False), on_device:
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        for begin in range(0, len(rows), chunk):
            here = slice(begin, begin + chunk)
            index = rows[here]
            part = hidden.index_select(0, index).to(dtype)
            logits = buffer[: len(index), :vocabulary]
            if bias is None:
                torch.mm(part, weight.T, out=logits)
            else:
                torch.addmm(bias, part, weight.T, out=logits)
            softmax(logits, labels[here], nll[here], scale, softcap, any(needs_grad))
            # From here on `logits` are their own gradients.
            if for_hidden:
                grad_hidden.index_copy_(0, index, (logits @ weight).to(hidden.dtype))
            if for_weight:
                _accumulate(grad_weight, logits, part, first=begin == 0)
            if for_bias:
                grad_bias += logits.sum(0, dtype=statistics)
    return nll.sum(), grad_hidden, grad_weight, grad_bias


@_forward.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden, weight, labels, bias, softcap, scale, ignore_index, dtype, rows, needs_grad
):
    statistics = _statistics_dtype(dtype)
    for_hidden, for_weight, for_bias = needs_grad
    return (
        hidden.new_empty((), dtype=statistics),
        hidden.new_empty(hidden.shape if for_hidden else 0),
        weight.new_empty(weight.shape if for_weight else 0, dtype=statistics),
        weight.new_empty(weight.shape[0] if for_bias else 0, dtype=statistics),
    )


class _ScaledInBackward(torch.autograd.Function):
    """Keeps the gradients that `_forward` computed; the backward pass scales them.

    They are sums over rows, not yet divided by the number of items: after that division fp16 would
    lose the small ones.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        hidden, weight, _, bias = arguments[:4]
        ctx.needs_grad = arguments[-1]
        total, *gradients = _forward(*arguments)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = (
            hidden.dtype,
            weight.dtype,
            weight.dtype if bias is None else bias.dtype,
        )
        return total  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() and not compiling:
            raise RuntimeError(
                "linear_cross_entropy has no second derivatives: call backward without "
                "create_graph=True, or compute cross_entropy on the logits"
            )
        # With retain_graph the backward pass may run again, so the saved tensors must stay as they
        # are. A torch that cannot tell is taken to retain the graph.
        keeps_graph = getattr(
            torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
        )
        in_place = not (compiling or keeps_graph())
        # One element in one dimension: as a 0-dim factor it would be rounded to the dtype of a
        # 16-bit gradient first (1/3001 in bf16, 70,000 in fp16).
        factor = grad.reshape(1)
        scaled = [
            _scale(gradient, factor, dtype, in_place) if wanted else None
            for wanted, gradient, dtype in zip(
                ctx.needs_grad, ctx.saved_tensors, ctx.dtypes, strict=True
            )
        ]
        return scaled[0], scaled[1], None, scaled[2], *[None] * 6


def _scale(
    gradient: Tensor,
    factor: Tensor,
    dtype: torch.dtype,
    in_place: bool,
) -> Tensor:
    """gradient * factor (1,), computed in factor's precision and rounded to dtype once.

    A GPU reads the gradient once and writes the result once: 6 bytes an element of an fp32
    gradient for a bf16 weight, 14 if the product is cast afterwards.
    """
    if in_place and gradient.dtype == dtype:
        return torch.mul(gradient, factor, out=gradient)
    if torch.compiler.is_compiling():  # the compiler fuses both
        return (gradient * factor).to(dtype)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_range(labels: Tensor, vocabulary: int) -> None:
    if labels.device.type == "cpu":
        wrong = labels[(labels < 0) | (labels >= vocabulary)]
        if len(wrong):
            raise IndexError(
                f"label {int(wrong[0])} is outside the vocabulary of {vocabulary} ids "
                f"(0 ... {vocabulary - 1}); {len(wrong)} of {len(labels)} kept labels are. "
                "Was the model resized for this tokenizer?"
            )
    elif labels.device.type == "cuda":
        within = ((labels >= 0) & (labels < vocabulary)).all()
        torch._assert_async(
            within, f"a label is outside the vocabulary of {vocabulary} ids"
        )


def _chunk_rows(weight: Tensor, dtype: torch.dtype, for_weight: bool) -> int:
    """How many rows of logits exist at a time: few save memory, many keep the products efficient.

    On a CPU with a vocabulary of 32,000: 2**27 / 32,000 / 4 bytes = 1,048 rows in fp32.

    On a GPU, if the weight is trained: each chunk reads and writes the fp32 gradient of the weight,
    4 V D bytes each way, and its logits several times, V bytes times rows and itemsize. The chunk
    is so large that its logits are as many bytes as that gradient. With D = 2048 in bf16:
    4 * 2048 / 2 = 4,096 rows.
    """
    vocabulary, width = weight.shape
    if weight.device.type == "cpu":
        return max(128, min(2048, _CHUNK_CPU // vocabulary) // dtype.itemsize)
    # A frozen head (LoRA) has no such gradient; 1,024 rows are assumed to fill a GPU.
    if not for_weight:
        return 1024
    return min(4096, max(1024, 4 * width // dtype.itemsize))


def _pitch(vocabulary: int, device: str) -> int:
    """The elements from one row of logits to the next.

    On a GPU a multiple of 16, so that every row begins at an address that vector loads accept and
    cuBLAS has its fast kernels, whatever the vocabulary: GPT-2's 50,257 logits lie in rows of
    50,272.
    """
    return -(-vocabulary // 16) * 16 if device == "cuda" else vocabulary


def _accumulate(
    total: Tensor,
    grad_logits: Tensor,
    part: Tensor,
    first: bool,
) -> None:
    """total += grad_logits.T @ part, in total's precision; (V, D), (rows, V) and (rows, D).

    `first`: total is not initialised yet, and is overwritten.
    """
    # With beta = 0 addmm does not read `total`, which may be NaN before it is initialised.
    beta = 0 if first else 1
    if grad_logits.dtype == total.dtype:
        torch.addmm(total, grad_logits.T, part, beta=beta, out=total)
        return
    if _adds_into(total.dtype, part.dtype, total.device):
        # bf16 in, fp32 out: cuBLAS adds its fp32 sums to `total` without rounding them to bf16.
        torch.addmm(total, grad_logits.T, part, total.dtype, beta=beta, out=total)
        return
    # Here the product of a chunk is rounded to 16 bits before it is added. With 4,096 kept rows in
    # 8 chunks that is 8 roundings, each of at most one part in 256 (bf16) of its own chunk's sum;
    # added up in bf16 throughout, each would be of the whole sum so far.
    # The product (V, D) is made in blocks of rows, so that a block is still in the cache when it is
    # added: with D = 512, 2,048 of 32,000 rows at a time.
    limit = _PRODUCT_BLOCK.get(total.device.type, _PRODUCT_BLOCK["other"])
    block = max(256, limit // (part.shape[1] * part.dtype.itemsize))
    for begin in range(0, len(total), block):
        product = grad_logits[:, begin : begin + block].T @ part
        here = total[begin : begin + block]
        if first:
            here.copy_(product)
        else:
            here.add_(product)


@cache
def _adds_into(total: torch.dtype, part: torch.dtype, device: torch.device) -> bool:
    """Whether `addmm` adds a 16-bit product to an fp32 matrix on this device.

    CUDA can since torch 2.8. Neither a CPU nor every version of ROCm can, so it is tried.
    """
    sums = torch.zeros(16, 16, dtype=total, device=device)
    product = torch.zeros(16, 16, dtype=part, device=device)
    try:
        torch.addmm(sums, product, product, total, beta=1, out=sums)
    except (TypeError, RuntimeError):  # an unknown argument; not implemented
        return False
    return True


@cache
def _row_kernel(device: str, dtype: torch.dtype) -> Callable[..., None]:
    if device == "cuda" and dtype != torch.float64:
        with suppress(ImportError):  # torch for Windows comes without Triton
            from goldfish.kernels import softmax_rows

            return softmax_rows
    return _softmax_rows


def _softmax_rows(
    logits: Tensor,
    labels: Tensor,
    nll: Tensor,
    scale: float,
    softcap: float | None,
    grad: bool,
) -> None:
    """Write each row's nll; if `grad`, overwrite the logits (rows, V) by the gradient of the nll.

    With z = softcap * tanh(scale * logit / softcap) and p = softmax(z), the gradient for a logit is

        (p - 1[label]) * (1 - (z / softcap)**2) * scale

    Each pass covers a few rows at a time, so that all passes but the first find them in the cache.
    """
    bytes_at_once = _SOFTMAX_BLOCK["other"]
    if logits.device.type == "cpu":
        bytes_at_once = _SOFTMAX_BLOCK["cpu"] * torch.get_num_threads()
    block = max(1, bytes_at_once // (logits.shape[1] * nll.dtype.itemsize))
    scratch = None
    if logits.dtype != nll.dtype:
        scratch = torch.empty_like(logits[:block], dtype=nll.dtype)
    for begin in range(0, len(logits), block):
        here = logits[begin : begin + block]
        label = labels[begin : begin + block, None]
        x = here if scratch is None else scratch[: len(here)].copy_(here)
        # x becomes z. The slope of the cap, 1 - tanh**2, is kept for the gradient.
        slope = None
        if scale != 1:
            x.mul_(scale)
        if softcap is not None:
            x.div_(softcap).tanh_()
            slope = 1 - x * x if grad else None
            x.mul_(softcap)
        # x becomes z - max(z), then its exponential. The label's entry is read in between: its
        # logarithm afterwards would have lost its digits, or be log 0.
        x.sub_(x.amax(1, keepdim=True))
        target = x.gather(1, label)
        total = x.exp_().sum(1, keepdim=True)
        nll[begin : begin + block] = (total.log() - target).squeeze(1)
        if not grad:
            continue
        # x becomes (p - 1[label]) * scale, and the slope is applied last.
        x.mul_(scale / total)
        x.scatter_add_(1, label, torch.full_like(target, -scale))
        if slope is not None:
            x.mul_(slope)
        if x is not here:
            here.copy_(x)
