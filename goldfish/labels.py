"""Rules applied to batches: labels with -100 where a token is dropped."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from goldfish.rule import Goldfish

Rules: TypeAlias = Goldfish | Mapping[str, Goldfish | None]  # one rule, or one for each source (None: drop nothing)

SOURCE = "source"  # the column of a dataset, and the key of a batch, that says which rule a row is under
IGNORE_INDEX = -100  # what torch's cross-entropy and Hugging Face's models leave out of the loss


def mask_labels(
    rule: Goldfish | None,
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """`labels` with ignore_index where `rule` drops the token; everything else unchanged.

    Labels are aligned as Hugging Face's models take them: labels[i] is the token input_ids[i] (or ignore_index),
    and the model shifts. Decisions depend on input_ids only, so a masked-out prompt still counts as context.

    Args:
        rule: says which tokens are dropped; None drops nothing.
        input_ids: integers, (T,) or (B, T).
        labels: integers of the same shape; by default input_ids, with ignore_index where attention_mask is 0.
        position_ids, attention_mask: as for `Goldfish.dropped`: document starts, padding.
        ignore_index: the value that means "no target".

    Returns:
        A new tensor of the shape, dtype and device of labels.

    Raises:
        TypeError, ValueError: as `Goldfish.dropped`; ValueError for labels of another shape than input_ids.
    """
    if not (rule is None or isinstance(rule, Goldfish)):
        raise TypeError(f"expected a rule such as Goldfish(k=4, h=13), or None to drop nothing, got {rule!r}")
    input_ids = torch.as_tensor(input_ids)
    if labels is None:
        labels = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, ignore_index)
    if labels.device != input_ids.device:
        raise ValueError(
            f"input_ids is on {input_ids.device} and labels on {labels.device}; move one of them, "
            "e.g. labels.to(input_ids.device)"
        )
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels must have the shape of input_ids, {tuple(input_ids.shape)}, got {tuple(labels.shape)}; "
            "labels are not shifted here, the model does that"
        )
    if rule is None:
        return labels.clone()
    dropped = rule.dropped(input_ids, position_ids, attention_mask=attention_mask, draw=_next_draw(rule))
    return labels.masked_fill(dropped, ignore_index)


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
        raise ValueError(f"the rule decides from input_ids, but the batch has only {', '.join(batch) or 'nothing'}")
    if batch.get("labels") is not None:
        return dict(batch)
    if getattr(batch.get("attention_mask"), "ndim", 2) != 2:
        raise ValueError(
            f"the batch has no labels, and an attention_mask of {tuple(batch['attention_mask'].shape)} does not say "
            "which tokens are padding; let the collator make labels"
        )
    return {**batch, "labels": mask_labels(None, batch["input_ids"], attention_mask=padding_mask(batch))}


def decide(rules: Rules, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Of a Hugging Face batch which tokens are dropped, bool (B, T), and the keys of `Goldfish.decide`, int64 (B, T).

    Reads input_ids, position_ids and a two-dimensional attention_mask; with one rule for each source, also what
    `CarrySource` put into the batch. Rows of a source without a rule have the keys of the default rule.
    """
    ids = batch["input_ids"]
    given = {"position_ids": batch.get("position_ids"), "attention_mask": padding_mask(batch)}
    if isinstance(rules, Goldfish):
        return rules.decide(ids, **given, draw=_next_draw(rules))
    dropped, keys = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.int64)
    for place, name in enumerate(sorted(rules)):
        rows, rule = batch[SOURCE] == place, rules[name] or Goldfish()
        of_rows = {key: None if tensor is None else tensor.expand_as(ids)[rows] for key, tensor in given.items()}
        decisions, keys[rows] = rule.decide(ids[rows], **of_rows, draw=_next_draw(rule))
        if rules[name] is not None:
            dropped[rows] = decisions
    return dropped, keys


def mask_batch(batch: Mapping[str, Any], dropped: Tensor) -> dict[str, Any]:
    """A copy of a batch with labels in which the dropped ones are -100; so are its shift_labels, if a collator made
    them. What `CarrySource` put there is left out."""
    masked = {name: value for name, value in batch.items() if name != SOURCE}
    masked["labels"] = batch["labels"].masked_fill(dropped, IGNORE_INDEX)
    if "shift_labels" in batch:
        ignored = torch.nn.functional.pad(masked["labels"][..., 1:] == IGNORE_INDEX, (0, 1), value=True)
        masked["shift_labels"] = batch["shift_labels"].masked_fill(ignored, IGNORE_INDEX)
    return masked


def check_rules(rules: Any) -> None:
    """TypeError unless `rules` is a rule, or a mapping from names of sources to rules or None."""
    if isinstance(rules, Goldfish):
        return
    if not isinstance(rules, Mapping) or not rules:
        raise TypeError(f"expected a rule such as Goldfish(k=4, h=13), or a mapping of sources to rules, got {rules!r}")
    for name, rule in rules.items():
        if not (isinstance(name, str) and name) or not (rule is None or isinstance(rule, Goldfish)):
            raise TypeError(f"sources are named by strings and have a Goldfish rule or None, got {name!r}: {rule!r}")


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
        names = sorted(self.rules)
        for feature in features:
            rule_for(self.rules, feature.get(SOURCE))
        without = [{name: value for name, value in feature.items() if name != SOURCE} for feature in features]
        batch = dict(self.inner(without, *args, **kwargs))
        if len(batch["input_ids"]) != len(features):
            raise ValueError(
                f"{len(features)} rows were packed into {len(batch['input_ids'])}, so rows no longer map to one "
                "source; write the labels before packing: premask(dataset, rules)"
            )
        return {**batch, SOURCE: torch.tensor([names.index(feature[SOURCE]) for feature in features])}


@dataclass
class GoldfishCollator:
    """Masks the batches of another collator: `DataLoader(dataset, collate_fn=GoldfishCollator(inner, rule))`.

    For custom training loops; give it to the training DataLoader only. A Trainer uses one collator for training and
    evaluation, so there it would change the evaluation loss: use GoldfishTrainer or attach(trainer, rule) instead.

    Args:
        inner: any collator whose batch has input_ids of shape (B, T) and optionally labels, attention_mask,
            position_ids.
        rule: says which tokens are dropped; or a mapping to rules from the names in the features' column `source`
            (None: such rows are not masked). Packed rows have more than one source: premask them before packing.
    """

    inner: Callable[..., Mapping[str, Any]]
    rule: Rules

    def __post_init__(self) -> None:
        check_rules(self.rule)

    def __call__(self, features: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        collate = self.inner if isinstance(self.rule, Goldfish) else CarrySource(self.inner, self.rule)
        batch = with_labels(collate(features, *args, **kwargs))
        return mask_batch(batch, decide(self.rule, batch)[0])


def premask(dataset: Any, rule: Rules, *, num_proc: int | None = None, dropped_column: str | None = None) -> Any:
    """A `datasets` dataset whose rows have masked `labels`, written once; map-style or streaming.

    For pipelines that pack or shard tokens later (packing, sequence parallelism): each row is decided as a whole before
    that. For training data only, and for a collator that keeps labels (DataCollatorForSeq2Seq, default_data_collator,
    TRL's): DataCollatorForLanguageModeling makes them anew from input_ids. `datasets` caches the result under the
    rule, each of the num_proc parts by itself, so an interrupted run continues after the parts it finished.

    Args:
        dataset: rows with `input_ids` and optionally `labels`, `position_ids`, `attention_mask`.
        rule: a rule, or a mapping to rules from the names in the column `source` (None: such rows are not masked).
        num_proc: processes, for map-style datasets.
        dropped_column: also write the decisions, as lists of bool, to a column of this name.

    Raises:
        TypeError: not a rule. ValueError: rows without input_ids, a source without a rule, or strategy "random",
            which draws anew in every epoch.
    """
    check_rules(rule)
    for one in [rule] if isinstance(rule, Goldfish) else rule.values():
        if one is not None and one.strategy == "random":
            raise ValueError('premask writes labels once, strategy "random" draws anew in every epoch: use a collator')
    options = {} if num_proc is None else {"num_proc": num_proc}
    return dataset.map(_mask_row, fn_kwargs={"rules": rule, "dropped_column": dropped_column}, **options)


def _mask_row(row: dict[str, Any], rules: Rules, dropped_column: str | None) -> dict[str, list[Any]]:
    if "input_ids" not in row:
        raise ValueError(f"the rule decides from input_ids, but the rows have only {', '.join(row)}; tokenize first")
    rule = rules if isinstance(rules, Goldfish) else rule_for(rules, row.get(SOURCE))
    names = ("input_ids", "labels", "position_ids", "attention_mask")
    given = {name: torch.tensor([row[name]], dtype=torch.int64) for name in names if row.get(name) is not None}
    batch = with_labels(given)
    dropped = decide(rule, batch)[0] if rule is not None else torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    added = {"labels": batch["labels"].masked_fill(dropped, IGNORE_INDEX)[0].tolist()}
    return added if dropped_column is None else {**added, dropped_column: dropped[0].tolist()}
