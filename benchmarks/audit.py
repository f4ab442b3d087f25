"""What an audit costs: beside other ways to the answer, in memory, and in 16 bits.

    # minutes on one core; also memaudit and lm-eval, if they are installed
    python benchmarks/audit.py --model DIR_OR_NAME
    # 1,000 to 100,000 windows of a tiny model, minutes
    python benchmarks/audit.py --memory
    # the models of recipes/memorize.py in float32 and bfloat16, on a GPU if there is one
    python benchmarks/audit.py --run runs/memorize
    # the tables again, from the JSON files
    python benchmarks/audit.py --render

Windows are cut from the Python language reference. In half of them the suffix is the model's own
greedy continuation of the prefix, so these are recited and the others are not. All ways must agree
on which are (except memaudit, which tokenizes the prefix's text again). They run in turn, --repeats
times; seconds are the processor's (one thread), which other work on the machine disturbs less than
the clock's. With --run they are the clock's.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from about import (
    RESULTS,
    about,
    byte_level_bpe,
    load_texts,
    markdown,
    parser,
    small_llama,
    source,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from goldfish.audit import audit
from goldfish.audit.records import read_records

# Tokens of a prefix, and of a suffix.
LENGTH = 50
SIZES = (1_000, 10_000, 100_000)
# Model, tokenizer, windows -> which are recited.
Way = Callable[[Any, Any, list[list[int]]], list[bool]]


def batched_generate(
    model: Any, tokenizer: Any, windows: list[list[int]]
) -> list[bool]:
    outputs = continued(model, windows)
    return [
        output == window[LENGTH:]
        for output, window in zip(outputs, windows, strict=True)
    ]


def ten_prefixes(model: Any, tokenizer: Any, windows: list[list[int]]) -> list[bool]:
    for prefix in range(LENGTH // 10, LENGTH + 1, LENGTH // 10):
        result = continued(model, windows, prefix)
    return [
        output == window[LENGTH:]
        for output, window in zip(result, windows, strict=True)
    ]


def continued(
    model: Any, windows: list[list[int]], prefix: int = LENGTH
) -> list[list[int]]:
    """Greedy continuations of all prefixes, in one batch, through any end of text."""
    start = torch.tensor([window[:prefix] for window in windows])
    output = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=False,
        max_new_tokens=LENGTH,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[:, prefix:].tolist()


def lm_eval_loglikelihood(
    model: Any, tokenizer: Any, windows: list[list[int]]
) -> list[bool]:
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=len(windows))
    requests = [(("", ""), window[:LENGTH], window[LENGTH:]) for window in windows]
    return [
        greedy for _, greedy in lm._loglikelihood_tokens(requests, disable_tqdm=True)
    ]


def memaudit(model: Any, tokenizer: Any, windows: list[list[int]]) -> list[bool]:
    """What its run_audit does with a canary: scores of the secret, and its completion."""
    from memaudit.scoring import generate_canary_completions, score_sequence

    result = []
    for window in windows:
        score_sequence(model, window, span=(LENGTH, len(window)))
        done = generate_canary_completions(
            model, tokenizer, tokenizer.decode(window), window, prefix_fractions=(0.5,)
        )
        result.append(done["by_prefix"][0]["exact"])
    return result


# The package that each way needs, and the way.
WAYS: dict[str, tuple[str | None, Way]] = {
    "exact match by one batched `generate`": (None, batched_generate),
    "lm-eval `loglikelihood` (exact match, log p)": ("lm_eval", lm_eval_loglikelihood),
    "memaudit `score_sequence`, `generate_canary_completions`": ("memaudit", memaudit),
    "exact match at ten prefix lengths by batched `generate`": (None, ten_prefixes),
}
OURS = "goldfish `audit()`, everything"


def cost(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds of every way, in turn; after each repeat, those so far."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = half_recited(model, tokenizer, args.windows)
    half = args.windows // 2
    expected = [True] * half + [False] * (args.windows - half)
    ways = {
        name: way
        for name, (package, way) in WAYS.items()
        if package is None or find_spec(package)
    }
    seconds: dict[str, list[float]] = {name: [] for name in (OURS, *ways)}
    with tempfile.TemporaryDirectory() as folder:
        paths = {
            split: Path(folder, f"{split}.jsonl") for split in ("members", "heldout")
        }
        for path, part in zip(
            paths.values(), (windows[:half], windows[half:]), strict=True
        ):
            path.write_text(
                "".join(json.dumps({"input_ids": window}) + "\n" for window in part)
            )
        for repeat in range(args.repeats):
            answers = {}
            for name in seconds:
                # Ten prefixes take long, and as evenly as the others.
                if repeat and name.startswith("exact match at ten"):
                    continue
                begin = time.process_time()
                if name == OURS:
                    answers[name] = ours(args.model, Path(folder, str(repeat)), paths)
                else:
                    answers[name] = ways[name](model, tokenizer, windows)
                seconds[name].append(time.process_time() - begin)
                print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
            for name, answer in answers.items():
                if answer != expected and not name.startswith("memaudit"):
                    raise SystemExit(
                        f"other windows than are recited: {name} finds {answer}"
                    )
            yield {
                "windows": args.windows,
                "tokens": LENGTH,
                "parameters": sum(weight.numel() for weight in model.parameters()),
                "seconds": seconds,
            }


def half_recited(model: Any, tokenizer: Any, count: int) -> list[list[int]]:
    """Windows of the language reference; half of them end as the model continues."""
    ids = tokenizer("\n".join(load_texts()), add_special_tokens=False)["input_ids"]
    windows = [ids[i * 500 : i * 500 + 2 * LENGTH] for i in range(count)]
    half = count // 2
    outputs = continued(model, windows[:half])
    for window, output in zip(windows, outputs, strict=False):
        window[LENGTH:] = output
    return windows


def ours(model: Any, output: Path, paths: dict[str, Path]) -> list[bool]:
    audit(
        model, output, **paths, prefix_length=LENGTH, suffix_length=LENGTH, device="cpu"
    )
    return read_records(output, ["exact_match"]).column("exact_match").to_pylist()


def in_dtypes(run: Path) -> Iterator[dict[str, Any]]:
    """Audits of both models of recipes/memorize.py in each dtype; after each, those so far."""
    paths = {split: run / f"{split}.jsonl" for split in ("members", "heldout")}
    first, *_ = paths["members"].read_text(encoding="utf-8").splitlines()
    half = len(json.loads(first)["input_ids"]) // 2
    rows = []
    exact: dict[str, list[list[int]]] = {}
    for model, dtype in product(("standard", "goldfish"), ("float32", "bfloat16")):
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            output = Path(folder, "audit")
            audit(
                run / model,
                output,
                **paths,
                prefix_length=half,
                suffix_length=half,
                dtype=dtype,
            )
            seconds = time.perf_counter() - begin
            table = read_records(output, ["exact_match", "output_ids"])
        outputs = table.column("output_ids").to_pylist()
        # 16 bits are another model: its outputs need not be those of 32.
        same = sum(
            a == b
            for a, b in zip(exact.setdefault(model, outputs), outputs, strict=True)
        )
        recited = sum(table.column("exact_match").to_pylist())
        rows.append(
            {
                "model": model,
                "dtype": dtype,
                "windows": len(outputs),
                "tokens": half,
                "seconds": round(seconds, 2),
                "recited": recited,
                "outputs_as_in_float32": same,
            }
        )
        print(rows[-1], flush=True)
        yield {"dtypes": rows}


def memory(sizes: list[int]) -> Iterator[dict[str, Any]]:
    """Peak resident memory of whole audits, each in its own process; after each, those so far."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = byte_level_bpe(load_texts(), 512)
        torch.manual_seed(0)
        changes = {
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "eos_token_id": None,
        }
        LlamaForCausalLM(small_llama(tokenizer, 16, **changes)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for size in sizes:
            generator = torch.Generator().manual_seed(size)
            for split in ("members", "heldout"):
                with Path(folder, f"{split}.jsonl").open("w") as lines:
                    for _ in range(size // 2):
                        row = torch.randint(1, 512, (16,), generator=generator).tolist()
                        lines.write(json.dumps({"input_ids": row}) + "\n")
            command = [
                sys.executable,
                __file__,
                "--peak",
                folder,
                "--windows",
                str(size),
            ]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
            yield {"memory": rows}


def peak(folder: Path, size: int) -> dict[str, float]:
    """The audit of one size, in this process.

    In MB of 10^6 bytes; `before` is what the imports alone take.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    paths = {split: folder / f"{split}.jsonl" for split in ("members", "heldout")}
    audit(
        folder,
        folder / str(size),
        **paths,
        prefix_length=8,
        suffix_length=8,
        device="cpu",
    )
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = round(used.ru_utime + used.ru_stime, 1)
    return {
        "windows": size,
        "peak": used.ru_maxrss * 1024 / 1e6,
        "before": before * 1024 / 1e6,
        "seconds": seconds,
    }


def render(folder: Path) -> str:
    """The tables of all JSON files of audits."""
    parts = []
    for path in sorted(folder.glob("audit-*.json")):
        data = json.loads(path.read_text())
        parts.append(source(data["about"]) + "\n")
        for key, table in (("memory", memory_table), ("dtypes", dtypes_table)):
            if key in data:
                parts.append(table(data[key]) + "\n")
        if "seconds" in data:
            size = (
                f"{data['windows']} windows, {data['parameters'] / 1e6:.1f}M parameters"
            )
            parts.append(f"{size}\n\n{seconds_table(data)}\n")
    return "\n".join(parts)


def memory_table(sizes: list[dict[str, Any]]) -> str:
    rows = [
        (f"{r['windows']:,}", f"{r['peak']:.0f}", f"{r['seconds']:.0f}") for r in sizes
    ]
    return markdown(("windows", "peak, MB", "CPU seconds"), rows)


def dtypes_table(audits: list[dict[str, Any]]) -> str:
    names = (
        "model",
        "dtype",
        "windows",
        "tokens",
        "seconds",
        "recited",
        "outputs_as_in_float32",
    )
    head = [name.replace("_", " ") for name in names]
    return markdown(head, [[row[name] for name in names] for row in audits])


def seconds_table(data: dict[str, Any]) -> str:
    n, audits = data["windows"], statistics.median(data["seconds"][OURS])
    rows = []
    for name, seconds in data["seconds"].items():
        middle = statistics.median(seconds)
        spread = f"{min(seconds) / n:.2f} - {max(seconds) / n:.2f}"
        rows.append(
            (name, f"{middle / n:.2f}", spread, len(seconds), f"{middle / audits:.2f}")
        )
    head = (
        "",
        "CPU seconds a window, median",
        "least - greatest",
        "runs",
        "of the audit's",
    )
    return markdown(head, rows)


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--model", help="a causal model and its tokenizer: folder or name"
    )
    options.add_argument("--windows", type=int, default=16)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--memory", action="store_true", help="measure memory instead")
    sizes_help = "windows, with --memory"
    options.add_argument("--sizes", type=int, nargs="+", default=SIZES, help=sizes_help)
    options.add_argument(
        "--run", type=Path, help="output_dir of recipes/memorize.py: both dtypes"
    )
    options.add_argument(
        "--render", action="store_true", help="print the tables and stop"
    )
    # One size of --memory, in a process of its own.
    options.add_argument("--peak", type=Path, help=argparse.SUPPRESS)
    options.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of the JSON files"
    )
    args = options.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        print(json.dumps(peak(args.peak, args.windows)))
        return
    if not (args.render or args.memory or args.model or args.run):
        options.error("--model, --memory, --run or --render is needed")
    if not args.render:
        provenance = about("memaudit", "lm-eval", "rapidfuzz")
        if args.run:
            name, results = "dtypes", in_dtypes(args.run)
        elif args.memory:
            name, results = "memory", memory(args.sizes)
        else:
            name, results = "cpu", cost(args)
        args.output.mkdir(parents=True, exist_ok=True)
        for result in results:
            text = json.dumps({"about": provenance, **result}, indent=1) + "\n"
            (args.output / f"audit-{name}.json").write_text(text, encoding="utf-8")
    print(render(args.output))


if __name__ == "__main__":
    main()
