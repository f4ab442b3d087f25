"""Labels with -100 where a rule drops a token. This file is the only place that writes them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from goldfish.rule import Goldfish, check_beside

# What torch's cross-entropy and Hugging Face's models leave out of the loss.
IGNORE_INDEX = -100
# In the description of a premasked dataset, which datasets keep through map, shuffle, concatenate
# and save_to_disk (not through parquet files).
PREMASKED = "labels masked by goldfish.premask under"


class Masked(NamedTuple):
    """A batch with masked labels, and what was decided. All tensors are aligned with the labels.

    Attributes:
        batch: a copy of the batch; its labels (and shift_labels, if any) are ignore_index at
            everything that is no target and at dropped targets.
        targets: bool (B, T), the tokens that the loss would be over without the rule.
        dropped: bool (B, T), the targets that the rule drops.
        keys: int64 (B, T), the keys of `Goldfish.drops_and_keys`.
    """

    batch: dict[str, Any]
    targets: Tensor
    dropped: Tensor
    keys: Tensor

    def dropping(self, tokens: Tensor) -> "Masked":
        """The same with these tokens dropped too, bool (B, T); for labels that are not shifted."""
        labels = self.batch["labels"].masked_fill(tokens, IGNORE_INDEX)
        dropped = self.dropped | self.targets & tokens
        return self._replace(batch={**self.batch, "labels": labels}, dropped=dropped)


def mask_labels(
    rule: Goldfish,
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    shifted: bool = False,
    draw: int | None = None,
    counts: Any = None,
) -> Tensor:
    """`labels` with ignore_index where `rule` drops the token; everything else is unchanged.

    >>> import torch
    >>> from goldfish import Goldfish
    >>> input_ids = torch.arange(100, 112)
    >>> mask_labels(Goldfish(k=4, h=13, max_kept=4), input_ids).tolist()
    [100, 101, 102, 103, 104, -100, 106, -100, 108, 109, 110, 111]

    Labels are aligned as in Hugging Face's models: labels[i] is the token input_ids[i] (or
    ignore_index), and the model shifts. With `shifted` they are shifted already, as in torchtitan,
    NeMo, Megatron and nanochat: labels[i] is the token after input_ids[i]. The decisions depend on
    input_ids only, so a prompt whose labels are ignore_index still counts as context.

    Args:
        rule: decides which tokens are dropped.
        input_ids: integers, (T,) or (B, T).
        labels: integers of the same shape; by default input_ids, with ignore_index where
            attention_mask is 0. Required if shifted.
        position_ids, attention_mask: as for `Goldfish.dropped`: document starts, padding.
        ignore_index: the label that means "no target"; -1 in nanochat.
        shifted: whether the labels are shifted already.
        draw: as for `Goldfish.dropped`; for strategy "random" only.
        counts: a `DropCounts` that adds up what was dropped, for a receipt.

    Returns:
        A new tensor of the shape, dtype and device of labels.

    Raises:
        TypeError: not a rule, ids that are not integers, labels that cannot hold ignore_index.
        ValueError: shapes or devices that do not fit; shifted without labels; counts of another
            rule.
    """
    if counts is not None and counts.rule != rule:
        raise ValueError(
            f"the counts are those of {counts.rule}, but the labels are masked under {rule}"
        )
    batch = {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "attention_mask": attention_mask,
    }
    masked = mask_batch(
        rule, batch, ignore_index=ignore_index, shifted=shifted, draw=draw
    )
    if counts is not None:
        counts.add_masked(masked)
    result: Tensor = masked.batch["labels"]
    return result


def mask_batch(
    rule: Goldfish,
    batch: Mapping[str, Any],
    *,
    ignore_index: int = IGNORE_INDEX,
    shifted: bool = False,
    ignore_first: bool = False,
    first_is_target: bool = False,
    draw: int | None = None,
) -> Masked:
    """Mask a batch; arguments and errors as for `mask_labels`.

    Args:
        batch: has input_ids, and optionally labels, shift_labels, position_ids and attention_mask,
            as a Hugging Face model takes them. Other entries are copied.
        ignore_first: also ignore the first label of each row (unless shifted). No model predicts
            it, but some versions of Trainer count it as a target.
        first_is_target: the first token of each row is a target after all: in prompt tuning the
            last virtual token predicts it.
    """
    check_rule(rule)
    if batch.get("input_ids") is None:
        names = ", ".join(name for name, value in batch.items() if value is not None)
        raise ValueError(
            f"the rule decides from input_ids, but the batch has only {names or 'nothing'}"
        )
    ids = torch.as_tensor(batch["input_ids"])
    padding = padding_mask(batch, ids)
    labels = _labels(batch, ids, ignore_index, shifted)
    targets = labels != ignore_index
    # Labels that were given mark padding themselves; labels made of ids do not.
    if batch.get("labels") is None and padding is not None:
        targets = targets & (padding != 0)

    given: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": padding,
        "position_ids": batch.get("position_ids"),
        "draw": _draw(rule, draw),
    }
    if shifted:
        given, places = _unshifted(given, labels, targets)
    decided, keys = rule.drops_and_keys(**given)
    if shifted:
        decided = decided.gather(-1, places)
        keys = keys.gather(-1, places)

    # Everything that is no target is ignored already, except padding in labels made of ids.
    ignored = ~targets | decided
    if not shifted and not first_is_target:
        # The first token of a row is no target: nothing comes before it.
        targets[..., :1] = False
        ignored[..., :1] |= ignore_first
    masked = {**batch, "labels": labels.masked_fill(ignored, ignore_index)}
    shift_labels = batch.get("shift_labels")
    if shift_labels is not None:
        # The label at position i is that of the token after it; the last one has none.
        next_ignored = pad(ignored[..., 1:], (0, 1), value=True)
        masked["shift_labels"] = shift_labels.masked_fill(next_ignored, ignore_index)
    return Masked(masked, targets, decided & targets, keys)


def premasked(dataset: Any) -> str:
    """What the description of a dataset says about an earlier `premask`; empty if nothing."""
    info = getattr(dataset, "info", None)
    description = getattr(info, "description", None) or ""
    # Concatenated data sets have the descriptions of all.
    lines = [line for line in description.splitlines() if line.startswith(PREMASKED)]
    return "; ".join(lines)


def check_rule(rule: Any) -> None:
    """TypeError unless `rule` is a rule."""
    if not isinstance(rule, Goldfish):
        raise TypeError(
            f"expected a rule such as Goldfish(k=4, h=13, max_kept=4), got {rule!r}"
        )


def _draw(rule: Goldfish, draw: int | None) -> int:
    """Without a given draw, strategy "random" takes one from torch's CPU generator."""
    if draw is not None or rule.strategy != "random":
        return draw or 0
    return int(torch.randint(2**62, ()))


def padding_mask(batch: Mapping[str, Any], ids: Tensor) -> Tensor | None:
    """The attention_mask of a batch, if it marks padding.

    One of shape (B, 1, T, T) says which tokens see each other; padding is then in the labels only.
    """
    if batch.get("attention_mask") is None:
        return None
    mask = batch["attention_mask"]
    if not isinstance(mask, Tensor):
        mask = torch.as_tensor(mask, device=ids.device)
    if mask.ndim <= 2:
        return check_beside("attention_mask", mask, ids)
    if batch.get("labels") is None:
        shape = tuple(mask.shape)
        raise ValueError(
            f"an attention_mask of {shape} does not mark padding; let the collator make labels"
        )
    return None


def _labels(
    batch: Mapping[str, Any], ids: Tensor, ignore_index: int, shifted: bool
) -> Tensor:
    """The labels of a batch, or else its ids."""
    if batch.get("labels") is None:
        if shifted:
            raise ValueError(
                "shifted=True needs labels: the last of them is a token that input_ids do not have"
            )
        return ids.to(torch.int64)  # uint8 cannot hold -100
    labels = check_beside("labels", batch["labels"], ids)
    assert labels is not None
    if not labels.dtype.is_signed:
        raise TypeError(
            f"labels must be signed to hold {ignore_index}, got {labels.dtype}: labels.long()"
        )
    return labels


def _unshifted(
    given: Mapping[str, Any], labels: Tensor, targets: Tensor
) -> tuple[dict[str, Any], Tensor]:
    """Rows that hold the token of every shifted label, and the place of each label there.

    A label is usually the next id of its row. The last label of a row, and of a document that was
    shifted before it was padded or packed, is not: it gets a place of its own behind its position.
    So every row is doubled: position i moves to 2i, and 2i + 1 is the extra place, which is
    attended only if it is needed. For the documents [5, 6, 7] and [8, 9], shifted and packed:

        input_ids            5  6  8        labels           6  7  9
        doubled input_ids    5  6  6  7  8  9
        attention_mask       1  0  1  1  1  1      so the rule sees 5 6 7 8 9
        places               2  3  5               of the labels 6, 7 and 9

    Returns:
        The arguments of `Goldfish.dropped` with rows of 2T, and int64 of the labels' shape.
    """
    ids = given["input_ids"]
    mask = given["attention_mask"]
    mask = torch.ones_like(ids) if mask is None else mask.to(torch.int64)
    next_id = pad(ids[..., 1:], (0, 1))
    next_attended = pad(mask[..., 1:] != 0, (0, 1))
    extra = (labels != next_id) | ~next_attended
    # An extra place is of the same document as its position.
    extra_mask = (extra & targets) * mask.clamp(min=1)

    pairs = {
        "input_ids": (ids, labels.to(ids.dtype)),
        "attention_mask": (mask, extra_mask),
    }
    if given["position_ids"] is not None:
        positions = torch.as_tensor(given["position_ids"], device=ids.device)
        pairs["position_ids"] = (positions, positions + 1)
    doubled = {name: torch.stack(pair, -1).flatten(-2) for name, pair in pairs.items()}

    # The extra place of position i, or the doubled place of position i + 1.
    column = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    places = torch.where(extra, 2 * column + 1, 2 * column + 2)
    return {**given, **doubled}, places


@dataclass
class GoldfishCollator:
    """Masks the batches of another collator.

    >>> from torch.utils.data import DataLoader
    >>> from transformers import default_data_collator
    >>> from goldfish import Goldfish
    >>> rule = Goldfish(k=4, h=13, max_kept=4)
    >>> rows = [{"input_ids": list(range(100, 112))}]
    >>> loader = DataLoader(rows, collate_fn=GoldfishCollator(default_data_collator, rule))
    >>> [batch["labels"].tolist() for batch in loader]
    [[[100, 101, 102, 103, 104, -100, 106, -100, 108, 109, 110, 111]]]

    For custom training loops; use it in the training DataLoader only. A Trainer uses one collator
    for training and evaluation, so there it would change the evaluation loss: use GoldfishTrainer
    or attach(trainer, rule) instead.

    Args:
        inner: any collator; its batch has input_ids (B, T), and optionally labels, attention_mask
            and position_ids.
        rule: decides which tokens are dropped.
        ignore_index, shifted: as for `mask_labels`; the inner collator must then make the labels.
    """

    inner: Callable[..., Mapping[str, Any]]
    rule: Goldfish
    ignore_index: int = IGNORE_INDEX
    shifted: bool = False

    def __post_init__(self) -> None:
        check_rule(self.rule)

    def __call__(self, features: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        batch = self.inner(features, *args, **kwargs)
        usual = self.ignore_index == IGNORE_INDEX and not self.shifted
        if batch.get("labels") is None and not usual:
            raise ValueError(
                f"ignore_index={self.ignore_index}, shifted={self.shifted} "
                "needs a collator with labels"
            )
        masked = mask_batch(
            self.rule, batch, ignore_index=self.ignore_index, shifted=self.shifted
        )
        return masked.batch
