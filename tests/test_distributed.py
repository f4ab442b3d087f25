"""Two processes on CPU (gloo) against one: the same losses, gradients and receipt.

The rows have unequal numbers of tokens.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import distributed_worker
import pytest
import torch

from goldfish import GoldfishMixin

HERE = Path(__file__).parent
ENTROPY = {"k": 2, "strategy": "entropy"}
CASES = {
    "fused": {},
    "logits": {"fused": False},
    "no target on one rank": {"dropped_whole": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "tokens averaged on each rank": {"average_tokens_across_devices": False},
    "label smoothing": {
        "label_smoothing_factor": 0.2,
        "gradient_accumulation_steps": 2,
    },
    "own mean": {"model": "OwnMean", "gradient_accumulation_steps": 2},
    "own mean, no target on one rank": {"model": "OwnMean", "dropped_whole": True},
    "FSDP2": {"fsdp": True},
    "FSDP2, logits": {"fsdp": True, "fused": False},
    "FSDP2, no target on one rank": {"fsdp": True, "dropped_whole": True},
    "FSDP2, own mean, accumulation": {
        "fsdp": True,
        "model": "OwnMean",
        "gradient_accumulation_steps": 2,
    },
    "saved between two logs": {
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
    },
    "entropy": {"rule": ENTROPY},
    "entropy, resumed on two": {
        "rule": ENTROPY,
        "save_strategy": "steps",
        "save_steps": 2,
    },
    # The last one: nothing takes its device mesh back.
    "tensor parallel": {"tp": True, "fused": False, "per_device_train_batch_size": 8},
}
NEEDS_LOGITS = ("logits", "own mean", "label smoothing", "tensor parallel")
NOT_FUSED = [case for case in CASES if any(name in case for name in NEEDS_LOGITS)]


def run(folder, checkpoint, processes):
    """All cases in one launch, or here if one process is enough; eight rows an optimiser step."""
    all_settings = []
    for number, (case, settings) in enumerate(CASES.items()):
        batch = 8 // processes // settings.get("gradient_accumulation_steps", 1)
        settings = {"per_device_train_batch_size": batch, **settings}
        if "resumed" in case and processes == 2:
            # From the run of one process, which is there; its decisions too.
            settings["resume"] = str(folder / f"1.json-{number}" / "checkpoint-2")
        all_settings.append(settings)
    output = folder / f"{processes}.json"
    arguments = [str(output), str(checkpoint), json.dumps(all_settings)]
    if processes == 1:
        distributed_worker.main(*arguments)
    else:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
        ]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}",
        }
        done = subprocess.run(
            [*command, str(HERE / "distributed_worker.py"), *arguments],
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-8000:]
    return dict(zip(CASES, json.loads(output.read_text()), strict=True))


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory, checkpoint):
    folder = tmp_path_factory.mktemp("distributed")
    return run(folder, checkpoint, 1), run(folder, checkpoint, 2)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one(one_and_two, case):
    one, two = (found[case] for found in one_and_two)
    assert two["sharded"] == ("FSDP2" in case or case == "tensor parallel")
    assert one["fused"] == two["fused"] == (case not in NOT_FUSED)
    assert ("checkpoint-2" in one["receipts"]) == ("save_steps" in CASES[case])
    assert two["counted"] == one["counted"]
    if not two["sharded"]:  # no process saves a sharded model alone
        if "resumed" not in case:
            assert two["receipts"] == one["receipts"]
        assert one["receipts"]["end"].items() >= one["counted"].items()
    # Asked to average on each rank, Trainer takes the mean of the means: right in scale only, as
    # without us.
    tolerance = 5e-2 if "on each rank" in case else 2e-5
    for ours, theirs in zip(two["steps"], one["steps"], strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
        assert ours[1] == pytest.approx(theirs[1], rel=10 * tolerance)
        assert ours[2] == theirs[2]


@pytest.mark.parametrize(
    ("names", "ranks"), [(("dp_shard", "cp"), (1, 1)), (("sp",), (1,))]
)
def test_processes_that_share_rows_count_them_once(names, ranks):
    """Context and sequence parallelism cut rows that all of a group have read."""
    local = dict(zip(names, ranks, strict=True))
    mesh = SimpleNamespace(mesh_dim_names=names, get_local_rank=local.get)
    accelerator = SimpleNamespace(
        torch_device_mesh=mesh, reduce=lambda counts, _: counts
    )
    trainer = SimpleNamespace(accelerator=accelerator)
    counts = torch.tensor([372, 93, 5])
    assert GoldfishMixin._sum_over_rows(trainer, counts).tolist() == [0, 0, 0]
    local[names[-1]] = 0
    assert GoldfishMixin._sum_over_rows(trainer, counts).tolist() == [372, 93, 5]
