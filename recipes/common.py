"""What the longer recipes share: runs that can be stopped and resumed, and results that say where they come from."""

import dataclasses
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import memorize
import torch
from accelerate import PartialState
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from goldfish.receipt import versions

FINISHED = "trainer_state.json"  # in a run's own folder; Trainer writes it into checkpoints too


def start() -> PartialState:
    """The processes of this launch. They may have to wait long, while the main one audits."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))


def prepare(output: Path, args: Any) -> None:
    """An empty folder for a new run; with --resume, the folder of an earlier one with the same arguments."""
    if not args.resume:
        memorize.prepare_output(output, args)
        return
    marker = output / "arguments.json"
    if not marker.is_file():
        raise FileNotFoundError(f"nothing to resume: {output} holds no run; start without --resume")
    before, now = json.loads(marker.read_text(encoding="utf-8")), dataclasses.asdict(args)
    for name in now:
        if name not in ("resume", "overwrite", "dry_run", "output_dir") and before.get(name) != now[name]:
            raise ValueError(
                f"{output} was started with {name} {before.get(name)!r}, not {now[name]!r}; resume with the same "
                "arguments, or choose another --output_dir"
            )


def finished(folder: Path) -> bool:
    """Whether the training in this folder came to its end."""
    return (folder / FINISHED).is_file()


def train_or_resume(trainer: Trainer, folder: Path) -> None:
    """Train from the start, or from the last whole checkpoint in the folder; save the model, then mark it finished.

    What is needed only to resume is removed at the end.
    """
    state = PartialState()
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        state.print(f"Resuming from {checkpoint}")
    state.wait_for_everyone()  # nobody writes a new checkpoint while another still looks for the last one
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model()
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    trainer.save_state()
    state.wait_for_everyone()
    unset_hf_deepspeed_config()  # or from_pretrained in the main process alone would cut weights among all, and wait
    if state.is_main_process:
        for old in folder.glob("checkpoint-*"):
            shutil.rmtree(old)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; a process may die while it writes one."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        try:
            json.loads((path / FINISHED).read_text(encoding="utf-8"))  # what Trainer writes last
        except (OSError, ValueError):
            continue
        return path
    return None


def log_of(folder: Path) -> list[dict[str, Any]]:
    """What Trainer logged in a finished training."""
    history: list[dict[str, Any]] = json.loads((folder / FINISHED).read_text(encoding="utf-8"))["log_history"]
    return history


def about() -> dict[str, Any]:
    """Which command, code, versions and hardware a result comes from."""
    script = Path(sys.argv[0])
    return {
        "command": shlex.join(["python", f"recipes/{script.name}", *sys.argv[1:]]),
        "commit": commit(),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "processes": PartialState().num_processes,
        "distributed": PartialState().distributed_type.value,
        "threads": torch.get_num_threads(),
    }


def commit() -> str:
    """The commit of this checkout, and whether files that git knows were changed since."""
    try:
        git = ["git", "-C", str(Path(__file__).parents[1])]
        known = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"]).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return known.stdout.strip() + ("+changes" if changed else "")


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"


def append(path: Path, result: dict[str, Any]) -> None:
    """One line of a .jsonl file."""
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(result) + "\n")


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file, none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
