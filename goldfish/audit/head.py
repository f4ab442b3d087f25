"""Logits a few rows at a time: one forward of a model's backbone, then its own head on chunks of the hidden states."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from goldfish.fused import bare_model, probe, read_probe

_log = logging.getLogger(__name__)
# Bytes of float32 logits alive at a time. On a CPU: large enough for the head's product, small enough for the caches.
LOGITS_BUDGET = {"cpu": 2**24, "other": 2**28}


class RowsOfLogits:
    """The logits of a causal language model of transformers, in chunks of rows, never (B, T, V).

    While the model's own forward runs, its output embedding keeps the hidden states and returns a probe in place of
    the logits. What the forward then does to the probe (nothing, a scale, a soft cap) is done to the logits of every
    chunk. Whether that gives the model's own logits is tried once; where it does not, `reason` says why, once in the
    log too, and the logits come from the model's own forward, of as few rows at a time as the budget asks.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.reason: str | None = None  # None: not tried yet; "": it works
        self._head = bare_model(model).get_output_embeddings()
        self._width, self._scale, self._softcap = 0, 1.0, None  # type: int, float, float | None

    def chunks(self, ids: Tensor, attention_mask: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yields which of the (B * (T - 1)) positions come, and their logits, float32 (rows, V).

        Args:
            ids: int64 (B, T); the logits are of positions 0 ... T - 2, which speak of ids[:, 1:].
            attention_mask: int64 (B, T), 0 for padding on the right; None where there is none.
        """
        if self.reason is None:
            self.reason = self._why_not(ids[:1, :16])
            if self.reason:
                _log.warning(
                    "The logits of %s are made whole, not in chunks: %s.", type(self.model).__name__, self.reason
                )
        if self.reason:
            yield from self._own_forward(ids, attention_mask)
            return
        hidden = self._hidden(ids, attention_mask)[0][:, :-1].flatten(0, 1)
        rows = self._rows(ids.device)
        for first in range(0, len(hidden), rows):
            yield slice(first, first + rows), self._project(hidden[first : first + rows])

    def _rows(self, device: torch.device) -> int:
        return max(1, LOGITS_BUDGET["cpu" if device.type == "cpu" else "other"] // (4 * self._width))

    def _own_forward(self, ids: Tensor, attention_mask: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        length = ids.shape[1]
        at_once = max(1, self._rows(ids.device) // length)
        for first in range(0, len(ids), at_once):
            part = slice(first, first + at_once)
            logits = self._forward(ids[part], None if attention_mask is None else attention_mask[part])
            yield slice(first * (length - 1), (first + at_once) * (length - 1)), logits[:, :-1].flatten(0, 1).float()

    def _forward(self, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits
        return logits

    def _hidden(self, ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the head was given, (B, T, D), and what the forward made of the probe."""
        with _instead_of(self._head, lambda hidden: probe(self._width, hidden.device)) as given:
            seen = self._forward(ids, attention_mask)
        if len(given) != 1 or given[0].shape[:2] != ids.shape:
            raise RuntimeError(f"the forward called its head with {[tuple(hidden.shape) for hidden in given]}")
        return given[0], seen

    def _project(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._head(hidden).float()
        if self._scale != 1.0:
            logits = logits * self._scale
        if self._softcap is not None:
            logits = (logits / self._softcap).tanh_().mul_(self._softcap)
        return logits

    def _why_not(self, ids: Tensor) -> str:
        """Try it on a few tokens; empty if the chunks' logits are the model's own."""
        own = self._forward(ids, None)
        self._width = own.shape[-1]
        if self._head is None:
            return "it has no output embedding"
        try:
            hidden, seen = self._hidden(ids, None)
        except Exception as error:  # whatever its forward does to logits, it cannot do to the probe
            return f"its forward fails on what the head returned ({type(error).__name__}: {error})"
        found = read_probe(seen) if seen.shape[-1] == self._width else None
        if found is None:
            return "the model does something to its logits that is neither a scale nor a soft cap"
        self._scale, self._softcap = found
        ours = self._project(hidden)
        # Soft cap and scale are float32 here and may have been 16-bit there: a few of its rounding steps.
        tolerance = 8 * torch.finfo(own.dtype).eps * own.float().abs().max().item() + 1e-5
        difference = (ours - own.float()).abs().max().item() if ours.shape == own.shape else float("inf")
        return "" if difference <= tolerance else f"they would be off by {difference:.2g}"


@contextmanager
def _instead_of(module: Any, forward: Any) -> Iterator[list[Tensor]]:
    """Replace a module's forward; yields the list of what it was given."""
    given: list[Tensor] = []

    def keep(hidden: Tensor, *_: Any, **__: Any) -> Any:
        given.append(hidden)
        return forward(hidden)

    before = module.__dict__.get("forward")
    module.forward = keep
    try:
        yield given
    finally:
        del module.forward
        if before is not None:
            module.forward = before
