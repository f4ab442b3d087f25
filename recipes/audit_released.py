"""Audit the checkpoints that the goldfish paper's authors released, and print our figures beside the published ones.

    python recipes/audit_released.py                              # network, one GPU: 7 models of 1.1B parameters
    python recipes/audit_released.py --samples 100 --models standard k=4
    python recipes/audit_released.py --root FOLDER                # FOLDER/4-goldfish-loss-llama-1B, ... on disk
    python recipes/audit_released.py --heldout slimpajama.jsonl   # also the loss on text that none of them repeated

Models tomg-group-umd/{3,4,8,32,128}-goldfish-loss-llama-1B, standard-loss-llama-1B and control-llama-1B (20B tokens of
RedPajama; all but the control also read 2000 Wikipedia texts 50 times, tomg-group-umd/wikipedia-en-2k-samples). The
published figures are an independent measurement: TokenSwap (Prashant et al., arXiv:2502.05159), table 4. We do not know
its prompt and continuation lengths, so the order and the distances of the models should agree, not the digits.
Matching length is the mean number of tokens before the first that differs; ROUGE-L here is over lower-case words,
Levenshtein over characters of the decoded texts, as a share of the longer. We have only run this on stand-ins.
"""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import pandas
import runs
from datasets import load_dataset
from rapidfuzz.distance import Levenshtein
from transformers import HfArgumentParser

from goldfish.audit import audit, records
from goldfish.audit.columns import rouge_l

MODELS = {
    "standard": "standard-loss-llama-1B",
    "control": "control-llama-1B",
    **{f"k={k}": f"{k}-goldfish-loss-llama-1B" for k in (3, 4, 8, 32, 128)},
}
DATA = "wikipedia-en-2k-samples"
MEASURES = ("matching length", "exact match", "ROUGE-L", "Levenshtein", "held-out nats")
PUBLISHED = {
    "standard": (73.9, 0.078, 0.38, 0.58, 3.44),
    "k=3": (12.7, 0.0, 0.23, 0.72, 3.54),
    "k=4": (14.7, 0.0, 0.23, 0.71, 3.50),
    "k=32": (58.1, 0.025, 0.35, 0.60, 3.44),
}


@dataclass
class Arguments:
    root: str = field(default="tomg-group-umd", metadata={"help": "owner of the checkpoints on the hub, or a folder"})
    models: list[str] = field(default_factory=lambda: list(MODELS))
    samples: int = field(default=2000, metadata={"help": "texts to ask for"})
    prefix_length: int = field(default=100, metadata={"help": "tokens given"})
    suffix_length: int = field(default=200, metadata={"help": "tokens to recite"})
    heldout: str | None = field(default=None, metadata={"help": ".jsonl or .txt that no model repeated"})
    output_dir: str = "runs/released"

    def __post_init__(self) -> None:
        if unknown := set(self.models) - set(MODELS):
            raise ValueError(f"--models are {', '.join(MODELS)}; got {', '.join(sorted(unknown))}")
        runs.at_least(1, self, "samples")


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    output = Path(args.output_dir)
    rows = load_rows(f"{args.root}/{DATA}", args.samples)
    runs.begin(output, args)
    members = output / "members.jsonl"
    members.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = {result["model"] for result in runs.read_results(output / "results.jsonl")}
    for name in args.models:
        if name in done:
            continue
        folder = output / name.replace("=", "")
        summary = audit(
            f"{args.root}/{MODELS[name]}", folder, members=members, heldout=args.heldout, name=name,
            prefix_length=args.prefix_length, suffix_length=args.suffix_length,
        )  # fmt: skip
        result = {"model": name, "n": summary["splits"]["members"]["n"]}
        result |= measure(records(folder).to_pylist(), summary)
        runs.append(output / "results.jsonl", result | {"protocol": summary["protocol"]} | runs.about())
    results = runs.read_results(output / "results.jsonl")
    print(f"\n{table(results)}\nin brackets: TokenSwap, table 4")
    return results


def load_rows(dataset: str, samples: int) -> list[dict[str, Any]]:
    """The first rows of the dataset's only split, reduced to the column that the audit reads."""
    splits = load_dataset(dataset)
    split = next(iter(splits.values()))
    column = next((name for name in ("text", "input_ids") if name in split.column_names), None)
    if column is None:
        raise ValueError(f"{dataset} has the columns {', '.join(split.column_names)}; expected text or input_ids")
    return [{column: row[column]} for row in split.select(range(min(samples, len(split))))]


def measure(rows: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, float | None]:
    """The five published measures of one audit; held-out None without a held-out file."""
    members = [record for record in rows if record["split"] == "members"]
    pairs = [("".join(record["output_tokens"]), "".join(record["suffix_tokens"])) for record in members]
    heldout = summary["splits"].get("heldout")
    return {
        "matching length": statistics.fmean(record["first_divergence"] for record in members),
        "exact match": statistics.fmean(record["exact_match"] for record in members),
        "ROUGE-L": statistics.fmean(rouge_l(common.words(ours), common.words(true)) for ours, true in pairs),
        "Levenshtein": statistics.fmean(Levenshtein.normalized_distance(ours, true) for ours, true in pairs),
        "held-out nats": heldout["nll"].value if heldout else None,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Our figures, and below each model the published ones in brackets."""
    rows = []
    for result in results:
        ours = ("-" if result[name] is None else f"{result[name]:.3f}" for name in MEASURES)
        rows.append((result["model"], result["n"], *ours))
        if result["model"] in PUBLISHED:
            rows.append(("", "", *(f"({value:g})" for value in PUBLISHED[result["model"]])))
    return str(pandas.DataFrame(rows, columns=["model", "n", *MEASURES]).to_string(index=False))


if __name__ == "__main__":
    runs.command_line(main)
