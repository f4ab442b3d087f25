"""What the recipes share about runs: options, output folders, resuming, results with provenance."""

import argparse
import dataclasses
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from goldfish.receipt import versions

# In a run's own folder it marks the end; Trainer writes one into each checkpoint, too.
FINISHED = "trainer_state.json"
ROOT = Path(__file__).parents[1]
# Arguments that choose which runs to make, not how one is made: they may change between commands.
WHICH = {
    "rules",
    "equal_supervised",
    "methods",
    "copies",
    "edits",
    "seeds",
    "leak",
    "keep",
    "output_dir",
    "dry_run",
}


def option(default: Any, help: str) -> Any:
    """A field of a recipe's options; a list is copied for each instance."""
    metadata = {"help": help}
    if isinstance(default, list):
        return dataclasses.field(
            default_factory=lambda: list(default), metadata=metadata
        )
    return dataclasses.field(default=default, metadata=metadata)


def parser(documentation: str | None) -> argparse.ArgumentParser:
    """A parser whose --help prints a script's docstring as it is."""
    as_it_is = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=documentation, formatter_class=as_it_is)


def command_line(main: Callable[[], object]) -> None:
    """Run `main`; an error that the user can mend is one line, without a traceback."""
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def at_least(least: int, args: Any, *names: str) -> None:
    """Raise ValueError if one of these options is too small."""
    for name in names:
        if getattr(args, name) < least:
            raise ValueError(
                f"--{name} must be at least {least}, got {getattr(args, name)}"
            )


def start(batch_size: int, accumulation: int = 1) -> PartialState:
    """The processes of this launch; batches must divide among them."""
    # The others wait while the main process audits, which takes longer than the default timeout.
    state = PartialState(
        cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1)
    )
    if batch_size % (state.num_processes * accumulation):
        raise ValueError(
            f"--batch_size {batch_size} does not divide by {state.num_processes} processes x "
            f"--accumulation {accumulation}"
        )
    return state


def settings_of(args: Any) -> dict[str, Any]:
    """The arguments that define how a run is made."""
    return {
        name: value
        for name, value in dataclasses.asdict(args).items()
        if name not in WHICH
    }


def begin(output: Path, args: Any) -> None:
    """Create the folder of a new run, or accept that of a run with the same arguments.

    Call it in all processes.

    Raises:
        ValueError: the folder is that of a run with other arguments.
        FileExistsError: the folder contains something else.
    """
    marker, now = output / "arguments.json", settings_of(args)
    with PartialState().main_process_first():
        if not marker.is_file():
            if output.exists() and (not output.is_dir() or any(output.iterdir())):
                raise FileExistsError(
                    f"{output} is not empty and not a run of a recipe; choose another --output_dir"
                )
            output.mkdir(parents=True, exist_ok=True)
            marker.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
    before = json.loads(marker.read_text(encoding="utf-8"))
    for name, value in now.items():
        if before.get(name) != value:
            raise ValueError(
                f"{output} holds a run with --{name} {before.get(name)}, not {value}; give the "
                "same arguments to go on with it, or choose another --output_dir"
            )


def finished(folder: Path) -> bool:
    """Whether the training in this folder was completed."""
    return (folder / FINISHED).is_file()


def train_or_resume(trainer: Trainer, folder: Path) -> None:
    """Train from the last complete checkpoint, if any; save the model, then mark it finished.

    Checkpoints are only needed to resume, and are removed at the end.
    """
    state = PartialState()
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        state.print(f"Resuming from {checkpoint}")
    # No process writes a new checkpoint while another still looks for the last one.
    state.wait_for_everyone()
    trainer.train(
        resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
    )
    trainer.save_model()
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    trainer.save_state()
    state.wait_for_everyone()
    # Else from_pretrained in the main process would shard weights over all processes, and wait.
    unset_hf_deepspeed_config()
    if state.is_main_process:
        for old in folder.glob("checkpoint-*"):
            shutil.rmtree(old)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; a process may die while it writes one."""
    for path in sorted(
        folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])
    ):
        try:
            # The file that Trainer writes last.
            json.loads((path / FINISHED).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return path
    return None


def last_logged(folder: Path, key: str) -> float:
    """The last value that Trainer logged under this name in a finished training."""
    history = json.loads((folder / FINISHED).read_text(encoding="utf-8"))["log_history"]
    return next(float(entry[key]) for entry in reversed(history) if key in entry)


def append(path: Path, result: dict[str, Any]) -> None:
    """Add one line to a .jsonl file."""
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(result) + "\n")


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file; none if there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def missing(path: Path, wanted: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The wanted runs of which results.jsonl has no line: how every recipe and benchmark resumes.

    A run is wanted by values that its line will have, too. Call it in all processes.

    >>> missing(Path("no such file"), [{"seed": 0, "rule": "standard"}])
    [{'seed': 0, 'rule': 'standard'}]
    """
    done = read_results(path)
    todo = []
    for run in wanted:
        if not any(all(line.get(name) == run[name] for name in run) for line in done):
            todo.append(dict(run))
    # All processes have read what is done before the main one adds to it.
    PartialState().wait_for_everyone()
    return todo


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown.

    >>> print(markdown(("k", "recited"), [(4, "0 of 48")]))
    | k | recited |
    | --- | --- |
    | 4 | 0 of 48 |
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def about(*packages: str) -> dict[str, Any]:
    """Provenance of a result: command, commit, date, hardware, versions (also of `packages`)."""
    script = Path(sys.argv[0]).resolve()
    name = (
        script.relative_to(ROOT).as_posix()
        if script.is_relative_to(ROOT)
        else script.name
    )
    # Files are recorded by name: their folder on this machine helps nobody.
    words = [
        Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]
    ]
    state = PartialState()
    return {
        "command": shlex.join(["python", name, *words]),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions() | {package: installed(package) for package in packages},
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else cpu_name(),
        "processes": state.num_processes,
        "distributed": state.distributed_type.value,
        "threads": torch.get_num_threads(),
    }


def commit() -> str:
    """The commit of this checkout, with "+changes" if tracked files differ from it."""
    git = ["git", "-C", str(ROOT)]
    describe = [
        "describe",
        "--always",
        "--exclude=*",
        "--abbrev=12",
        "--dirty=+changes",
    ]
    try:
        done = subprocess.run(
            [*git, *describe], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_name() -> str:
    """The processor's name and the number of its cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [
        line.split(":")[1].strip() for line in lines if line.startswith("model name")
    ]
    name = names[0] if names else platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def installed(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
