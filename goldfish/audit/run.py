"""The audit as one call: a checkpoint and texts in, summary.json and records.parquet out."""

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, AutoTokenizer

from goldfish.audit.extraction import Record, make_record
from goldfish.audit.schema import RECORDS
from goldfish.audit.score import Sampling, score
from goldfish.audit.summary import summarize
from goldfish.audit.windows import Window, cut_windows, read_rows
from goldfish.labels import Rules
from goldfish.receipt import bind, read_receipt, rules_of, versions
from goldfish.rule import Goldfish


def audit(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    members: str | Path | None = None,
    heldout: str | Path | None = None,
    prefix_length: int = 50,
    suffix_length: int = 50,
    name: str | None = None,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Ask a checkpoint to recite texts, greedily; returns the summary, which is also written.

    Args:
        checkpoint: a folder (or hub name) with model and tokenizer; a folder's goldfish.json, where there is one,
            says which tokens its training dropped. The model runs in float32.
        output_dir: a new or empty folder for summary.json and records.parquet.
        members, heldout: .jsonl or .txt files of texts that were trained on, and of texts of the same kind that were
            not; at least one of them. See `windows.read_rows` for the fields.
        prefix_length, suffix_length: tokens that the model is given, and that it is to go on with.
        name: what tables and reports call this checkpoint; by default its folder's name.
        device: by default the GPU where there is one.

    Raises:
        FileExistsError: an output_dir that holds something.
        FileNotFoundError, ValueError: a missing or malformed input, a checkpoint without a tokenizer, a split without
            one usable window.
    """
    if prefix_length < 1 or suffix_length < 1:
        raise ValueError(f"prefix and suffix need at least one token each, got {prefix_length} and {suffix_length}")
    files = {split: file for split, file in (("members", members), ("heldout", heldout)) if file is not None}
    if not files:
        raise ValueError("nothing to audit: give members (texts that were trained on), heldout, or both")
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder; choose another output folder or remove it")

    tokenizer = load_tokenizer(checkpoint)
    windows: dict[str, list[Window]] = {}
    skipped: dict[str, int] = {}
    for split, file in files.items():
        windows[split], skipped[split] = cut_windows(read_rows(file), split, tokenizer, prefix_length, suffix_length)
        if not windows[split]:
            raise ValueError(
                f"{file} has no usable window: {skipped[split]} rows, none with {prefix_length} + {suffix_length} "
                "tokens; ask for a shorter prefix or suffix, or join short texts"
            )
    receipt = read_receipt(checkpoint)
    rules = bind(rules_of(receipt), tokenizer) if receipt else None
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).to(device)
    known = model.get_input_embeddings().num_embeddings
    for window in itertools.chain(*windows.values()):
        if max(window.ids) >= known:
            raise ValueError(
                f"{files[window.split]}, row {window.index}: token id {max(window.ids)}, but the model knows "
                f"{known} ids; were these input_ids made with another tokenizer? Give `text` instead"
            )

    name = name or Path(checkpoint).name
    records: list[Record] = []
    with _progress() as bar:
        for split, its_windows in windows.items():
            task = bar.add_task(f"audit {name}: {split}", total=len(its_windows))
            scores = score(model, its_windows, lambda done, task=task: bar.advance(task, done))  # type: ignore[misc]
            records += [
                make_record(*pair, _rule_of(pair[0], rules), tokenizer)
                for pair in zip(its_windows, scores, strict=True)
            ]

    protocol = {
        "prefix_length": prefix_length,
        "suffix_length": suffix_length,
        "offsets": [0],
        "lowercase": False,
        "control": None,
        "decoding": "greedy",
        "sampling": [asdict(Sampling())],
        "beams": None,
        "dtype": "float32",
        "device": device.type,
        "ambiguous_margin": 0.0,
    }
    summary = summarize(
        records,
        protocol=protocol,
        skipped=skipped,
        receipt=receipt,
        name=name,
        checkpoint=str(checkpoint),
        rule=rules.to_dict() if isinstance(rules, Goldfish) else None,
        versions=versions(),
    )
    output.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records, RECORDS), output / "records.parquet")
    # Last, so that a folder with a summary is a finished audit.
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _rule_of(window: Window, rules: Rules | None) -> Goldfish | None:
    if rules is None or isinstance(rules, Goldfish):
        return rules
    return rules.get(window.source or "")


def load_tokenizer(checkpoint: str | Path) -> Any:
    """AutoTokenizer's, from a folder or hub name; FileNotFoundError, ValueError in words where there is none."""
    folder = Path(checkpoint)
    # transformers makes an empty tokenizer for a folder that has none, so look before asking.
    if folder.is_dir() and not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        raise ValueError(
            f"{checkpoint} holds no tokenizer; save it there with tokenizer.save_pretrained({str(checkpoint)!r}), "
            "or pass it to Trainer as processing_class so that checkpoints include it"
        )
    if not folder.is_dir() and (folder.is_absolute() or folder.exists() or len(folder.parts) > 2):
        raise FileNotFoundError(f"no checkpoint folder {checkpoint}")
    try:
        return AutoTokenizer.from_pretrained(checkpoint)
    except OSError as error:
        if folder.is_dir():
            raise
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"no folder {checkpoint} here, and no model of that name on the hub: {reason}"
        ) from error


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("windows"),
        TimeRemainingColumn(),
    )
