"""What the recipes share about runs: output folders, going on after a stop, results that say where they come from."""

import dataclasses
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from goldfish.receipt import versions

FINISHED = "trainer_state.json"  # in a run's own folder; Trainer writes it into checkpoints too
ROOT = Path(__file__).parents[1]
# Arguments that say which runs to make, not what a run is: they may be others when a command is given again.
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
            raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}")


def start(batch_size: int, accumulation: int = 1) -> PartialState:
    """The processes of this launch, among which batches must divide. They may wait long while the main one audits."""
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))
    if batch_size % (state.num_processes * accumulation):
        raise ValueError(
            f"--batch_size {batch_size} does not divide by {state.num_processes} processes x --accumulation "
            f"{accumulation}"
        )
    return state


def settings_of(args: Any) -> dict[str, Any]:
    """The arguments that say what a run is."""
    return {name: value for name, value in dataclasses.asdict(args).items() if name not in WHICH}


def begin(output: Path, args: Any) -> None:
    """Make the folder of a new run, or go on with the run of the same arguments that it holds. Call in all processes.

    Raises:
        ValueError: it holds a run with other arguments. FileExistsError: it holds something else.
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
                f"{output} holds a run with --{name} {before.get(name)}, not {value}; give the same arguments to go on "
                "with it, or choose another --output_dir"
            )


def finished(folder: Path) -> bool:
    """Whether the training in this folder was completed."""
    return (folder / FINISHED).is_file()


def train_or_resume(trainer: Trainer, folder: Path) -> None:
    """Train from the start or from the last complete checkpoint in the folder; save the model, then mark it finished.

    Checkpoints, which only resuming needs, are removed at the end.
    """
    state = PartialState()
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        state.print(f"Resuming from {checkpoint}")
    state.wait_for_everyone()  # no process writes a new checkpoint while another still looks for the last one
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model()
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    trainer.save_state()
    state.wait_for_everyone()
    unset_hf_deepspeed_config()  # else from_pretrained in the main process would shard weights over all, and wait
    if state.is_main_process:
        for old in folder.glob("checkpoint-*"):
            shutil.rmtree(old)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; a process may die while it writes one."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        try:
            json.loads((path / FINISHED).read_text(encoding="utf-8"))  # what Trainer writes last
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
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if path.is_file()
        else []
    )


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    return "\n".join(
        f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)
    )


def about(*packages: str) -> dict[str, Any]:
    """Provenance of a result: command, commit, date, versions (also of these packages) and hardware."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    # Files are recorded by name: where they lie on this machine helps nobody.
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    state = PartialState()
    return {
        "command": shlex.join(["python", name, *words]),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions() | {package: installed(package) for package in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "processes": state.num_processes,
        "distributed": state.distributed_type.value,
        "threads": torch.get_num_threads(),
    }


def commit() -> str:
    """The commit of this checkout, with "+changes" if tracked files differ from it."""
    describe = [
        "git",
        "-C",
        str(ROOT),
        "describe",
        "--always",
        "--exclude=*",
        "--abbrev=12",
        "--dirty=+changes",
    ]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
    return f"{name}, {os.cpu_count()} cores"


def installed(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
