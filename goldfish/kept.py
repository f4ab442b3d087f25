"""Tier 1 of a cheap loss: a Hugging Face model's own head and loss, on the kept rows only. See `goldfish.fused`."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from goldfish.linear import divisor

IGNORED = -100
HANDLE = "_goldfish_fused_head"  # the attribute under which a model holds its `goldfish.fused.FusedHead`


def kept_rows_only(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Tier 1: arguments of a Hugging Face model's forward, changed so that head and loss see the kept rows only.

    Args:
        model: a causal language model of transformers.
        inputs: keyword arguments of its forward, with labels (B, T) that hold -100 where nothing is to be learned;
            num_items_in_batch and shift_labels if the trainer gives them.

    Returns:
        The same arguments, or a copy with `logits_to_keep` (bool (B, T)), `shift_labels` and `num_items_in_batch`; the
        model then returns the same loss, and logits (kept rows, V). Unchanged where the model cannot do that (see
        `why_not_kept_rows_only`). No kept row gives a loss of 0, and a graph, instead of NaN.
    """
    if inputs.get("labels") is None or why_not_kept_rows_only(model):
        return inputs
    targets = shifted_labels(inputs)
    kept = targets != IGNORED
    return inputs | {
        "logits_to_keep": kept,
        "shift_labels": targets[kept],
        "num_items_in_batch": divisor(kept.sum(), inputs.get("num_items_in_batch")),
    }


def why_not_kept_rows_only(model: nn.Module) -> str:
    """Why tier 1 is not possible; empty if it is."""
    from transformers import modeling_utils

    model = bare_model(model)
    forward = inspect.unwrap(type(model).forward)
    calls = getattr(getattr(forward, "__code__", None), "co_names", ())
    if "slice_logits_to_keep" not in calls or not hasattr(modeling_utils, "slice_logits_to_keep"):
        return f"the forward of {type(model).__name__} takes no boolean logits_to_keep in this transformers version"
    if "loss_function" not in calls:
        return f"the forward of {type(model).__name__} does not call self.loss_function"
    return why_not_this_loss(model)


def why_not_this_loss(model: nn.Module) -> str:
    from transformers.loss.loss_utils import ForCausalLMLoss

    handle = model.__dict__.get(HANDLE)
    if (handle._plain_loss if handle else model.loss_function) is not ForCausalLMLoss:
        return f"the loss function of {type(model).__name__} is not transformers' causal language model loss"
    return ""


def bare_model(model: Any) -> Any:
    """The transformers model inside torch.compile, DDP, FSDP, DeepSpeed and PEFT."""
    while True:
        if "_orig_mod" in getattr(model, "_modules", {}):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        # DeepSpeed's engine answers for its module's attributes, so the class is asked.
        elif "module" in getattr(model, "_modules", {}) and not hasattr(type(model), "get_output_embeddings"):
            model = model.module
        else:
            return model


def shifted_labels(inputs: dict[str, Any]) -> Tensor:
    """Labels aligned with the logits, as transformers' own loss aligns them."""
    if inputs.get("shift_labels") is not None:
        return inputs["shift_labels"]  # type: ignore[no-any-return]
    return nn.functional.pad(inputs["labels"], (0, 1), value=IGNORED)[..., 1:]


class KeptRows:
    """Indices of the kept rows. On CUDA their number travels to the host while the backbone runs."""

    def __init__(self, targets: Tensor) -> None:
        self._order: Tensor | None = None
        if targets.is_cuda:
            dropped = targets.reshape(-1) == IGNORED
            self._order = dropped.sort(stable=True).indices  # the kept ones first, in their order
            self._count = torch.empty((), dtype=torch.int64, pin_memory=True)
            self._count.copy_((~dropped).sum(), non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def indices(self, device: torch.device) -> Tensor | None:
        """int64 on `device`; None: let the loss find them."""
        if self._order is None:
            return None
        self._arrived.synchronize()
        return self._order[: int(self._count)].to(device)
