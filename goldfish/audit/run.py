"""The audit as one call: a checkpoint and texts in, a folder of records and their summary out."""

import errno
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress

from goldfish.audit.columns import COLUMNS, RECORDS, RUN, make_record, read_run, token_table
from goldfish.audit.estimate import SCHEMA, dumps
from goldfish.audit.model import (
    context_of,
    file_hashes,
    load_model,
    load_receipt,
    load_tokenizer,
    vocabulary_of,
)  # fmt: skip
from goldfish.audit.score import AMBIGUOUS, Sampling, Scorer
from goldfish.audit.summary import summarize
from goldfish.audit.windows import (
    Skipped,
    Survey,
    Window,
    cut_windows,
    lowercase_ids,
    prefix_grid,
    read_rows,
    require_input,
    sha256,
    survey,
)  # fmt: skip
from goldfish.labels import Rules
from goldfish.receipt import bind, rules_of, tokenizer_fingerprint, versions
from goldfish.rule import Goldfish

DTYPES = ("float32", "bfloat16", "float16")
BLOCK = 256  # windows that are scored, and written to disk, together; a killed run loses no more
SUMMARY, TOKENS = "summary.json", "tokens"
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
    tokens: bool = False,
    name: str | None = None,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
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
        tokens: also write tokens/, one row a token.
        name: what tables and reports call this checkpoint; by default its folder's name.
        dtype: float32, bfloat16 or float16. In 16 bits, rows whose answer depends on rounding are settled at batch
            size 1.
        device: by default the GPU where there is one.
        allow_pickle: load weights that are not safetensors. trust_remote_code: run the checkpoint's own code.
        command: the command line, for run.json.
        state: of accelerate, where several processes share the work; all of them make this call, and see one folder.

    Raises:
        FileExistsError: an output_dir that holds something else.
        FileNotFoundError, ValueError: a missing or malformed input, a checkpoint without a tokenizer, a split without
            one usable window, windows longer than the model's context, ids that the model does not know.
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
        "dtype": dtype,
    }
    _check(protocol)
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
        "prefix_grid": prefix_grid(prefix_length),
    }
    inputs: dict[str, dict[str, Any]] = {
        split: {"path": str(file), "sha256": sha256(require_input(file))} for split, file in files.items()
    }

    def windows_of(split: str) -> Iterator[Window | Skipped]:
        rows = read_rows(files[split])
        return cut_windows(rows, split, tokenizer, prefix_length, suffix_length, protocol["offsets"])

    checkpoints = [checkpoint, *([control] if control is not None else [])]
    surveys: dict[str, Survey] = {}
    models: dict[str | Path, Any] = {}
    finished = folder.summary() is not None
    if not finished:
        surveys = {split: survey(windows_of(split)) for split in files}
        for split, each in surveys.items():
            if not each.windows:
                raise ValueError(
                    f"{files[split]} has no usable window: {each.rows} rows, none with {prefix_length} + "
                    f"{suffix_length} tokens; ask for a shorter prefix or suffix, or join short texts"
                )
            inputs[split] |= {"rows": each.rows, "windows": each.windows, "skipped": list(each.skipped.values())}
        for path in checkpoints:
            models[path] = load_model(
                path, device, dtype=dtype, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
            )
        _check_inputs(models, files, surveys, prefix_length + suffix_length)
        protocol["vocabulary"] = vocabulary_of(models[checkpoint])

    rank, processes = (state.process_index, state.num_processes) if state is not None else (0, 1)
    run = {
        "schema": SCHEMA,
        "name": name or Path(checkpoint).resolve().name,
        "checkpoint": str(checkpoint),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "protocol": protocol,
        "inputs": inputs,
        "weights": [file_hashes(path) for path in checkpoints],
        "rule": rules.to_dict() if isinstance(rules, Goldfish) else None,
        "receipt": receipt,
        "versions": versions(),
        "block": BLOCK,
        "tokens": tokens,
    }
    if rank == 0:
        folder.open(run)
    _wait(state)
    if not finished:
        lowered, context = None, context_of(models[checkpoint])
        if lowercase:
            lowered = lambda window: lowercase_ids(window, tokenizer)[:context]  # noqa: E731
        scorer = Scorer(models[checkpoint], sampling, protocol["beams"] or (), lowered, models.get(control or ""))
        first = 0
        clusters: dict[tuple[str, str], int] = {}
        columns = [*Progress.get_default_columns(), MofNCompleteColumn()]
        with Progress(*columns, disable=rank > 0) as bar:
            for split, each in surveys.items():
                numbers = range(first, first := first + -(-each.windows // BLOCK))
                task = bar.add_task(escape(f"audit {run['name']}: {split}"), total=each.windows)
                for number, block in zip(numbers, _blocks(windows_of(split)), strict=True):
                    numbered = [clusters.setdefault((split, w.document), len(clusters)) for w in block]
                    if number % processes == rank and not folder.has(number, len(block)):
                        scores = scorer.score(block)
                        records = [
                            make_record(window, score, _rule_of(window, rules), tokenizer, cluster)
                            for window, score, cluster in zip(block, scores, numbered, strict=True)
                        ]
                        folder.write(number, records, token_table(block, scores) if tokens else None)
                    bar.advance(task, len(block))
        _wait(state)
    summary = summarize(folder.path)
    if rank == 0:
        folder.finish(summary)
    _wait(state)
    return summary


class Folder:
    """The folder of an audit: run.json, one parquet file a block in records/ (and tokens/), at last summary.json.

    run.json says what is being run, so that a run continues only with its own blocks. A file is there whole or not at
    all, and a summary.json means a finished audit.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def require_usable(self) -> None:
        """FileExistsError unless the folder is new, empty, or holds an audit."""
        if not self.path.exists() or (self.path / RUN).is_file():
            return
        if not self.path.is_dir() or any(path.name != _part(self.path / RUN).name for path in self.path.iterdir()):
            raise FileExistsError(
                f"{self.path} exists and is not an empty folder; choose another output folder or remove it"
            )

    def open(self, run: Mapping[str, Any]) -> None:
        """Begin this run, or continue it.

        Raises:
            FileExistsError: the folder holds something else: another run, finished or not.
        """
        self.require_usable()
        if not (self.path / RUN).is_file():
            self.path.mkdir(parents=True, exist_ok=True)
            _write_json(self.path / RUN, run)
        before, now = _settings(read_run(self.path)), _settings(json.loads(json.dumps(run)))
        if before != now:
            differences = [
                f"{key} ({before.get(key)!r:.80} there, {now.get(key)!r:.80} now)"
                for key in dict.fromkeys([*before, *now])
                if before.get(key) != now.get(key)
            ]
            raise FileExistsError(
                f"{self.path} holds an audit with other settings: {'; '.join(differences)}. Repeat that audit to "
                "finish it, choose another output folder, or remove this one"
            )

    def summary(self) -> dict[str, Any] | None:
        """That of a finished audit."""
        path = self.path / SUMMARY
        if not path.is_file():
            return None
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return summary

    def has(self, block: int, windows: int) -> bool:
        path = self._file(RECORDS, block)
        try:
            return bool(pq.read_metadata(path).num_rows == windows)
        except (OSError, pa.ArrowInvalid):  # not there, or cut short
            return False

    def write(self, block: int, records: Sequence[Mapping[str, Any]], tokens: pa.Table | None) -> None:
        """Write a block; its records last, since they say that it is done."""
        if tokens is not None:
            _write_table(self._file(TOKENS, block), tokens)
        _write_table(self._file(RECORDS, block), pa.Table.from_pylist(list(records), COLUMNS))

    def finish(self, summary: Mapping[str, Any]) -> None:
        _write_json(self.path / SUMMARY, summary)

    def _file(self, kind: str, block: int) -> Path:
        return self.path / kind / f"{block:06d}.parquet"


def _settings(run: Mapping[str, Any]) -> dict[str, Any]:
    """What a run must share with the one that it continues, one level deep for messages; counts follow from it."""
    flat = {**run, **run["protocol"]}
    for key in ("date", "command", "protocol", "vocabulary"):
        flat.pop(key, None)
    inputs = {split: [each["path"], each["sha256"]] for split, each in run["inputs"].items()}
    return {**flat, "inputs": inputs}


def _write_json(path: Path, value: Any) -> None:
    _whole_or_not_at_all(path, lambda file: file.write_text(dumps(value), encoding="utf-8"))


def _write_table(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(exist_ok=True)
    _whole_or_not_at_all(path, lambda file: pq.write_table(table, file))


def _whole_or_not_at_all(path: Path, write: Callable[[Path], Any]) -> None:
    part = _part(path)
    try:
        write(part)
        with part.open("rb") as data:
            os.fsync(data.fileno())  # or a power cut could leave the name without the bytes
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno == errno.ENOSPC:
            message = f"the disk is full; the blocks in {path.parent} are kept: make room and repeat the command"
            raise OSError(errno.ENOSPC, message) from error
        raise


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _check(protocol: dict[str, Any]) -> None:
    lengths = protocol["prefix_length"], protocol["suffix_length"]
    if min(lengths) < 1:
        raise ValueError(f"prefix and suffix need at least one token each, got {lengths[0]} and {lengths[1]}")
    if not protocol["offsets"] or min(protocol["offsets"]) < 0:
        raise ValueError(f"offsets count tokens from a text's start and must be 0 or more, got {protocol['offsets']}")
    if protocol["beams"] and protocol["beams"][0] < 1:
        raise ValueError(f"a search needs at least one beam, got {protocol['beams']}")
    if protocol["dtype"] not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {protocol['dtype']!r}")


def _check_inputs(
    models: dict[str | Path, Any], files: dict[str, Path], surveys: dict[str, Survey], length: int
) -> None:
    """ValueError for windows that a model cannot take."""
    for checkpoint, model in models.items():
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
