import pytest
import torch
from transformers import DataCollatorWithFlattening, DataCollatorWithPadding, default_data_collator

from goldfish import Goldfish, GoldfishCollator, mask_labels

pytestmark = pytest.mark.core
RULE = Goldfish(k=2, h=3)


def random_ids(*shape):
    return torch.randint(2, 300, shape, generator=torch.Generator().manual_seed(0))


def test_mask_labels_changes_dropped_tokens_and_nothing_else():
    ids = random_ids(2, 50)
    labels = ids.clone()
    labels[:, :10] = -100
    masked = mask_labels(RULE, ids, labels)
    dropped = RULE.dropped(ids)
    assert torch.equal(masked[~dropped], labels[~dropped])
    assert (masked[dropped] == -100).all()
    assert (labels[:, 10:] == ids[:, 10:]).all(), "the caller's labels are not touched"
    assert torch.equal(mask_labels(RULE, ids, labels, ignore_index=-1) == -1, dropped)


def test_labels_default_to_the_attended_ids():
    ids = random_ids(1, 20)
    attended = torch.ones_like(ids)
    attended[:, :5] = 0
    masked = mask_labels(RULE, ids, attention_mask=attended)
    assert (masked[:, :5] == -100).all()
    assert torch.equal(masked[0, 5:], mask_labels(RULE, ids[0, 5:]))


def test_random_takes_new_holes_each_time_and_repeats_under_a_seed():
    ids, rule = random_ids(1, 400), Goldfish(strategy="random")
    torch.manual_seed(3)
    first, second = mask_labels(rule, ids), mask_labels(rule, ids)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(mask_labels(rule, ids), first)


def test_labels_of_another_shape_are_refused():
    with pytest.raises(
        ValueError, match=r"labels must have the shape of input_ids, \(1, 20\), got \(1, 19\); labels are"
    ):
        mask_labels(RULE, random_ids(1, 20), random_ids(1, 19))


def test_collator_masks_what_the_inner_one_made():
    rows = [{"input_ids": row, "labels": row} for row in random_ids(3, 30).tolist()]
    plain, masked = default_data_collator(rows), GoldfishCollator(default_data_collator, RULE)(rows)
    assert torch.equal(masked["input_ids"], plain["input_ids"])
    assert torch.equal(masked["labels"], mask_labels(RULE, plain["input_ids"], plain["labels"]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_masked_as_they_are_alone(tokenizer, side):
    tokenizer.padding_side = side
    rows = [{"input_ids": row.tolist()} for row in (random_ids(30), random_ids(12), random_ids(1))]
    batch = GoldfishCollator(DataCollatorWithPadding(tokenizer), RULE)(rows)
    for row, labels, attended in zip(rows, batch["labels"], batch["attention_mask"], strict=True):
        assert torch.equal(labels[attended == 1], mask_labels(RULE, torch.tensor(row["input_ids"])))
        assert (labels[attended == 0] == -100).all()


def test_packed_rows_are_masked_as_they_are_alone():
    rows = [{"input_ids": row.tolist()} for row in (random_ids(30), random_ids(12))]
    batch = GoldfishCollator(DataCollatorWithFlattening(), RULE)(rows)
    alone = [mask_labels(RULE, torch.tensor(row["input_ids"])) for row in rows]
    expected = torch.cat(alone)[None]
    expected[0, [0, 30]] = -100  # the inner collator's own: a document's first token is no target
    assert torch.equal(batch["labels"], expected)


def test_shift_labels_are_masked_too():
    ids = random_ids(1, 30)
    shifted = torch.cat([ids[:, 1:], torch.tensor([[-100]])], dim=1)
    batch = GoldfishCollator(lambda _: {"input_ids": ids, "labels": ids, "shift_labels": shifted}, RULE)([])
    assert torch.equal(batch["shift_labels"][:, :-1], batch["labels"][:, 1:])


def test_a_batch_without_ids_is_refused():
    with pytest.raises(ValueError, match="decides from input_ids, but the batch holds only inputs_embeds"):
        GoldfishCollator(lambda _: {"inputs_embeds": torch.zeros(1, 2, 3)}, RULE)([])
