"""Compute a Hugging Face model's training loss with `linear_cross_entropy`, by patching its head.

No forward of transformers is copied. In a training call three things happen inside the model's own
forward:

1. The head (`lm_head`) computes the loss of the kept tokens itself. Instead of logits it returns a
   *probe*: a few known numbers in the shape of logits.
2. The model does to the probe what it does to its logits: nothing, a scale, a soft cap.
3. The loss function gets the probe, and returns the sum that the head computed, divided.

The first training call is preceded by one forward without gradient, in which the probe is read back
(`read_probe`): this shows which scale and which soft cap the loss must include. Wherever that, or
anything else, is not known to be right, the model's own head and loss run (`_fall_back`).
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

from goldfish.linear import divisor, kept_rows, loss_sum
from goldfish.masking import IGNORE_INDEX
from goldfish.unwrap import bare_model

HANDLE = "_goldfish_fused_head"  # the attribute of a model that is its FusedHead
_log = logging.getLogger(__name__)
# The numbers of the probe, in fp64:
#
#     0.0625  -0.25  1  -4  16  -64  ...  2**20    2**-40    -2**20  2**20
#
# A soft cap is found from the last, which tanh maps to the cap itself; a scale from 2**-40, where
# tanh is the identity. The first 13 go in factors of -4: close enough to tell tanh from any other
# bound, far enough apart to cover any cap. -2**20 tells a bound on both sides from one on one side.
_PROBE = (*((-4.0) ** i / 16 for i in range(13)), 2.0**-40, -(2.0**20), 2.0**20)

# torch.compile runs a function with the first decorator as plain Python, and compiles the model's
# own forward that it calls; with the second, nothing inside it is compiled.
_between_graphs: Any = torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call]
_never_compiled: Any = torch.compiler.disable()  # type: ignore[no-untyped-call]


def fuse_head(model: nn.Module) -> "FusedHead":
    """Compute the training loss of `model` inside its head, for the kept tokens only.

    From then on `model(input_ids=..., labels=...)` in training mode returns the same loss and no
    logits: a dropped token costs no head, no softmax and no memory. Evaluation, generation and
    calls without labels are unchanged. Where the loss is not known to be the same, the model's own
    forward runs; the log and `handle.reason` say why, once.

    Args:
        model: a causal language model of transformers, bare or inside PEFT, DDP, FSDP or
            torch.compile. Not nn.DataParallel, whose replicas share one forward.

    Returns:
        A handle with `reason` (empty if the loss is fused) and `remove()`. Another call returns
        the same handle.

    Raises:
        TypeError: not a causal language model of transformers; call linear_cross_entropy there.
        ValueError: nn.DataParallel.

    >>> import torch, transformers
    >>> from goldfish import fuse_head
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> config = transformers.LlamaConfig(vocab_size=16, **sizes)
    >>> model = transformers.LlamaForCausalLM(config).train()
    >>> ids = torch.tensor([[3, 1, 4, 1, 5]])
    >>> plain = model(input_ids=ids, labels=ids)
    >>> handle = fuse_head(model)
    >>> fused = model(input_ids=ids, labels=ids)
    >>> torch.allclose(fused.loss, plain.loss), "logits" in fused
    (True, False)
    >>> handle.remove()
    """
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "fuse_head cannot patch nn.DataParallel: its replicas share one forward. "
            "Use one process per GPU (torchrun), or fused=False"
        )
    base = bare_model(model)
    needed = ("get_output_embeddings", "loss_function", "config")
    missing = [name for name in needed if not hasattr(base, name)]
    if missing:
        raise TypeError(
            "fuse_head needs a causal language model of transformers, got "
            f"{type(base).__name__}; in a model of your own call "
            "linear_cross_entropy(hidden, head.weight, labels)"
        )
    handle = base.__dict__.get(HANDLE)
    return handle if isinstance(handle, FusedHead) else FusedHead(base)


@dataclass
class _Call:
    """One training forward: what its head and its loss function need, and what they saw."""

    labels: Tensor  # as the forward got them
    targets: Tensor  # labels aligned with the logits
    shift_labels: Tensor | None  # what the forward must pass on to its loss function
    rows: Tensor | None  # `kept_rows(targets)`, if known
    loss_sum: Tensor | None = None
    logits: Tensor | None = None  # the probe as it reached the loss function
    vocabulary: int = 0  # rows of the head's weight
    heads: int = 0  # how often the head was called
    losses: int = 0  # how often the loss function was called
    compiled: bool = False
    problem: str = ""


class FusedHead:
    """The handle of `fuse_head`; it replaces the model's forward.

    Attributes: `reason`, why the loss is not fused; empty if it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        patched = ("forward", "_loss_function")
        self._own = {
            name: model.__dict__[name] for name in patched if name in model.__dict__
        }
        self._forward: Callable[..., Any] = model.forward
        self._plain_loss: Any = model.loss_function
        # Trainer and generate() read it, to see which columns and arguments the model takes.
        self.__signature__ = inspect.signature(model.forward)
        self._names = list(self.__signature__.parameters)
        self._heads: list[nn.Linear] = []
        self._call: _Call | None = None
        self._scale = 1.0
        self._softcap: float | None = None
        self._compiled = False
        self._active = True
        self.reason = ""
        self._adopt_head()
        model.__dict__ |= {HANDLE: self, "forward": self, "_loss_function": self._loss}

    def remove(self) -> None:
        """Give the model its own forward, head and loss function back."""
        self._active = False
        self._release_heads()
        attributes = self._model.__dict__
        attributes.pop(HANDLE, None)
        patched = {"forward": self, "_loss_function": self._loss}
        for name, ours in patched.items():
            # Someone wrapped it meanwhile, and still calls it: it only passes calls through now.
            if attributes.get(name) != ours:
                continue
            del attributes[name]
            if name in self._own:
                attributes[name] = self._own[name]

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedHead":
        if id(self._model) not in memo:
            return self  # PEFT copies the head alone: that copy still belongs to this model
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update(deepcopy(self.__dict__, memo))
        return twin

    @_between_graphs  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # accelerate binds a forward that it unwraps, so the model comes as the first argument.
        if args and args[0] is self._model:
            args = args[1:]
        inputs = dict(zip(self._names, args, strict=False)) | kwargs
        if not (self._active and self._is_training_call(inputs)):
            return self._forward(*args, **kwargs)
        # resize_token_embeddings makes a new head, and PEFT wraps it, after we patched the old one.
        if self._model.get_output_embeddings() is not self._head:  # type: ignore[operator]
            self._adopt_head()
        # A loop over the names would be a generator, which torch.compile refuses here.
        before_5_24, since = inputs.get("past_key_values"), inputs.get("cache")
        has_cache = before_5_24 is not None or since is not None
        if not self.reason and has_cache:
            # The forward that reads the probe would add to the cache.
            self._fall_back("it is called with a key-value cache (prefix tuning?)")
        elif not (self.reason or self._proved):
            self._prove(inputs)
        output = None if self.reason else self._fused(inputs)
        return self._forward(**inputs) if output is None else output

    def _is_training_call(self, inputs: dict[str, Any]) -> bool:
        # `logits_to_keep=0` means all rows. Otherwise logits and labels differ in length.
        to_keep = inputs.get("logits_to_keep")
        all_rows = to_keep is None or (isinstance(to_keep, int) and to_keep == 0)
        has_labels = inputs.get("labels") is not None
        return (
            has_labels and all_rows and self._model.training and torch.is_grad_enabled()
        )

    @_never_compiled  # type: ignore[untyped-decorator]
    def _prove(self, inputs: dict[str, Any]) -> None:
        """Find scale and soft cap by one forward without gradient and without loss, or fall back.

        The generators of random numbers are restored, so that the training step draws the dropout
        that it would have drawn.
        """
        gpus = {
            parameter.device
            for parameter in self._model.parameters()
            if parameter.is_cuda
        }
        with torch.no_grad(), torch.random.fork_rng(gpus):
            call, _ = self._run(inputs)
        torch.clear_autocast_cache()  # it holds weights now that were cast without a gradient
        if self.reason:
            return
        after_head = read_probe(call.logits)
        if after_head is None:
            self._fall_back(
                "the model does something to its logits that is neither a scale nor a soft cap"
            )
        else:
            self._scale, self._softcap = after_head
            # From now on training calls are fused, this one included.
            self._proved = True

    @_between_graphs  # type: ignore[untyped-decorator]
    def _fused(self, inputs: dict[str, Any]) -> Any:
        """The model's output without logits; None after a fall back."""
        call, output = self._run(inputs)
        if output is None or call.logits is None:
            return None
        if call.logits.requires_grad:
            return self._fall_back("a parameter that is trained changes its logits")
        # A compiled forward returns the probe on the model's device. Reading it there would make
        # the host wait for a GPU in every step.
        readable = (
            call.logits.device.type == "cpu" and not torch.compiler.is_compiling()
        )
        if readable and read_probe(call.logits) != (self._scale, self._softcap):
            return self._fall_back(
                "what the model does to its logits has changed since the first step"
            )
        # The probe does not leave this function: reading logits must fail, not give numbers.
        if isinstance(output, dict):
            without = {
                name: value for name, value in output.items() if name != "logits"
            }
            return type(output)(**without)
        return tuple(None if value is call.logits else value for value in output)

    @_between_graphs  # type: ignore[untyped-decorator]
    def _run(self, inputs: dict[str, Any]) -> tuple[_Call, Any]:
        """One forward, and its output; None if head and loss function were not used as expected."""
        shifted = inputs.get("shift_labels")
        targets = shifted
        if targets is None:
            # As transformers' own loss aligns labels: [5, 6, 7] becomes [6, 7, -100].
            padded = nn.functional.pad(inputs["labels"], (0, 1), value=IGNORE_INDEX)
            targets = padded[..., 1:]
        # The host waits for the GPU to learn how many rows are kept. Before the forward the GPU has
        # least to do: Trainer waits at the end of every backward pass, to check the loss. A graph
        # would be compiled again for another number of rows, so there the operator finds them.
        rows = kept_rows(targets) if self._proved and not self._compiled else None
        call = self._call = _Call(inputs["labels"], targets, shifted, rows)
        try:
            output = self._forward(**inputs)
        except Exception as error:
            if call.heads == 0:  # not because of what the head returned
                raise
            cause = f"{type(error).__name__}: {error}"
            call.problem = f"its forward failed on what the head returned ({cause})"
        finally:
            self._call = None
        self._compiled = call.compiled
        used_once = call.heads == 1 and call.losses == 1
        if not call.problem and not used_once:
            call.problem = (
                f"its forward called its head {call.heads} times and its loss function "
                f"{call.losses} times"
            )
        if call.problem:
            self._fall_back(call.problem)
            return call, None
        return call, output

    @_never_compiled  # type: ignore[untyped-decorator]
    def _adopt_head(self) -> None:
        """Patch the head's linear layers, or fall back if they are not known."""
        self._release_heads()
        self._head = head = self._model.get_output_embeddings()  # type: ignore[operator]
        self._proved = False
        self.reason = ""
        linears = [head]
        if hasattr(head, "original_module") and hasattr(head, "modules_to_save"):
            # PEFT's modules_to_save: several layers, of which one runs.
            linears = [head.original_module, *head.modules_to_save.values()]
        problem = self._why_not_this_model()
        for linear in linears:
            problem = problem or _why_not_this_head(linear)
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
        if self._plain_loss is not ForCausalLMLoss:
            name = type(self._model).__name__
            return f"the loss function of {name} is not transformers' causal language model loss"
        return ""

    def _fall_back(self, reason: str) -> None:
        """From now on the model's own forward runs; the log says why."""
        self._release_heads()
        self.reason = reason
        _log.warning(
            "The loss of %s is not fused: %s. Its own head and loss run on all tokens.",
            type(self._model).__name__,
            reason,
        )

    def _project(self, linear: nn.Linear, hidden: Tensor) -> Tensor:
        """The head's forward. In a training call the loss is computed here, and the probe returned.

        Here, inside the head's own call, FSDP has gathered the weights.
        """
        call = self._call
        if call is None:
            return nn.functional.linear(hidden, linear.weight, linear.bias)
        call.compiled = torch.compiler.is_compiling()
        # Not `out_features`: where embeddings are tied, PEFT makes a head that swaps it with
        # `in_features`.
        call.vocabulary = linear.weight.shape[0]
        call.problem = call.problem or _why_not_this_call(linear, hidden, call)
        if self._proved and not call.problem:
            rows = call.rows
            if rows is not None:
                rows = None if call.compiled else rows.to(hidden.device)
            call.loss_sum = loss_sum(
                hidden,
                linear.weight,
                call.targets.to(hidden.device),
                linear.bias,
                softcap=self._softcap,
                scale=self._scale,
                rows=rows,
            )
        # Not before: an error of the loss itself is no reason to fall back.
        call.heads += 1
        if call.problem:
            return nn.functional.linear(hidden, linear.weight, linear.bias)
        # The first forward sees the whole width, which shows whether single columns are changed
        # (masked entries of a padded vocabulary). Later ones do with 8 columns. On the CPU, unless
        # compiled: reading the probe then makes no GPU wait.
        width = min(8, call.vocabulary) if self._proved else call.vocabulary
        device = hidden.device if call.compiled else torch.device("cpu")
        probe = torch.tensor(_PROBE, dtype=torch.float64, device=device)
        return probe[None, :, None].repeat(1, 1, width)

    def _loss(
        self, logits: Tensor, labels: Tensor, vocab_size: int, *args: Any, **kwargs: Any
    ) -> Any:
        """The model's loss function. In a training call: the head's sum, divided."""
        call = self._call
        if call is None or call.heads == 0:
            return self._plain_loss(logits, labels, vocab_size, *args, **kwargs)
        call.losses += 1
        call.logits = logits
        if not call.problem:
            call.problem = _why_not_this_loss(call, labels, vocab_size, args, kwargs)
        # The first forward only reads the probe, without a loss; after a problem its result is
        # thrown away.
        if call.loss_sum is None:
            return torch.zeros((), device=labels.device)
        count = (call.targets != IGNORE_INDEX).sum().to(call.loss_sum.device)
        return call.loss_sum / divisor(count, kwargs.get("num_items_in_batch"))


@_never_compiled  # type: ignore[untyped-decorator]
def read_probe(logits: Tensor | None) -> tuple[float, float | None] | None:
    """The (scale, softcap) that turn the probe into `logits`; None if nothing of that kind does.

    Gemma 2 computes y = 30 * tanh(x / 30). The probe's last number, x = 2**20, gives the bound
    y = 30; x = 2**-40 gives y / x = 1, the scale. Then every other number must agree with the two:
    x = 16 with 14.6377, x = -4 with -3.9765. Granite computes y = x / 8: the scale is 1/8 and all
    numbers lie on that line, so there is no cap.
    """
    x = torch.tensor(_PROBE, dtype=torch.float64)
    if logits is None or logits.requires_grad or not logits.is_floating_point():
        return None
    if logits.ndim != 3 or logits.shape[:2] != (1, len(x)):
        return None
    y = logits[0].double().cpu()
    same_in_all_columns = bool((y == y[:, :1]).all())
    if not (y.isfinite().all() and same_in_all_columns):
        return None
    y = y[:, 0]
    small, bound = x.abs().argmin(), y[-1]
    scale = y[small] / x[small]
    # A scale alone is exact up to the rounding of fp32; tanh of fp32 errs a little more.
    if scale != 0 and torch.allclose(y, scale * x, rtol=1e-6, atol=0):
        return scale.item(), None
    if scale > 0 and bound > 0:
        capped = bound * torch.tanh(scale * x / bound)
        if torch.allclose(y, capped, rtol=2e-6, atol=0):
            return scale.item(), bound.item()
    return None


def _why_not_this_head(head: nn.Module) -> str:
    # FSDP makes subclasses, which keep the forward; quantised and LoRA layers have their own.
    if getattr(type(head), "forward", None) is not nn.Linear.forward:
        return f"its head is a {type(head).__module__}.{type(head).__name__}, not a plain nn.Linear"
    patch = head.__dict__.get("forward")
    is_ours = isinstance(
        getattr(getattr(patch, "func", None), "__self__", None), FusedHead
    )
    if patch is not None and not is_ours:
        return "the forward of its head is patched already"
    return ""


def _why_not_this_call(linear: nn.Linear, hidden: Tensor, call: _Call) -> str:
    if hasattr(linear.weight, "ds_id"):
        return (
            "DeepSpeed ZeRO-3 gathers its head when the gradient of logits arrives, and there are "
            "no logits"
        )
    if type(linear.weight) not in (Tensor, nn.Parameter):
        return f"the weight of its head is a {type(linear.weight).__name__} (tensor parallel?)"
    if hidden.shape[:-1] != call.targets.shape:
        return (
            f"its head sees rows {tuple(hidden.shape[:-1])}, the labels are "
            f"{tuple(call.targets.shape)}"
        )
    return ""


def _why_not_this_loss(
    call: _Call,
    labels: Tensor,
    vocab_size: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> str:
    if args or kwargs.get("ignore_index", IGNORE_INDEX) != IGNORE_INDEX:
        return "its loss function gets arguments that are not known"
    # Some models copy their labels to the device of the logits first.
    if labels is not call.labels and labels.device == call.labels.device:
        return "its loss function gets other labels than its forward"
    if kwargs.get("shift_labels") is not call.shift_labels:
        return "its forward does not pass shift_labels on to its loss function"
    if vocab_size != call.vocabulary:
        return f"its loss function expects {vocab_size} logits, the head has {call.vocabulary}"
    return ""
