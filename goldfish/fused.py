"""Put `linear_cross_entropy` inside a Hugging Face causal language model, without copying its forward.

Three tiers, best first; each gives the loss of the model's own forward on the same labels:
    2  the head computes the loss of the kept rows itself and no logits exist;
    1  the model's own head and loss, on the kept rows only (`logits_to_keep`);
    0  the model's own forward, unchanged.
"""

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from goldfish.kept import (
    HANDLE,
    IGNORED,
    KeptRows,
    bare_model,
    kept_rows_only,
    shifted_labels,
    why_not_kept_rows_only,
    why_not_this_loss,
)
from goldfish.linear import divisor, linear_cross_entropy

_log = logging.getLogger(__name__)
# Far enough apart to tell a bound from a factor, close enough (a factor of four) to tell tanh from any other bound.
_PROBE = (*((-4.0) ** i / 16 for i in range(13)), 2.0**-40, -(2.0**20), 2.0**20)


# torch.compile runs the frames of these as plain Python and compiles the model's own forward, which they call.
_between_graphs: Any = torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call]
_never_compiled: Any = torch.compiler.disable()  # type: ignore[no-untyped-call]


def fuse_head(model: nn.Module) -> "FusedHead":
    """Compute the training loss of `model` inside its head, for the kept tokens only, without logits (tier 2).

    From then on `model(input_ids=..., labels=...)` in training mode returns the same loss and no logits, so a dropped
    token costs no head, no softmax and no memory. Evaluation, generation and calls without labels are unchanged.
    What the model does after its head (soft cap, scale) is read off a probe that takes the logits' place, at every
    call; where that or anything else is not known to be right, the model falls back to tier 1 or 0 and says why, once,
    in the log and in the handle. torch.compile works as it is; with fullgraph=True, take one eager step before it.

    Args:
        model: a causal language model of transformers, bare or inside PEFT, DDP, FSDP or torch.compile. Not
            nn.DataParallel, whose replicas share one forward.

    Returns:
        A handle: `handle.tier`, `handle.reason`, `handle.remove()`; as a context manager it removes itself at the end.
        Calling fuse_head again returns the same handle.

    Raises:
        TypeError: for a model that is not a causal language model of transformers; linear_cross_entropy serves those.
        ValueError: for nn.DataParallel.
    """
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "fuse_head cannot patch nn.DataParallel: its replicas share one forward. "
            "Use one process per GPU (torchrun), or fused=False"
        )
    base = bare_model(model)
    if not all(hasattr(base, name) for name in ("get_output_embeddings", "loss_function", "config")):
        raise TypeError(
            f"fuse_head needs a causal language model of transformers, got {type(base).__name__}; "
            "in a model of your own call linear_cross_entropy(hidden, head.weight, labels)"
        )
    handle = base.__dict__.get(HANDLE)
    return handle if isinstance(handle, FusedHead) else FusedHead(base)


@dataclass
class _Call:
    """What one training forward tells head and loss, and what they found."""

    targets: Tensor
    shift_labels: Tensor | None
    rows: KeptRows
    width: int | None  # of the probe; None: the whole vocabulary
    loss_sum: Tensor | None = None
    seen: Tensor | None = None  # the probe, as it reached the loss
    heads: int = 0
    losses: int = 0
    problem: str = ""


class FusedHead:
    """The handle of `fuse_head`; it stands in for the model's forward.

    Attributes:
        tier: 2, 1 or 0, as in this module's first lines.
        reason: why it is not 2; empty if it is.
    """

    tier: int
    reason: str

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._instance_forward = model.__dict__.get("forward")
        self._forward: Callable[..., Any] = model.forward
        self._loss_function = model.__dict__.get("_loss_function")
        self._plain_loss: Any = model.loss_function
        self.__signature__ = inspect.signature(model.forward)  # Trainer and generate() read it
        self._names = list(self.__signature__.parameters)
        self._heads: list[nn.Linear] = []
        self._head: nn.Module | None = None
        self._call: _Call | None = None
        self._scale, self._softcap = 1.0, None  # type: float, float | None
        self._proved = False
        self._active = True
        self._adopt_head()
        model.__dict__ |= {HANDLE: self, "forward": self, "_loss_function": self._loss}

    def remove(self) -> None:
        """Give the model its own forward, head and loss back."""
        self._active = False
        self._release_heads()
        model = self._model
        model.__dict__.pop(HANDLE, None)
        if model.__dict__.get("forward") is self:  # else someone wrapped it: from now on it only passes through
            _restore(model, "forward", self._instance_forward)
        if model.__dict__.get("_loss_function") == self._loss:
            _restore(model, "_loss_function", self._loss_function)

    def __enter__(self) -> "FusedHead":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedHead":
        if id(self._model) not in memo:  # PEFT copies a head alone: that copy still belongs to this model
            return self
        from copy import deepcopy

        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update(deepcopy(self.__dict__, memo))
        return twin

    @_between_graphs  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self._model:  # accelerate binds a forward that it unwraps
            args = args[1:]
        inputs = dict(zip(self._names, args, strict=False)) | kwargs
        if not (self._active and self._trains(inputs)):
            return self._forward(*args, **kwargs)
        if self._model.get_output_embeddings() is not self._head:  # type: ignore[operator]
            self._adopt_head()
        if self.tier == 2 and hasattr(getattr(self._head, "weight", None), "ds_id"):
            self._fall_back("DeepSpeed ZeRO-3 gathers its head when the gradient of logits arrives, and there are none")
        if self.tier == 2:
            random = None if self._proved else _random_state()
            for _ in range(2):  # again if the first try found a scale or a soft cap
                output = self._fused(inputs)
                if output is not None:
                    return output
                if random is not None:  # the next try draws the same dropout
                    _set_random_state(random)
                if self.tier < 2:
                    break
            else:
                self._fall_back("what the model does to its logits differs from call to call")
        if self.tier == 1:
            return self._kept_rows(inputs)
        return self._forward(**inputs)

    def _trains(self, inputs: dict[str, Any]) -> bool:
        to_keep = inputs.get("logits_to_keep")
        return (
            inputs.get("labels") is not None
            and self._model.training
            and torch.is_grad_enabled()
            and (to_keep is None or (isinstance(to_keep, int) and to_keep == 0))
        )

    @_between_graphs  # type: ignore[untyped-decorator]
    def _fused(self, inputs: dict[str, Any]) -> Any:
        """The model's output without logits; None if what was learned on the way asks for another try."""
        targets = shifted_labels(inputs)
        call = _Call(targets, inputs.get("shift_labels"), KeptRows(targets), 8 if self._proved else None)
        self._call = call
        try:
            output = self._forward(**inputs)
        except Exception as error:
            if call.loss_sum is None:  # not the probe's doing
                raise
            return self._fall_back(f"the forward failed on what the head returned ({type(error).__name__}: {error})")
        finally:
            self._call = None
        if call.problem or (call.heads, call.losses) != (1, 1):
            return self._fall_back(
                call.problem or f"the forward called its head {call.heads} times and its loss {call.losses} times"
            )
        assert call.seen is not None
        # Inside a graph, or on CUDA (which is where a graph leaves it), it is read the first time only: that waits.
        if not self._proved or (call.seen.device.type == "cpu" and not torch.compiler.is_compiling()):
            found = read_probe(call.seen)
            if found is None:
                return self._fall_back("the model does something to its logits that is neither a scale nor a soft cap")
            if found != (self._scale, self._softcap):
                (self._scale, self._softcap), self._proved = found, False
                return None
            self._proved = True
        return _without(output, call.seen)

    @_between_graphs  # type: ignore[untyped-decorator]
    def _kept_rows(self, inputs: dict[str, Any]) -> Any:
        """The output of tier 1; of tier 0 if the model turns out not to do that."""
        try:
            output = self._forward(**kept_rows_only(self._model, inputs))
        except Exception as error:
            if self._proved:
                raise
            output = self._forward(**inputs)  # if the inputs are at fault, this says so
            self._fall_back(f"{self.reason}; and its forward fails on kept rows ({type(error).__name__}: {error})", 0)
        self._proved = True
        return output

    @_never_compiled  # type: ignore[untyped-decorator]
    def _adopt_head(self) -> None:
        """Patch the head's linear layers, or step down if they are not known."""
        self._release_heads()
        self._head = self._model.get_output_embeddings()  # type: ignore[operator]
        self._proved, self.tier, self.reason = False, 2, ""
        linears = _linears(self._head)
        problem = self._why_not_this_model() or next(filter(None, map(_why_not_this_head, linears)), "")
        if problem:
            self._fall_back(problem)
            return
        self._heads = linears
        for linear in linears:
            linear.forward = partial(self._project, linear)

    def _release_heads(self) -> None:
        for linear in self._heads:
            _restore(linear, "forward", None)
        self._heads = []

    def _why_not_this_model(self) -> str:
        # accelerate's autocast wrapper leaves the second attribute beside the forward that it wraps
        if self._instance_forward is not None and "_original_forward" not in self._model.__dict__:
            return "its forward is patched already (by another fused loss?)"
        return why_not_this_loss(self._model)

    def _fall_back(self, reason: str, tier: int = 1) -> None:
        """To tier 1, or to 0 where that is not possible either; says so once."""
        self._release_heads()
        self._proved = False
        if tier == 0 or self._why_not_this_model():
            self.tier, self.reason = 0, reason
        else:
            no_rows = why_not_kept_rows_only(self._model)
            self.tier, self.reason = (0, f"{reason}; and {no_rows}") if no_rows else (1, reason)
        instead = ("its own forward on all rows", "its own head and loss on the kept rows")[self.tier]
        _log.warning("The loss of %s is not fused: %s. It uses %s.", type(self._model).__name__, self.reason, instead)

    def _project(self, linear: nn.Linear, hidden: Tensor) -> Tensor:
        """The head's forward: in a training call the loss is computed here, where the weights are gathered."""
        call = self._call
        if call is not None:
            call.heads += 1
            problem = _why_not_this_call(linear, hidden, call)
            if problem:
                call.problem = call.problem or problem
            else:
                rows = None if torch.compiler.is_compiling() else call.rows.indices(hidden.device)
                call.loss_sum = linear_cross_entropy(
                    hidden,
                    linear.weight,
                    call.targets.to(hidden.device),
                    linear.bias,
                    num_items=1,
                    softcap=self._softcap,
                    scale=self._scale,
                    rows=rows,
                )
                # On the CPU in eager mode: reading it later makes no GPU wait.
                device = hidden.device if torch.compiler.is_compiling() else torch.device("cpu")
                return probe(min(call.width or linear.out_features, linear.out_features), device)
        return nn.functional.linear(hidden, linear.weight, linear.bias)

    def _loss(self, logits: Tensor, labels: Tensor, vocab_size: int, *args: Any, **kwargs: Any) -> Any:
        """The model's loss function: in a training call, the sum that the head left, divided."""
        call = self._call
        if call is None or call.loss_sum is None:
            return self._plain_loss(logits, labels, vocab_size, *args, **kwargs)
        call.losses += 1
        call.seen = logits
        if args or kwargs.get("ignore_index", IGNORED) != IGNORED:
            call.problem = "its loss has arguments that are not known"
        elif kwargs.get("shift_labels") is not call.shift_labels:
            call.problem = "its forward does not hand shift_labels to the loss"
        elif any(vocab_size != linear.out_features for linear in self._heads):
            call.problem = f"its loss expects {vocab_size} logits, the head has {self._heads[0].out_features}"
        count = (call.targets != IGNORED).sum().to(call.loss_sum.device)
        return call.loss_sum / divisor(count, kwargs.get("num_items_in_batch"))


def probe(width: int, device: torch.device) -> Tensor:
    """fp64 (1, len(_PROBE), width): stands in for logits, to see what the model does to them."""
    return torch.tensor(_PROBE, dtype=torch.float64, device=device)[None, :, None].repeat(1, 1, width)


@_never_compiled  # type: ignore[untyped-decorator]
def read_probe(seen: Tensor) -> tuple[float, float | None] | None:
    """The (scale, softcap) that turn the probe into `seen`; None if nothing of that kind does."""
    x = torch.tensor(_PROBE, dtype=torch.float64)
    if seen.requires_grad or seen.ndim != 3 or seen.shape[:2] != (1, len(x)) or not seen.is_floating_point():
        return None
    y = seen[0].double().cpu()
    if not (y.isfinite().all() and (y == y[:, :1]).all()):
        return None
    y = y[:, 0]
    small, bound = x.abs().argmin(), y[-1]
    scale = y[small] / x[small]
    if scale != 0 and torch.allclose(y, scale * x, rtol=1e-6, atol=0):
        return scale.item(), None
    if scale > 0 and bound > 0 and torch.allclose(y, bound * torch.tanh(scale * x / bound), rtol=2e-6, atol=0):
        return scale.item(), bound.item()
    return None


def _linears(head: Any) -> list[Any]:
    """The layers that may run when the head is called: itself, or what PEFT's modules_to_save holds."""
    if hasattr(head, "original_module") and hasattr(head, "modules_to_save"):
        return [head.original_module, *head.modules_to_save.values()]
    return [head]


def _why_not_this_head(head: nn.Module) -> str:
    # FSDP makes subclasses, which keep the forward; quantised and LoRA layers have their own.
    if getattr(type(head), "forward", None) is not nn.Linear.forward:
        return f"its head is a {type(head).__module__}.{type(head).__name__}, not a plain nn.Linear"
    if "forward" in head.__dict__ and not (
        isinstance(head.__dict__["forward"], partial)
        and isinstance(getattr(head.__dict__["forward"].func, "__self__", None), FusedHead)
    ):
        return "the forward of its head is patched already"
    return ""


def _why_not_this_call(linear: nn.Linear, hidden: Tensor, call: _Call) -> str:
    if call.heads > 1:
        return "the forward calls its head more than once"
    if type(linear.weight) not in (Tensor, nn.Parameter):
        return f"its head's weight is a {type(linear.weight).__name__} (tensor parallel?)"
    if hidden.shape[:-1] != call.targets.shape:
        return f"its head sees rows {tuple(hidden.shape[:-1])}, the labels are {tuple(call.targets.shape)}"
    return ""


def _without(output: Any, logits: Tensor | None) -> Any:
    """The output without the probe in the place of its logits: reading them must fail, not give numbers."""
    if isinstance(output, dict):
        return type(output)(**{k: v for k, v in output.items() if k != "logits"})
    return tuple(None if x is logits else x for x in output)


def _restore(module: nn.Module, name: str, value: Any) -> None:
    module.__dict__.pop(name, None)
    if value is not None:
        module.__dict__[name] = value


def _random_state() -> list[Tensor]:
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if on_gpu else [])]


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])
