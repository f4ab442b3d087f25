"""Does the gauge show memorization? The gap beside what is recited, during a training.

    python benchmarks/gauge.py              # resumes benchmarks/results/gauge.jsonl; minutes of CPU
    python benchmarks/gauge.py --table      # the table of the trainings so far

The setting is that of recipes/memorize.py: 32 windows of 256 tokens of the Python language
reference, 100 epochs, a Llama of 1.1M parameters. After some of the epochs, every window is asked
for: its first half is given, the second is continued greedily. `goldfish/gap` is what the trainer
logs there, in nats per token, measured on a few rows of the last batch. The gap of all windows,
trained on and held out, is computed here by other code. The standard loss has no gauge; its gap is
that of the tokens that the first rule of the same seed would drop.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from about import (
    RESULTS,
    about,
    append,
    byte_level_bpe,
    load_texts,
    make_trainer,
    markdown,
    missing,
    parser,
    read_results,
    rule_of,
    small_llama,
    split_windows,
    training_settings,
)
from rapidfuzz.distance import LCSseq
from torch import Tensor
from transformers import LlamaForCausalLM, TrainerCallback, set_seed

from goldfish import Goldfish

RULES = ("hash-4-13-4", "hash-32-13", "standard")
POINTS = (5, 10, 20, 30, 50, 100)
DOCUMENTS, WINDOW, EPOCHS, BATCH = 32, 256, 100, 8
HEAD = (
    "training",
    "epoch",
    "`goldfish/gap` (seeds)",
    "gap: trained on",
    "gap: held-out",
    "recited (seeds)",
    "ROUGE-L: trained on",
    "ROUGE-L: held-out",
)


@torch.no_grad()
def gap(model: Any, ids: Tensor, dropped: Tensor) -> float:
    """Mean loss of dropped targets minus that of kept ones, nats per token.

    ids: int64 (N, T); dropped: bool (N, T), True where a token has no loss in training.
    """
    logits = model(input_ids=ids).logits[:, :-1].float()
    nll = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), ids[:, 1:], reduction="none"
    )
    return (nll[dropped[:, 1:]].mean() - nll[~dropped[:, 1:]].mean()).item()


@torch.no_grad()
def recite(model: Any, ids: Tensor) -> dict[str, Any]:
    """How many second halves are continued verbatim from the first, and their mean ROUGE-L."""
    half = ids.shape[1] // 2
    given = ids[:, :half]
    output = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        do_sample=False,
        max_new_tokens=ids.shape[1] - half,
        # An end-of-text token does not end the continuation.
        eos_token_id=None,
        pad_token_id=0,
    )
    pairs = list(zip(output[:, half:].tolist(), ids[:, half:].tolist(), strict=True))
    # Both sides have one length, so precision, recall and F1 of ROUGE-L are the same number.
    rouge = [LCSseq.normalized_similarity(*pair) for pair in pairs]
    return {
        "exact_match": sum(ours == true for ours, true in pairs),
        "rouge_l": np.mean(rouge),
    }


@dataclass
class Watch(TrainerCallback):
    """Ask the model at the logs of some epochs, and note what the trainer logged."""

    windows: dict[str, Tensor]
    rule: Goldfish
    points: list[dict[str, Any]] = field(default_factory=list)

    def on_log(self, args, state, control, logs, model, **kwargs):  # type: ignore[no-untyped-def]
        epoch = round(state.epoch)
        if epoch not in POINTS or "loss" not in logs:
            return
        model.eval()
        point = {"epoch": epoch, "logged_gap": logs.get("goldfish/gap")}
        for split, ids in self.windows.items():
            ids = ids.to(model.device)
            point[split] = {
                "gap": gap(model, ids, self.rule.dropped(ids)),
                **recite(model, ids),
            }
        model.train()
        self.points.append(point)
        print(f"  epoch {epoch}: {point}", flush=True)


def train(rule_name: str, seed: int) -> dict[str, Any]:
    """One training; its figures at each of the points."""
    texts = load_texts()
    tokenizer = byte_level_bpe(texts, 2048)
    members, heldout = split_windows(texts, tokenizer, DOCUMENTS, WINDOW, seed)
    rule = rule_of(rule_name, seed)
    watched = rule or rule_of(RULES[0], seed)
    assert watched is not None
    set_seed(seed)
    model = LlamaForCausalLM(small_llama(tokenizer, 128))
    settings = training_settings(
        Path("runs/gauge"),
        len(members),
        epochs=EPOCHS,
        batch_size=BATCH,
        learning_rate=2e-3,
        seed=seed,
    )
    # Every fifth epoch, so that the gauge reads a few rows each time (1% of the time between).
    settings["logging_steps"] = 5 * DOCUMENTS // BATCH
    trainer = make_trainer(model, settings, members, tokenizer, rule)
    windows = {"members": torch.tensor(members), "heldout": torch.tensor(heldout)}
    watch = Watch(windows, watched)
    trainer.add_callback(watch)
    trainer.train()
    return {"points": watch.points}


def table(results: list[dict[str, Any]]) -> str:
    """In Markdown: counts and logged gaps of each seed; the other figures are means over seeds."""
    rows = []
    for name in dict.fromkeys(result["rule"] for result in results):
        group = [result["points"] for result in results if result["rule"] == name]
        for points in zip(*group, strict=True):
            logged = [point["logged_gap"] for point in points]
            figures = [
                f"{np.mean([point[split][figure] for point in points]):.2f}"
                for figure in ("gap", "rouge_l")
                for split in ("members", "heldout")
            ]
            recited = ", ".join(
                str(point["members"]["exact_match"]) for point in points
            )
            rows.append(
                (
                    name,
                    points[0]["epoch"],
                    ""
                    if None in logged
                    else ", ".join(f"{value:.2f}" for value in logged),
                    *figures[:2],
                    f"{recited} of {DOCUMENTS}",
                    *figures[2:],
                )
            )
    return markdown(HEAD, rows)


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--rules", nargs="+", default=list(RULES))
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--results", type=Path, default=RESULTS / "gauge.jsonl")
    options.add_argument(
        "--table", action="store_true", help="print the table and stop"
    )
    args = options.parse_args(argv)
    if not args.table:
        wanted = [
            {"seed": seed, "rule": rule} for seed in args.seeds for rule in args.rules
        ]
        for run in missing(args.results, wanted):
            print(f"seed {run['seed']}, {run['rule']}", flush=True)
            append(args.results, run | train(run["rule"], run["seed"]) | about())
    print(table(read_results(args.results)))


if __name__ == "__main__":
    main()
