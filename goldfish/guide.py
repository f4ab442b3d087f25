"""Strategy "entropy": a model reads the data before training, and its uncertainty decides.

The rule itself is in `goldfish.spec.most_uncertain`. Floats differ between machines, so what was
decided is stored, and training looks it up: `Goldfish.decisions`.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from goldfish.masking import mask_batch, padding_mask
from goldfish.rule import Goldfish, place_keys, tokens_of
from goldfish.unwrap import (
    adapters_of,
    bare_model,
    evaluation_mode,
    require_vocabulary,
    without_adapters,
)

FILE_NAME = "goldfish_decisions.safetensors"
# Logits of the documents that are read at a time: 1 GB of float32.
LOGITS = 2**28
# Of these, so many are turned into probabilities at a time: float32, with copies.
PROBABILITIES = 2**24


class Guide:
    """A model that decides, before training, what strategy "entropy" drops.

    >>> import torch, transformers
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=16, **sizes))
    >>> batch = {"input_ids": torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])}
    >>> rule = Guide(model).read(Goldfish(k=4, strategy="entropy"), batch)
    >>> rule.dropped(batch["input_ids"]).sum().item()  # its 7 targets are one window
    1

    Args:
        model: a causal language model of transformers, on its device; adapters are part of it. It
            is used in evaluation mode, without gradient.

    Attributes:
        fingerprint: the first 16 hexadecimal digits of the SHA-256 of its weights; with those of
            adapters if they change its predictions.

    Raises:
        TypeError: not a model.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                "the guide must be a model, such as AutoModelForCausalLM.from_pretrained(name), "
                f"got {model!r}"
            )
        self.model = model
        self.fingerprint = _fingerprint(model)

    def __reduce__(self) -> Any:
        # datasets names its cache by the pickled arguments of `map`, and nothing else pickles a
        # guide: the fingerprint takes the place of the weights.
        return Guide, (self.fingerprint,)

    def read(self, rule: Goldfish, batch: Mapping[str, Any]) -> Goldfish:
        """The rule with decisions about the documents of a batch, and of no others.

        Args:
            rule: of strategy "entropy".
            batch: as for `mask_batch`, on the CPU.

        Raises:
            ValueError: a rule of another guide; predictions that are not finite.
        """
        return self.with_decisions(rule, self.decisions(rule, batch))

    def with_decisions(self, rule: Goldfish, decisions: Tensor | None) -> Goldfish:
        """The rule with this guide's fingerprint and with these decisions."""
        if rule.guide not in (None, self.fingerprint):
            raise ValueError(
                f"the rule's guide has the fingerprint {rule.guide}, this model has "
                f"{self.fingerprint}"
            )
        return replace(rule, guide=self.fingerprint, decisions=decisions)

    def decisions(self, rule: Goldfish, batch: Mapping[str, Any]) -> Tensor:
        """`Goldfish.decisions` about the documents of a batch; see `read`."""
        ids = torch.as_tensor(batch["input_ids"])
        if ids.numel() == 0:
            return torch.zeros(0, dtype=torch.int64)
        rows = rule.rows(
            ids, batch.get("position_ids"), attention_mask=padding_mask(batch, ids)
        )
        tokens = tokens_of(rows.ids, rows.starts, rule.h)
        # The targets do not depend on the rule with which they are found.
        targets = rows.move(mask_batch(Goldfish(), batch).targets)
        targets = targets & rule.candidates(tokens)

        # Documents lie end to end in the rows, and rows end to end.
        starts = rows.starts.flatten()
        begins = starts.nonzero().flatten()
        lengths = begins.diff(append=torch.tensor([len(starts)])).tolist()
        dropped = self._dropped(
            torch.split(rows.ids.flatten(), lengths),
            torch.split(targets.flatten(), lengths),
            window=int(2 * rule.k) - 1,
        )
        keys = place_keys(tokens).flatten()
        decisions: Tensor = torch.unique(torch.cat([keys[starts], keys[dropped]]))
        return decisions

    def _dropped(
        self, documents: Sequence[Tensor], targets: Sequence[Tensor], window: int
    ) -> Tensor:
        """The decisions about documents, bool, one document after the other."""
        result = [torch.zeros_like(each) for each in targets]
        # Padding and prompts are documents without targets.
        asked = [i for i, each in enumerate(targets) if each.any()]
        vocabulary = bare_model(self.model).config.get_text_config().vocab_size
        lengths = [len(documents[i]) for i in asked]
        for batch in of_similar_length(lengths, LOGITS // vocabulary):
            places = [asked[i] for i in batch]
            entropies = self.entropies([documents[i] for i in places])
            are_targets = pad_sequence([targets[i] for i in places], batch_first=True)
            drops = most_uncertain(entropies, are_targets, window)
            for i, line in zip(places, drops, strict=True):
                result[i] = line[: len(documents[i])]
        return torch.cat(result)

    @torch.no_grad()
    def entropies(self, documents: Sequence[Tensor]) -> Tensor:
        """Entropy of the prediction of each token from those before it.

        Args:
            documents: int64 (T,) each.

        Returns:
            float32 (len(documents), T of the longest), on the CPU; nats, 0 for first tokens.
        """
        device = next(self.model.parameters()).device
        ids = pad_sequence(list(documents), batch_first=True)
        require_vocabulary(self.model, ids)
        ids = ids.to(device)
        attended = [torch.ones_like(document) for document in documents]
        mask = pad_sequence(attended, batch_first=True).to(device)
        try:
            with evaluation_mode(self.model):
                logits = self.model(input_ids=ids, attention_mask=mask).logits
        except IndexError as error:
            # A table of positions, as in GPT-2, has an end; rotary positions have none.
            raise ValueError(
                f"the guide cannot read a document of {ids.shape[1]} tokens ({error}): cut the "
                "rows as for training"
            ) from error
        # Counted from the end: prompt tuning puts virtual tokens in front.
        logits = logits[:, -ids.shape[1] : -1]
        # Never all logits in float32 at once: a long row has gigabytes of them.
        columns = max(1, PROBABILITIES // (len(ids) * logits.shape[-1]))
        parts = []
        for part in logits.split(columns, dim=1):
            probabilities = part.float().softmax(-1)
            # entr(p) is -p log p, and 0 for p = 0.
            parts.append(torch.special.entr(probabilities).sum(-1))
        result = torch.cat(parts, 1).cpu()
        if not result.isfinite().all():
            raise ValueError("the guide's predictions are not finite")
        return pad(result, (1, 0))


def most_uncertain(entropies: Tensor, targets: Tensor, window: int) -> Tensor:
    """`spec.most_uncertain` of the targets of each row; one document a row, bool (B, T).

    A target is dropped if it beats its neighbours on the left and right, one after the other, as
    far as a window reaches:

        entropies, window 3    1 4 2 2 3
        beaten on the left     0 1 0 0 2     those that are less
        beaten on the right    0 2 1 0 0     those that are not larger
        dropped                . D . . D     of left + 1 + right >= 3

    Args:
        entropies: float (B, T).
        targets: bool (B, T).
    """
    length = targets.shape[-1]
    # The targets of each row come first, in order. Behind them nothing can be beaten.
    order = (~targets).to(torch.uint8).sort(dim=-1, stable=True).indices
    count = targets.sum(-1, keepdim=True)
    is_target = torch.arange(length) < count
    values = entropies.gather(-1, order).masked_fill(~is_target, torch.inf)

    reach = torch.ones_like(order)
    beats_left = beats_right = is_target
    for distance in range(1, min(window, length)):
        left = pad(values[:, :-distance], (distance, 0), value=torch.inf)
        right = pad(values[:, distance:], (0, distance), value=torch.inf)
        beats_left = beats_left & (left < values)
        beats_right = beats_right & (right <= values)
        reach += beats_left.long() + beats_right.long()
    chosen = is_target & (reach >= count.clamp(max=window))
    return torch.zeros_like(targets).scatter(-1, order, chosen)


def of_similar_length(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """The places of all rows, shortest first, in batches of at most `most` tokens with padding."""
    batch: list[int] = []
    for place in np.argsort(lengths, kind="stable").tolist():
        # With this row, which is longer than all before it, every row has its length.
        padded_size = (len(batch) + 1) * lengths[place]
        if batch and padded_size > most:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _fingerprint(model: nn.Module) -> str:
    """By the order of tensors and not by their names, which adapters change."""
    left_out = set() if _adapters_matter(model) else adapters_of(model)
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        is_left_out = left_out & set(name.split("."))
        if not isinstance(tensor, Tensor) or is_left_out:
            continue
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


@torch.no_grad()
def _adapters_matter(model: nn.Module) -> bool:
    """Whether a model predicts anything else without its adapters.

    New ones of LoRA add exact zeros. But half of their weights are random, so with them two guides
    that decide alike would have two fingerprints.
    """
    if not adapters_of(model):
        return False
    vocabulary = bare_model(model).config.get_text_config().vocab_size
    device = next(model.parameters()).device
    probe = torch.arange(min(vocabulary, 16), device=device)[None]
    with evaluation_mode(model):
        adapted = model(input_ids=probe).logits
        with without_adapters(model):
            plain = model(input_ids=probe).logits
    return not torch.equal(adapted, plain)


def save_decisions(folder: str | Path, rule: Goldfish) -> None:
    """Write what a guide decided, with the rule, into a folder; `load_decisions` reads it."""
    from safetensors.torch import save_file

    assert rule.decisions is not None
    path = Path(folder) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    tensors = {"decisions": rule.decisions.cpu()}
    save_file(tensors, unfinished, metadata={"rule": json.dumps(rule.to_dict())})
    os.replace(unfinished, path)


def load_decisions(folder: str | Path) -> Goldfish:
    """The rule of `save_decisions`, not bound to a tokenizer.

    Raises:
        FileNotFoundError: a folder without the file.
        ValueError: a damaged file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {FILE_NAME}, the decisions of the training that is resumed. They are "
            "in every checkpoint of it: copy it there"
        )
    try:
        with safe_open(path, "pt") as file:
            rule = json.loads(file.metadata()["rule"])
            return Goldfish(**rule, decisions=file.get_tensor("decisions"))
    # Cut off, or another file of this name.
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not what a guide decided ({error!r}); copy that of another checkpoint of "
            "the same training there"
        ) from error
