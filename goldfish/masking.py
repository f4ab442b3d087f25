"""Rules applied to batches: labels with -100 where a token is dropped."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from goldfish.rule import Goldfish, check_beside

Rules: TypeAlias = (
    Goldfish | Mapping[str, Goldfish | None]
)  # one rule, or one for each source (None: drop nothing)

SOURCE = (
    "source"  # the column of a dataset, and the key of a batch, that says which rule a row is under
)
IGNORE_INDEX = -100  # what torch's cross-entropy and Hugging Face's models leave out of the loss


def mask_labels(
    rule: Goldfish | None,
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    shifted: bool = False,
) -> Tensor:
    """`labels` with ignore_index where `rule` drops the token; everything else unchanged.

    Labels are aligned as Hugging Face's models take them: labels[i] is the token input_ids[i] (or ignore_index), and
    the model shifts. With `shifted` they are already, as in torchtitan, NeMo, Megatron and nanochat: labels[i] is the
    token after input_ids[i]. Decisions depend on the ids only, so a masked-out prompt still counts as context.

    Args:
        rule: says which tokens are dropped; None drops nothing.
        input_ids: integers, (T,) or (B, T).
        labels: integers of the same shape; by default input_ids, with ignore_index where attention_mask is 0.
            Required if shifted.
        position_ids, attention_mask: as for `Goldfish.dropped`: document starts, padding.
        ignore_index: the label that means "no target"; -1 in nanochat.
        shifted: whether labels are shifted already.

    Returns:
        A new tensor of the shape, dtype and device of labels.

    Raises:
        TypeError, ValueError: as `Goldfish.dropped`; ValueError for labels of another shape than input_ids.
    """
    if not (rule is None or isinstance(rule, Goldfish)):
        raise TypeError(
            f"expected a rule such as Goldfish(k=4, h=13), or None to drop nothing, got {rule!r}"
        )
    input_ids = torch.as_tensor(input_ids)
    if labels is None and shifted:
        raise ValueError(
            "shifted=True needs labels: the last of them is a token that input_ids do not have"
        )
    if labels is None:
        labels = input_ids.to(torch.int64)  # bytes cannot hold -100
        labels = (
            labels
            if attention_mask is None
            else labels.masked_fill(attention_mask == 0, ignore_index)
        )
    check_beside("labels", labels, input_ids)
    if not labels.dtype.is_signed:
        raise TypeError(
            f"labels must be signed to hold {ignore_index}, got {labels.dtype}: labels.long()"
        )
    if rule is None:
        return labels.clone()
    batch: dict[str, Any] = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": attention_mask,
    }
    if shifted:
        batch, places = _unshifted({**batch, "labels": labels}, ignore_index)
    dropped = rule.dropped(**batch, draw=_next_draw(rule))
    return labels.masked_fill(dropped.gather(-1, places) if shifted else dropped, ignore_index)


def _unshifted(batch: Mapping[str, Any], ignore_index: int) -> tuple[dict[str, Any], Tensor]:
    """input_ids, position_ids and attention_mask that hold the token of every label of a batch with shifted labels; and
    where, int64 of the labels' shape. Most are the next of the ids. That of a row's last label, and of a document that
    was shifted before it was padded or packed, is not: it gets a place of its own behind its position."""
    ids, labels, mask = batch["input_ids"], batch["labels"], batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    following, attended = (pad(each[..., 1:], (0, 1)) for each in (ids, mask != 0))
    own = (labels != following) | ~attended
    there = own & (labels != ignore_index)
    pairs = {"input_ids": (ids, labels.to(ids.dtype)), "attention_mask": (mask, there.to(mask))}
    if batch.get("position_ids") is not None:
        pairs["position_ids"] = (batch["position_ids"], batch["position_ids"] + 1)
    column = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    return {
        name: torch.stack(pair, -1).flatten(-2) for name, pair in pairs.items()
    }, 2 * column + 2 - own.long()


def _next_draw(rule: Goldfish) -> int:
    """Strategy "random" draws from torch's CPU generator, which Trainer seeds, saves and restores."""
    return int(torch.randint(2**62, ())) if rule.strategy == "random" else 0


def padding_mask(batch: Mapping[str, Any]) -> Tensor | None:
    """A batch's attention_mask if it has the shape of the ids and so marks padding. One of shape (B, 1, T, T) says
    which tokens see each other; padding is then marked by labels alone."""
    mask: Tensor | None = batch.get("attention_mask")
    return mask if mask is not None and mask.shape == batch["input_ids"].shape else None


def with_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a Hugging Face batch that has labels: its own, or input_ids with -100 on padding.

    Raises:
        ValueError: a batch without input_ids.
    """
    if "input_ids" not in batch:
        raise ValueError(
            f"the rule decides from input_ids, but the batch has only {', '.join(batch) or 'nothing'}"
        )
    if batch.get("labels") is not None:
        return dict(batch)
    if getattr(batch.get("attention_mask"), "ndim", 2) != 2:
        shape = tuple(batch["attention_mask"].shape)
        raise ValueError(
            f"an attention_mask of {shape} does not mark padding; let the collator make labels"
        )
    return {
        **batch,
        "labels": mask_labels(None, batch["input_ids"], attention_mask=padding_mask(batch)),
    }


def decide(rules: Rules, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Of a Hugging Face batch which tokens are dropped, bool (B, T), and the keys of `Goldfish.decide`, int64 (B, T).

    Reads input_ids, position_ids and a two-dimensional attention_mask; with one rule for each source, also what
    `CarrySource` put into the batch. Rows of a source without a rule have the keys of the default rule.
    """
    ids = batch["input_ids"]
    given = {
        name: batch[name] for name in ("input_ids", "position_ids") if batch.get(name) is not None
    }
    if padding_mask(batch) is not None:
        given["attention_mask"] = batch["attention_mask"]
    if isinstance(rules, Goldfish):
        return rules.decide(**given, draw=_next_draw(rules))
    dropped, keys = (
        torch.zeros_like(ids, dtype=torch.bool),
        torch.zeros_like(ids, dtype=torch.int64),
    )
    for place, name in enumerate(sorted(rules)):
        rows, rule = batch[SOURCE] == place, rules[name] or Goldfish()
        decisions, contexts = rule.decide(**given, draw=_next_draw(rule))
        keys[rows] = contexts[rows]
        if rules[name] is not None:
            dropped[rows] = decisions[rows]
    return dropped, keys


def mask_batch(
    batch: Mapping[str, Any], dropped: Tensor, ignore_index: int = IGNORE_INDEX
) -> dict[str, Any]:
    """A copy of a batch with labels in which the dropped ones are ignored; so are its shift_labels, if a collator made
    them. What `CarrySource` put there is left out."""
    masked = {name: value for name, value in batch.items() if name != SOURCE}
    masked["labels"] = batch["labels"].masked_fill(dropped, ignore_index)
    if "shift_labels" in batch:
        ignored = pad(masked["labels"][..., 1:] == ignore_index, (0, 1), value=True)
        masked["shift_labels"] = batch["shift_labels"].masked_fill(ignored, ignore_index)
    return masked


def check_rules(rules: Any) -> None:
    """TypeError unless `rules` is a rule, or a mapping from names of sources to rules or None."""
    if isinstance(rules, Goldfish):
        return
    if not isinstance(rules, Mapping) or not rules:
        raise TypeError(
            f"expected a rule such as Goldfish(k=4, h=13), or a mapping of sources to rules, got {rules!r}"
        )
    for name, rule in rules.items():
        if not (isinstance(name, str) and name) or not (rule is None or isinstance(rule, Goldfish)):
            raise TypeError(
                f"sources are named by strings and have a Goldfish rule or None, got {name!r}: {rule!r}"
            )


def rule_for(rules: Mapping[str, Goldfish | None], source: Any) -> Goldfish | None:
    """The rule of a source; ValueError for one that has none."""
    if source not in rules:
        raise ValueError(
            f"a row has the {SOURCE} {source!r}, but there are rules for {', '.join(sorted(rules))}; "
            f"give every row one of these in its column {SOURCE!r}, or add a rule (None drops nothing)"
        )
    return rules[source]


@dataclass
class CarrySource:
    """A collator that takes `source` out of the features and puts it into the batch: int64 (B,), the place of each
    row's source among the sorted names of `rules`."""

    inner: Callable[..., Mapping[str, Any]]
    rules: Mapping[str, Goldfish | None]

    def __call__(self, features: list[dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        for feature in features:
            rule_for(self.rules, feature.get(SOURCE))
        without = [
            {name: value for name, value in feature.items() if name != SOURCE}
            for feature in features
        ]
        batch = dict(self.inner(without, *args, **kwargs))
        if len(batch["input_ids"]) != len(features):
            raise ValueError(
                f"{len(features)} rows were packed into {len(batch['input_ids'])}, so rows no longer map to one "
                "source; write the labels before packing: premask(dataset, rules)"
            )
        return {
            **batch,
            SOURCE: torch.tensor(
                [sorted(self.rules).index(feature[SOURCE]) for feature in features]
            ),
        }


@dataclass
class GoldfishCollator:
    """Masks the batches of another collator: `DataLoader(dataset, collate_fn=GoldfishCollator(inner, rule))`.

    For custom training loops; give it to the training DataLoader only. A Trainer uses one collator for training and
    evaluation, so there it would change the evaluation loss: use GoldfishTrainer or attach(trainer, rule) instead.

    Args:
        inner: any collator; its batch has input_ids (B, T), optionally labels, attention_mask, position_ids.
        rule: says which tokens are dropped; or a mapping to rules from the names in the features' column `source`
            (None: such rows are not masked). Packed rows have more than one source: premask them before packing.
        ignore_index, shifted: as for `mask_labels`; the inner collator must then make the labels.
    """

    inner: Callable[..., Mapping[str, Any]]
    rule: Rules
    ignore_index: int = IGNORE_INDEX
    shifted: bool = False

    def __post_init__(self) -> None:
        check_rules(self.rule)

    def __call__(self, features: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        collate = (
            self.inner if isinstance(self.rule, Goldfish) else CarrySource(self.inner, self.rule)
        )
        batch = collate(features, *args, **kwargs)
        if self.ignore_index == IGNORE_INDEX and not self.shifted:
            batch = with_labels(batch)
        elif batch.get("labels") is None:
            raise ValueError(
                f"ignore_index={self.ignore_index}, shifted={self.shifted} needs a collator with labels"
            )
        if not self.shifted:
            return mask_batch(batch, decide(self.rule, batch)[0], self.ignore_index)
        whole, places = _unshifted(batch, self.ignore_index)
        return mask_batch(
            batch, decide(self.rule, {**batch, **whole})[0].gather(-1, places), self.ignore_index
        )
