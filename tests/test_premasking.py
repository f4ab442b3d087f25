"""Labels written once: in Python and by `goldfish premask`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk
from helpers import BEFORE_5, tiny_llama
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from goldfish import Goldfish, GoldfishTrainer, attach, mask_labels, premask
from goldfish.cli import main
from goldfish.premasking import premask_files
from goldfish.receipt import merge_receipts, read_receipt, rules_of

pytestmark = pytest.mark.core
RULE = Goldfish(k=2, h=3)


def random_ids(*shape):
    return torch.randint(2, 300, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("streaming", [False, True])
def test_premask_writes_what_the_collator_would(streaming):
    rows = [
        {"input_ids": random_ids(n).tolist(), "name": str(n)} for n in (30, 1, 50, 20)
    ]
    dataset = Dataset.from_list(rows)
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    masked = list(premask(dataset, RULE))
    assert [(row["input_ids"], row["name"]) for row in masked] == [
        (row["input_ids"], row["name"]) for row in rows
    ]
    for row in masked:
        assert (
            row["labels"] == mask_labels(RULE, torch.tensor(row["input_ids"])).tolist()
        )


def test_premask_respects_labels_padding_and_documents():
    ids = random_ids(40)
    row = {
        "input_ids": ids.tolist(),
        "labels": [-100] * 5 + ids[5:].tolist(),
        "position_ids": [*range(20), *range(20)],
        "attention_mask": [0] * 3 + [1] * 37,
    }
    (masked,) = premask(Dataset.from_list([row]), RULE)
    given = {
        name: torch.tensor(row[name])
        for name in ("labels", "position_ids", "attention_mask")
    }
    assert masked["labels"] == mask_labels(RULE, ids, **given).tolist()


def test_premask_takes_rows_as_tensors():
    rows = Dataset.from_list([{"input_ids": random_ids(n).tolist()} for n in (30, 1)])
    expected = premask(rows, RULE)["labels"]
    for kind in ("torch", "numpy"):
        assert [
            list(row)
            for row in premask(rows.with_format(kind), RULE).with_format(None)["labels"]
        ] == expected


def test_premask_refuses_rows_that_it_cannot_read(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"premask takes one split, got train, test: premask\(dataset\['train'\]",
    ):
        premask(
            DatasetDict(
                {"train": Dataset.from_list([]), "test": Dataset.from_list([])}
            ),
            RULE,
        )
    for wrong, message in (
        (
            {"input_ids": [1.5]},
            "row 0: input_ids must be a list of integers, got float",
        ),
        ({"input_ids": ["a"]}, "row 0: input_ids must be a list of integers, got <U1"),
        (
            {"input_ids": [1, 2], "labels": [1]},
            "row 0: labels must have the shape of input_ids",
        ),
        (
            {"input_ids": None},
            "row 0 has no input_ids",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            list(premask(Dataset.from_list([wrong]).to_iterable_dataset(), RULE))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty.jsonl cannot be read: "):
        premask_files(tmp_path / "empty.jsonl", tmp_path / "out", RULE, None)


def test_premask_is_cached_by_the_rule(tmp_path):
    Dataset.from_list([{"input_ids": random_ids(40).tolist()}] * 4).save_to_disk(
        str(tmp_path / "rows")
    )

    def files(rule, num_proc=None):
        masked = premask(
            load_from_disk(str(tmp_path / "rows")), rule, num_proc=num_proc
        )
        return sorted(file["filename"] for file in masked.cache_files)

    assert files(RULE) == files(Goldfish(k=2, h=3))
    assert files(RULE) != files(Goldfish(k=2, h=4))
    assert len(files(Goldfish(k=3), num_proc=2)) == 2, (
        "each process has a cache of its own"
    )


def test_premask_refuses_what_it_cannot_do():
    dataset = Dataset.from_list([{"text": "not tokenized"}])
    with pytest.raises(
        ValueError,
        match=r"decides from input_ids, but the rows have only text; tokenize first",
    ):
        premask(dataset, RULE)
    with pytest.raises(ValueError, match="draws anew in every epoch"):
        premask(dataset, Goldfish(strategy="random"))


def test_rows_cut_among_ranks_are_decided_before():
    """Each of two ranks has half of a premasked row, from which it would decide otherwise."""
    ids = random_ids(64)
    (row,) = premask(Dataset.from_list([{"input_ids": ids.tolist()}]), RULE)
    halves = [torch.tensor(row["labels"][:32]), torch.tensor(row["labels"][32:])]
    alone = [mask_labels(RULE, ids[:32]), mask_labels(RULE, ids[32:])]
    assert torch.equal(halves[0], alone[0])
    assert not torch.equal(halves[1], alone[1])
    assert torch.equal(halves[1][3:], alone[1][3:]), (
        "only the first h tokens lack their context"
    )


def test_a_collator_that_keeps_labels_keeps_premasked_ones(tokenizer):
    dataset = premask(
        Dataset.from_list([{"input_ids": random_ids(n).tolist()} for n in (9, 30)]),
        RULE,
    )
    batch = DataCollatorForSeq2Seq(tokenizer)(list(dataset))
    for row, labels in zip(dataset, batch["labels"], strict=True):
        assert row["labels"] == [
            label for label, _ in zip(labels.tolist(), row["labels"], strict=False)
        ]
        assert -100 in row["labels"]


def trained(folder, dataset, rule, tokenizer):
    """The receipt of one epoch of a Trainer over the rows."""
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=2,
        num_train_epochs=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=True,
        disable_tqdm=True,
    )
    collator = DataCollatorForSeq2Seq(tokenizer)
    trainer = GoldfishTrainer(
        tiny_llama(),
        arguments,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=tokenizer,
        goldfish=rule,
    )
    trainer.train()
    trainer.save_model(str(folder))
    return json.loads((folder / "goldfish.json").read_text())


ROWS = [random_ids(n).tolist() for n in (30, 1, 47, 12, 64, 2)]


@pytest.mark.parametrize(
    "rule",
    [RULE, Goldfish(k=3, h=2, strategy="letters"), Goldfish(k=3, max_kept=4)],
    ids=["hash", "letters", "max_kept"],
)
def test_the_receipt_is_that_of_a_trainer_over_the_same_rows(
    tokenizer, tmp_path, rule, monkeypatch
):
    monkeypatch.setattr("goldfish.premasking.CHUNK", 4)
    rows = {
        "input_ids": ROWS,
        "labels": [[-100] * (len(row) // 3) + row[len(row) // 3 :] for row in ROWS],
    }
    dataset = Dataset.from_dict(rows)
    masked = premask(dataset, rule, receipt=tmp_path / "data", tokenizer=tokenizer)
    assert set(masked.column_names) == {"input_ids", "labels"}
    assert json.loads((tmp_path / "data" / "goldfish.json").read_text()) == trained(
        tmp_path / "model", dataset, rule, tokenizer
    )


def test_a_rule_for_each_source_is_premasked_data_that_is_concatenated(tmp_path):
    rules = {"books": RULE, "web": Goldfish(k=50, h=3)}
    parts = {
        name: premask(
            Dataset.from_dict({"input_ids": ROWS}), rule, receipt=tmp_path / name
        )
        for name, rule in rules.items()
    }
    expected = [
        mask_labels(rule, torch.tensor(row)).tolist()
        for rule in rules.values()
        for row in ROWS
    ]
    assert concatenate_datasets([*parts.values()])["labels"][:] == expected

    merge_receipts({name: tmp_path / name for name in rules}, tmp_path / "model")
    merged = read_receipt(tmp_path / "model")
    assert rules_of(merged) == rules
    for name in rules:
        alone = read_receipt(tmp_path / name)
        assert merged["sources"][name] == {
            key: alone[key] for key in merged["sources"][name]
        }
    with pytest.raises(ValueError, match="has a receipt of several rules"):
        merge_receipts({"a": tmp_path / "model", "b": tmp_path / "web"}, tmp_path)


def test_receipts_of_one_rule_add_up(tmp_path, tokenizer):
    for name, rows in (("first", ROWS[:3]), ("second", ROWS[3:]), ("whole", ROWS)):
        premask(Dataset.from_dict({"input_ids": rows}), RULE, receipt=tmp_path / name)
    merge_receipts(
        {name: tmp_path / name for name in ("first", "second")}, tmp_path / "merged"
    )
    assert read_receipt(tmp_path / "merged") == read_receipt(tmp_path / "whole")

    rows = Dataset.from_dict({"input_ids": ROWS})
    premask(rows, RULE, receipt=tmp_path / "named", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="expected receipts of one tokenizer, got 2"):
        merge_receipts(
            {name: tmp_path / name for name in ("first", "named")}, tmp_path / "merged"
        )
    with pytest.raises(FileNotFoundError, match=r"nothing has no goldfish.json"):
        merge_receipts({"nothing": tmp_path / "nothing"}, tmp_path / "merged")


@pytest.mark.parametrize("streaming", [False, True])
def test_no_second_rule_is_attached_to_premasked_rows(tmp_path, tokenizer, streaming):
    rows = Dataset.from_dict({"input_ids": ROWS})
    rows = rows.to_iterable_dataset() if streaming else rows
    masked = premask(rows, RULE)
    if not streaming:
        masked = concatenate_datasets(
            [Dataset.from_dict({"input_ids": ROWS}), masked]
        ).shuffle()
    with pytest.raises(
        ValueError, match=r"labels masked by .* under Goldfish\(k=2, h=3\).* orig"
    ):
        premask(masked, RULE)
    arguments = TrainingArguments(tmp_path, max_steps=1, report_to=[], use_cpu=True)
    trainer = Trainer(tiny_llama(), arguments, train_dataset=masked)
    with pytest.raises(
        ValueError, match=r"the train_dataset has labels masked by .* plain Trainer"
    ):
        attach(trainer, RULE)


@pytest.mark.skipif(
    BEFORE_5, reason="the numpy format of datasets 3 refuses them first"
)
def test_columns_that_only_some_rows_have_are_refused():
    rows = Dataset.from_list(
        [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3]}]
    )
    with pytest.raises(ValueError, match="some rows have labels and others have none"):
        premask(rows, RULE)


FORKS = """
import torch
from datasets import Dataset, disable_progress_bars
from goldfish import Goldfish, premask
disable_progress_bars()
torch.set_num_threads(2)
rows = Dataset.from_dict({"input_ids": [list(range(100_000))] * 4})
rule = Goldfish(k=2, h=3)
expected = rule.dropped(torch.arange(100_000))  # starts torch's threads
masked = premask(rows, rule, num_proc=2)
assert masked.num_rows == 4
labels = torch.tensor(masked[3]["labels"])
assert torch.equal(labels == -100, expected)
"""


def test_processes_can_be_forked_after_torch_has_used_its_threads():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run(
        [sys.executable, "-c", FORKS], env=environment, timeout=120, check=True
    )


def test_a_transform_would_make_the_labels_anew():
    rows = Dataset.from_dict({"input_ids": ROWS})
    rows.set_transform(lambda batch: {"input_ids": batch["input_ids"]})
    with pytest.raises(ValueError, match="the dataset has a transform"):
        premask(rows, RULE)


def test_a_stream_has_no_receipt(tmp_path):
    stream = Dataset.from_dict({"input_ids": ROWS}).to_iterable_dataset()
    with pytest.raises(
        ValueError,
        match="a receipt counts all rows, but a streaming dataset has not read them",
    ):
        premask(stream, RULE, receipt=tmp_path)


def written(tmp_path, checkpoint, kind, *options):
    """Run `goldfish premask` on ROWS, stored in one of several ways."""
    dataset, path = Dataset.from_dict({"input_ids": ROWS}), tmp_path / f"rows.{kind}"
    if kind == "parquet":
        dataset.to_parquet(path)
    elif kind == "jsonl":
        dataset.to_json(path)
    elif kind == "folder":
        dataset.save_to_disk(path)
    else:
        DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(path)
    output = tmp_path / "out"
    command = [
        "premask",
        str(path),
        "-o",
        str(output),
        "--tokenizer",
        str(checkpoint),
        "-k",
        "2",
        "--h",
        "3",
        *options,
    ]
    assert main(command) == 0
    return output


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("parquet", []),
        ("jsonl", ["--strategy", "letters"]),
        ("folder", ["--num-proc", "2"]),
        ("dict", ["--max-kept", "3"]),
    ],
)
def test_premask_writes_a_dataset_and_its_receipt(
    tmp_path, checkpoint, tokenizer, kind, options, capsys
):
    output = written(tmp_path, checkpoint, kind, *options)
    receipt = json.loads((output / "goldfish.json").read_text())
    rule = Goldfish(**receipt["rule"]).bind(tokenizer)
    assert (rule.k, rule.h) == (2, 3)
    dataset = load_from_disk(str(output))
    assert dataset["input_ids"][:] == ROWS
    labels = [mask_labels(rule, torch.tensor(row)).tolist() for row in ROWS]
    assert dataset["labels"][:] == labels
    assert receipt["dropped"] == sum(
        label == -100 for row in labels for label in row[1:]
    )
    assert receipt["targets"] == sum(len(row) - 1 for row in ROWS)
    assert list(tmp_path.glob("out*")) == [output], "nothing unfinished is left"
    assert (
        main(
            ["premask", str(output), "-o", str(output), "--tokenizer", str(checkpoint)]
        )
        == 2
    )
    assert (
        f"{output} exists already; give the name of a new folder"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("format", "name", "dtype"),
    [
        ("mask", "labels_mask.npy", np.bool_),
        ("loss-mask", "loss_mask.npy", np.float32),
    ],
)
def test_masks_are_flat_arrays_beside_the_ids(
    tmp_path, checkpoint, format, name, dtype, monkeypatch
):
    monkeypatch.setattr("goldfish.premasking.CHUNK", 4)
    output = written(tmp_path, checkpoint, "parquet", "--format", format)
    assert sorted(path.name for path in output.iterdir()) == sorted(
        ["goldfish.json", "token_ids.npy", name]
    )
    assert np.fromfile(output / "token_ids.npy", np.uint32).tolist() == [
        i for row in ROWS for i in row
    ]
    expected = []
    for row in ROWS:
        dropped = RULE.dropped(torch.tensor(row)).tolist()
        after = [
            *(not drop for drop in dropped[1:]),
            False,
        ]  # what is predicted at each token
        expected += after if format == "loss-mask" else [not drop for drop in dropped]
    assert np.fromfile(output / name, dtype).tolist() == expected


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["rows.txt"],
            "no file rows.txt; expected a .jsonl, .json, .parquet or .csv file",
        ),
        (["splits"], "splits has the splits test: give one of them"),
        (
            ["ids.jsonl", "--format", "masks"],
            "format must be one of labels, mask, loss-mask, got 'masks'",
        ),
        (["ids.jsonl", "--format", "mask"], "ids must fit into uint32, got -1 to 5"),
        (["ids.jsonl", "--strategy", "random"], "premask writes labels once"),
    ],
)
def test_what_premask_refuses(
    tmp_path, checkpoint, capsys, monkeypatch, arguments, text
):
    monkeypatch.chdir(tmp_path)
    DatasetDict(test=Dataset.from_dict({"input_ids": ROWS})).save_to_disk("splits")
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [5, -1]}')
    assert (
        main(["premask", *arguments, "-o", "out", "--tokenizer", str(checkpoint)]) == 2
    )
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith(f"goldfish premask: {text}")
    )
    assert not (tmp_path / "out").exists()
