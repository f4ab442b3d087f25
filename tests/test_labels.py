import pytest
import torch
from datasets import Dataset, load_from_disk
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    default_data_collator,
)

from goldfish import Goldfish, GoldfishCollator, mask_labels, premask

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


def test_random_drops_other_tokens_each_time_and_repeats_under_a_seed():
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
    with pytest.raises(ValueError, match="decides from input_ids, but the batch has only inputs_embeds"):
        GoldfishCollator(lambda _: {"inputs_embeds": torch.zeros(1, 2, 3)}, RULE)([])


SOURCES = {"books": RULE, "web": Goldfish(k=50, h=3), "own": None}


def test_each_source_has_its_rule():
    ids = random_ids(4, 60)
    names = ["web", "books", "own", "books"]
    rows = [{"input_ids": row, "source": name} for row, name in zip(ids.tolist(), names, strict=True)]
    batch = GoldfishCollator(default_data_collator, SOURCES)(rows)
    assert set(batch) == {"input_ids", "labels"}
    for row, labels, name in zip(ids, batch["labels"], names, strict=True):
        assert torch.equal(labels, mask_labels(SOURCES[name], row))
    assert (batch["labels"][2] == ids[2]).all()
    assert rows[0]["source"] == "web", "the features are left as they were"


def test_a_source_without_a_rule_is_refused():
    collator = GoldfishCollator(default_data_collator, SOURCES)
    with pytest.raises(ValueError, match=r"a row has the source 'news', but there are rules for books, own, web; give"):
        collator([{"input_ids": [1, 2], "source": "news"}])
    with pytest.raises(ValueError, match="a row has the source None"):
        collator([{"input_ids": [1, 2]}])
    with pytest.raises(ValueError, match=r"2 rows were packed into 1, .* premask"):
        GoldfishCollator(DataCollatorWithFlattening(), SOURCES)([{"input_ids": [1, 2], "source": "own"}] * 2)


@pytest.mark.parametrize("streaming", [False, True])
def test_premask_writes_what_the_collator_would(streaming):
    names = ["web", "books", "own"]
    lengths = [30, 50, 20]
    rows = [{"input_ids": random_ids(n).tolist(), "source": name} for n, name in zip(lengths, names, strict=True)]
    dataset = Dataset.from_list(rows)
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    for row in premask(dataset, SOURCES, dropped_column="dropped"):
        ids, rule = torch.tensor(row["input_ids"]), SOURCES[row["source"]]
        assert row["labels"] == mask_labels(rule, ids).tolist()
        assert row["dropped"] == [label == -100 for label in row["labels"]]


def test_premask_respects_labels_padding_and_documents():
    ids = random_ids(40)
    row = {
        "input_ids": ids.tolist(),
        "labels": [-100] * 5 + ids[5:].tolist(),
        "position_ids": [*range(20), *range(20)],
        "attention_mask": [0] * 3 + [1] * 37,
    }
    (masked,) = premask(Dataset.from_list([row]), RULE)
    given = {name: torch.tensor(row[name]) for name in ("labels", "position_ids", "attention_mask")}
    assert masked["labels"] == mask_labels(RULE, ids, **given).tolist()


def test_premask_is_cached_by_the_rule(tmp_path):
    Dataset.from_list([{"input_ids": random_ids(40).tolist()}] * 4).save_to_disk(str(tmp_path / "rows"))

    def files(rule, num_proc=None):
        masked = premask(load_from_disk(str(tmp_path / "rows")), rule, num_proc=num_proc)
        return sorted(file["filename"] for file in masked.cache_files)

    assert files(RULE) == files(Goldfish(k=2, h=3))
    assert files(RULE) != files(Goldfish(k=2, h=4))
    assert len(files(Goldfish(k=3), num_proc=2)) == 2, "each process has a cache of its own"


def test_premask_refuses_what_it_cannot_do():
    dataset = Dataset.from_list([{"text": "not tokenized"}])
    with pytest.raises(ValueError, match=r"decides from input_ids, but the rows have only text; tokenize first"):
        premask(dataset, RULE)
    with pytest.raises(ValueError, match="draws anew in every epoch"):
        premask(dataset, {"a": Goldfish(strategy="random")})


def test_rows_cut_among_ranks_are_decided_before():
    """Each of two ranks has half of a premasked row; what it decides from its half alone is something else."""
    ids = random_ids(64)
    (row,) = premask(Dataset.from_list([{"input_ids": ids.tolist()}]), RULE)
    halves = [torch.tensor(row["labels"][:32]), torch.tensor(row["labels"][32:])]
    alone = [mask_labels(RULE, ids[:32]), mask_labels(RULE, ids[32:])]
    assert torch.equal(halves[0], alone[0])
    assert not torch.equal(halves[1], alone[1])
    assert torch.equal(halves[1][3:], alone[1][3:]), "only the first h tokens lack their context"


def test_a_collator_that_keeps_labels_keeps_premasked_ones(tokenizer):
    dataset = premask(Dataset.from_list([{"input_ids": random_ids(n).tolist()} for n in (9, 30)]), RULE)
    batch = DataCollatorForSeq2Seq(tokenizer)(list(dataset))
    for row, labels in zip(dataset, batch["labels"], strict=True):
        assert row["labels"] == [label for label, _ in zip(labels.tolist(), row["labels"], strict=False)]
        assert -100 in row["labels"]


def test_what_is_no_rule_is_refused():
    for call in (
        lambda: premask(Dataset.from_list([{"input_ids": [1]}]), 4),
        lambda: GoldfishCollator(default_data_collator, 4),
        lambda: mask_labels(4, random_ids(3)),
    ):
        with pytest.raises(TypeError, match=r"expected a rule such as Goldfish\(k=4, h=13\), or .*, got 4"):
            call()
    with pytest.raises(ValueError, match="input_ids is on cpu and labels on meta; move one of them"):
        mask_labels(RULE, random_ids(3), torch.zeros(3, device="meta"))
    four_d = {"input_ids": random_ids(1, 3), "attention_mask": torch.ones(1, 1, 3, 3)}
    with pytest.raises(ValueError, match=r"the batch has no labels, and an attention_mask of \(1, 1, 3, 3\) does not"):
        GoldfishCollator(lambda _: four_d, RULE)([])
