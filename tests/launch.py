"""Two processes, for the tests: `accelerate launch` with the configurations that people copy.

Starting two processes takes longer than the miniatures that run in them, so `in_two` (conftest.py)
runs several recipes, and a training with an AuditCallback, in one launch.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).parent / "recipe_worker.py"


def words(**options):
    """--name value ..., as a command line has them."""
    return [
        word
        for name, value in options.items()
        for word in (f"--{name}", *str(value).split())
    ]


MEMORIZE = words(
    documents=4, epochs=2, hidden_size=32, window=64, batch_size=4, vocab_size=512
)
# 8 rows, two epochs, batches that are full in two processes too.
FINETUNE = words(
    passages=4, passage=24, people=2, exposures=1, chats=2, epochs=2, batch_size=4
)
LOOP = words(steps=3)


def leave():
    """End a process of a distributed test whose results are on disk.

    Without Python's finalization: during that, a C++ thread of gloo or autograd that asks for the
    GIL aborts the process now and then ("terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def launch(*commands, config="ddp", dies="none"):
    """Run (recipe, arguments) one after the other in two CPU processes; returns the finished
    process.

    The configuration is for eight GPUs in bf16: the options here make it two CPU processes in full
    precision.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "recipes" / "configs" / f"{config}.yaml")]
    command += [
        "--num_processes",
        "2",
        "--mixed_precision",
        "no",
        "--main_process_port",
        "0",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, str(WORKER), dies, json.dumps(commands)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )


def launch_several(folder, topics, chat_model, checkpoint):
    """memorize, the loop, with TRL installed finetune_private, and callback_worker in one launch;
    their output is in folders of these names."""
    text = ["--text", str(topics)]
    commands = [
        ("memorize", [*text, *MEMORIZE, "--output_dir", str(folder / "memorize")])
    ]
    commands.append(("accelerate_loop", [*text, *LOOP]))
    if importlib.util.find_spec("trl"):
        one = words(
            model=chat_model,
            methods="lora",
            rules="hash-2-3",
            output_dir=folder / "finetune_private",
        )
        commands.append(("finetune_private", [*FINETUNE, *one]))
    callback = folder / "callback_worker"
    callback.mkdir()
    commands.append(("callback_worker", [str(callback), str(checkpoint)]))
    done = launch(*commands)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout
