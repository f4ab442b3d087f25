"""What the recipes share about runs: output folders, stopping and resuming, results that say where they come from."""

import dataclasses
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
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


def prepare(output: Path, args: Any) -> None:
    """Make the folder of a new run. An earlier run is replaced with --overwrite and continued with --resume.

    Raises:
        FileExistsError: the folder holds something else, or an earlier run and neither option was given.
        FileNotFoundError: nothing to resume. ValueError: the run to resume had other arguments.
    """
    marker, now = output / "arguments.json", dataclasses.asdict(args)
    if now.get("resume"):
        if not marker.is_file():
            raise FileNotFoundError(f"nothing to resume: {output} holds no run; start without --resume")
        before = json.loads(marker.read_text(encoding="utf-8"))
        for name in now.keys() - {"resume", "overwrite", "dry_run", "output_dir"}:
            if before.get(name) != now[name]:
                raise ValueError(
                    f"{output} was started with {name} {before.get(name)!r}, not {now[name]!r}; resume with the same "
                    "arguments, or choose another --output_dir"
                )
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not marker.is_file():
            raise FileExistsError(f"{output} is not empty and not a run of a recipe; choose another --output_dir")
        if not now.get("overwrite"):
            raise FileExistsError(
                f"{output} holds an earlier run; choose another --output_dir, or replace it: --overwrite"
            )
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")


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
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


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
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"]).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if changed else "")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"


def installed(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
