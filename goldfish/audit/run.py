"""The audit as one call: a checkpoint and texts in, a folder of records and their summary out."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress

from goldfish.audit.estimate import SCHEMA
from goldfish.audit.folder import SUMMARY, Folder
from goldfish.audit.model import Checkpoint, context_of, vocabulary_of
from goldfish.audit.records import make_record
from goldfish.audit.results import read
from goldfish.audit.score import AMBIGUOUS, Sampling, Scorer
from goldfish.audit.tell import publish
from goldfish.audit.verdict import parse_limits
from goldfish.audit.windows import Cutter, Survey, join, overlap_of, prefix_grid
from goldfish.receipt import bind, rules_of, tokenizer_fingerprint, versions
from goldfish.rule import Goldfish
from goldfish.text.chats import secret_finder
from goldfish.text.printable import plain
from goldfish.text.rows import digest, draw, first_line, read_rows

SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
BLOCK = 256  # windows that are scored, and written to disk, together; a killed run loses no more
_log = logging.getLogger(__name__)


def audit(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    members: str | Path | None = None,
    heldout: str | Path | None = None,
    text_column: str = "",
    max_rows: int | None = None,
    seed: int = 0,
    secrets: str = "",
    secret_column: str = "",
    prefix_length: int = 50,
    suffix_length: int = 50,
    offsets: Sequence[int] = (0,),
    sampling: Sequence[Sampling] = (Sampling(), Sampling(top_k=40)),
    beams: Sequence[int] = (),
    control: str | Path | None = None,
    name: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    batch_tokens: int | None = None,
    allow_overlap: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    limits: Sequence[str] = (),
    require: Sequence[str] = (),
    command: str | None = None,
    state: PartialState | None = None,
) -> dict[str, Any]:
    """Test whether a checkpoint recites texts; returns the summary, which is also written.

    A run that was stopped at any moment continues where it was when the same call is made again, and its files are
    the same bytes. A finished audit is only summarized again. Inputs are read and tokenized once, a row at a time,
    before anything is computed.

    Args:
        checkpoint: a folder, hub name or GGUF file with model and tokenizer; its goldfish.json, where there is one,
            says which tokens its training dropped.
        output_dir: a new or empty folder, or that of the same audit. It gets run.json, records/ (parquet, one row a
            window) and summary.json.
        members, heldout: texts or chats that were trained on, and such of the same kind that were not; at least one
            of them. See `rows.read_rows`.
        text_column: the column that holds the text. max_rows: audit so many rows of each, drawn with `seed`.
        secrets, secret_column: a regular expression, or a column, for secrets in what is to be recited; see
            `chats.secret_finder`.
        prefix_length, suffix_length: tokens that the model is given, and tokens that should follow. Of a chat all that
            comes before a turn of the assistant is given, and the turn should follow.
        offsets: where in a text windows begin, in tokens.
        sampling: settings of an adversary who samples, for the probability of drawing the suffix.
        beams: numbers of beams of adversaries who search, such as (4, 16); 1 is greedy.
        control: a checkpoint with the same tokenizer that never saw the members (one more pass).
        name: what tables and reports call this checkpoint; by default its folder's name.
        revision: of a checkpoint on the hub.
        dtype: float32, bfloat16 (bf16) or float16 (fp16). In 16 bits, rows whose answer depends on rounding are
            settled at batch size 1.
        device: by default the GPU where there is one. device_map: see `Checkpoint.model`.
        batch_tokens: how many tokens a batch may hold; by default what the memory allows.
        allow_overlap: audit although some texts are in both inputs.
        allow_pickle: load weights that are pickles. trust_remote_code: run the checkpoint's own code.
        limits: of the verdict, such as "recited=0.1%". require: "membership" makes that question count towards the
            outcome.
        command: the command line, for run.json.
        state: of accelerate, where several processes share the work; all of them make this call, and see one folder.

    Raises:
        FileExistsError: an output_dir that holds something else, or that another audit is using.
        FileNotFoundError, ValueError: a missing or malformed input, a checkpoint without a tokenizer, a split without
            one usable window, texts that are in both inputs, windows longer than the model's context, ids that the
            model does not know, weights that do not fit or are not finite, a model that is not causal.
        OSError: a full disk; what was done is kept.
    """
    given = {"members": members, "heldout": heldout}
    sources = {split: str(source) for split, source in given.items() if source is not None}
    protocol: dict[str, Any] = {
        "prefix_length": prefix_length,
        "suffix_length": suffix_length,
        "offsets": list(dict.fromkeys(offsets)),
        "sampling": [asdict(each) for each in sampling],
        "beams": sorted(set(beams)) or None,
        "control": None if control is None else str(control),
        "text_column": text_column or None,
        "max_rows": max_rows,
        "seed": seed,
        "secrets": secrets or None,
        "secret_column": secret_column or None,
        "dtype": SHORT.get(dtype, dtype),
        "prefix_grid": prefix_grid(prefix_length),
    }
    rank, processes = (state.process_index, state.num_processes) if state is not None else (0, 1)
    wait: Any = state.wait_for_everyone if state is not None else lambda: None
    _check(sources, protocol, batch_tokens, processes, device_map)
    parse_limits(limits)  # a bad limit is reported before the work
    folder = Folder(Path(output_dir))
    folder.require_usable()
    checkpoints = [Checkpoint(checkpoint, revision, trust_remote_code)]
    tokenizer = checkpoints[0].tokenizer()
    if control is not None:
        checkpoints.append(Checkpoint(control, None, trust_remote_code))
        if checkpoints[1].tokenizer().get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"the control {control} has another tokenizer than {checkpoint}, so the same ids are other texts to "
                "it; take a control of the same family"
            )
    receipt = checkpoints[0].receipt()
    rules = _rules(checkpoint, receipt, tokenizer)
    if device is None:
        device = (
            state.device if state is not None else "cuda" if torch.cuda.is_available() else "cpu"
        )
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device {device} is not there: {first_line(error)}") from error
    protocol |= {
        "device": device.type,
        "ambiguous_margin": AMBIGUOUS[getattr(torch, protocol["dtype"])],
    }
    inputs: dict[str, dict[str, Any]] = {
        split: {"path": source, "sha256": digest(source)} for split, source in sources.items()
    }
    surveys: dict[str, Survey] = {}
    models: list[Any] = []
    overlap: dict[str, Any] | None = None
    finished = (folder.path / SUMMARY).is_file()
    if not finished:
        contexts = [context_of(each.config()) for each in checkpoints]
        context = min(filter(None, contexts), default=None)
        marks = secret_finder(secrets, secret_column) if secrets or secret_column else None
        cutter = Cutter(
            tokenizer, prefix_length, suffix_length, protocol["offsets"], context, marks
        )
        for split, source in sources.items():
            rows = draw(read_rows(source, text_column), max_rows, seed)
            surveys[split] = Survey(rows, split, cutter)
        join(surveys)
        overlap = overlap_of(surveys)
        _check_surveys(surveys, sources, cutter, overlap, allow_overlap)
        for split, each in surveys.items():
            inputs[split] |= each.counts()
        options: dict[str, Any] = {
            "dtype": protocol["dtype"],
            "allow_pickle": allow_pickle,
            "device_map": device_map,
        }
        models = [each.model(device, **options) for each in checkpoints]
        known = min(len(model.get_input_embeddings().weight) for model in models)
        for split, each in surveys.items():
            if each.largest_id >= known:
                raise ValueError(
                    f"{sources[split]}, row {each.largest_at}: token id {each.largest_id}, but the model knows {known} "
                    "ids; were these input_ids made with another tokenizer? Give `text` instead"
                )
        protocol["vocabulary"] = vocabulary_of(models[0])

    run = {
        "schema": SCHEMA,
        "name": name or Path(checkpoint).resolve().name,
        "checkpoint": str(checkpoint),
        "revision": revision,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "protocol": protocol,
        "inputs": inputs,
        "overlap": overlap,
        "weights": [each.hashes() for each in checkpoints],
        "rule": rules.to_dict() if isinstance(rules, Goldfish) else None,
        "receipt": receipt,
        "versions": versions(),
        "block": BLOCK,
    }
    with folder.held() if rank == 0 else nullcontext():
        if rank == 0:
            folder.open(run)
        wait()
        if not finished:
            reference = models[1] if control is not None else None
            scorer = Scorer(models[0], sampling, protocol["beams"] or (), reference, batch_tokens)
            of_source: Any = rules.get if isinstance(rules, Mapping) else lambda _: rules
            blocks = chain.from_iterable(each.blocks(BLOCK) for each in surveys.values())
            with Progress(
                *Progress.get_default_columns(), MofNCompleteColumn(), disable=rank > 0
            ) as bar:
                windows = sum(len(each.indices) for each in surveys.values())
                task = bar.add_task(escape(plain(f"audit {run['name']}")), total=windows)
                for number, block in enumerate(blocks):
                    if number % processes == rank and not folder.has(number, len(block)):
                        scores = scorer.score([window for window, _ in block])
                        records = [
                            make_record(window, score, of_source(window.source), tokenizer, cluster)
                            for (window, cluster), score in zip(block, scores, strict=True)
                        ]
                        folder.write(number, records)
                    bar.advance(task, len(block))
            wait()
        if rank == 0:
            publish(folder.path, limits, require)
        wait()
    return read(folder.path).summary


def _check(
    sources: Mapping[str, str],
    protocol: Mapping[str, Any],
    batch_tokens: int | None,
    processes: int,
    device_map: Any,
) -> None:
    if not sources:
        raise ValueError(
            "nothing to audit: give members (texts that were trained on), heldout, or both"
        )
    if "-" in sources.values() and (processes > 1 or len(set(sources.values())) < len(sources)):
        raise ValueError("standard input can be read once, by one process: give a file")
    if device_map is not None and processes > 1:
        raise ValueError(
            "device_map spreads one model over all GPUs, but each process has its own: use one process or no device_map"
        )
    lengths = protocol["prefix_length"], protocol["suffix_length"]
    if min(lengths) < 1:
        raise ValueError(
            f"prefix and suffix need at least one token each, got {lengths[0]} and {lengths[1]}"
        )
    if not protocol["offsets"] or min(protocol["offsets"]) < 0:
        raise ValueError(
            f"offsets count tokens from a text's start and must be 0 or more, got {protocol['offsets']}"
        )
    if protocol["beams"] and protocol["beams"][0] < 1:
        raise ValueError(f"a search needs at least one beam, got {protocol['beams']}")
    for what, number in (
        ("a batch needs at least one token, got batch_tokens", batch_tokens),
        ("an audit needs at least one row, got max_rows", protocol["max_rows"]),
    ):
        if number is not None and number < 1:
            raise ValueError(f"{what}={number}")
    if protocol["dtype"] not in SHORT.values():
        raise ValueError(
            f"dtype must be one of {', '.join(SHORT.values())}, got {protocol['dtype']!r}"
        )


def _check_surveys(
    surveys: Mapping[str, Survey],
    sources: Mapping[str, str],
    cutter: Cutter,
    overlap: Any,
    allow_overlap: bool,
) -> None:
    """ValueError for inputs that no model could be audited with."""
    for split, each in surveys.items():
        if not each.indices:
            reasons = "; ".join(
                f"{skipped['count']} {reason}" for reason, skipped in each.skipped.items()
            )
            raise ValueError(
                f"{sources[split]} has no usable window: {each.rows} rows, none with {cutter.prefix_length} + "
                f"{cutter.suffix_length} tokens or a completion ({reasons or 'it is empty'}); ask for a shorter prefix "
                "or suffix, or join short texts"
            )
    first = next(iter(surveys))  # members, where there are some
    if cutter.secrets is not None and not surveys[first].secrets:
        raise ValueError(
            f"no suffix in {sources[first]} contains a marked secret: check the column's name or the regular expression"
        )
    if overlap and not allow_overlap:
        rows = ", ".join(f"row {here} and row {there}" for here, there in overlap["rows"])
        raise ValueError(
            f"{overlap['documents']} documents are in both {sources['members']} and {sources['heldout']} (first: {rows})"
            ": texts that were trained on are no control. Remove them from one file, or allow it with allow_overlap "
            "(--allow-overlap)"
        )


def _rules(
    checkpoint: str | Path, receipt: dict[str, Any] | None, tokenizer: Any
) -> Goldfish | dict[str, Goldfish] | None:
    """What the checkpoint was trained under, as far as it says."""
    if receipt is None:
        return None
    if receipt.get("tokenizer") not in (None, tokenizer_fingerprint(tokenizer)):
        _log.warning(
            "The tokenizer of %s is not the one that its goldfish.json names: texts may be cut into other tokens than "
            "in training. Save the tokenizer of the training there, or give `input_ids`.",
            checkpoint,
        )
    rules = rules_of(receipt)
    if isinstance(rules, Goldfish):
        return bind(rules, tokenizer)
    return {name: bind(rule, tokenizer) for name, rule in rules.items()}
