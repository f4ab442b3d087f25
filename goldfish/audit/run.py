"""The audit as one call: a checkpoint and texts in, summary.json and records.parquet out."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from goldfish.audit.extraction import make_record
from goldfish.audit.load import fingerprint, load_model, load_receipt, load_tokenizer
from goldfish.audit.score import AMBIGUOUS, Sampling, Score, Scorer
from goldfish.audit.shards import RECORDS, TOKENS, Records, Shards
from goldfish.audit.summary import summarize
from goldfish.audit.windows import Survey, Window, cut_windows, lowercase_ids, read_rows, survey
from goldfish.labels import Rules
from goldfish.receipt import bind, rules_of, tokenizer_fingerprint, versions
from goldfish.rule import Goldfish

DTYPES = ("float32", "bfloat16", "float16")
BLOCK = 256  # windows that are scored, and kept on disk, together; a killed run loses no more
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
    state: PartialState | None = None,
) -> dict[str, Any]:
    """Ask a checkpoint to recite texts; returns the summary, which is also written.

    A run that was stopped at any moment goes on where it was when the same call is made again, and its files are the
    same bytes. Inputs are read twice, a row at a time: once to check every line before anything is computed.

    Args:
        checkpoint: a folder (or hub name) with model and tokenizer; its goldfish.json, where there is one, says which
            tokens its training dropped.
        output_dir: a new or empty folder for summary.json and records.parquet (one row a window), or that of the same
            audit, unfinished.
        members, heldout: .jsonl or .txt files of texts that were trained on, and of texts of the same kind that were
            not; at least one of them. See `windows.read_rows` for the fields.
        prefix_length, suffix_length: tokens that the model is given, and that it is to go on with.
        offsets: where in a text windows begin, in tokens.
        sampling: settings of an adversary who samples, for the probability of drawing the suffix.
        beams: numbers of beams of adversaries who search, such as (4, 16); 1 is greedy.
        lowercase: also score the texts in lower case (one more pass).
        control: a checkpoint with the same tokenizer that never saw the members (one more pass).
        tokens: also write tokens.parquet, one row a token.
        name: what tables and reports call this checkpoint; by default its folder's name.
        dtype: float32, bfloat16 or float16. In 16 bits, rows whose answer hangs on rounding are settled at batch
            size 1.
        device: by default the GPU where there is one.
        allow_pickle: load weights that are no safetensors. trust_remote_code: run the checkpoint's own code.
        state: of accelerate, where several processes share the work; all of them make this call, and see one folder.

    Raises:
        FileExistsError: an output_dir that holds something else.
        FileNotFoundError, ValueError: a missing or malformed input, a checkpoint without a tokenizer, a split without
            one usable window, windows longer than the model's context, ids that the model does not know.
        OSError: a full disk; what was done is kept.
    """
    files = {split: Path(file) for split, file in (("members", members), ("heldout", heldout)) if file is not None}
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
    shards = Shards(Path(output_dir))
    shards.refuse()
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    if control is not None:
        its_tokenizer = load_tokenizer(control, trust_remote_code=trust_remote_code)
        if its_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"the control {control} has another tokenizer than {checkpoint}, so the same ids are other texts to "
                "it; take a control of the same family"
            )

    def windows_of(split: str) -> Iterator[Window | None]:
        rows = read_rows(files[split])
        return cut_windows(rows, split, tokenizer, prefix_length, suffix_length, protocol["offsets"])

    surveys = {split: survey(file, windows_of(split)) for split, file in files.items()}
    for split, its in surveys.items():
        if not its.windows:
            raise ValueError(
                f"{files[split]} has no usable window: {its.skipped} rows, none with {prefix_length} + {suffix_length} "
                "tokens; ask for a shorter prefix or suffix, or join short texts"
            )
    receipt = load_receipt(checkpoint)
    rules = _rules(checkpoint, receipt, tokenizer)
    if device is None:
        device = state.device if state is not None else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    models = {}
    for each in (checkpoint, *([control] if control is not None else [])):
        models[each] = load_model(
            each, device, dtype=dtype, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
        )
    _check_inputs(models, files, surveys, prefix_length + suffix_length)
    protocol |= {"device": device.type, "ambiguous_margin": AMBIGUOUS[models[checkpoint].dtype]}

    rank, processes = (state.process_index, state.num_processes) if state is not None else (0, 1)
    header = {"name": name or Path(checkpoint).resolve().name, "checkpoint": str(checkpoint)}
    if rank == 0:
        prints = [fingerprint(each) or getattr(model.config, "_commit_hash", None) for each, model in models.items()]
        inputs = {split: asdict(its) for split, its in surveys.items()}
        run = header | protocol | {"fingerprints": prints, "inputs": inputs, "tokens": tokens, "block": BLOCK}
        shards.open(run | {"versions": versions()})
    _wait(state)
    summary = shards.summary()
    if summary is not None:  # it was stopped while it cleaned up
        _wait(state)
        if rank == 0:
            shards.clean()
        return summary

    ends = list(itertools.accumulate(-(-its.windows // BLOCK) for its in surveys.values()))
    numbers = {split: range(first, end) for split, first, end in zip(surveys, [0, *ends], ends, strict=False)}
    context = _context(models[checkpoint])
    scorer = Scorer(
        models[checkpoint],
        sampling,
        protocol["beams"] or (),
        (lambda window: lowercase_ids(window, tokenizer)[:context]) if lowercase else None,
        models[control] if control is not None else None,
    )
    with _progress(disable=rank > 0) as bar:
        for split, its_numbers in numbers.items():
            windows = surveys[split].windows
            mine = {n: min(BLOCK, windows - i * BLOCK) for i, n in enumerate(its_numbers) if n % processes == rank}
            task = bar.add_task(f"audit {header['name']}: {split}", total=sum(mine.values()))
            for number, block in zip(its_numbers, _blocks(windows_of(split)), strict=True):
                if number not in mine:
                    continue
                if not shards.has(number):
                    scores = scorer.score(block)
                    records = [
                        make_record(window, score, _rule_of(window, rules), tokenizer)
                        for window, score in zip(block, scores, strict=True)
                    ]
                    shards.write(number, records, _token_table(block, scores) if tokens else None)
                bar.advance(task, mine[number])
    _wait(state)

    if rank == 0:
        if tokens:
            shards.join(ends[-1], TOKENS)
        path = shards.join(ends[-1], RECORDS)
        shards.finish(
            summarize(
                Records(path),
                protocol=protocol,
                skipped={split: its.skipped for split, its in surveys.items()},
                receipt=receipt,
                **header,
                rule=rules.to_dict() if isinstance(rules, Goldfish) else None,
                versions=versions(),
            )
        )
    _wait(state)
    summary = shards.summary()
    assert summary is not None
    return summary


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
        context, known = _context(model), model.get_input_embeddings().num_embeddings
        if context is not None and length > context:
            raise ValueError(
                f"windows of {length} tokens do not fit the context of {checkpoint}, {context} tokens; "
                "ask for a shorter prefix or suffix"
            )
        for split, its in surveys.items():
            if its.largest_id >= known:
                raise ValueError(
                    f"{files[split]}, row {its.largest_at}: token id {its.largest_id}, but {checkpoint} knows "
                    f"{known} ids; were these input_ids made with another tokenizer? Give `text` instead"
                )


def _context(model: Any) -> int | None:
    context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return context


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


def _blocks(windows: Iterator[Window | None]) -> Iterator[list[Window]]:
    kept = (window for window in windows if window is not None)
    while block := list(itertools.islice(kept, BLOCK)):
        yield block


def _token_table(windows: Sequence[Window], scores: Sequence[Score]) -> pa.Table:
    """One row for each token but the first of each window; log_q, of the settings in order, for the suffix only."""
    lengths = [len(score.nll) for score in scores]
    columns: dict[str, Any] = {
        key: np.repeat([getattr(window, key) for window in windows], lengths)
        for key in ("split", "index", "document", "offset")
    }
    columns["position"] = np.concatenate([np.arange(1, length + 1) for length in lengths])
    columns["id"] = np.concatenate([window.ids[1:] for window in windows])
    for key in ("greedy", "nll", "rank", "margin", "entropy_mean", "entropy_std"):
        columns[key] = np.concatenate([getattr(score, key) for score in scores])
    columns["log_q"] = pa.array(
        [
            place
            for window, score in zip(windows, scores, strict=True)
            for place in [None] * (window.prefix_length - 1) + score.log_q.T.tolist()
        ],
        type=pa.list_(pa.float32()),
    )
    return pa.table(columns)


def _wait(state: PartialState | None) -> None:
    if state is not None:
        state.wait_for_everyone()


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} windows/s" if speed else "windows")


def _progress(disable: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        disable=disable,
    )
