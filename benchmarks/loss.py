"""Head and loss, forward and backward: time and extra peak memory of this package and its peers.

    # the CPU (or CUDA) shapes; writes benchmarks/results/loss-<device>.json
    python benchmarks/loss.py
    # a small look, kept elsewhere
    python benchmarks/loss.py --shapes 512,64,4000 --output runs/loss
    # the tables of docs/speed.md, from every JSON file there
    python benchmarks/loss.py --render

All methods get the same labels. Each warms up on a few rows, then all of them run in turn,
`--repeats` times, so that a disturbance meets all; a method whose runs took `--seconds` together is
not repeated. Time is the median; the spread is (slowest - fastest) / median. On CPU it is the
process's CPU time, all threads together, so that other work on the machine hardly counts. Memory
is the peak above what inputs occupy. A peer that cannot run here has the reason in its place.
"""

import argparse
import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from about import RESULTS, about, markdown, parser, source
from torch import Tensor, nn
from torch.nn import functional as F

from goldfish.linear import linear_cross_entropy
from goldfish.rule import Goldfish

PACKAGES = ("trl", "liger-kernel", "cut-cross-entropy", "triton")
# Rows, hidden size, vocabulary.
Shape = tuple[int, int, int]
SHAPES = {
    "cpu": [(4096, 512, 32_000), (4096, 512, 128_256)],
    "cuda": [
        (4096, 512, 32_000),
        (4096, 512, 128_256),
        (8192, 2048, 128_256),
        # The head of Llama-3-8B.
        (8192, 4096, 128_256),
    ],
}
FLOOR = "three matrix products over kept rows (the floor)"
BASE = "HF eager"
ALL = float("inf")
# Hidden (N, D), weight (V, D), labels int64 (N,) -> the loss.
Case = Callable[[Tensor, Tensor, Tensor], Tensor]


def hf_eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss(
        F.linear(hidden, weight), labels, len(weight), shift_labels=labels
    )


def hf_kept_rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    kept = labels != -100
    return hf_eager(hidden[kept], weight, labels[kept])


def torch_chunked(**options: object) -> Case:
    return lambda hidden, weight, labels: F.linear_cross_entropy(
        hidden, weight, labels, options=nn.LinearCrossEntropyOptions(**options)
    )


def trl_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """TRL's own path: a model of nothing but a head, patched by TRL."""
    from transformers import LlamaConfig
    from trl.trainer.utils import add_fused_lm_head

    class Backbone(nn.Module):
        def forward(self, hidden: Tensor, **_: object) -> object:
            return argparse.Namespace(
                last_hidden_state=hidden,
                past_key_values=None,
                hidden_states=None,
                attentions=None,
            )

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model, self.config = Backbone(), LlamaConfig()
            self.head = nn.Linear(1, 1, bias=False)
            self.head.weight = weight

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, hidden: Tensor) -> None: ...

    model = Model()
    add_fused_lm_head(model)
    return model(
        hidden=hidden[None],
        labels=labels[None],
        shift_labels=labels[None],
        fused_lm_head=True,
    ).loss


def cut_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cce

    impl = "torch_compile" if hidden.device.type == "cpu" else "cce"
    return cce(hidden, weight, labels, impl=impl)


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels)


def liger_scaled(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Liger's other loss: plain PyTorch on most devices, a kernel of its own on an H100 or H200."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction as Function,
    )

    return Function.apply(hidden, weight, labels).sum() / (labels != -100).sum()


def three_products(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The products that every exact method needs for loss and gradients; no softmax, no loss."""
    with torch.no_grad():
        # Logits, the gradient of the weight, and that of the hidden states.
        kept = hidden[labels != -100]
        logits = kept @ weight.T
        weight.grad = logits.T @ kept
        return (logits @ weight).sum()


def cases(hidden: Tensor, weight: Tensor) -> dict[str, Case | str]:
    """Each method, or why it is not measured."""
    result: dict[str, Case | str] = {
        BASE: hf_eager,
        "HF eager, kept rows": hf_kept_rows,
        "torch F.linear_cross_entropy, default": torch_default,
        "torch F.linear_cross_entropy, best chunking": best_torch_chunking,
        "TRL fused head": trl_head,
        "cut-cross-entropy": cut_cross_entropy,
        # Liger has two: its Triton kernel, and a newer one that other devices run too.
        "Liger": liger,
        "Liger, scaled": liger_scaled,
        "goldfish": linear_cross_entropy,
        FLOOR: three_products,
    }
    for name in result:
        # F.linear_cross_entropy and its options are of torch 2.13; images may have an older one.
        if name.startswith("torch") and not hasattr(nn, "LinearCrossEntropyOptions"):
            result[name] = "not in this torch"
    packages = {
        "TRL fused head": "trl",
        "cut-cross-entropy": "cut_cross_entropy",
        "Liger": "liger_kernel",
        "Liger, scaled": "liger_kernel",
    }
    for name, package in packages.items():
        if not find_spec(package):
            result[name] = "not installed"
    if not hidden.is_cuda:
        result["Liger"] = "a Triton kernel"
        # Made for GPUs: on a CPU it holds about nine times the fp32 logits.
        needed = 9 * 4 * len(hidden) * len(weight)
        if needed > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            result["TRL fused head"] = "not enough memory free"
    return result


def torch_default(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return torch_chunked()(hidden, weight, labels)


@cache
def fastest_chunking(
    width: int, vocabulary: int, dtype: torch.dtype, device: str
) -> Case:
    """The fastest of a few chunk sizes and both policies, each tried once on 1,024 rows."""
    hidden = torch.randn(1024, width, dtype=dtype, device=device, requires_grad=True)
    weight = nn.Parameter(
        torch.randn(vocabulary, width, dtype=dtype, device=device) * 0.02
    )
    labels = torch.randint(vocabulary, (1024,), device=device)
    candidates = [
        torch_chunked(chunking_method=None, batch_chunk_size=rows, acc_policy=policy)
        for rows in (256, 512, 1024)
        for policy in ("compact", "accurate")
    ]
    return min(
        candidates, key=lambda case: measure(case, hidden, weight, labels)["seconds"]
    )


def best_torch_chunking(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    case = fastest_chunking(
        hidden.shape[1], len(weight), hidden.dtype, hidden.device.type
    )
    return case(hidden, weight, labels)


def measure(
    case: Case, hidden: Tensor, weight: Tensor, labels: Tensor
) -> dict[str, float]:
    """Seconds, extra peak bytes and loss of one forward and backward."""
    hidden.grad = weight.grad = None
    before = start_memory(hidden.device)
    clock = time.perf_counter if hidden.is_cuda else time.process_time
    begin = clock()
    loss = case(hidden, weight, labels)
    if loss.requires_grad:
        loss.backward()
    if hidden.is_cuda:
        torch.cuda.synchronize()
    seconds = clock() - begin
    return {
        "seconds": seconds,
        "bytes": peak_memory(hidden.device) - before,
        "loss": loss.item(),
    }


def start_memory(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # glibc keeps what was freed, which would hide what the next method takes.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    # Linux forgets the highest resident size so far.
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak_memory(device: torch.device) -> int:
    return (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else resident("VmHWM")
    )


def resident(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def run(
    shape: Shape, dtype: str, k: float, device: str, args: argparse.Namespace
) -> list[dict]:
    """All methods on the same inputs; a line of the results for each."""
    rows, width, vocabulary = shape
    torch.manual_seed(0)
    hidden = (
        torch.randn(rows, width, device=device)
        .to(getattr(torch, dtype))
        .requires_grad_()
    )
    weight = nn.Parameter(
        (torch.randn(vocabulary, width, device=device) * 0.02).to(hidden.dtype)
    )
    labels = torch.randint(vocabulary, (rows,), device=device)
    # One document of random tokens: the rule drops about one in k.
    if k != ALL:
        labels[Goldfish(k=k).dropped(labels)] = -100
    chosen = cases(hidden, weight)
    runs, failed = measure_in_turn(chosen, (hidden, weight, labels), args)
    results = []
    for name, case in chosen.items():
        result: dict[str, Any] = {
            "n": rows,
            "d": width,
            "v": vocabulary,
            "dtype": dtype,
        }
        result |= {
            "k": "inf" if k == ALL else k,
            "name": name,
            "kept": int((labels >= 0).sum()),
        }
        if name in failed:
            result["error" if callable(case) else "not measured"] = failed[name]
        else:
            seconds = [each["seconds"] for each in runs[name]]
            result |= {"seconds": seconds, "median": statistics.median(seconds)}
            result["loss"] = runs[name][-1]["loss"]
            result["bytes"] = statistics.median(each["bytes"] for each in runs[name])
            took, extra = result["median"], result["bytes"] / 1e6
            print(
                f"{shape} {dtype} k={k:g} {name}: {took:.4f} s, {extra:.0f} MB",
                flush=True,
            )
        results.append(result)
    return results


def measure_in_turn(
    chosen: dict[str, Case | str],
    inputs: tuple[Tensor, Tensor, Tensor],
    args: argparse.Namespace,
) -> tuple[dict[str, list[dict[str, float]]], dict[str, str]]:
    """The measurements of each method, and why there are none of some."""
    hidden, weight, labels = inputs
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    failed = {name: case for name, case in chosen.items() if isinstance(case, str)}
    for repeat in range(args.repeats + 1):
        for name, case in chosen.items():
            taken = sum(each["seconds"] for each in runs[name])
            if name in failed or isinstance(case, str) or taken > args.seconds:
                continue
            try:
                if repeat:
                    runs[name].append(measure(case, *inputs))
                    continue
                # The first turn warms up: on a few rows, but what is compiled needs its own shape.
                whole = name == "cut-cross-entropy" or hidden.is_cuda
                few = slice(None if whole else 64)
                measure(
                    case, hidden[few].detach().requires_grad_(), weight, labels[few]
                )
            except Exception as error:
                # Also out of memory: the others can still be measured.
                failed[name] = f"{type(error).__name__}: {error}"[:300]
                hidden.grad = weight.grad = None
    return runs, failed


def render(folder: Path) -> str:
    """One Markdown table per device, shape and dtype; rows are methods, columns k."""
    parts = []
    for path in sorted(folder.glob("loss-*.json")):
        data = json.loads(path.read_text())
        parts.append(source(data["about"]))
        groups: dict[tuple, list[dict]] = {}
        for result in data["results"]:
            key = tuple(result[name] for name in ("n", "d", "v", "dtype"))
            groups.setdefault(key, []).append(result)
        for (n, d, v, dtype), chosen in groups.items():
            ks = sorted({result["k"] for result in chosen}, key=float)
            head = ("", *("all tokens" if k == "inf" else f"k = {k:g}" for k in ks))
            rows = []
            for name in dict.fromkeys(result["name"] for result in chosen):
                columns = [
                    [result for result in chosen if result["k"] == k] for k in ks
                ]
                rows.append((name, *(cell(name, column) for column in columns)))
            title = (
                f"N = {n}, D = {d}, V = {v}, {dtype}: seconds (times HF eager; half the spread) / "
                "extra MB (times HF eager)"
            )
            parts.append(f"{title}\n\n{markdown(head, rows)}")
    return "\n\n".join(parts)


def cell(name: str, results: list[dict]) -> str:
    """The figures of one method at one k."""
    result = next((r for r in results if r["name"] == name), None)
    if result is None:
        return "not measured"
    if "not measured" in result:
        return f"not measured ({result['not measured']})"
    if "error" in result:
        return "failed: " + result["error"].split(":")[0]
    seconds, median = result["seconds"], result["median"]
    spread = f"±{(max(seconds) - min(seconds)) / median / 2:.0%}"
    if len(seconds) == 1:
        spread = "one run"
    times, share = "", ""
    base = next(r for r in results if r["name"] == BASE)
    # Eager may have failed, by running out of memory.
    if "median" in base:
        times = f"{median / base['median']:.2f}; "
        share = f" ({result['bytes'] / base['bytes']:.3f})"
    text = f"{median:.3g} ({times}{spread}) / {result['bytes'] / 1e6:.0f}{share}"
    return f"**{text}**" if name == "goldfish" else text


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--render", action="store_true", help="print the tables and stop"
    )
    options.add_argument("--shapes", nargs="+", help="N,D,V ...")
    options.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options.add_argument("--k", nargs="+", type=float, default=[3, 4, ALL])
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument(
        "--seconds",
        type=float,
        default=ALL,
        help="after which a method is not repeated",
    )
    options.add_argument("--threads", type=int, default=1, help="of the CPU")
    options.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of the JSON files"
    )
    args = options.parse_args()
    if args.render:
        print(render(args.output))
        return
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes: list[Any] = SHAPES[device]
    if args.shapes:
        shapes = [tuple(map(int, shape.split(","))) for shape in args.shapes]
    provenance = about(*PACKAGES)
    args.output.mkdir(parents=True, exist_ok=True)
    out = args.output / f"loss-{device}.json"
    results: list[dict] = []
    for shape, k, dtype in product(shapes, args.k, args.dtypes):
        results += run(shape, dtype, k, device, args)
        # Written after each group, so that a run that is stopped leaves what it has.
        out.write_text(
            json.dumps({"about": provenance, "results": results}, indent=1) + "\n"
        )
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
