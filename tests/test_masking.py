import pytest
import torch
from datasets import Dataset
from torch.nn.functional import pad
from transformers import (
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    default_data_collator,
)

from goldfish import DropCounts, Goldfish, GoldfishCollator, mask_labels, premask
from goldfish.masking import mask_batch

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


def test_random_drops_other_tokens_each_time_and_repeats_under_a_seed():
    ids, rule = random_ids(1, 400), Goldfish(strategy="random")
    torch.manual_seed(3)
    first, second = mask_labels(rule, ids), mask_labels(rule, ids)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(mask_labels(rule, ids), first)


def test_labels_of_another_shape_are_refused():
    with pytest.raises(
        ValueError,
        match=r"labels must have the shape of input_ids, \(1, 20\), got \(1, 19\)",
    ):
        mask_labels(RULE, random_ids(1, 20), random_ids(1, 19))


def test_collator_masks_what_the_inner_one_made():
    rows = [{"input_ids": row, "labels": row} for row in random_ids(3, 30).tolist()]
    plain, masked = (
        default_data_collator(rows),
        GoldfishCollator(default_data_collator, RULE)(rows),
    )
    assert torch.equal(masked["input_ids"], plain["input_ids"])
    assert torch.equal(
        masked["labels"], mask_labels(RULE, plain["input_ids"], plain["labels"])
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_masked_as_they_are_alone(tokenizer, side):
    tokenizer.padding_side = side
    rows = [
        {"input_ids": row.tolist()}
        for row in (random_ids(30), random_ids(12), random_ids(1))
    ]
    batch = GoldfishCollator(DataCollatorWithPadding(tokenizer), RULE)(rows)
    for row, labels, attended in zip(
        rows, batch["labels"], batch["attention_mask"], strict=True
    ):
        assert torch.equal(
            labels[attended == 1], mask_labels(RULE, torch.tensor(row["input_ids"]))
        )
        assert (labels[attended == 0] == -100).all()


def test_packed_rows_are_masked_as_they_are_alone():
    rows = [{"input_ids": row.tolist()} for row in (random_ids(30), random_ids(12))]
    batch = GoldfishCollator(DataCollatorWithFlattening(), RULE)(rows)
    alone = [mask_labels(RULE, torch.tensor(row["input_ids"])) for row in rows]
    expected = torch.cat(alone)[None]
    expected[
        0, [0, 30]
    ] = -100  # the inner collator's own: a document's first token is no target
    assert torch.equal(batch["labels"], expected)


def test_shift_labels_are_masked_too():
    ids = random_ids(1, 30)
    shifted = torch.cat([ids[:, 1:], torch.tensor([[-100]])], dim=1)
    batch = GoldfishCollator(
        lambda _: {"input_ids": ids, "labels": ids, "shift_labels": shifted}, RULE
    )([])
    assert torch.equal(batch["shift_labels"][:, :-1], batch["labels"][:, 1:])


def test_a_batch_without_ids_is_refused():
    with pytest.raises(
        ValueError, match="decides from input_ids, but the batch has only inputs_embeds"
    ):
        GoldfishCollator(lambda _: {"inputs_embeds": torch.zeros(1, 2, 3)}, RULE)([])


def test_what_is_no_rule_is_refused():
    for call in (
        lambda: premask(Dataset.from_list([{"input_ids": [1]}]), 4),
        lambda: GoldfishCollator(default_data_collator, 4),
        lambda: mask_labels(4, random_ids(3)),
    ):
        with pytest.raises(
            TypeError,
            match=r"expected a rule such as Goldfish\(k=4, h=13, max_kept=4\), got 4",
        ):
            call()
    with pytest.raises(
        ValueError, match="input_ids is on cpu and labels on meta; move one of them"
    ):
        mask_labels(RULE, random_ids(3), torch.zeros(3, device="meta"))
    four_d = {"input_ids": random_ids(1, 3), "attention_mask": torch.ones(1, 1, 3, 3)}
    with pytest.raises(
        ValueError,
        match=r"an attention_mask of \(1, 1, 3, 3\) does not mark padding; let the",
    ):
        GoldfishCollator(lambda _: four_d, RULE)([])


def documents(*lengths):
    """Position ids of documents one after the other."""
    return torch.cat([torch.arange(n) for n in lengths])


@pytest.mark.parametrize("ignore_index", [-100, -1])
@pytest.mark.parametrize(
    "rule",
    [RULE, Goldfish(k=2, h=3, window="inclusive"), Goldfish(k=3, max_kept=4)],
    ids=str,
)
def test_shifted_labels_are_masked_as_the_whole_row(rule, ignore_index):
    """torchtitan, NeMo, Megatron, nanochat: inputs are tokens[:-1], labels tokens[1:]."""
    tokens = random_ids(2, 51)
    positions, attended = documents(20, 31).expand(2, -1), torch.ones_like(tokens)
    attended[1, :6] = 0
    given = {"position_ids": positions[:, :-1], "attention_mask": attended[:, :-1]}
    labels = tokens[:, 1:].masked_fill(attended[:, 1:] == 0, ignore_index)
    expected = labels.masked_fill(
        rule.dropped(tokens, positions, attention_mask=attended)[:, 1:], ignore_index
    )
    masked = mask_labels(
        rule, tokens[:, :-1], labels, shifted=True, ignore_index=ignore_index, **given
    )
    assert torch.equal(masked, expected)
    assert (masked[:, -1] == ignore_index).any() or rule.max_kept, (
        "the last label is decided too"
    )
    batch = {"input_ids": tokens[:, :-1], "labels": labels, **given}
    collator = GoldfishCollator(
        lambda _: batch, rule, ignore_index=ignore_index, shifted=True
    )
    assert torch.equal(collator([])["labels"], expected)
    if ignore_index != -100:
        unshifted = GoldfishCollator(
            lambda _: batch | {"labels": tokens[:, :-1]}, rule, ignore_index=-1
        )([])["labels"]
        assert torch.equal(unshifted == -1, rule.dropped(tokens[:, :-1], **given))


@pytest.mark.parametrize("rule", [RULE, Goldfish(k=2, h=3, max_kept=2)], ids=str)
def test_labels_that_were_shifted_before_padding_and_packing(rule):
    """Each document's last label is a token that input_ids do not have; it is decided, too."""
    documents = [random_ids(n) for n in (12, 30, 7)]
    expected = torch.cat(
        [ids[1:].masked_fill(rule.dropped(ids)[1:], -100) for ids in documents]
    )
    ids, labels = (
        torch.cat([each[part] for each in documents])
        for part in (slice(-1), slice(1, None))
    )
    positions = torch.cat([torch.arange(len(each) - 1) for each in documents])
    assert torch.equal(
        mask_labels(rule, ids, labels, position_ids=positions, shifted=True), expected
    )
    length = 32
    for ids in documents:
        given = (
            pad(ids[:-1], (0, length - len(ids) + 1)),
            pad(ids[1:], (0, length - len(ids) + 1), value=-100),
        )
        expected = pad(
            ids[1:].masked_fill(rule.dropped(ids)[1:], -100),
            (0, length - len(ids) + 1),
            value=-100,
        )
        attended = (torch.arange(length) < len(ids) - 1).long()
        for mask in (attended, None):
            assert torch.equal(
                mask_labels(rule, *given, attention_mask=mask, shifted=True), expected
            )


def test_bytes_can_be_ids_and_no_labels():
    ids = torch.randint(0, 256, (4, 40), dtype=torch.uint8)
    assert torch.equal(mask_labels(RULE, ids), mask_labels(RULE, ids.long()))
    with pytest.raises(
        TypeError,
        match=r"labels must be signed to hold -100, got torch.uint8: labels.long",
    ):
        mask_labels(RULE, ids, ids)


def test_shifted_labels_must_be_there():
    ids = random_ids(1, 5)
    with pytest.raises(
        ValueError,
        match="shifted=True needs labels: the last of them is a token that input_ids",
    ):
        mask_labels(RULE, ids, shifted=True)
    for options in ({"shifted": True}, {"ignore_index": -1}):
        with pytest.raises(ValueError, match="needs a collator with labels"):
            GoldfishCollator(lambda _: {"input_ids": ids}, RULE, **options)([])


def test_position_ids_of_multimodal_models():
    """(3, B, T) or (4, B, T): the first row, of text or time, says where documents start."""
    ids, text = random_ids(2, 40), documents(15, 25).expand(2, -1)
    for rows in (3, 4):
        positions = torch.stack([text, *[torch.ones_like(text)] * (rows - 1)])
        batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
        expected = RULE.dropped(ids, text)
        assert torch.equal(RULE.dropped(ids, positions), expected)
        assert not torch.equal(RULE.dropped(ids), expected)
        assert torch.equal(
            GoldfishCollator(lambda _, b=batch: b, RULE)([])["labels"] == -100, expected
        )


def test_a_list_can_be_an_attention_mask():
    ids = random_ids(1, 30)
    mask = [[0] * 7 + [1] * 23]
    expected = mask_labels(RULE, ids, attention_mask=torch.tensor(mask))
    assert torch.equal(mask_labels(RULE, ids, attention_mask=mask), expected)
    assert (expected[0, :7] == -100).all()


def test_labels_alone_can_mark_padding_of_numbered_documents():
    """Shifted labels: each document's last label is decided in its own document."""
    documents = [random_ids(n) for n in (12, 30, 7)]
    expected = torch.cat(
        [ids[1:].masked_fill(RULE.dropped(ids)[1:], -100) for ids in documents]
    )
    ids, labels = (
        torch.cat([each[part] for each in documents])
        for part in (slice(-1), slice(1, None))
    )
    numbers = torch.cat(
        [torch.full((len(each) - 1,), i) for i, each in enumerate(documents, 1)]
    )
    masked = mask_labels(RULE, ids, labels, attention_mask=numbers, shifted=True)
    assert torch.equal(masked, expected)


def test_what_the_trainer_needs_to_know():
    ids = random_ids(2, 40)
    labels = ids.masked_fill(torch.arange(40) < 5, -100)
    masked = mask_batch(
        RULE, {"input_ids": ids, "labels": labels, "other": 3}, ignore_first=True
    )
    decided = RULE.dropped(ids)
    assert masked.batch["other"] == 3
    assert torch.equal(masked.targets, labels != -100)
    assert torch.equal(masked.dropped, decided & (labels != -100))
    kept = masked.targets & ~masked.dropped
    assert torch.equal(masked.batch["labels"] != -100, kept)
    first = mask_batch(RULE, {"input_ids": ids})
    assert not first.targets[:, 0].any(), "the first token of a row is no target"
    assert torch.equal(first.batch["labels"][:, 0], ids[:, 0]), (
        "its label is left as it was"
    )
    alone = mask_batch(RULE, {"input_ids": ids}, ignore_first=True)
    assert (alone.batch["labels"][:, 0] == -100).all()


def test_a_loop_of_ones_own_writes_a_receipt(tmp_path, tokenizer):
    """That of premask over the same rows, padded or shifted."""
    rows = [random_ids(n) for n in (30, 12, 1)]
    dataset = Dataset.from_dict({"input_ids": [row.tolist() for row in rows]})
    premask(dataset, RULE, receipt=tmp_path / "premask", tokenizer=tokenizer)
    padded, shifted = DropCounts(RULE), DropCounts(RULE)
    for row in rows:
        ids = pad(row, (0, 3))[None]
        mask_labels(RULE, ids, attention_mask=(ids != 0).long(), counts=padded)
        mask_labels(RULE, row[:-1], row[1:], shifted=True, counts=shifted)
    for counts in (padded, shifted):
        path = counts.save(tmp_path / "loop", tokenizer)
        assert path.read_text() == (tmp_path / "premask" / "goldfish.json").read_text()


def test_counts_are_those_of_their_rule():
    ids = torch.arange(40)
    counts = DropCounts(Goldfish(k=4))
    with pytest.raises(ValueError, match=r"the counts are those of Goldfish\(k=4, "):
        mask_labels(Goldfish(k=8), ids, counts=counts)
    assert counts.to_dict()["targets"] == 0
    with pytest.raises(TypeError, match="expected a rule such as"):
        DropCounts("k=4")
