"""Head and loss, forward and backward: time and extra peak memory of this package and of its peers, on the same labels.

    python benchmarks/loss.py                       # the CPU (or CUDA) shapes; writes benchmarks/results/loss-*.json
    python benchmarks/loss.py --shapes 512,64,4000  # a small look
    python benchmarks/loss.py --render              # the tables of the README, from every JSON there

Every case warms up on a few rows, then all of them run in turn, `--repeats` times, so that a disturbance meets all; a
case whose runs took `--seconds` together is not repeated. Time is the median; the spread is (slowest - fastest) /
median. On CPU it is the process's CPU time, all threads together, so that other work on the machine hardly counts.
Memory is the peak above what inputs hold. A peer that cannot run here has the reason in its place.
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

import torch
from about import RESULTS, about, markdown, source
from torch import Tensor, nn
from torch.nn import functional as F

from goldfish.linear import linear_cross_entropy
from goldfish.rule import Goldfish

PACKAGES = ("trl", "liger-kernel", "cut-cross-entropy", "triton")
SHAPES = {
    "cpu": [(4096, 512, 32_000), (4096, 512, 128_256)],
    "cuda": [
        (4096, 512, 32_000),
        (4096, 512, 128_256),
        (8192, 2048, 128_256),
        (8192, 4096, 128_256),
    ],
}
FLOOR = "three matrix products over kept rows (the floor)"
BASE = "HF eager"
Case = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # hidden (N, D), weight (V, D), labels (N,) -> loss


def hf_eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss(F.linear(hidden, weight), labels, len(weight), shift_labels=labels)


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
                last_hidden_state=hidden, past_key_values=None, hidden_states=None, attentions=None
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
        hidden=hidden[None], labels=labels[None], shift_labels=labels[None], fused_lm_head=True
    ).loss


def cut_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cce

    return cce(
        hidden, weight, labels, impl="torch_compile" if hidden.device.type == "cpu" else "cce"
    )


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels)


def three_products(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What no exact method with gradients can do without: no softmax, no loss, all logits at once."""
    with torch.no_grad():
        kept = hidden[labels != -100]
        logits = kept @ weight.T
        weight.grad = logits.T @ kept
        return (logits @ weight).sum()


def cases(hidden: Tensor, weight: Tensor) -> dict[str, Case | str]:
    """Each method, or why it is not measured."""
    result: dict[str, Case | str] = {
        BASE: hf_eager,
        "HF eager, kept rows": hf_kept_rows,
        "torch F.linear_cross_entropy, default": torch_chunked(),
        "torch F.linear_cross_entropy, best chunking": best_torch_chunking,
        "TRL fused head": trl_head,
        "cut-cross-entropy": cut_cross_entropy,
        "Liger": liger,
        "goldfish": linear_cross_entropy,
        FLOOR: three_products,
    }
    if not hasattr(F, "linear_cross_entropy"):
        result |= dict.fromkeys(
            [name for name in result if name.startswith("torch")], "not in this torch"
        )
    packages = {
        "TRL fused head": "trl",
        "cut-cross-entropy": "cut_cross_entropy",
        "Liger": "liger_kernel",
    }
    result |= {
        name: "not installed" for name, package in packages.items() if not find_spec(package)
    }
    if not hidden.is_cuda:
        result["Liger"] = "needs a GPU"
        logits = 4 * len(hidden) * len(weight)  # bytes of fp32
        if 9 * logits > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            result["TRL fused head"] = "not enough memory free"
    return result


@cache
def fastest_chunking(width: int, vocabulary: int, dtype: torch.dtype, device: str) -> Case:
    """The fastest of a few chunk sizes and both policies, each tried once on 1,024 rows."""
    hidden = torch.randn(1024, width, dtype=dtype, device=device, requires_grad=True)
    weight = nn.Parameter(torch.randn(vocabulary, width, dtype=dtype, device=device) * 0.02)
    labels = torch.randint(vocabulary, (1024,), device=device)
    candidates = [
        torch_chunked(chunking_method=None, batch_chunk_size=rows, acc_policy=policy)
        for rows in (256, 512, 1024)
        for policy in ("compact", "accurate")
    ]
    return min(candidates, key=lambda case: measure(case, hidden, weight, labels)["seconds"])


def best_torch_chunking(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return fastest_chunking(hidden.shape[1], len(weight), hidden.dtype, hidden.device.type)(
        hidden, weight, labels
    )


def measure(case: Case, hidden: Tensor, weight: Tensor, labels: Tensor) -> dict[str, float]:
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
    return {"seconds": seconds, "bytes": peak_memory(hidden.device) - before, "loss": loss.item()}


def start_memory(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL("libc.so.6").malloc_trim(
        0
    )  # glibc keeps what was freed, which would hide what the next one takes
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the highest resident size so far
    return resident("VmRSS")


def peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")


def resident(field: str) -> int:
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field + ":")
    )
    return int(line.split()[1]) * 1024


def run(
    shape: tuple[int, int, int], dtype: str, k: float, device: str, args: argparse.Namespace
) -> list[dict]:
    rows, width, vocabulary = shape
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, device=device).to(getattr(torch, dtype)).requires_grad_()
    weight = nn.Parameter((torch.randn(vocabulary, width, device=device) * 0.02).to(hidden.dtype))
    labels = torch.randint(vocabulary, (rows,), device=device)
    if k != float("inf"):
        labels[Goldfish(k=k).dropped(labels)] = -100
    inputs = hidden, weight, labels
    chosen = cases(hidden, weight)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    failed = {name: case for name, case in chosen.items() if isinstance(case, str)}
    for repeat in range(args.repeats + 1):
        for name, case in chosen.items():
            if name in failed or sum(r["seconds"] for r in runs[name]) > args.seconds:
                continue
            try:
                if repeat:
                    runs[name].append(measure(case, *inputs))
                else:  # what is compiled needs its own shape to warm up
                    few = slice(None if name == "cut-cross-entropy" or device == "cuda" else 64)
                    measure(case, hidden[few].detach().requires_grad_(), weight, labels[few])
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"[:300]
    common = {
        "n": rows,
        "d": width,
        "v": vocabulary,
        "dtype": dtype,
        "k": "inf" if k == float("inf") else k,
    }
    results = []
    for name in chosen:
        entry = common | {"name": name, "kept": int((labels != -100).sum())}
        if name in failed:
            entry["error" if callable(chosen[name]) else "not measured"] = failed[name]
        else:
            seconds = [r["seconds"] for r in runs[name]]
            entry |= {
                "seconds": seconds,
                "median": statistics.median(seconds),
                "loss": runs[name][-1]["loss"],
            }
            entry["bytes"] = statistics.median(r["bytes"] for r in runs[name])
            print(
                f"{shape} {dtype} k={k:g} {name}: {entry['median']:.4f} s, {entry['bytes'] / 1e6:.0f} MB",
                flush=True,
            )
        results.append(entry)
    return results


def render() -> str:
    """One Markdown table per device, shape and dtype; rows are methods, columns k."""
    parts = []
    for path in sorted(RESULTS.glob("loss-*.json")):
        data = json.loads(path.read_text())
        parts.append(source(data["about"]))
        groups: dict[tuple, list[dict]] = {}
        for result in data["results"]:
            groups.setdefault(tuple(result[name] for name in ("n", "d", "v", "dtype")), []).append(
                result
            )
        for (n, d, v, dtype), chosen in groups.items():
            ks = sorted({r["k"] for r in chosen}, key=float)
            head = ("", *("all tokens" if k == "inf" else f"k = {k:g}" for k in ks))
            rows = [
                (name, *(cell(name, [r for r in chosen if r["k"] == k]) for k in ks))
                for name in dict.fromkeys(r["name"] for r in chosen)
            ]
            parts.append(
                f"N = {n}, D = {d}, V = {v}, {dtype}: "
                f"seconds (times HF eager; half the spread) / extra MB (times HF eager)\n\n{markdown(head, rows)}"
            )
    return "\n\n".join(parts)


def cell(name: str, results: list[dict]) -> str:
    result = next((r for r in results if r["name"] == name), None)
    if result is None or "not measured" in result:
        return "not measured" + (f" ({result['not measured']})" if result else "")
    if "error" in result:
        return "failed: " + result["error"].split(":")[0]
    base = next(r for r in results if r["name"] == BASE)
    spread = f"±{(max(result['seconds']) - min(result['seconds'])) / result['median'] / 2:.0%}"
    if len(result["seconds"]) == 1:
        spread = "one run"
    time_ratio, memory_ratio = result["median"] / base["median"], result["bytes"] / base["bytes"]
    text = f"{result['median']:.3g} ({time_ratio:.2f}; {spread}) / {result['bytes'] / 1e6:.0f} ({memory_ratio:.3f})"
    return f"**{text}**" if name == "goldfish" else text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--render", action="store_true", help="print the tables and stop")
    parser.add_argument("--shapes", nargs="+", help="N,D,V ...")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--k", nargs="+", type=float, default=[3, 4, float("inf")])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="after which a case is not repeated"
    )
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    args = parser.parse_args()
    if args.render:
        print(render())
        return
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = [tuple(map(int, s.split(","))) for s in args.shapes] if args.shapes else SHAPES[device]
    provenance = about(*PACKAGES)
    out = RESULTS / f"loss-{device}.json"
    results: list[dict] = []
    for shape, k, dtype in product(shapes, args.k, args.dtypes):
        results += run(shape, dtype, k, device, args)  # type: ignore[arg-type]
        out.write_text(json.dumps({"about": provenance, "results": results}, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
