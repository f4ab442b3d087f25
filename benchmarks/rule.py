"""Does the rule drop one token in k, whatever h and the vocabulary? And what does it cost?

    python benchmarks/rule.py --text documents.jsonl
    # the tables of the last run, in Markdown
    python benchmarks/rule.py --render

The documents of a JSONL file with a `text` field, tokenized, one after the other in rows of 4096
tokens; the same for strategy "reference", the original's function. "hash" is given the documents'
starts. Times are medians of many calls, the cells in turn, so that whatever else the machine does
meets them all.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from about import RESULTS, about, byte_level_bpe, load_texts, markdown, parser
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from goldfish import Goldfish

# Vocabularies.
SIZES = (32_000, 131_072)
# k, h.
RULES = ((4, 13), (50, 50), (3, 13))
# h.
COSTS = (4, 13, 50)
RATES_HEAD = (
    "vocabulary",
    "k, h",
    "strategy",
    "dropped",
    "of distinct windows (sigmas from 1/k)",
    "windows with key 0",
    "tokens in runs of 200+ without a drop (by chance)",
)
COSTS_HEAD = (
    "strategy",
    "vocabulary",
    "h",
    "ms, median (quartiles)",
    "largest tensor, held at once",
)
LENGTH = 4096
# A run of this many tokens without a dropped one can be recited.
RUN = 200


def rows(documents: list[list[int]]) -> tuple[Tensor, Tensor]:
    """All documents in a row, and each token's place in its own; both int64 (N, 4096).

    What does not fill a last row is left out.
    """
    ids = np.concatenate([np.array(d, dtype=np.int64) for d in documents])
    positions = np.concatenate([np.arange(len(d)) for d in documents])
    whole = len(ids) // LENGTH * LENGTH
    ids, positions = (
        ids[:whole].reshape(-1, LENGTH),
        positions[:whole].reshape(-1, LENGTH),
    )
    return torch.from_numpy(ids), torch.from_numpy(positions)


def products(ids: Tensor, h: int) -> Tensor:
    """Of the last h tokens, from token h on, int64 (N, T - h): the key of "reference"."""
    return ids[:, 1:].unfold(-1, h, 1).prod(-1)


def in_long_runs(dropped: np.ndarray) -> int:
    """How many tokens are in runs of at least RUN tokens without a dropped one."""
    runs = np.diff(np.flatnonzero(np.concatenate(([True], dropped, [True])))) - 1
    return int(runs[runs >= RUN].sum())


def law(k: float) -> float:
    """The share of tokens in such runs if tokens are dropped independently, with probability 1/k.

    A run of exactly n kept tokens between two dropped ones starts at a token with probability
    q^n / k^2, where q = 1 - 1/k. The sum of n q^n / k^2 over n >= RUN is what is returned.
    """
    q = 1 - 1 / k
    return q**RUN * (RUN + k - 1) / k


def measure(
    ids: Tensor, positions: Tensor, k: float, h: int, seed: int
) -> Iterator[dict[str, Any]]:
    """The figures of "hash" and "reference" for one rule and one vocabulary."""
    chunks = list(zip(ids.split(64), positions.split(64), strict=True))
    for strategy in ("hash", "reference"):
        rule = Goldfish(k=k, h=h, seed=seed, strategy=strategy)
        pairs = [
            rule.drops_and_keys(i, p if strategy == "hash" else None) for i, p in chunks
        ]
        dropped, windows = (
            torch.cat(parts).numpy() for parts in zip(*pairs, strict=True)
        )
        # Only tokens with a whole window are counted.
        decided = np.zeros(dropped.shape, dtype=bool)
        decided[:, h:] = True
        zero = None
        if strategy == "hash":
            # The window is the h tokens before a token, in its document.
            decided &= positions.numpy() >= h
        else:
            # The window is the last h tokens: those before the next token.
            windows = np.roll(windows, -1, axis=1)
            decided[:, -1] = False
            zero = float(
                (torch.cat([products(i, h) for i, _ in chunks]) == 0).double().mean()
            )
        distinct, places = np.unique(windows[decided], return_index=True)
        n = len(distinct)
        rate = float(dropped[decided][places].mean())
        yield {
            "k": k,
            "h": h,
            "strategy": strategy,
            "tokens": ids.numel(),
            "drop_rate": float(dropped.mean()),
            "distinct_windows": n,
            "distinct_rate": rate,
            "sigmas": (rate - 1 / k) / (1 / k * (1 - 1 / k) / n) ** 0.5,
            "zero_products": zero,
            "in_long_runs": in_long_runs(dropped.reshape(-1)) / ids.numel(),
            "in_long_runs_law": law(k),
        }


def allocations(rule: Goldfish, ids: Tensor) -> tuple[float, float]:
    """The largest tensor of one call, and the most at a time, in multiples of the ids' bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        rule.dropped(ids)
    events = [
        event
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    sizes = [
        event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())
    ]
    own = ids.numel() * ids.element_size()
    return max(sizes) / own, float(np.cumsum(sizes).max()) / own


def costs(
    bound: dict[str, Goldfish], rows: dict[str, Tensor], seed: int, repeats: int
) -> list[dict[str, Any]]:
    """Milliseconds of one call for 8 rows of 4096 tokens, all cells in turn."""
    cells, calls = [], []
    for name, strategy, h in product(rows, ("hash", "letters", "reference"), COSTS):
        cells.append({"vocabulary": name, "strategy": strategy, "h": h})
        rule = Goldfish(
            k=4, h=h, seed=seed, strategy=strategy, vocabulary=bound[name].vocabulary
        )
        calls.append((rule, rows[name][:8].clone()))
    times: list[list[float]] = [[] for _ in cells]
    for turn in range(repeats + 3):
        for taken, (rule, ids) in zip(times, calls, strict=True):
            begin = time.perf_counter()
            rule.dropped(ids)
            # The first calls make tables and warm caches.
            if turn >= 3:
                taken.append(1e3 * (time.perf_counter() - begin))
    for cell, taken, (rule, ids) in zip(cells, times, calls, strict=True):
        low, median, high = statistics.quantiles(taken, n=4)
        largest, held = allocations(rule, ids)
        cell |= {
            "tokens": ids.numel(),
            "least_ms": min(taken),
            "quartile_ms": low,
            "median_ms": median,
            "third_quartile_ms": high,
            "largest_tensor": largest,
            "held_at_once": held,
        }
    return cells


def render(result: dict[str, Any]) -> str:
    """Two tables in Markdown."""
    rates = [
        (
            r["vocabulary"],
            f"{r['k']}, {r['h']}",
            r["strategy"],
            f"{r['drop_rate']:.4f}",
            f"{r['distinct_rate']:.4f} ({r['sigmas']:+.1f})",
            "" if r["zero_products"] is None else f"{r['zero_products']:.1%}",
            f"{r['in_long_runs']:.1%} ({r['in_long_runs_law']:.1%})",
        )
        for r in result["rates"]
    ]
    costs = [
        (
            c["strategy"],
            c["vocabulary"],
            c["h"],
            f"{c['median_ms']:.2f} ({c['quartile_ms']:.2f}-{c['third_quartile_ms']:.2f})",
            f"{c['largest_tensor']:.1f}x, {c['held_at_once']:.1f}x the ids",
        )
        for c in result["costs"]
    ]
    return f"{markdown(RATES_HEAD, rates)}\n\n8 x 4096 tokens\n\n{markdown(COSTS_HEAD, costs)}"


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--text", help="a JSONL file with a `text` field")
    options.add_argument("--documents", type=int, help="only so many of them")
    options.add_argument("--seed", type=int, default=0, help="of the rules")
    options.add_argument(
        "--repeats", type=int, default=101, help="calls that are timed"
    )
    options.add_argument("--output", type=Path, default=RESULTS / "rule.json")
    options.add_argument(
        "--render", action="store_true", help="print the tables and stop"
    )
    args = options.parse_args(argv)
    if args.render:
        print(render(json.loads(args.output.read_text(encoding="utf-8"))))
        return
    if args.text is None:
        options.error("--text or --render is needed")
    torch.set_num_threads(1)
    texts = load_texts(args.text)[: args.documents]
    result, rates, bound, ids = about("tokenizers"), [], {}, {}
    for size in SIZES:
        tokenizer = byte_level_bpe(texts, size).backend_tokenizer
        # Fewer than asked for, if the text has no more pairs to merge.
        name = f"{tokenizer.get_vocab_size():,} entries"
        documents = [
            encoding.ids
            for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]
        ids[name], positions = rows(documents)
        bound[name] = Goldfish(strategy="letters").bind(tokenizer)
        print(f"{name}: {ids[name].numel():,} tokens", file=sys.stderr, flush=True)
        for k, h in RULES:
            rates += [
                {"vocabulary": name, **r}
                for r in measure(ids[name], positions, k, h, args.seed)
            ]
            print(f"  k={k} h={h}", file=sys.stderr, flush=True)
    result |= {
        "documents": len(texts),
        "seed": args.seed,
        "repeats": args.repeats,
        "rates": rates,
        "costs": costs(bound, ids, args.seed, args.repeats),
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(render(result))


if __name__ == "__main__":
    main()
