"""Evenly spread dropped tokens against the hash rule, at equal drop rates: what is recited after 100 epochs?

    python benchmarks/spread.py                    # goes on with what benchmarks/results/spread.jsonl lacks; 2 CPU
                                                   # minutes a training
    python benchmarks/spread.py --static           # what needs no training: rates, runs, edits
    python benchmarks/spread.py --table            # the table of the trainings so far

The setting is that of recipes/memorize.py: 32 windows of 256 tokens of the Python language reference, 100 epochs, a
Llama of 1M parameters; then the second half of each window is asked for. Prototypes of rules whose dropped tokens are
spread evenly and depend on content only:

hash      with probability 1/k, from the 13 tokens before (the package's rule).
cap       as hash with max_kept = k: with a lower rate q, and also after every L kept tokens in a row.
winnow    where the hash of the tokens before is the least of some w consecutive ones; rate 2 / (w + 1).
mod       mod-minimizer (Groot Koerkamp and Pibiri 2024): the least hash of short contexts in a longer window says which
          of w consecutive tokens is dropped; rate between 1 / w and 2 / (w + 1).
even      every k-th position: moves with the passage, so no candidate, but the limit of even spacing.
"""

import argparse
import hashlib
import math
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from about import RESULTS, about, byte_level_bpe, small_llama
from common import audit_halves, load_texts, save_windows, split_windows
from numpy.typing import NDArray
from runs import append, read_results
from scipy.stats import t as student
from transformers import LlamaForCausalLM, get_cosine_schedule_with_warmup

from goldfish import Goldfish
from goldfish.audit import records

RATES = (1 / 4, 1 / 3, 1 / 5, 1 / 2)
SCHEMES = ("hash", "cap", "winnow", "mod", "even")
H, SHORT, WINDOW, BATCH, VOCABULARY = 13, 3, 256, 8, 2048


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=("standard", *SCHEMES))
    parser.add_argument("--results", type=Path, default=RESULTS / "spread.jsonl")
    parser.add_argument("--static", action="store_true", help="only measure the rules, without training")
    parser.add_argument("--table", action="store_true", help="print the table of the results and stop")
    args = parser.parse_args(argv)
    if args.static:
        print(static_table(args))
        return
    for seed in [] if args.table else args.seeds:
        texts = load_texts()
        tokenizer = byte_level_bpe(texts, VOCABULARY)
        members, heldout = split_windows(texts, tokenizer, args.documents, WINDOW, seed)
        for rate in args.rates:
            for scheme in args.schemes:
                run = {"seed": seed, "scheme": scheme, "rate": round(rate, 4), "documents": args.documents,
                       "epochs": args.epochs}  # fmt: skip
                if any(all(known[key] == run[key] for key in run) for known in read_results(args.results)):
                    continue
                began = time.process_time()
                result = train(scheme, rate, seed, args.epochs, tokenizer, members, heldout)
                append(args.results, run | result | {"cpu_seconds": round(time.process_time() - began)} | about())
                print({**run, "rouge_l": round(statistics.fmean(result["members"]["rouge_l_ids"]), 3)}, flush=True)
    print(table(read_results(args.results)))


def dropped(scheme: str, rate: float, ids: list[int]) -> NDArray[np.bool_]:
    """Which tokens of one document are dropped. The first never is."""
    number = len(ids)
    drop = np.zeros(number, dtype=bool)
    if scheme in ("hash", "cap"):
        longest = math.ceil(1 / rate) if scheme == "cap" else None
        return Goldfish(k=round(1 / rate), h=H, max_kept=longest).dropped(torch.tensor(ids)).numpy()
    if scheme == "even":
        drop = np.arange(number) % round(1 / rate) == 0
    elif scheme == "winnow":
        values = keys(ids, H)
        width = round(2 / rate - 1)
        for first in range(max(1, number - width + 1)):
            drop[first + int(np.argmin(values[first : first + width]))] = True
    elif scheme == "mod":
        width = mod_of(rate)
        short = SHORT + (H - SHORT) % width
        values = keys(ids, short)
        span = H - short + width  # short contexts within `width` consecutive contexts of H tokens
        for first in range(number - width + 1):
            # The contexts of H tokens that end before first, ..., first + width - 1; of short ones: those within them.
            ends = np.arange(first - (H - short), first - (H - short) + span)
            among = np.where(ends >= 0, values[np.maximum(ends, 0)], np.inf)
            drop[first + int(np.argmin(among)) % width] = True
    drop[0] = False
    return drop


def keys(ids: list[int], length: int) -> NDArray[np.float64]:
    """For every token a number in [0, 1) from the up to `length` tokens before it."""
    contexts = (np.array(ids[max(0, place - length) : place], dtype=np.int32).tobytes() for place in range(len(ids)))
    return np.array([int.from_bytes(hashlib.blake2b(context, digest_size=7).digest()) / 2**56 for context in contexts])


def mod_of(rate: float) -> int:
    """The window that gives the rate; found by measuring (--static)."""
    return {0.5: 2, 0.3333: 4, 0.25: 5, 0.2: 7}.get(round(rate, 4), round(1 / rate))


def train(
    scheme: str, rate: float, seed: int, epochs: int, tokenizer: Any, members: list[list[int]], heldout: list[list[int]]
) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(small_llama(tokenizer, 128))
    ids = torch.tensor(members)
    drop = np.zeros(ids.shape, dtype=bool)
    if scheme != "standard":
        drop = np.stack([dropped(scheme, rate, row) for row in members])
    labels = ids.masked_fill(torch.from_numpy(drop), -100)
    steps = epochs * -(-len(ids) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(ids)).split(BATCH):
            model(input_ids=ids[batch], labels=labels[batch]).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    result: dict[str, Any] = {"drop_rate": round(float(drop[:, 1:].mean()), 4), "longest_kept": longest_kept(drop)}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        paths = save_windows(Path(folder), (members, heldout), tokenizer)
        audit_halves(Path(folder), Path(folder, "audit"), paths, WINDOW, scheme)
        rows = records(Path(folder, "audit")).to_pylist()
    for split in paths:
        here = [record for record in rows if record["split"] == split]
        result[split] = {
            "exact_match": sum(record["exact_match"] for record in here),
            "rouge_l_ids": [round(record["rouge_l_ids"], 4) for record in here],
            "longest_run": [record["longest_run"] for record in here],
        }
    return result


def longest_kept(drop: NDArray[np.bool_]) -> int:
    """The longest run of kept targets between two dropped ones in a row of the array."""
    gaps = [np.diff(np.flatnonzero(row)) - 1 for row in drop]
    return int(max((gap.max() for gap in gaps if len(gap)), default=0))


def static_table(args: argparse.Namespace) -> str:
    """Rate, longest kept run, spans of 9 tokens without a dropped one, and drops that stay when 5% of tokens change."""
    texts = load_texts()
    members, heldout = split_windows(texts, byte_level_bpe(texts, VOCABULARY), args.documents, WINDOW, 0)
    lines = ["| scheme | rate wanted | drop rate | longest kept run | 9 tokens without a drop "
             "| drops held, 5% edited |", "|---" * 6 + "|"]  # fmt: skip
    draw = random.Random(0)
    for rate in args.rates:
        for scheme in args.schemes:
            drop, held = [], []
            for row in members + heldout:
                drop.append(dropped(scheme, rate, row))
                origin, edited = edit(row, draw)
                held.append(dropped(scheme, rate, edited)[[place >= 0 and drop[-1][place] for place in origin]])
            stacked = np.stack(drop)
            bare = [not row[i : i + 9].any() for row in stacked for i in range(1, WINDOW - 8)]
            lines.append(f"| {scheme} | {rate:.3f} | {stacked[:, 1:].mean():.3f} | {longest_kept(stacked)} "
                         f"| {statistics.fmean(bare):.3f} | {np.concatenate(held).mean():.2f} |")  # fmt: skip
    return "\n".join(lines)


def edit(row: list[int], draw: random.Random) -> tuple[list[int], list[int]]:
    """5% of the tokens are replaced, removed or followed by a new one; (place in row or -1, token) of what results."""
    pairs: list[tuple[int, int]] = []
    for place, token in enumerate(row):
        kind = draw.randrange(3) if draw.random() < 0.05 else None
        if kind is None or kind == 2:
            pairs.append((place, token))
        if kind in (0, 2):
            pairs.append((-1, draw.randrange(VOCABULARY)))
    return [place for place, _ in pairs], [token for _, token in pairs]


def table(results: list[dict[str, Any]]) -> str:
    """Means over windows and seeds; the difference from hash at equal rate and seed, with a t interval over windows."""
    lines = ["| rate wanted | scheme | seeds | drop rate | longest kept run | verbatim | ROUGE-L (seeds) | held-out "
             "| longest recited run | ROUGE-L - hash, paired [95% over windows] |", "|---" * 10 + "|"]  # fmt: skip
    for rate in dict.fromkeys(result["rate"] for result in results):
        for scheme in dict.fromkeys(result["scheme"] for result in results if result["rate"] == rate):
            group = [r for r in results if (r["rate"], r["scheme"]) == (rate, scheme)]
            base = {r["seed"]: r for r in results if (r["rate"], r["scheme"]) == (rate, "hash")}
            pairs = [(r["members"]["rouge_l_ids"], base[r["seed"]]["members"]["rouge_l_ids"])
                     for r in group if r["seed"] in base]  # fmt: skip
            paired = [a - b for mine, others in pairs for a, b in zip(mine, others, strict=True)]
            difference = ""
            if scheme != "hash" and len(paired) > 1:
                half = student.ppf(0.975, len(paired) - 1) * statistics.stdev(paired) / len(paired) ** 0.5
                centre = statistics.fmean(paired)
                difference = f"{centre:+.3f} [{centre - half:+.3f}, {centre + half:+.3f}]"
            means = [statistics.fmean(r["members"]["rouge_l_ids"]) for r in group]
            lines.append(
                f"| {rate:.3f} | {scheme} | {len(group)} | {statistics.fmean(r['drop_rate'] for r in group):.3f} "
                f"| {max(r['longest_kept'] for r in group)} | {sum(r['members']['exact_match'] for r in group)} of "
                f"{sum(r['documents'] for r in group)} | {', '.join(f'{value:.3f}' for value in means)} "
                f"| {statistics.fmean(v for r in group for v in r['heldout']['rouge_l_ids']):.3f} "
                f"| {statistics.fmean(v for r in group for v in r['members']['longest_run']):.1f} | {difference} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
