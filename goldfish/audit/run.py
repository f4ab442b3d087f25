"""The audit as one call: a checkpoint and texts in, a folder of records and their summary out.

survey (inputs -> windows) -> load (models) -> score (windows -> records) -> summarize (records ->
figures -> verdict) -> write
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import datetime, timezone
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import torch
from accelerate import PartialState
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress

from goldfish.audit.documents import Relations, overlap_of
from goldfish.audit.figures import make_figures
from goldfish.audit.intervals import Figures
from goldfish.audit.questions import ask as simple_prompts
from goldfish.audit.questions import sanity
from goldfish.audit.questions.secrets import reasons_of
from goldfish.audit.records import (
    COLUMNS,
    NEAR_VERBATIM,
    RECORDS,
    SCHEMA,
    make_record,
    read_blocks,
    read_records,
    read_run,
    run_thresholds,
    thresholds,
)
from goldfish.audit.render import write
from goldfish.audit.results import Audit, Folder, read, write_table
from goldfish.audit.score import AMBIGUOUS, Sampling, Scorer
from goldfish.audit.verdict import check_require, parse_limits, verdict
from goldfish.audit.windows import (
    Cutter,
    Survey,
    Window,
    prefix_grid,
)
from goldfish.checkpoint import Checkpoint, InMemory
from goldfish.receipt import bind_rule, rules_of, tokenizer_fingerprint, versions
from goldfish.rule import Goldfish
from goldfish.text.chats import prints_the_date, secret_finder
from goldfish.text.printable import counted, plain
from goldfish.text.prompts import check_template
from goldfish.text.rows import (
    Source,
    digest,
    draw,
    first_line,
    in_memory,
    name_of,
    read_rows,
)
from goldfish.unwrap import context_of, vocabulary_of

SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
ASKED_BLOCK = 32  # the same for questions, whose answers are longer
BLOCK = 256  # windows that are scored, and written to disk, together; a killed run loses no more
# Tokens that outputs have beyond the longest marked answer: a model that opens its answer with
# other words ("Of course, dear user, ...") still comes to the secret.
MARGIN = 32
DATED = (
    "The chat template prints today's date, so chats are asked under another date than that of "
    "their training; give the training's date in `chat_template_kwargs`, or the rows as "
    "`input_ids`."
)
_log = logging.getLogger(__name__)


def audit(
    checkpoint: Any,
    output_dir: str | Path,
    *,
    members: Source | None = None,
    heldout: Source | None = None,
    tokenizer: Any = None,
    text_column: str = "",
    max_rows: int | None = None,
    complete: bool = False,
    seed: int = 0,
    secrets: str = "",
    secret_column: str = "",
    prefix_length: int = 50,
    suffix_length: int = 50,
    offsets: Sequence[int] = (0,),
    sampling: Sequence[Sampling] = (Sampling(), Sampling(top_k=40)),
    beams: Sequence[int] = (),
    near_verbatim: str = NEAR_VERBATIM,
    ask: Sequence[str] = (),
    ask_length: int = 256,
    ask_samples: int = 0,
    ask_rounds: int = 1,
    control: str | Path | None = None,
    rule: Goldfish | None = None,
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
) -> Audit:
    """Test whether a checkpoint recites texts; returns the audit, which is also written.

    A run that was stopped at any moment continues where it was when the same call is made again,
    and its files are the same bytes. A finished audit is only summarized again. Inputs are read and
    tokenized once, a row at a time, before anything is computed.

    Args:
        checkpoint: a folder, hub name or GGUF file with model and tokenizer; its goldfish.json, if
            there is one, says which tokens its training dropped. Or a model in memory, with its
            `tokenizer`.
        output_dir: a new or empty folder, or that of the same audit. It gets run.json, records/
            (parquet, one row a window) and summary.json.
        members, heldout: texts or chats of the training data, and comparable ones the model was not
            trained on; at least one of them. A path or hub name (see `rows.read_rows`), a data set
            or data frame, or an iterable of rows.
        tokenizer: of a model in memory; else that of the checkpoint.
        text_column: the column that holds the text.
        max_rows: audit so many rows of each, drawn with `seed`.
        complete: `members` is everything that was trained on, so that no sampling error is left;
            with max_rows it is a sample all the same.
        secrets, secret_column: a regular expression, or a column, for secrets in what is to be
            recited; see `chats.secret_finder`.
        prefix_length, suffix_length: tokens that the model is given, and tokens that should follow.
            In a chat everything before a turn of the assistant is given, and the turn should
            follow.
        offsets: where in a text windows begin, in tokens.
        sampling: settings of an adversary who samples, for the probability of drawing the suffix.
        beams: numbers of beams of adversaries who search, such as (4, 16); 1 is greedy.
        near_verbatim: what counts as near-verbatim, in tokens, words or characters in one piece or
            as a share of the tokens that need no edit: such as "150c", or "25t,50%" for either.
        ask: simple prompts, such as "What is the text of {title}?", with columns of the rows.
        ask_length: the most tokens of an answer to one. ask_samples: how many answers are drawn at
            temperature 1, besides the greedy one. ask_rounds: how often a greedy answer that
            recites is asked to go on, the first time included.
        control: a reference model: a checkpoint with the same tokenizer that never saw the members
            (one more pass).
        rule: that of the training, for a checkpoint without goldfish.json.
        name: what tables and reports call this checkpoint; by default its folder's name.
        revision: of a checkpoint on the hub.
        dtype: float32, bfloat16 (bf16) or float16 (fp16); a model in memory has its own. In 16
            bits, rows whose answer depends on rounding are settled at batch size 1.
        device: by default the GPU if there is one. device_map: see `Checkpoint.model`.
        batch_tokens: how many tokens a batch may hold; by default what the memory allows.
        allow_overlap: audit although some texts are in both inputs.
        allow_pickle: load weights that are pickles.
        trust_remote_code: run the checkpoint's own code.
        limits: of the verdict, such as "recited=0.1%".
        require: "membership" makes that question count towards the outcome; it takes both splits.
        command: the command line, for run.json.
        state: of accelerate, if several processes share the work; all of them make this call, and
            see one folder.

    Raises:
        FileExistsError: an output_dir that holds something else, or that another audit is using.
        FileNotFoundError, ValueError: a missing or malformed input, a checkpoint without a
            tokenizer, a split without one usable window, texts that are in both inputs, windows
            longer than the model's context, ids that the model does not know, weights that do not
            fit or are not finite, a model that is not causal.
        OSError: a full disk; what was done is kept.
    """
    protocol: dict[str, Any] = {
        "prefix_length": prefix_length,
        "suffix_length": suffix_length,
        "offsets": list(dict.fromkeys(offsets)),
        "sampling": [asdict(each) for each in sampling],
        "beams": sorted(set(beams)) or None,
        "near_verbatim": near_verbatim,
        "ask": list(dict.fromkeys([ask] if isinstance(ask, str) else ask)) or None,
        "ask_length": ask_length,
        "ask_samples": ask_samples,
        "ask_rounds": ask_rounds,
        "control": None if control is None else str(control),
        "text_column": text_column or None,
        "max_rows": max_rows,
        "complete": complete,
        "seed": seed,
        "secrets": secrets or None,
        "secret_column": secret_column or None,
        "dtype": SHORT.get(dtype, dtype),
        "prefix_grid": prefix_grid(prefix_length),
    }
    # What can be refused is refused now: reading inputs and loading models may take minutes.
    sources = _sources(members, heldout)
    _check_protocol(protocol, batch_tokens, limits)
    _check_sources(sources, require, _part(state)[1], device_map)
    folder = Folder(Path(output_dir))
    folder.require_usable()
    checkpoints = _checkpoints(
        checkpoint, tokenizer, control, revision, trust_remote_code
    )
    target = _device(device, state)
    # A model in memory has its own type.
    dtype = checkpoints[0].dtype or protocol["dtype"]
    protocol |= {
        "dtype": dtype,
        "device": target.type,
        "ambiguous_margin": AMBIGUOUS[getattr(torch, dtype)],
    }
    rules = _rules(checkpoints[0], rule)
    run: dict[str, Any] = {
        "revision": revision,
        "command": command,
        **_description(checkpoints, sources, protocol, name),
        "rule": rules.to_dict() if isinstance(rules, Goldfish) else None,
    }
    first = state is None or state.process_index == 0
    with TemporaryDirectory() as temporary, ExitStack() as held:
        held.callback(checkpoints[0].put_back)
        # Of a finished audit nothing is read again; it is only summarized.
        surveys: dict[str, Survey] = {}
        if not folder.is_finished():
            surveys = survey(sources, checkpoints, run, Path(temporary))
            _check_surveys(surveys, run, allow_overlap)
            models = [
                each.model(
                    target,
                    dtype=dtype,
                    allow_pickle=allow_pickle,
                    device_map=device_map,
                )
                for each in checkpoints
            ]
            _check_ids(surveys, run, models)
            protocol |= {
                "vocabulary": vocabulary_of(models[0]),
                "output_length": _output_length(surveys),
            }
            scorer = _scorer(models, protocol, sampling, batch_tokens)
        if first:
            held.enter_context(folder.held())
            run["sanity"] = sanity.measure(scorer, surveys) if surveys else None
            folder.open(run)
        # run.json is there before any process writes a block.
        _wait(state)
        if surveys:
            score(surveys, scorer, checkpoints[0], rules, folder, run["name"], state)
            if protocol["ask"]:
                put_questions(
                    sources, surveys, models[0], checkpoints[0], run, folder, state
                )
        _wait(state)
        if first:
            if surveys and protocol["ask"]:
                compare_with_others(sources, surveys, checkpoints[0], run, folder)
            # Rules that differ by source cannot be tested as one.
            publish(
                folder.path,
                limits,
                require,
                rules if isinstance(rules, Goldfish) else None,
            )
        _wait(state)
    return read(folder.path)


def _sources(members: Any, heldout: Any) -> dict[str, Source]:
    sources = {}
    # Members come first everywhere.
    for split, source in (("members", members), ("heldout", heldout)):
        if source is not None:
            # An iterator can be read once, but --ask reads its documents again.
            sources[split] = in_memory(source)
    return sources


def _description(
    checkpoints: Sequence[Any],
    sources: Mapping[str, Source],
    protocol: dict[str, Any],
    name: str | None,
) -> dict[str, Any]:
    """run.json, as far as it is known before the inputs are read."""
    audited = checkpoints[0]
    return {
        "schema": SCHEMA,
        "name": name or Path(audited.name).resolve().name,
        "checkpoint": audited.name,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "protocol": protocol,
        "inputs": {
            split: {"path": name_of(source), "sha256": digest(source)}
            for split, source in sources.items()
        },
        "unasked_secrets": [],
        "overlap": None,
        "sanity": None,
        "notes": [],
        # The audited model first, then the reference model.
        "weights": [each.hashes() for each in checkpoints],
        "receipt": audited.receipt(),
        "versions": versions(),
        "block": BLOCK,
    }


def _output_length(surveys: Mapping[str, Survey]) -> int | None:
    """The least length of all outputs, in tokens; None if it is that of the suffix."""
    # One length for all: a secret may come out in the answer to any question.
    longest = max(each.longest_marked for each in surveys.values())
    return longest + MARGIN if longest else None


def _scorer(
    models: Sequence[Any],
    protocol: Mapping[str, Any],
    sampling: Sequence[Sampling],
    batch_tokens: int | None,
) -> Scorer:
    """models: the audited one, and the reference model if there is one."""
    return Scorer(
        models[0],
        sampling,
        protocol["beams"] or (),
        models[1] if len(models) > 1 else None,
        batch_tokens,
        protocol["output_length"] or 0,
    )


def survey(
    sources: Mapping[str, Source],
    checkpoints: Sequence[Any],
    run: dict[str, Any],
    temporary: Path,
) -> dict[str, Survey]:
    """Read the inputs; what was found goes into `run`: counts, overlap, notes."""
    protocol = run["protocol"]
    pattern = protocol["secrets"] or ""
    column = protocol["secret_column"] or ""
    # A window has to fit the reference model too.
    contexts = [context_of(each.config()) for each in checkpoints]
    cutter = Cutter(
        checkpoints[0].tokenizer(),
        protocol["prefix_length"],
        protocol["suffix_length"],
        protocol["offsets"],
        min(filter(None, contexts), default=None),
        secret_finder(pattern, column) if pattern or column else None,
        column,
    )
    surveys = {}
    # Of both splits together: a document in both is one.
    relations = Relations()
    for split, source in sources.items():
        surveys[split] = Survey(
            read_rows(source, protocol["text_column"] or ""),
            split,
            cutter,
            temporary / split,
            relations,
            protocol["max_rows"],
            protocol["seed"],
            protocol["ask"] or (),
        )
    # The windows' numbers come in the order in which they were added.
    numbers = iter(relations.number_documents())
    for split, each in surveys.items():
        each.documents = list(islice(numbers, len(each.indices)))
        run["inputs"][split] |= each.counts()
    if "members" in surveys:
        run["unasked_secrets"] = surveys["members"].secrets.unasked
    if len(surveys) == 2:
        run["overlap"] = overlap_of(*(each.first_rows for each in surveys.values()))
    has_chats = any(each.completions for each in surveys.values())
    if has_chats and prints_the_date(cutter.tokenizer):
        _log.warning(DATED)
        run["notes"].append(DATED)
    return surveys


def score(
    surveys: Mapping[str, Survey],
    scorer: Scorer,
    checkpoint: Any,
    rules: Goldfish | Mapping[str, Goldfish] | None,
    folder: Folder,
    name: str,
    state: PartialState | None,
) -> None:
    """Score the windows whose records are not in the folder yet."""
    tokenizer = checkpoint.tokenizer()

    def records_of(block: Sequence[tuple[Window, int]]) -> list[dict[str, Any]]:
        scores = scorer.score([window for window, _ in block])
        records = []
        for (window, document), each in zip(block, scores, strict=True):
            rule = _rule_of(window, rules)
            records.append(make_record(window, each, rule, tokenizer, document))
        return records

    blocks = chain.from_iterable(
        _batched(each.windows(), BLOCK) for each in surveys.values()
    )
    total = sum(len(each.indices) for each in surveys.values())
    title = f"audit {name}"
    _in_blocks(blocks, records_of, RECORDS, folder, title, total, state)


def _in_blocks(
    blocks: Iterator[list[Any]],
    make: Callable[[list[Any]], list[dict[str, Any]]],
    kind: str,
    folder: Folder,
    title: str,
    total: int,
    state: PartialState | None,
) -> None:
    """Make the blocks of a table that are not in the folder yet; of several processes, each every
    n-th.

    blocks: what each is made of, by `make`. kind: RECORDS or ASKED.
    """
    rank, processes = _part(state)
    columns = [*Progress.get_default_columns(), MofNCompleteColumn()]
    with Progress(*columns, disable=rank > 0) as bar:
        task = bar.add_task(escape(plain(title)), total=total)
        # The blocks are numbered alike in every process, so they need no word from each other.
        for number, block in enumerate(blocks):
            # Each window has one record; a question may have several answers, or none.
            rows = len(block) if kind == RECORDS else None
            if number % processes == rank and not folder.has(kind, number, rows):
                folder.write(kind, number, make(block))
            bar.advance(task, len(block))


def _batched(things: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while block := list(islice(things, size)):
        yield block


def _rule_of(
    window: Window, rules: Goldfish | Mapping[str, Goldfish] | None
) -> Goldfish | None:
    """The rule of a window: of all texts, or of its source."""
    if isinstance(rules, Mapping):
        return rules.get(window.source or "")
    return rules


def put_questions(
    sources: Mapping[str, Source],
    surveys: Mapping[str, Survey],
    model: Any,
    checkpoint: Any,
    run: Mapping[str, Any],
    folder: Folder,
    state: PartialState | None,
) -> None:
    """Ask the simple prompts whose answers are not in the folder yet."""
    protocol = run["protocol"]
    asker = simple_prompts.Asker(
        model,
        checkpoint.tokenizer(),
        protocol["ask_length"],
        protocol["ask_samples"],
        protocol["ask_rounds"],
    )
    documents = _documents(sources, surveys, checkpoint, protocol)
    blocks = _batched(simple_prompts.questions(documents, protocol["ask"]), ASKED_BLOCK)
    total = len(protocol["ask"]) * sum(each.asked for each in surveys.values())
    title = f"ask {run['name']}"
    _in_blocks(blocks, asker.answers, simple_prompts.ASKED, folder, title, total, state)


def compare_with_others(
    sources: Mapping[str, Source],
    surveys: Mapping[str, Survey],
    checkpoint: Any,
    run: Mapping[str, Any],
    folder: Folder,
) -> None:
    """Look in the answers for documents that they were not asked about; into asked_elsewhere."""
    protocol = run["protocol"]
    # The answers alone: what they recite elsewhere may be damaged, and is made anew.
    answers = read_blocks(folder.path / simple_prompts.ASKED, simple_prompts.COLUMNS)
    found = simple_prompts.recited_elsewhere(
        answers,
        _documents(sources, surveys, checkpoint, protocol),
        run_thresholds(protocol["near_verbatim"]),
    )
    write_table(folder.path / simple_prompts.ELSEWHERE, found)


def _documents(
    sources: Mapping[str, Source],
    surveys: Mapping[str, Survey],
    checkpoint: Any,
    protocol: Mapping[str, Any],
) -> Iterator[simple_prompts.Document]:
    """The whole documents of all inputs, which are read again: they were not kept."""
    for split, survey in surveys.items():
        numbers = dict(zip(survey.indices, survey.documents, strict=True))
        rows = read_rows(sources[split], protocol["text_column"] or "")
        drawn = draw(rows, protocol["max_rows"], protocol["seed"])
        yield from simple_prompts.whole_documents(
            drawn, split, numbers, checkpoint.tokenizer()
        )


def _part(state: PartialState | None) -> tuple[int, int]:
    """The number of this process, and of all processes."""
    return (0, 1) if state is None else (state.process_index, state.num_processes)


def _wait(state: PartialState | None) -> None:
    """Until all processes are here."""
    if state is not None:
        state.wait_for_everyone()


def _device(
    device: str | torch.device | None, state: PartialState | None
) -> torch.device:
    if device is None and state is not None:
        device = state.device
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # What comes back has a number, "cuda" has none; a device that is not there is noticed.
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"the device {device} is not there: {first_line(error)}"
        ) from error


def _checkpoints(
    checkpoint: Any,
    tokenizer: Any,
    control: str | Path | None,
    revision: str | None,
    trust_remote_code: bool,
) -> list[Any]:
    """What is audited, and the reference model if there is one."""
    if isinstance(checkpoint, torch.nn.Module):
        checkpoints: list[Any] = [InMemory(checkpoint, tokenizer)]
    elif isinstance(checkpoint, InMemory):
        checkpoints = [checkpoint]
    elif tokenizer is not None:
        raise ValueError(
            "a tokenizer is given for a model in memory; a folder has its own"
        )
    else:
        checkpoints = [Checkpoint(checkpoint, revision, trust_remote_code)]
    vocabulary = checkpoints[0].tokenizer().get_vocab()  # a wrong name is reported here
    if control is not None:
        # Both models read the same ids.
        reference = Checkpoint(control, None, trust_remote_code)
        if reference.tokenizer().get_vocab() != vocabulary:
            raise ValueError(
                f"the control {control} has another tokenizer than {checkpoints[0].name}, so the "
                "same ids are other texts to it; take a control of the same family"
            )
        checkpoints.append(reference)
    return checkpoints


def _check_sources(
    sources: Mapping[str, Source],
    require: Sequence[str],
    processes: int,
    device_map: Any,
) -> None:
    if not sources:
        raise ValueError(
            "nothing to audit: give members (texts that were trained on), heldout, or both"
        )
    check_require(require, sources)
    paths = [source for source in sources.values() if isinstance(source, str | Path)]
    readers = sum(str(path) == "-" for path in paths) * processes
    if readers > 1:
        raise ValueError("standard input can be read once, by one process: give a file")
    if device_map is not None and processes > 1:
        raise ValueError(
            "device_map spreads one model over all GPUs, but each process has its own: use one "
            "process or no device_map"
        )


def _check_protocol(
    protocol: Mapping[str, Any],
    batch_tokens: int | None,
    limits: Sequence[str],
) -> None:
    lengths = protocol["prefix_length"], protocol["suffix_length"]
    if min(lengths) < 1:
        raise ValueError(
            f"prefix and suffix need at least one token each, got {lengths[0]} and {lengths[1]}"
        )
    if not protocol["offsets"] or min(protocol["offsets"]) < 0:
        raise ValueError(
            "offsets count tokens from a text's start and must be 0 or more, got "
            f"{protocol['offsets']}"
        )
    # These raise ValueError for what they cannot read.
    parse_limits(limits)
    thresholds(protocol["near_verbatim"])
    for template in protocol["ask"] or ():
        check_template(template)
    if protocol["ask_samples"] < 0:
        raise ValueError(
            f"ask_samples must be 0 or more, got {protocol['ask_samples']}"
        )
    if protocol["beams"] and protocol["beams"][0] < 1:
        raise ValueError(f"a search needs at least one beam, got {protocol['beams']}")
    for what, number in (
        ("a batch needs at least one token, got batch_tokens", batch_tokens),
        ("an audit needs at least one row, got max_rows", protocol["max_rows"]),
        ("an answer needs at least one token, got ask_length", protocol["ask_length"]),
        ("answers need at least one round, got ask_rounds", protocol["ask_rounds"]),
    ):
        if number is not None and number < 1:
            raise ValueError(f"{what}={number}")
    if protocol["dtype"] not in SHORT.values():
        raise ValueError(
            f"dtype must be one of {', '.join(SHORT.values())}, got {protocol['dtype']!r}"
        )


def _check_surveys(
    surveys: Mapping[str, Survey],
    run: Mapping[str, Any],
    allow_overlap: bool,
) -> None:
    """ValueError for inputs that no model could be audited with."""
    for split, each in surveys.items():
        about = run["inputs"][split]
        if not each.indices:
            raise ValueError(_no_window(about, run["protocol"]))
        # Rows that lack a template's columns are counted; if all do, its columns are misspelled.
        for template in about.get("unprompted", ()):
            if template["count"] == each.asked:
                raise ValueError(
                    f"{about['path']}: no row has the columns of --ask {template['reason']!r}"
                )
    # Held-out texts need not have secrets; a mark that fits no member is a mistake.
    first = next(iter(surveys))  # members, if there are some
    marks = run["protocol"]["secrets"] or run["protocol"]["secret_column"]
    if marks and not surveys[first].secrets.asked:
        raise ValueError(_no_secret(run["inputs"][first]))
    if run["overlap"] and not allow_overlap:
        raise ValueError(_shared(run))


def _no_window(about: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    """about: an input in run.json."""
    reasons = [f"{each['count']:,} {each['reason']}" for each in about["skipped"]]
    why = "; ".join(reasons) or "it is empty"
    rows = counted(about["drawn"], "row")
    tokens = f"{protocol['prefix_length']} + {protocol['suffix_length']} tokens"
    return (
        f"{about['path']} has no usable window: {rows}, none with {tokens} or a completion "
        f"({why}); ask for a shorter prefix or suffix, or join short texts"
    )


def _no_secret(about: Mapping[str, Any]) -> str:
    counts = about["secrets"]
    why = "check the column's name or the regular expression"
    if counts["marked"]:
        marked = counted(counts["marked"], "secret")
        why = f"{marked} marked, but none asked ({reasons_of(counts)})"
    return f"no suffix in {about['path']} contains a marked secret: {why}"


def _shared(run: Mapping[str, Any]) -> str:
    overlap = run["overlap"]
    inputs = run["inputs"]
    rows = ", ".join(f"row {here} and row {there}" for here, there in overlap["rows"])
    documents = counted(overlap["documents"], "document")
    return (
        f"{inputs['members']['path']} and {inputs['heldout']['path']} share {documents} (first: "
        f"{rows}): texts that were trained on are no control. Remove them from one file, or allow "
        "it with allow_overlap (--allow-overlap)"
    )


def _check_ids(
    surveys: Mapping[str, Survey],
    run: Mapping[str, Any],
    models: Sequence[Any],
) -> None:
    # An id beyond the embeddings would stop a CUDA kernel without a word about the row.
    known = min(len(model.get_input_embeddings().weight) for model in models)
    for split, each in surveys.items():
        if each.largest_id >= known:
            raise ValueError(
                f"{run['inputs'][split]['path']}, row {each.largest_at}: token id "
                f"{each.largest_id}, but the model knows {known} ids; were these input_ids made "
                "with another tokenizer? Give `text` instead"
            )


def _rules(
    checkpoint: Any, rule: Goldfish | None
) -> Goldfish | dict[str, Goldfish] | None:
    """What the checkpoint was trained under: what its receipt names, or else the user."""
    receipt = checkpoint.receipt()
    if receipt is None:
        return None if rule is None else bind_rule(rule, checkpoint.tokenizer())
    if rule is not None:
        raise ValueError(
            f"{checkpoint.name} has a goldfish.json, which names the rule of its training: leave "
            "out rule (--rule)"
        )
    tokenizer = checkpoint.tokenizer()
    # Older receipts have no fingerprint.
    if receipt.get("tokenizer") not in (None, tokenizer_fingerprint(tokenizer)):
        _log.warning(
            "The tokenizer of %s is not the one that its goldfish.json names: texts may be cut "
            "into other tokens than in training. Save the tokenizer of the training there, or give "
            "`input_ids`.",
            checkpoint.name,
        )
    rules = rules_of(receipt)
    if isinstance(rules, Goldfish):
        return bind_rule(rules, tokenizer)
    return {name: bind_rule(rule, tokenizer) for name, rule in rules.items()}


# Columns of the records that figures do not need as a rule. They are most of the bytes.
_FOR_READERS = (
    "prompt",
    "suffix_text",
    "output_text",
    "prefix_ids",
    "output_ids",
    "suffix_tokens",
    "output_tokens",
    "rank",
    "common_runs",
)


def publish(
    folder: str | Path,
    limits: Sequence[str] = (),
    require: Sequence[str] = (),
    rule: Goldfish | None = None,
) -> Audit:
    """Summarize an audit whose records are complete, and write it; errors as of `read_records`.

    rule: that of run.json, bound to the tokenizer if it reads text.
    """
    run = read_run(folder)
    table = read_records(folder, figure_columns(run))
    asked = None
    if run["protocol"]["ask"]:
        asked = simple_prompts.read_asked(folder)
    audit = summarize(run, table, limits, require, Path(folder), rule, asked)
    write(audit, folder)
    return audit


def figure_columns(run: Mapping[str, Any]) -> list[str]:
    """The columns of the records that the figures of this run are made of; no others are read."""
    unread = set(_FOR_READERS)
    if run["rule"] is not None:
        unread.discard("prefix_ids")  # the test of the rule needs them
    if run["protocol"]["secrets"] or run["protocol"]["secret_column"]:
        unread -= {"prompt", "output_text"}  # where secrets are looked for
    return [name for name in COLUMNS.names if name not in unread]


def summarize(
    run: Mapping[str, Any],
    table: pa.Table,
    limits: Sequence[str] = (),
    require: Sequence[str] = (),
    folder: Path = Path(),
    rule: Goldfish | None = None,
    asked: pa.Table | None = None,
) -> Audit:
    """Records -> figures -> verdict. asked: the answers to simple prompts."""
    rows, examples = make_figures(run, table, rule, asked)
    figures = Figures(rows)
    parsed = parse_limits(limits)
    judged = verdict(run, figures, parsed, require)
    return Audit(folder, dict(run), figures, judged, parsed, list(require), examples)
