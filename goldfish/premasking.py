"""Labels written once into a tokenized dataset: `premask`, and the files of `goldfish premask`."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from goldfish.guide import Guide, of_similar_length
from goldfish.letters import Vocabulary
from goldfish.masking import IGNORE_INDEX, PREMASKED, check_rule, mask_batch, premasked
from goldfish.receipt import DropCounts, bind_rule, count_drops, write_receipt
from goldfish.rule import NEEDS_GUIDE, Goldfish
from goldfish.secret_spans import Literals, text_of
from goldfish.text.chats import marked_values
from goldfish.text.rows import dataset_of

_log = logging.getLogger(__name__)
FORMATS = ("labels", "mask", "loss-mask")
CHUNK = 1000  # rows that are read at a time
# Tokens that are decided at a time, padding included: arrays of 2 MB.
BATCH_TOKENS = 2**18
# A column for the time of writing: `count_drops` of each row. The sum over the rows that were
# written is right also for parts that `datasets` takes from its cache.
COUNTS = "goldfish_counts"


def premask(
    dataset: Any,
    rule: Goldfish,
    *,
    guide: Any = None,
    num_proc: int | None = None,
    receipt: str | Path | None = None,
    tokenizer: Any = None,
    secret_column: str | None = None,
) -> Any:
    """A `datasets` dataset whose rows have masked `labels`, written once; map-style or streaming.

    >>> from datasets import Dataset
    >>> from goldfish import Goldfish
    >>> dataset = Dataset.from_dict({"input_ids": [list(range(100, 112)), [7, 8]]})
    >>> premask(dataset, Goldfish(k=4, h=13, max_kept=4))["labels"][0]
    [100, 101, 102, 103, 104, -100, 106, -100, 108, 109, 110, 111]

    For pipelines that pack or shard tokens later (packing, sequence parallelism), and for a rule
    for each source: premask the data sets one by one and concatenate them. Each row is decided as
    a whole. For training data only, and for a collator that keeps labels (DataCollatorForSeq2Seq,
    default_data_collator, TRL's): DataCollatorForLanguageModeling makes them anew from input_ids.
    The description of the result names the rule, so that no trainer attaches another one.
    `datasets` caches the result under the rule, each of the num_proc parts by itself, so an
    interrupted run continues after the parts that it finished.

    Args:
        dataset: rows with `input_ids` and optionally `labels`, `position_ids`, `attention_mask`.
        rule: decides which tokens are dropped.
        guide: for strategy "entropy", the model that is to be trained, or one with its tokenizer,
            on its device. It reads every document once, alone; an interrupted run starts again.
        num_proc: processes, for map-style datasets; not with a guide.
        receipt: a folder in which to write goldfish.json, with the counts of one pass over the
            rows (map-style only). Copy it beside the weights: a trainer without goldfish support
            does not write one.
        tokenizer: binds rules that need it; its fingerprint goes into the receipt.
        secret_column: a column with a secret of each row (a string, taken literally), or a list of
            them, or None. Every token that overlaps any of these secrets, in any row, is dropped,
            on top of the rule. The receipt has the name of the column only. Needs the tokenizer
            and a map-style dataset.

    Raises:
        TypeError: not a rule.
        ValueError: rows that cannot be masked; a dataset with a transform, which would make the
            labels anew; strategy "random", which draws anew in every epoch; a streaming dataset
            with a receipt or a guide; strategy "entropy" without a guide, or the reverse.
    """
    check_rule(rule)
    _check_dataset(dataset, receipt is not None)
    if rule.strategy == "random":
        raise ValueError(
            'premask writes labels once, strategy "random" draws anew in every epoch: '
            "use a collator"
        )
    rule = bind_rule(rule, tokenizer)
    if guide is not None:
        _check_guided(dataset, num_proc)
        guide = Guide(guide)
        rule = guide.with_decisions(rule, None)
    elif rule.strategy == "entropy":
        raise ValueError(NEEDS_GUIDE)
    literals = vocabulary = None
    if secret_column is not None:
        if tokenizer is None:
            raise ValueError(
                "secret_column needs the tokenizer: premask(..., tokenizer=tokenizer)"
            )
        vocabulary = Goldfish(secrets="x").bind(tokenizer).vocabulary
        assert vocabulary is not None
        literals = _secrets_in(dataset, secret_column, vocabulary)
    settings = {
        "rule": rule,
        "guide": guide,
        "literals": literals,
        "vocabulary": vocabulary,
        "count": receipt is not None,
        "one_thread": (num_proc or 1) > 1,
    }
    options = {
        "batched": True,
        "batch_size": CHUNK,
        "with_indices": True,
        "fn_kwargs": settings,
    }
    if not hasattr(dataset, "num_rows"):
        return _with_trace(dataset.map(_mask_rows, **options), rule)
    # Arrays, not lists: Python's lists of integers would take most of the time.
    if num_proc is not None:
        options["num_proc"] = num_proc
    masked = dataset.with_format("numpy").map(_mask_rows, **options)
    if receipt is not None:
        counts = DropCounts(rule, torch.device("cpu"))
        for batch in masked.select_columns([COUNTS]).iter(CHUNK):
            counts.add(torch.tensor(batch[COUNTS]))
        counts.end_step()
        counts.sync()
        write_receipt(receipt, counts, tokenizer, secret_column=secret_column)
        masked = masked.remove_columns(COUNTS)
    return _with_trace(_with_format_of(dataset, masked), rule)


def _secrets_in(dataset: Any, column: str, vocabulary: Vocabulary) -> Literals:
    """The secrets of a column; a warning counts those that their rows do not have."""
    if not hasattr(dataset, "num_rows") or column not in dataset.column_names:
        raise ValueError(
            f"the dataset has no column {column!r} that can be read in advance"
        )
    secrets: set[str] = set()
    missing = []
    # Cells as Python's own values, ids as arrays.
    rows = dataset.select_columns(["input_ids", column])
    rows = rows.with_format("numpy", ["input_ids"], output_all_columns=True)
    for number, row in enumerate(rows):
        own = marked_values(row, column)
        secrets.update(own)
        entries = vocabulary.entries_of(np.asarray(row["input_ids"]))
        text = text_of(entries)
        if any(secret not in text for secret in own):
            missing.append(number)
    if missing:
        _log.warning(
            "%d rows do not have their secret of the column %s in the text of their ids (first: "
            "row %d). Was it tokenized otherwise, or cut off?",
            len(missing),
            column,
            missing[0],
        )
    if not secrets:
        raise ValueError(f"the column {column!r} has no secret")
    return Literals(secrets)


def _with_trace(masked: Any, rule: Goldfish) -> Any:
    """`masked`, described as such, so that no second rule is attached to it."""
    earlier = masked.info.description or ""
    masked.info.description = f"{earlier}\n{PREMASKED} {rule}".strip()
    return masked


def _check_dataset(dataset: Any, wants_receipt: bool) -> None:
    if isinstance(dataset, dict):
        raise ValueError(
            f"premask takes one split, got {', '.join(dataset)}: premask(dataset['train'], ...)"
        )
    if premasked(dataset):
        raise ValueError(
            f"the dataset has {premasked(dataset)}; premask the original instead"
        )
    if wants_receipt and not hasattr(dataset, "num_rows"):
        raise ValueError(
            "a receipt counts all rows, but a streaming dataset has not read them: "
            "use a map-style dataset"
        )
    if getattr(dataset, "format", {}).get("type") == "custom":
        raise ValueError(
            "the dataset has a transform (set_transform), which makes its columns when they are "
            "read, so written labels would be lost: use dataset.map instead of the transform"
        )


def _check_guided(dataset: Any, num_proc: int | None) -> None:
    if not hasattr(dataset, "num_rows"):
        raise ValueError(
            "the guide would read a streaming dataset again in every epoch: use a map-style dataset"
        )
    if (num_proc or 1) > 1:
        raise ValueError(
            f"the guide reads in one process, on its device, got num_proc={num_proc}"
        )


def _with_format_of(dataset: Any, masked: Any) -> Any:
    """`masked` in the format of `dataset`; the labels are visible if the ids are."""
    given = dataset.format
    columns = {*given["columns"]}
    if "input_ids" in columns:
        columns.add("labels")
    # None is "all columns", also of columns that are added later.
    all_columns = columns == set(masked.column_names)
    return masked.with_format(
        given["type"],
        None if all_columns else sorted(columns),
        given["output_all_columns"],
        **given["format_kwargs"],
    )


def _mask_rows(
    rows: Mapping[str, Any],
    numbers: list[int],
    rule: Goldfish,
    guide: Guide | None,
    literals: Literals | None,
    vocabulary: Vocabulary | None,
    count: bool,
    one_thread: bool,
) -> dict[str, list[Any]]:
    """The new columns of some rows of a dataset.

    Rows of similar length are padded to one length and decided together.
    """
    if one_thread:
        # A forked process inherits torch's thread pool, whose threads it does not have: an
        # operation that uses them would wait forever.
        torch.set_num_threads(1)
    if "input_ids" not in rows:
        raise ValueError(
            f"the rule decides from input_ids, but the rows have only {', '.join(rows)}; "
            "tokenize first"
        )
    given = [_read_row(rows, place, number) for place, number in enumerate(numbers)]
    lengths = [len(row["input_ids"]) for row in given]
    labels: list[Any] = [None] * len(given)
    counts: list[Any] = [None] * len(given)
    for places in of_similar_length(lengths, BATCH_TOKENS):
        # A batch is padded to the length of its last row, which is the longest.
        width = lengths[places[-1]]
        batch = _padded([given[place] for place in places], width)
        decided = rule if guide is None else guide.read(rule, batch)
        masked = mask_batch(decided, batch)
        if literals is not None:
            documents = rule.rows(
                batch["input_ids"],
                batch.get("position_ids"),
                attention_mask=batch["attention_mask"],
            )
            assert vocabulary is not None
            secret = documents.overlapping(literals, vocabulary)
            masked = masked.dropping(documents.back(secret))
        batch_labels = masked.batch["labels"].numpy()
        batch_counts = count_drops(masked).tolist()
        # Results go back to the places of their rows, without the padding. With lengths of
        # [3, 9, 2] the places are [2, 0, 1].
        for line, place in enumerate(places):
            row_labels = batch_labels[line, : lengths[place]]
            is_array = isinstance(rows["input_ids"][place], np.ndarray)
            labels[place] = row_labels if is_array else row_labels.tolist()
            counts[place] = batch_counts[line]
    return {"labels": labels, COUNTS: counts} if count else {"labels": labels}


def _read_row(
    rows: Mapping[str, Any], place: int, number: int
) -> dict[str, np.ndarray]:
    """The columns of one row that decide; ValueError with its number if they do not fit."""
    row = {}
    for name in ("input_ids", "labels", "position_ids", "attention_mask"):
        value = rows[name][place] if name in rows else None
        if value is None and name == "input_ids":
            raise ValueError(f"row {number} has no input_ids")
        if value is None:
            continue
        column = np.asarray(value)
        row[name] = column
        # An empty list becomes an array of floats.
        is_integer = np.issubdtype(column.dtype, np.integer)
        if column.size and not is_integer:
            raise ValueError(
                f"row {number}: {name} must be a list of integers, got {column.dtype}"
            )
        expected = row["input_ids"].shape
        if column.shape != expected or column.ndim != 1:
            shapes = f"{expected}, got {column.shape}"
            raise ValueError(
                f"row {number}: {name} must have the shape of input_ids, {shapes}"
            )
    return row


def _padded(rows: list[dict[str, np.ndarray]], width: int) -> dict[str, torch.Tensor]:
    """A batch of rows, padded on the right; padding has the attention_mask 0."""
    for row in rows:
        uneven = row.keys() ^ rows[0].keys()
        if uneven:
            raise ValueError(
                f"some rows have {min(uneven)} and others have none; give it to all"
            )
    batch = {}
    for name in {*rows[0], "attention_mask"}:
        fill = IGNORE_INDEX if name == "labels" else 0
        padded = np.full((len(rows), width), fill, dtype=np.int64)
        for line, row in zip(padded, rows, strict=True):
            line[: len(row["input_ids"])] = row.get(name, 1)
        batch[name] = torch.from_numpy(padded)
    return batch


def premask_files(
    source: str | Path,
    output: str | Path,
    rule: Goldfish,
    tokenizer: Any,
    *,
    guide: Any = None,
    format: str = "labels",
    num_proc: int | None = None,
    secret_column: str | None = None,
) -> None:
    """Mask a tokenized dataset on disk and write it, with its receipt, to a new folder.

    The folder appears when all is written.

    Args:
        source: see `rows.dataset_of`; if it has several splits, "train" is read.
        output: the new folder.
        rule, tokenizer, guide, num_proc, secret_column: as for `premask`.
        format: "labels" is a folder for `datasets.load_from_disk`, whose labels hold -100 at
            dropped tokens. "mask" is for OLMo and OLMo-core (data.paths, label_mask_paths):
            token_ids.npy (uint32) and labels_mask.npy (bool, True if the token is a target), all
            rows one after the other, without a header (np.memmap). "loss-mask" is for Megatron and
            NeMo: token_ids.npy and loss_mask.npy, float32 in the same layout, shifted: 1 if the
            next token of the row is a target, 0 if it is not and for the last token of a row.

    Raises:
        ValueError: an output that exists, an unknown source or format, no tokens, ids beyond
            uint32; as `premask`.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(f"{output} exists already; give the name of a new folder")
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    dataset = dataset_of(str(source), streaming=False, split="train")
    unfinished = output.with_name(output.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    masked = premask(
        dataset,
        rule,
        guide=guide,
        num_proc=num_proc,
        receipt=unfinished,
        tokenizer=tokenizer,
        secret_column=secret_column,
    )
    if format == "labels":
        masked.save_to_disk(str(unfinished), num_proc=num_proc)
    else:
        _write_arrays(masked, unfinished, shifted=format == "loss-mask")
    unfinished.rename(output)


def _write_arrays(masked: Any, folder: Path, *, shifted: bool) -> None:
    """The ids and the targets of all rows, one after the other; see `premask_files`."""
    name = "loss_mask.npy" if shifted else "labels_mask.npy"
    dtype = np.float32 if shifted else np.bool_
    rows = masked.select_columns(["input_ids", "labels"]).with_format("numpy")
    with (
        (folder / "token_ids.npy").open("wb") as ids,
        (folder / name).open("wb") as mask,
    ):
        for batch in rows.iter(CHUNK):
            for row, labels in zip(batch["input_ids"], batch["labels"], strict=True):
                if len(row) == 0:
                    continue
                if row.min() < 0 or row.max() >= 2**32:
                    raise ValueError(
                        f"ids must fit into uint32, got {row.min()} to {row.max()}"
                    )
                targets = labels != IGNORE_INDEX
                if shifted:
                    # Whether the next token is a target; after the last one there is none.
                    targets = np.append(targets[1:], False)
                ids.write(row.astype(np.uint32).tobytes())
                mask.write(targets.astype(dtype).tobytes())
        if ids.tell() == 0:
            raise ValueError("the dataset has no tokens")
