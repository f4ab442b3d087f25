"""What an audit costs: beside other ways to the answer on the same windows, and in memory as the windows grow.

    python benchmarks/audit.py --model DIR_OR_NAME      # minutes on one core; memaudit and lm-eval, where installed
    python benchmarks/audit.py --memory                 # 1,000 to 100,000 windows of a tiny model, minutes
    python benchmarks/audit.py --render                 # the tables again, from the JSON files

Windows are cut from the Python language reference. In half of them the suffix is what the model itself says after the
prefix, so these are recited and the others are not. All ways must agree on which are (but memaudit, which tokenizes
the prefix's text again). They run in turn, --repeats times; seconds are the processor's (one thread), which other work
on the machine disturbs less than the clock's.
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
from pathlib import Path
from typing import Any

import torch
from about import RESULTS, about, byte_level_bpe, load_texts, markdown, small_llama, source
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from goldfish.audit import audit
from goldfish.audit.records import read_records

LENGTH = 50  # tokens of a prefix, and of a suffix
SIZES = (1_000, 10_000, 100_000)
Way = Callable[
    [Any, Any, list[list[int]]], list[bool]
]  # model, tokenizer, windows -> which are recited


def batched_generate(model: Any, tokenizer: Any, windows: list[list[int]]) -> list[bool]:
    return [
        output == window[LENGTH:]
        for output, window in zip(continued(model, windows), windows, strict=True)
    ]


def ten_prefixes(model: Any, tokenizer: Any, windows: list[list[int]]) -> list[bool]:
    for prefix in range(LENGTH // 10, LENGTH + 1, LENGTH // 10):
        result = continued(model, windows, prefix)
    return [output == window[LENGTH:] for output, window in zip(result, windows, strict=True)]


def continued(model: Any, windows: list[list[int]], prefix: int = LENGTH) -> list[list[int]]:
    """Greedy continuations of all prefixes, in one batch; an end-of-text token does not end them."""
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


def lm_eval_loglikelihood(model: Any, tokenizer: Any, windows: list[list[int]]) -> list[bool]:
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=len(windows))
    requests = [(("", ""), window[:LENGTH], window[LENGTH:]) for window in windows]
    return [greedy for _, greedy in lm._loglikelihood_tokens(requests, disable_tqdm=True)]


def memaudit(model: Any, tokenizer: Any, windows: list[list[int]]) -> list[bool]:
    """What its run_audit does with a canary: the scores of the secret, and its completion from half of it."""
    from memaudit.scoring import generate_canary_completions, score_sequence

    result = []
    for window in windows:
        score_sequence(model, window, span=(LENGTH, len(window)))
        done = generate_canary_completions(
            model, tokenizer, tokenizer.decode(window), window, prefix_fractions=(0.5,)
        )
        result.append(done["by_prefix"][0]["exact"])
    return result


WAYS: dict[str, tuple[str | None, Way]] = {  # the package that each needs
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
    ids = tokenizer("\n".join(load_texts()), add_special_tokens=False)["input_ids"]
    windows = [ids[i * 500 : i * 500 + 2 * LENGTH] for i in range(args.windows)]
    half = args.windows // 2
    recited = continued(model, windows[:half])
    windows[:half] = [
        window[:LENGTH] + output for window, output in zip(windows[:half], recited, strict=True)
    ]
    ways = {
        name: way for name, (package, way) in WAYS.items() if package is None or find_spec(package)
    }
    seconds: dict[str, list[float]] = {name: [] for name in (OURS, *ways)}
    parameters = sum(weight.numel() for weight in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        paths = {"members": Path(folder, "members.jsonl"), "heldout": Path(folder, "heldout.jsonl")}
        for path, part in zip(paths.values(), (windows[:half], windows[half:]), strict=True):
            path.write_text("".join(json.dumps({"input_ids": window}) + "\n" for window in part))
        for repeat in range(args.repeats):
            answers = {}
            for name in seconds:
                if repeat and name.startswith(
                    "exact match at ten"
                ):  # long, and as even as the others
                    continue
                begin = time.process_time()
                if name == OURS:
                    output = Path(folder, str(repeat))
                    audit(
                        args.model,
                        output,
                        **paths,
                        prefix_length=LENGTH,
                        suffix_length=LENGTH,
                        device="cpu",
                    )
                else:
                    answers[name] = ways[name](model, tokenizer, windows)
                seconds[name].append(time.process_time() - begin)
                print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
            ours = read_records(output, ["exact_match"]).column("exact_match").to_pylist()
            for name, answer in [(OURS, ours), *answers.items()]:
                if answer != [True] * half + [False] * (
                    args.windows - half
                ) and not name.startswith("memaudit"):
                    raise SystemExit(f"not the windows that are recited: {name} says {answer}")
            yield {
                "windows": args.windows,
                "tokens": LENGTH,
                "parameters": parameters,
                "seconds": seconds,
            }


def memory(sizes: list[int]) -> Iterator[dict[str, Any]]:
    """Peak resident memory of a whole audit, each in a process of its own; after each size, those so far."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = byte_level_bpe(load_texts(), 512)
        torch.manual_seed(0)
        changes = {"num_hidden_layers": 1, "num_attention_heads": 1, "eos_token_id": None}
        LlamaForCausalLM(small_llama(tokenizer, 16, **changes)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for size in sizes:
            generator = torch.Generator().manual_seed(size)
            for split in ("members", "heldout"):
                with Path(folder, f"{split}.jsonl").open("w") as lines:
                    for _ in range(size // 2):
                        row = torch.randint(1, 512, (16,), generator=generator).tolist()
                        lines.write(json.dumps({"input_ids": row}) + "\n")
            command = [sys.executable, __file__, "--peak", folder, "--windows", str(size)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
            yield {"memory": rows}


def peak(folder: Path, size: int) -> dict[str, float]:
    """The audit of one size, in this process. MB of 10^6 bytes; `before`: what the imports alone take."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    paths = {split: folder / f"{split}.jsonl" for split in ("members", "heldout")}
    audit(folder, folder / str(size), **paths, prefix_length=8, suffix_length=8, device="cpu")
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = round(used.ru_utime + used.ru_stime, 1)
    return {
        "windows": size,
        "peak": used.ru_maxrss * 1024 / 1e6,
        "before": before * 1024 / 1e6,
        "seconds": seconds,
    }


def render() -> str:
    parts = []
    for path in sorted(RESULTS.glob("audit-*.json")):
        data = json.loads(path.read_text())
        parts.append(source(data["about"]) + "\n")
        if "memory" in data:
            rows = [
                (f"{r['windows']:,}", f"{r['peak']:.0f}", f"{r['seconds']:.0f}")
                for r in data["memory"]
            ]
            parts.append(markdown(("windows", "peak, MB", "CPU seconds"), rows) + "\n")
            continue
        n, ours = data["windows"], statistics.median(data["seconds"][OURS])
        rows = []
        for name, seconds in data["seconds"].items():
            middle, spread = (
                statistics.median(seconds),
                f"{min(seconds) / n:.2f} - {max(seconds) / n:.2f}",
            )
            rows.append((name, f"{middle / n:.2f}", spread, len(seconds), f"{middle / ours:.2f}"))
        head = ("", "CPU seconds a window, median", "least - greatest", "runs", "of the audit's")
        parts.append(
            f"{n} windows, {data['parameters'] / 1e6:.1f}M parameters\n\n{markdown(head, rows)}\n"
        )
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a causal model and its tokenizer: folder or name")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=SIZES, help="windows, with --memory"
    )
    parser.add_argument("--render", action="store_true", help="print the tables and stop")
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)  # one size of --memory
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        print(json.dumps(peak(args.peak, args.windows)))
        return
    if not (args.render or args.memory or args.model):
        parser.error("--model, --memory or --render is needed")
    if not args.render:
        provenance = about("memaudit", "lm-eval", "rapidfuzz")
        name, results = ("memory", memory(args.sizes)) if args.memory else ("cpu", cost(args))
        for result in results:
            text = json.dumps({"about": provenance, **result}, indent=1) + "\n"
            (RESULTS / f"audit-{name}.json").write_text(text, encoding="utf-8")
    print(render())


if __name__ == "__main__":
    main()
