"""Every test here runs at toy size on the CPU and, marked `gpu`, at full size on a GPU, where its figures are kept.

pytest -m gpu tests/gpu        # writes benchmarks/results/gpu-NAME.json; minutes: not measured yet
"""

import json
import platform
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "recipes"), str(ROOT / "tests")]

GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; the same test ran on the CPU"),
    ],
)


@pytest.fixture(scope="session", params=["cpu", GPU])
def device(request):
    return request.param


@pytest.fixture(scope="session")
def figures(device, tmp_path_factory):
    """What tests measure, by name; written at the end, those of a GPU beside the benchmarks."""
    found: dict[str, object] = {}
    yield found
    folder, name = tmp_path_factory.mktemp("figures"), "cpu"
    if device == "cuda":
        folder, name = ROOT / "benchmarks" / "results", torch.cuda.get_device_name()
    about = {"device": name, "torch": torch.__version__, "python": platform.python_version()}
    path = folder / f"gpu-{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
    path.write_text(json.dumps({"about": about, "command": "pytest -m gpu tests/gpu", **found}, indent=1) + "\n")
