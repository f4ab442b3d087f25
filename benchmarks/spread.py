"""Evenly spread dropped tokens against the hash rule, at equal drop rates: what is recited?

    # resumes with what benchmarks/results/spread.jsonl lacks; 2 CPU minutes a training
    python benchmarks/spread.py
    # the table of the trainings so far
    python benchmarks/spread.py --table

The setting is that of recipes/memorize.py: 32 windows of 256 tokens of the Python language
reference, 100 epochs, a Llama of 1M parameters; then the second half of each window is asked for.

hash      with probability 1/k, from the 13 tokens before (the package's rule).
cap       as hash with max_kept = 1 / rate rounded up (4 for 0.33333333, 3 for 0.3333333333333333):
          with a lower rate q, and also after every max_kept kept tokens in a row.
even      every k-th position: moves with the passage, so no candidate, but the limit of even
          spacing.
standard  no token is dropped.
"""

import math
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from about import (
    RESULTS,
    Split,
    about,
    append,
    audited,
    byte_level_bpe,
    load_texts,
    markdown,
    mean_of,
    missing,
    parser,
    read_results,
    small_llama,
    split_windows,
)
from torch import Tensor
from transformers import LlamaForCausalLM, get_cosine_schedule_with_warmup

from goldfish import Goldfish

SCHEMES = ("hash", "cap", "even")
HEAD = (
    "rate wanted",
    "scheme",
    "seeds",
    "drop rate",
    "longest kept run",
    "verbatim",
    "ROUGE-L (seeds)",
    "held-out",
    "longest recited run",
    "ROUGE-L - hash, paired [95% over windows]",
)
WINDOW, BATCH, VOCABULARY = 256, 8, 2048


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--documents", type=int, default=32)
    options.add_argument("--epochs", type=int, default=100)
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument(
        "--rates", nargs="+", type=float, default=[1 / 4, 1 / 3, 1 / 5, 1 / 2]
    )
    options.add_argument(
        "--schemes", nargs="+", default=list(SCHEMES), choices=("standard", *SCHEMES)
    )
    options.add_argument("--results", type=Path, default=RESULTS / "spread.jsonl")
    options.add_argument(
        "--table", action="store_true", help="print the table of the results and stop"
    )
    args = options.parse_args(argv)
    names = ("seed", "rate", "scheme")
    rates = [round(rate, 4) for rate in args.rates]
    size = {"documents": args.documents, "epochs": args.epochs}
    wanted = [
        dict(zip(names, each, strict=True)) | size
        for each in product(args.seeds, rates, args.schemes)
    ]
    exact = dict(zip(rates, args.rates, strict=True))
    for run in [] if args.table else missing(args.results, wanted):
        texts = load_texts()
        tokenizer = byte_level_bpe(texts, VOCABULARY)
        windows = split_windows(texts, tokenizer, args.documents, WINDOW, run["seed"])
        began = time.process_time()
        rate = exact[run["rate"]]
        result = train(
            run["scheme"], rate, run["seed"], args.epochs, tokenizer, windows
        )
        result["cpu_seconds"] = round(time.process_time() - began)
        append(args.results, run | result | about())
        print(
            f"{run}: ROUGE-L {np.mean(result['members']['rouge_l_ids']):.3f}",
            flush=True,
        )
    print(table(read_results(args.results)))


def dropped(scheme: str, rate: float, ids: Tensor) -> Tensor:
    """Which tokens of documents are dropped, bool (N, T). The first never is."""
    drop = torch.zeros_like(ids, dtype=torch.bool)
    k = round(1 / rate)
    if scheme in ("hash", "cap"):
        drop = Goldfish(
            k=k, h=13, max_kept=math.ceil(1 / rate) if scheme == "cap" else None
        ).dropped(ids)
    elif scheme == "even":
        drop[:, ::k] = True
    drop[:, 0] = False
    return drop


def train(
    scheme: str, rate: float, seed: int, epochs: int, tokenizer: Any, windows: Split
) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(small_llama(tokenizer, 128))
    ids = torch.tensor(windows[0])
    drop = dropped(scheme, rate, ids)
    labels = ids.masked_fill(drop, -100)
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
    # Kept targets between two dropped ones.
    gaps = [np.diff(np.flatnonzero(row)) - 1 for row in drop.numpy()]
    result: dict[str, Any] = {
        "drop_rate": round(drop[:, 1:].double().mean().item(), 4),
        "longest_kept": int(max(np.concatenate(gaps), default=0)),
    }
    rows = audited(model, tokenizer, windows)
    for split in ("members", "heldout"):
        here = [record for record in rows if record["split"] == split]
        result[split] = {
            "exact_match": sum(record["exact_match"] for record in here),
            "rouge_l_ids": [round(record["rouge_l_ids"], 4) for record in here],
            "longest_run": [record["longest_run"] for record in here],
        }
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Means over windows and seeds.

    The last column is the difference from hash at equal rate and seed, with a t interval over
    windows.
    """
    rows = []
    for rate, scheme in dict.fromkeys((r["rate"], r["scheme"]) for r in results):
        group = [r for r in results if (r["rate"], r["scheme"]) == (rate, scheme)]
        base = {
            r["seed"]: r["members"]
            for r in results
            if (r["rate"], r["scheme"]) == (rate, "hash")
        }
        differences = [
            np.subtract(r["members"]["rouge_l_ids"], base[r["seed"]]["rouge_l_ids"])
            for r in group
            if r["seed"] in base and scheme != "hash"
        ]
        members = [r["members"] for r in group]
        exact = sum(each["exact_match"] for each in members)
        rouge = [f"{np.mean(each['rouge_l_ids']):.3f}" for each in members]
        rows.append(
            (
                f"{rate:.3f}",
                scheme,
                len(group),
                f"{np.mean([r['drop_rate'] for r in group]):.3f}",
                max(r["longest_kept"] for r in group),
                f"{exact} of {sum(r['documents'] for r in group)}",
                ", ".join(rouge),
                f"{np.mean([r['heldout']['rouge_l_ids'] for r in group]):.3f}",
                f"{np.mean([each['longest_run'] for each in members]):.1f}",
                mean_of(np.concatenate(differences), 3) if differences else "",
            )
        )
    return markdown(HEAD, rows)


if __name__ == "__main__":
    main()
