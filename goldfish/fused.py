"""Compute a Hugging Face model's training loss with `linear_cross_entropy`, without copying its forward.

The head computes the loss of the kept tokens itself and returns a probe instead of logits; the model's loss function
returns the sum that the head computed, divided. Where that is not known to be right, the model's own forward runs.
"""

import inspect
import logging
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from goldfish.linear import divisor, linear_cross_entropy
from goldfish.masking import IGNORE_INDEX

HANDLE = "_goldfish_fused_head"  # the attribute under which a model holds its FusedHead
_log = logging.getLogger(__name__)
# Far enough apart to tell a bound from a factor, close enough (a factor of four) to tell tanh from any other bound.
_PROBE = (*((-4.0) ** i / 16 for i in range(13)), 2.0**-40, -(2.0**20), 2.0**20)

# torch.compile runs the frames of these as plain Python and compiles the model's own forward, which they call.
_between_graphs: Any = torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call]
_never_compiled: Any = torch.compiler.disable()  # type: ignore[no-untyped-call]


def fuse_head(model: nn.Module) -> "FusedHead":
    """Compute the training loss of `model` inside its head, for the kept tokens only and without logits.

    From then on `model(input_ids=..., labels=...)` in training mode returns the same loss and no logits: a dropped
    token costs no head, no softmax and no memory. Evaluation, generation and calls without labels are unchanged.
    The first training call is preceded by one forward of the same batch without gradient, in which a probe takes the
    place of the logits: it shows what the model does after its head (soft cap, scale). Where that, or anything else,
    is not known to be right, the model's own forward runs, and the log and the handle say why, once.

    Args:
        model: a causal language model of transformers, bare or inside PEFT, DDP, FSDP or torch.compile. Not
            nn.DataParallel, whose replicas share one forward.

    Returns:
        A handle: `handle.reason`, `handle.remove()`. Calling fuse_head again returns the same handle.

    Raises:
        TypeError: for a model that is not a causal language model of transformers; use linear_cross_entropy there.
        ValueError: for nn.DataParallel.
    """
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "fuse_head cannot patch nn.DataParallel: its replicas share one forward. "
            "Use one process per GPU (torchrun), or fused=False"
        )
    base = bare_model(model)
    if not all(
        hasattr(base, name) for name in ("get_output_embeddings", "loss_function", "config")
    ):
        raise TypeError(
            f"fuse_head needs a causal language model of transformers, got {type(base).__name__}; "
            "in a model of your own call linear_cross_entropy(hidden, head.weight, labels)"
        )
    handle = base.__dict__.get(HANDLE)
    return handle if isinstance(handle, FusedHead) else FusedHead(base)


@dataclass
class _Call:
    """One training forward: what its head and its loss function need, and what they saw."""

    targets: Tensor  # labels aligned with the logits
    shift_labels: Tensor | None  # what the forward must pass on to its loss function
    loss_sum: Tensor | None = None
    logits: Tensor | None = None  # as they reached the loss function
    heads: int = 0
    losses: int = 0
    problem: str = ""


class FusedHead:
    """The handle of `fuse_head`; it stands in for the model's forward.

    Attributes: `reason`, why the loss is not fused; empty if it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._own = {
            name: model.__dict__[name]
            for name in ("forward", "_loss_function")
            if name in model.__dict__
        }
        self._forward: Callable[..., Any] = model.forward
        self._plain_loss: Any = model.loss_function
        self.__signature__ = inspect.signature(model.forward)  # Trainer and generate() read it
        self._names = list(self.__signature__.parameters)
        self._heads: list[nn.Linear] = []
        self._call: _Call | None = None
        self._scale, self._softcap = 1.0, None  # type: float, float | None
        self._active, self.reason = True, ""
        self._adopt_head()
        model.__dict__ |= {HANDLE: self, "forward": self, "_loss_function": self._loss}

    def remove(self) -> None:
        """Give the model its own forward, head and loss function back."""
        self._active = False
        self._release_heads()
        model = self._model
        model.__dict__.pop(HANDLE, None)
        for name, ours in (("forward", self), ("_loss_function", self._loss)):
            if (
                model.__dict__.get(name) == ours
            ):  # else someone wrapped it: from now on it only passes through
                del model.__dict__[name]
                model.__dict__ |= {name: self._own[name]} if name in self._own else {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedHead":
        if (
            id(self._model) not in memo
        ):  # PEFT copies a head alone: that copy still belongs to this model
            return self
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
        if (
            not self.reason and inputs.get("past_key_values") is not None
        ):  # the proof would add to the cache
            self._fall_back("it is called with past_key_values (prefix tuning?)")
        elif not (self.reason or self._proved):
            self._prove(inputs)
        output = None if self.reason else self._fused(inputs)
        return self._forward(**inputs) if output is None else output

    def _trains(self, inputs: dict[str, Any]) -> bool:
        to_keep = inputs.get("logits_to_keep")
        return (
            inputs.get("labels") is not None
            and self._model.training
            and torch.is_grad_enabled()
            and (to_keep is None or (isinstance(to_keep, int) and to_keep == 0))
        )

    @_never_compiled  # type: ignore[untyped-decorator]
    def _prove(self, inputs: dict[str, Any]) -> None:
        """Find the scale and the soft cap by one forward without gradient and without loss, or fall back."""
        gpus = {parameter.device for parameter in self._model.parameters() if parameter.is_cuda}
        with (
            torch.no_grad(),
            torch.random.fork_rng(gpus),
        ):  # the training step draws the dropout that it would draw
            call, _ = self._run(inputs)
        torch.clear_autocast_cache()  # it now holds weights that were cast without a gradient
        after_head = None if self.reason else read_probe(call.logits)
        if after_head is not None:
            (self._scale, self._softcap), self._proved = after_head, True
        elif not self.reason:
            self._fall_back(
                "the model does something to its logits that is neither a scale nor a soft cap"
            )

    @_between_graphs  # type: ignore[untyped-decorator]
    def _fused(self, inputs: dict[str, Any]) -> Any:
        """The model's output without logits; None after a fall back."""
        call, output = self._run(inputs)
        if output is None or call.logits is None:
            return None
        if call.logits.requires_grad:
            return self._fall_back("a parameter that is trained changes its logits")
        # From a graph the probe comes on the model's device: reading it there would make a GPU wait in every step.
        eager = call.logits.device.type == "cpu" and not torch.compiler.is_compiling()
        if eager and read_probe(call.logits) != (self._scale, self._softcap):
            return self._fall_back(
                "what the model does to its logits has changed since the first step"
            )
        # Without the probe in the place of the logits: reading them must fail, not give numbers.
        if isinstance(output, dict):
            return type(output)(
                **{name: value for name, value in output.items() if name != "logits"}
            )
        return tuple(None if value is call.logits else value for value in output)

    @_between_graphs  # type: ignore[untyped-decorator]
    def _run(self, inputs: dict[str, Any]) -> tuple[_Call, Any]:
        """One forward, and its output; None after a fall back, because of what head and loss function saw."""
        shifted = inputs.get(
            "shift_labels"
        )  # as transformers' own loss aligns labels, if nobody did
        targets = (
            nn.functional.pad(inputs["labels"], (0, 1), value=IGNORE_INDEX)[..., 1:]
            if shifted is None
            else shifted
        )
        call = self._call = _Call(targets, shifted)
        try:
            output = self._forward(**inputs)
        except Exception as error:
            if call.heads == 0:  # not because of what the head returned
                raise
            call.problem = (
                f"its forward failed on what the head returned ({type(error).__name__}: {error})"
            )
        finally:
            self._call = None
        if not call.problem and (call.heads, call.losses) != (1, 1):
            call.problem = f"its forward called its head {call.heads} times and its loss function {call.losses} times"
        if call.problem:
            self._fall_back(call.problem)
        return call, None if call.problem else output

    @_never_compiled  # type: ignore[untyped-decorator]
    def _adopt_head(self) -> None:
        """Patch the head's linear layers, or fall back if they are not known."""
        self._release_heads()
        self._head = head = self._model.get_output_embeddings()  # type: ignore[operator]
        self._proved, self.reason = False, ""
        # PEFT's modules_to_save holds several layers; one of them runs.
        wrapped = hasattr(head, "original_module") and hasattr(head, "modules_to_save")
        linears = [head.original_module, *head.modules_to_save.values()] if wrapped else [head]
        problem = self._why_not_this_model() or next(
            filter(None, map(_why_not_this_head, linears)), ""
        )
        if problem:
            self._fall_back(problem)
            return
        self._heads = linears
        for linear in linears:
            linear.forward = partial(self._project, linear)

    def _release_heads(self) -> None:
        for linear in self._heads:
            linear.__dict__.pop("forward", None)
        self._heads = []

    def _why_not_this_model(self) -> str:
        from transformers.loss.loss_utils import ForCausalLMLoss

        # accelerate's autocast wrapper leaves the second attribute beside the forward that it wraps
        if "forward" in self._own and "_original_forward" not in self._model.__dict__:
            return "its forward is patched already (by another fused loss?)"
        name = type(self._model).__name__
        own = self._plain_loss is not ForCausalLMLoss
        return (
            f"the loss function of {name} is not transformers' causal language model loss"
            if own
            else ""
        )

    def _fall_back(self, reason: str) -> None:
        """From now on the model's own forward runs; the log says why."""
        self._release_heads()
        self.reason = reason
        name = type(self._model).__name__
        _log.warning(
            "The loss of %s is not fused: %s. Its own head and loss run on all tokens.",
            name,
            reason,
        )

    def _project(self, linear: nn.Linear, hidden: Tensor) -> Tensor:
        """The head's forward: in a training call the loss is computed here, where sharded weights are gathered."""
        call = self._call
        if call is None:
            return nn.functional.linear(hidden, linear.weight, linear.bias)
        call.problem = call.problem or _why_not_this_call(linear, hidden, call)
        if self._proved and not call.problem:
            call.loss_sum = linear_cross_entropy(
                hidden,
                linear.weight,
                call.targets.to(hidden.device),
                linear.bias,
                num_items=1,
                softcap=self._softcap,
                scale=self._scale,
            )
        call.heads += 1
        if call.problem:
            return nn.functional.linear(hidden, linear.weight, linear.bias)
        # On the CPU in eager mode: reading it later makes no GPU wait.
        width = min(8, linear.out_features) if self._proved else linear.out_features
        device = hidden.device if torch.compiler.is_compiling() else torch.device("cpu")
        return torch.tensor(_PROBE, dtype=torch.float64, device=device)[None, :, None].repeat(
            1, 1, width
        )

    def _loss(
        self, logits: Tensor, labels: Tensor, vocab_size: int, *args: Any, **kwargs: Any
    ) -> Any:
        """The model's loss function: in a training call, the sum that the head computed, divided."""
        call = self._call
        if call is None or call.heads == 0:
            return self._plain_loss(logits, labels, vocab_size, *args, **kwargs)
        call.losses += 1
        call.logits = logits
        if args or kwargs.get("ignore_index", IGNORE_INDEX) != IGNORE_INDEX:
            call.problem = "its loss function gets arguments that are not known"
        elif kwargs.get("shift_labels") is not call.shift_labels:
            call.problem = "its forward does not pass shift_labels on to its loss function"
        elif any(vocab_size != linear.out_features for linear in self._heads):
            call.problem = f"its loss function expects {vocab_size} logits, the head has {self._heads[0].out_features}"
        if call.loss_sum is None:
            return torch.zeros((), device=labels.device)
        count = (call.targets != IGNORE_INDEX).sum().to(call.loss_sum.device)
        return call.loss_sum / divisor(count, kwargs.get("num_items_in_batch"))


def bare_model(model: Any) -> Any:
    """The transformers model inside torch.compile, DDP, FSDP, DeepSpeed and PEFT."""
    while True:
        if "_orig_mod" in getattr(model, "_modules", {}):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        # DeepSpeed's engine answers for its module's attributes, so look at the class.
        elif "module" in getattr(model, "_modules", {}) and not hasattr(
            type(model), "get_output_embeddings"
        ):
            model = model.module
        else:
            return model


@_never_compiled  # type: ignore[untyped-decorator]
def read_probe(logits: Tensor | None) -> tuple[float, float | None] | None:
    """The (scale, softcap) that turn the probe into `logits`; None if nothing of that kind does."""
    x = torch.tensor(_PROBE, dtype=torch.float64)
    if (
        logits is None
        or logits.requires_grad
        or logits.ndim != 3
        or logits.shape[:2] != (1, len(x))
    ):
        return None
    y = logits[0].double().cpu()
    if not (logits.is_floating_point() and y.isfinite().all() and (y == y[:, :1]).all()):
        return None
    y = y[:, 0]
    small, bound = x.abs().argmin(), y[-1]
    scale = y[small] / x[small]
    if scale != 0 and torch.allclose(y, scale * x, rtol=1e-6, atol=0):
        return scale.item(), None
    if (
        scale > 0
        and bound > 0
        and torch.allclose(y, bound * torch.tanh(scale * x / bound), rtol=2e-6, atol=0)
    ):
        return scale.item(), bound.item()
    return None


def _why_not_this_head(head: nn.Module) -> str:
    # FSDP makes subclasses, which keep the forward; quantised and LoRA layers have their own.
    if getattr(type(head), "forward", None) is not nn.Linear.forward:
        return f"its head is a {type(head).__module__}.{type(head).__name__}, not a plain nn.Linear"
    patch = head.__dict__.get("forward")
    if patch is not None and not isinstance(
        getattr(getattr(patch, "func", None), "__self__", None), FusedHead
    ):
        return "the forward of its head is patched already"
    return ""


def _why_not_this_call(linear: nn.Linear, hidden: Tensor, call: _Call) -> str:
    if hasattr(linear.weight, "ds_id"):
        return "DeepSpeed ZeRO-3 gathers its head when the gradient of logits arrives, and there are no logits"
    if type(linear.weight) not in (Tensor, nn.Parameter):
        return f"the weight of its head is a {type(linear.weight).__name__} (tensor parallel?)"
    if hidden.shape[:-1] != call.targets.shape:
        return f"its head sees rows {tuple(hidden.shape[:-1])}, the labels are {tuple(call.targets.shape)}"
    return ""
