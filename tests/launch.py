"""Recipes in two processes, for the tests: `accelerate launch` with the configurations that people copy."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).parent / "recipe_worker.py"


def launch(recipe, arguments, *, config="ddp", dies="none", processes=2):
    """The finished process; its configuration's eight GPUs become two CPU processes in full precision."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "recipes" / "configs" / f"{config}.yaml")]
    command += ["--num_processes", str(processes), "--mixed_precision", "no", "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, str(WORKER), recipe, dies, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
