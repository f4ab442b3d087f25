"""One process of some trainings, as `accelerate launch` starts it; for tests of several processes.

recipe_worker.py DIES [[RECIPE, ARGUMENTS], ...]   DIES: none, or FOLDER:RANK:STEP, which kills that
process (kill -9) when the training in a folder of that name reaches that step. Where accelerate was
configured for FSDP, processes on CPU pass for GPUs, because accelerate turns FSDP on for those
only.
"""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import runs
from launch import leave

plain_init, plain_train = PartialState.__init__, runs.train_or_resume


def init_as_gpu(self, *args, **kwargs):
    plain_init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


class Die(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, arguments, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(trainer, folder):
    name, rank, step = sys.argv[1].rsplit(":", 2)
    if name in str(folder) and PartialState().process_index == int(rank):
        trainer.add_callback(Die(int(step)))
    plain_train(trainer, folder)


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState.__init__ = init_as_gpu
    if sys.argv[1] != "none":
        runs.train_or_resume = train_and_die
    for recipe, arguments in json.loads(sys.argv[2]):
        importlib.import_module(recipe).main(arguments)
    leave()
