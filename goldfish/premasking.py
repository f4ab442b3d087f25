"""Labels written once into a tokenized dataset: `premask`, and the files of `goldfish premask`."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from goldfish.masking import IGNORE_INDEX, SOURCE, Rules, check_rules, decide, rule_for, with_labels
from goldfish.receipt import ALL, Tally, bind, count, write_receipt
from goldfish.rule import Goldfish, check_beside
from goldfish.text.rows import dataset_of, first_line

FORMATS = ("labels", "mask", "loss-mask")
CHUNK = 1000  # rows that are read at a time
COUNTS = "goldfish_counts"  # a column for the time of writing: a row's targets, dropped targets, sum of decisions


def premask(
    dataset: Any,
    rule: Rules,
    *,
    num_proc: int | None = None,
    receipt: str | Path | None = None,
    tokenizer: Any = None,
) -> Any:
    """A `datasets` dataset whose rows have masked `labels`, written once; map-style or streaming.

    For pipelines that pack or shard tokens later (packing, sequence parallelism): each row is decided as a whole before
    that. For training data only, and for a collator that keeps labels (DataCollatorForSeq2Seq, default_data_collator,
    TRL's): DataCollatorForLanguageModeling makes them anew from input_ids. `datasets` caches the result under the
    rule, each of the num_proc parts by itself, so an interrupted run continues after the parts it finished.

    Args:
        dataset: rows with `input_ids` and optionally `labels`, `position_ids`, `attention_mask`.
        rule: a rule, or a mapping to rules from the names in the column `source` (None: such rows are not masked).
        num_proc: processes, for map-style datasets.
        receipt: a folder in which to write goldfish.json, with the counts of one pass over the rows (map-style only).
            Copy it beside the weights: a trainer that knows nothing of the rule does not.
        tokenizer: binds rules that need it; its fingerprint goes into the receipt.

    Raises:
        TypeError: not a rule. ValueError: rows without input_ids, a source without a rule, or strategy "random",
            which draws anew in every epoch; a receipt of a streaming dataset.
    """
    check_rules(rule)
    if isinstance(dataset, dict):
        raise ValueError(
            f"premask takes one split, got {', '.join(dataset)}: premask(dataset['train'], ...)"
        )
    for one in [rule] if isinstance(rule, Goldfish) else rule.values():
        if one is not None and one.strategy == "random":
            raise ValueError(
                'premask writes labels once, strategy "random" draws anew in every epoch: use a collator'
            )
    if receipt is not None and not hasattr(dataset, "num_rows"):
        raise ValueError(
            "a receipt counts all rows, a streaming dataset has not read them: use a map-style dataset"
        )
    rule = bind(rule, tokenizer)
    options = {} if num_proc is None else {"num_proc": num_proc}
    settings = {"rules": rule, "counts": receipt is not None}
    masked = dataset.map(_mask_row, with_indices=True, fn_kwargs=settings, **options)
    if receipt is None:
        return masked
    tally = Tally(rule, torch.device("cpu"))
    columns = [COUNTS] if isinstance(rule, Goldfish) else [COUNTS, SOURCE]
    for batch in masked.select_columns(columns).with_format("numpy").iter(CHUNK):
        sources = [list(tally.rules).index(name) for name in batch.get(SOURCE, ())]
        tally.add(torch.tensor(batch[COUNTS]), torch.tensor(sources) if sources else None)
    tally.end_step()
    tally.sync()
    write_receipt(receipt, tally, tokenizer)
    return masked.remove_columns(COUNTS)


def _mask_row(row: dict[str, Any], number: int, rules: Rules, counts: bool) -> dict[str, list[Any]]:
    if "input_ids" not in row:
        raise ValueError(
            f"the rule decides from input_ids, but the rows have only {', '.join(row)}; tokenize first"
        )
    rule = rules if isinstance(rules, Goldfish) else rule_for(rules, row.get(SOURCE))
    names = ("input_ids", "labels", "position_ids", "attention_mask")
    try:
        given = {
            name: torch.as_tensor(row[name])[None] for name in names if row.get(name) is not None
        }
        given = {
            name: value if value.numel() else value.long() for name, value in given.items()
        }  # of [] float32
        batch = with_labels(given)
        check_beside("labels", batch["labels"], batch["input_ids"])
        dropped, keys = decide({ALL: rule}, batch | {SOURCE: torch.tensor([0])})
    except (ValueError, TypeError, RuntimeError) as error:  # of torch too
        raise ValueError(f"row {number}: {first_line(error)}") from error
    labels = batch["labels"].long().masked_fill(dropped, IGNORE_INDEX)[0].tolist()
    return {"labels": labels} | (
        {COUNTS: count(batch, dropped, keys)[0].tolist()} if counts else {}
    )


def premask_files(
    source: str | Path,
    output: str | Path,
    rule: Goldfish,
    tokenizer: Any,
    *,
    format: str = "labels",
    num_proc: int | None = None,
) -> None:
    """Mask a tokenized dataset on disk (`rows.dataset_of`; of several splits "train") and write it to a new folder,
    which appears when all is written, with its receipt. Formats:

    - "labels": a folder for `datasets.load_from_disk`; labels hold -100 where a token is dropped.
    - "mask", for OLMo and OLMo-core (data.paths, label_mask_paths): token_ids.npy (uint32) and labels_mask.npy (bool,
      True: the token is a target), all rows one after the other, without a header (np.memmap).
    - "loss-mask", for Megatron and NeMo: token_ids.npy and loss_mask.npy, float32 in the same layout, shifted: 1 where
      the next token of the row is a target, 0 where it is not and for the last token of a row.

    Raises:
        ValueError: an output that exists, an unknown source or format, no tokens, ids beyond uint32; as `premask`.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(f"{output} exists already; give the name of a new folder")
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    dataset = dataset_of(str(source), streaming=False, split="train")
    unfinished = output.with_name(output.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    masked = premask(dataset, rule, num_proc=num_proc, receipt=unfinished, tokenizer=tokenizer)
    if format == "labels":
        masked.save_to_disk(str(unfinished), num_proc=num_proc)
    else:
        _write_arrays(masked, unfinished, shifted=format == "loss-mask")
    unfinished.rename(output)


def _write_arrays(masked: Any, folder: Path, *, shifted: bool) -> None:
    name, dtype = ("loss_mask.npy", np.float32) if shifted else ("labels_mask.npy", np.bool_)
    rows = masked.select_columns(["input_ids", "labels"]).with_format("numpy")
    with (folder / "token_ids.npy").open("wb") as ids, (folder / name).open("wb") as mask:
        for batch in rows.iter(CHUNK):
            for row, labels in zip(batch["input_ids"], batch["labels"], strict=True):
                if len(row) and not 0 <= row.min() <= row.max() < 2**32:
                    raise ValueError(f"ids must fit into uint32, got {row.min()} to {row.max()}")
                targets = labels != IGNORE_INDEX
                if shifted:
                    targets = np.append(targets[1:], False)[: len(row)]
                ids.write(row.astype(np.uint32).tobytes())
                mask.write(targets.astype(dtype).tobytes())
        if ids.tell() == 0:
            raise ValueError("the dataset has no tokens")
