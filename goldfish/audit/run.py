"""The audit as one call: a checkpoint and texts in, a folder of records and their summary out."""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress

from goldfish.audit.columns import make_record
from goldfish.audit.estimate import SCHEMA
from goldfish.audit.folder import Folder
from goldfish.audit.model import (
    context_of,
    file_hashes,
    load_model,
    load_receipt,
    load_tokenizer,
    vocabulary_of,
)  # fmt: skip
from goldfish.audit.results import read
from goldfish.audit.score import AMBIGUOUS, Sampling, Scorer
from goldfish.audit.tell import publish, require_known
from goldfish.audit.windows import (
    Documents,
    Skipped,
    Survey,
    Window,
    cut_windows,
    lowercase_ids,
    overlap_of,
    prefix_grid,
    read_rows,
    require_input,
    sha256,
    survey,
)  # fmt: skip
from goldfish.labels import Rules
from goldfish.pieces import plain
from goldfish.receipt import bind, rules_of, tokenizer_fingerprint, versions
from goldfish.rule import Goldfish

DTYPES = ("float32", "bfloat16", "float16")
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
BLOCK = 256  # windows that are scored, and written to disk, together; a killed run loses no more
_log = logging.getLogger(__name__)


def audit(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    members: str | Path | None = None,
    heldout: str | Path | None = None,
    prefix_length: int = 50,
    suffix_length: int = 50,
    offsets: Sequence[int] = (0,),
    sampling: Sequence[Sampling] = (Sampling(), Sampling(top_k=40)),
    beams: Sequence[int] = (),
    lowercase: bool = False,
    control: str | Path | None = None,
    name: str | None = None,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    batch_tokens: int | None = None,
    allow_overlap: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    limits: Sequence[str] = (),
    require: Sequence[str] = (),
    fail_on: Sequence[str] = (),
    command: str | None = None,
    state: PartialState | None = None,
) -> dict[str, Any]:
    """Test whether a checkpoint recites texts; returns the summary, which is also written.

    A run that was stopped at any moment continues where it was when the same call is made again, and its files are
    the same bytes. A finished audit is only summarized again. Inputs are read twice, a row at a time: once to check
    every line before anything is computed.

    Args:
        checkpoint: a folder (or hub name) with model and tokenizer; its goldfish.json, where there is one, says which
            tokens its training dropped.
        output_dir: a new or empty folder, or that of the same audit. It gets run.json, records/ (parquet, one row a
            window) and summary.json.
        members, heldout: .jsonl or .txt files of texts that were trained on, and of texts of the same kind that were
            not; at least one of them. See `windows.read_rows` for the fields.
        prefix_length, suffix_length: tokens that the model is given, and tokens that should follow.
        offsets: where in a text windows begin, in tokens.
        sampling: settings of an adversary who samples, for the probability of drawing the suffix.
        beams: numbers of beams of adversaries who search, such as (4, 16); 1 is greedy.
        lowercase: also score the texts in lower case (one more pass).
        control: a checkpoint with the same tokenizer that never saw the members (one more pass).
        name: what tables and reports call this checkpoint; by default its folder's name.
        dtype: float32, bfloat16 (bf16) or float16 (fp16). In 16 bits, rows whose answer depends on rounding are
            settled at batch size 1.
        device: by default the GPU where there is one.
        batch_tokens: how many tokens a batch may hold; by default what the memory allows.
        allow_overlap: audit although some texts are in both files.
        allow_pickle: load weights that are not safetensors. trust_remote_code: run the checkpoint's own code.
        limits: of the verdict, such as "recited=0.1%". require: "membership" makes that question count towards the
            outcome. fail_on: conditions such as "em.upper95 > 0.01"; their names are looked up before the work.
        command: the command line, for run.json.
        state: of accelerate, where several processes share the work; all of them make this call, and see one folder.

    Raises:
        FileExistsError: an output_dir that holds something else, or that another audit is using.
        FileNotFoundError, ValueError: a missing or malformed input, a checkpoint without a tokenizer, a split without
            one usable window, texts that are in both files, windows longer than the model's context, ids that the
            model does not know, weights that do not fit or are not finite, a model that is not causal.
        OSError: a full disk; what was done is kept.
    """
    given = {"members": members, "heldout": heldout}
    files = {split: Path(file) for split, file in given.items() if file is not None}
    if not files:
        raise ValueError("nothing to audit: give members (texts that were trained on), heldout, or both")
    protocol: dict[str, Any] = {
        "prefix_length": prefix_length,
        "suffix_length": suffix_length,
        "offsets": list(dict.fromkeys(offsets)),
        "decoding": "greedy",
        "sampling": [asdict(each) for each in sampling],
        "beams": sorted(set(beams)) or None,
        "lowercase": lowercase,
        "control": None if control is None else str(control),
        "dtype": (dtype := SHORT.get(dtype, dtype)),
        "prefix_grid": prefix_grid(prefix_length),
    }
    _check(protocol, batch_tokens)
    require_known(fail_on, limits, protocol, list(files))
    folder = Folder(Path(output_dir))
    folder.require_usable()
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    if control is not None:
        control_tokenizer = load_tokenizer(control, trust_remote_code=trust_remote_code)
        if control_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"the control {control} has another tokenizer than {checkpoint}, so the same ids are other texts to "
                "it; take a control of the same family"
            )
    receipt = load_receipt(checkpoint)
    rules = _rules(checkpoint, receipt, tokenizer)
    if device is None:
        device = state.device if state is not None else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    protocol |= {
        "device": device.type,
        "ambiguous_margin": AMBIGUOUS[getattr(torch, dtype)],
    }
    inputs: dict[str, dict[str, Any]] = {
        split: {"path": str(file), "sha256": sha256(require_input(file))} for split, file in files.items()
    }

    how = tokenizer, prefix_length, suffix_length, protocol["offsets"]
    checkpoints = [checkpoint, *([control] if control is not None else [])]
    surveys: dict[str, Survey] = {}
    models: list[Any] = []
    overlap: dict[str, Any] | None = None
    finished = folder.is_finished()
    if not finished:
        documents = Documents()
        surveys = {split: survey(read_rows(file), split, documents, *how) for split, file in files.items()}
        clusters = documents.clusters(surveys)
        for split, each in surveys.items():
            if not each.numbers:
                raise ValueError(
                    f"{files[split]} has no usable window: {each.rows} rows, none with {prefix_length} + "
                    f"{suffix_length} tokens; ask for a shorter prefix or suffix, or join short texts"
                )
            distinct = len(set(clusters[split]))
            counts = {"windows": len(each.numbers), "clusters": distinct, "repeated": each.names - distinct}
            inputs[split] |= {"rows": each.rows, **counts, "skipped": list(each.skipped.values())}
            if counts["repeated"]:
                _log.warning("%s: %d of %d documents repeat the text of another one; intervals count %d documents",
                             files[split], counts["repeated"], each.names, distinct)  # fmt: skip
        overlap = overlap_of(surveys, clusters)
        if overlap and not allow_overlap:
            rows = ", ".join(f"row {here} and row {there}" for here, there in overlap["rows"])
            raise ValueError(
                f"{overlap['clusters']} documents are in both {members} and {heldout} (first: {rows}): texts that were "
                "trained on are no control. Remove them from one file, or allow it with allow_overlap (--allow-overlap)"
            )
        for path in checkpoints:
            model = load_model(
                path, device, dtype=dtype, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
            )
            _check_inputs(path, model, files, surveys, prefix_length + suffix_length)
            models.append(model)
        protocol["vocabulary"] = vocabulary_of(models[0])

    rank, processes = (state.process_index, state.num_processes) if state is not None else (0, 1)
    run = {
        "schema": SCHEMA,
        "name": name or Path(checkpoint).resolve().name,
        "checkpoint": str(checkpoint),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "protocol": protocol,
        "inputs": inputs,
        "overlap": overlap,
        "weights": [file_hashes(path) for path in checkpoints],
        "rule": rules.to_dict() if isinstance(rules, Goldfish) else None,
        "receipt": receipt,
        "versions": versions(),
        "block": BLOCK,
    }
    with folder.held() if rank == 0 else nullcontext():
        if rank == 0:
            folder.open(run)
        _wait(state)
        if not finished:
            lowered, context = None, context_of(models[0])
            if lowercase:
                lowered = lambda window: lowercase_ids(window, tokenizer)[:context]  # noqa: E731
            control_model = models[1] if control is not None else None
            scorer = Scorer(models[0], sampling, protocol["beams"] or (), lowered, control_model, batch_tokens)
            first = 0
            with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), disable=rank > 0) as bar:
                for split, each in surveys.items():
                    windows, total = cut_windows(read_rows(files[split]), split, *how), len(each.numbers)
                    numbers = range(first, first := first + -(-total // BLOCK))
                    task = bar.add_task(escape(plain(f"audit {run['name']}: {split}")), total=total)
                    for number, block in zip(numbers, _blocks(windows), strict=True):
                        if number % processes == rank and not folder.has(number, len(block)):
                            scores, start = scorer.score(block), (number - numbers[0]) * BLOCK
                            of_block = clusters[split][start : start + len(block)]
                            records = [
                                make_record(window, score, _rule_of(window, rules), tokenizer, cluster)
                                for window, score, cluster in zip(block, scores, of_block, strict=True)
                            ]
                            folder.write(number, records)
                        bar.advance(task, len(block))
            _wait(state)
        if rank == 0:
            publish(folder.path, limits, require, fail_on)
        _wait(state)
    return read(folder.path).summary


def _check(protocol: dict[str, Any], batch_tokens: int | None) -> None:
    lengths = protocol["prefix_length"], protocol["suffix_length"]
    if min(lengths) < 1:
        raise ValueError(f"prefix and suffix need at least one token each, got {lengths[0]} and {lengths[1]}")
    if not protocol["offsets"] or min(protocol["offsets"]) < 0:
        raise ValueError(f"offsets count tokens from a text's start and must be 0 or more, got {protocol['offsets']}")
    if protocol["beams"] and protocol["beams"][0] < 1:
        raise ValueError(f"a search needs at least one beam, got {protocol['beams']}")
    if batch_tokens is not None and batch_tokens < 1:
        raise ValueError(f"a batch needs at least one token, got batch_tokens={batch_tokens}")
    if protocol["dtype"] not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {protocol['dtype']!r}")


def _check_inputs(
    checkpoint: str | Path, model: Any, files: Mapping[str, Path], surveys: Mapping[str, Survey], length: int
) -> None:
    """ValueError for windows that a model cannot take."""
    context, known = context_of(model), model.get_input_embeddings().num_embeddings
    if context is not None and length > context:
        raise ValueError(
            f"windows of {length} tokens do not fit the context of {checkpoint}, {context} tokens; "
            "ask for a shorter prefix or suffix"
        )
    for split, each in surveys.items():
        if each.largest_id >= known:
            raise ValueError(
                f"{files[split]}, row {each.largest_at}: token id {each.largest_id}, but {checkpoint} knows "
                f"{known} ids; were these input_ids made with another tokenizer? Give `text` instead"
            )


def _rules(checkpoint: str | Path, receipt: dict[str, Any] | None, tokenizer: Any) -> Rules | None:
    """What the checkpoint was trained under, as far as it says."""
    if receipt is None:
        return None
    if receipt.get("tokenizer") not in (None, tokenizer_fingerprint(tokenizer)):
        _log.warning(
            "The tokenizer of %s is not the one that its goldfish.json names: texts may be cut into other tokens than "
            "in training. Save the tokenizer of the training there, or give `input_ids`.",
            checkpoint,
        )
    return bind(rules_of(receipt), tokenizer)


def _rule_of(window: Window, rules: Rules | None) -> Goldfish | None:
    if rules is None or isinstance(rules, Goldfish):
        return rules
    return rules.get(window.source or "")


def _blocks(windows: Iterator[Window | Skipped]) -> Iterator[list[Window]]:
    usable = (window for window in windows if isinstance(window, Window))
    while block := list(itertools.islice(usable, BLOCK)):
        yield block


def _wait(state: PartialState | None) -> None:
    if state is not None:
        state.wait_for_everyone()
