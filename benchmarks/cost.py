"""What the goldfish loss costs: held-out loss against the standard loss.

    # resumes with what benchmarks/results/cost.jsonl lacks
    python benchmarks/cost.py --text documents.jsonl
    # the table of the runs so far; no training
    python benchmarks/cost.py --table

A small Llama reads its training documents once, row by row; no token is read twice. All runs of a
seed start from the same weights and read the same rows in the same order, whatever their rule. The
learning rate is constant after the warm-up and an average of the weights (EMA) is evaluated, so
every point of a run is a finished training of its length: with a decaying rate the points of one
run could not be compared with the ends of others.

The standard run ends after --targets targets. A goldfish run is evaluated twice: when it has read
as many targets (equal input), and when it has kept as many (equal supervised; it has then read
k / (k - 1) times the rows). So at equal supervised tokens goldfish has read more text, as in the
paper: the claim is about what the dropped tokens cost. It has then also taken more optimiser steps,
which early in training is worth more than the targets. So there is a third comparison, with `--wide
RULES`: each optimiser step takes as many rows as have the kept targets of a standard step, so
supervised tokens and steps are equal.

What this can detect, written down before the runs. The held-out set is 56 documents of 7,500
tokens. With a standard deviation of 0.05 nats between the documents' paired differences, the
interval of one pair of runs is +-0.013 nats, as far as the choice of documents goes. Runs also
differ by chance: with a standard deviation of 0.01 nats between the seeds' differences, the t
interval of three seeds is +-0.025 nats, and of two seeds +-0.09. The prediction that can fail: a
dropped token costs its own gradient and nothing else, so goldfish at equal input equals the
standard run after (1 - drop rate) of the targets (the column "predicted", from the same seed's
standard run), and goldfish at equal supervised tokens, with as many steps or more, differs by 0.
"""

import argparse
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from about import (
    RESULTS,
    about,
    append,
    byte_level_bpe,
    cut,
    heldout,
    load_texts,
    markdown,
    mean_of,
    missing,
    paired,
    parser,
    read_results,
    rule_of,
    small_llama,
)
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import LlamaConfig, LlamaForCausalLM

from goldfish import Goldfish, mask_labels

RULES = ("standard", "hash-4-13", "hash-3-13", "hash-8-13", "letters-4-8")
# Behind the name of a rule.
WIDE = " wide"
HEAD = (
    "rule",
    "at equal",
    "drop rate",
    "goldfish - standard: each seed [95% over documents]",
    "predicted",
    "mean [95% over seeds]",
    "on tokens that the rule would drop",
)
# Tokens a row, and rows an optimiser step.
ROW, BATCH = 256, 8
RATE, WARMUP, EMA = 2e-3, 100, 0.99
# Optimiser steps between two checkpoints.
SAVE = 200


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    options = parser(__doc__)
    options.add_argument(
        "--text", help="training and held-out documents: .jsonl with a `text` field"
    )
    options.add_argument(
        "--targets", type=int, default=3_000_000, help="targets of the standard run"
    )
    options.add_argument(
        "--hidden", type=int, default=128, help="hidden size: 128 is 1.0M parameters"
    )
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--vocabulary", type=int, default=2048)
    options.add_argument(
        "--heldout", type=int, default=420_000, help="held-out tokens, at least"
    )
    options.add_argument("--rules", nargs="+", default=list(RULES))
    options.add_argument(
        "--wide",
        nargs="*",
        default=[],
        help="rules to train with as many kept targets a step, too",
    )
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--results", type=Path, default=RESULTS / "cost.jsonl")
    options.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/cost"),
        help="checkpoints of the run in progress",
    )
    options.add_argument(
        "--table", action="store_true", help="print the table of the results and stop"
    )
    args = options.parse_args(argv)
    size = {
        name: getattr(args, name)
        for name in ("targets", "hidden", "layers", "vocabulary", "heldout")
    }
    if not args.table:
        if args.text is None:
            options.error(
                "--text is needed to train: a .jsonl file with a `text` field"
            )
        data = load(args)
        names = [*args.rules, *(name + WIDE for name in args.wide)]
        rules = {name: bound_rule(name, data.tokenizer) for name in names}
        dropped = {
            name.removesuffix(WIDE): rule.dropped(data.heldout)
            for name, rule in rules.items()
            if rule
        }
        print(
            f"{len(data.rows) * (ROW - 1):,} targets to train on; held out: "
            f"{data.owners.max() + 1} documents, {data.heldout.numel():,} tokens",
            flush=True,
        )
        wanted = [
            {"seed": seed, "rule": name, "size": size}
            for seed in args.seeds
            for name in names
        ]
        for wish in missing(args.results, wanted):
            run = Run(
                args, wish["seed"], wish["rule"], rules[wish["rule"]], data, dropped
            )
            append(args.results, wish | run.train() | about())
    results = [run for run in read_results(args.results) if run["size"] == size]
    print(table(results))
    return results


class Data(NamedTuple):
    tokenizer: Any
    # To train on, int64 (N, ROW).
    rows: Tensor
    # Int64 (M, ROW).
    heldout: Tensor
    # Int64 (M,), the held-out document of each row.
    owners: Tensor


def load(args: argparse.Namespace) -> Data:
    """The split and the tokenizer (which reads all documents) are the same for every seed.

    A row lies within one document; what is left at a document's end is left out.
    """
    texts = load_texts(args.text)
    random.Random(0).shuffle(texts)
    tokenizer = byte_level_bpe(texts, args.vocabulary, end=None)
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    documents = [document for each in encoded if (document := cut(each.ids, ROW))]
    # The first documents are held out, as many as have the wanted number of tokens.
    last = next(
        n
        for n in range(len(documents))
        if sum(map(len, documents[:n])) * ROW >= args.heldout
    )
    owners = [
        number for number, document in enumerate(documents[:last]) for _ in document
    ]
    rows = torch.tensor([row for document in documents[last:] for row in document])
    heldout = torch.tensor([row for document in documents[:last] for row in document])
    return Data(tokenizer, rows, heldout, torch.tensor(owners))


def share_of(name: str) -> float:
    """The share of tokens that a rule drops: 1 / k."""
    return 1 / float(name.removesuffix(WIDE).split("-")[1])


def bound_rule(name: str, tokenizer: Any) -> Goldfish | None:
    rule = rule_of(name.removesuffix(WIDE))
    return rule.bind(tokenizer) if rule else None


def model_config(args: argparse.Namespace, tokenizer: Any) -> LlamaConfig:
    return small_llama(
        tokenizer,
        args.hidden,
        ROW,
        intermediate_size=args.hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
    )


class Run:
    """One training, from its last checkpoint if there is one.

    It is evaluated at every point at which it is compared. `dropped`: which held-out tokens each
    rule would drop, bool (M, ROW).
    """

    def __init__(
        self,
        args: argparse.Namespace,
        seed: int,
        name: str,
        rule: Goldfish | None,
        data: Data,
        dropped: dict[str, Tensor],
    ) -> None:
        torch.manual_seed(seed)
        self.args, self.seed, self.name, self.rule, self.data = (
            args,
            seed,
            name,
            rule,
            data,
        )
        self.wide = name.endswith(WIDE)
        self.model = LlamaForCausalLM(model_config(args, data.tokenizer))
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(EMA))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1
        )
        order = torch.Generator().manual_seed(seed)
        self.order = torch.randperm(len(data.rows), generator=order)
        own = name.removesuffix(WIDE)
        self.dropped = dropped if rule is None else {own: dropped[own]}
        self.state: dict[str, Any] = {
            "step": 0,
            "row": 0,
            "read": 0,
            "kept": 0,
            "cpu": 0.0,
            "points": [],
        }
        self.path = (
            args.folder / f"{name.replace(' ', '-')}-seed{seed}-{args.hidden}.pt"
        )
        self.began = time.process_time()

    def points(self) -> list[tuple[str, int]]:
        """What is counted, and how many, at each evaluation."""
        targets = self.args.targets
        if self.rule is None:
            # Also at the shares that goldfish runs keep, for the column "predicted".
            shares = {1 - share_of(other) for other in self.dropped}
            return [
                ("read", round(share * targets)) for share in sorted({*shares, 1.0})
            ]
        return (
            [("kept", targets)] if self.wide else [("read", targets), ("kept", targets)]
        )

    def train(self) -> dict[str, Any]:
        points, state = self.points(), self.state
        self.resume()
        while len(state["points"]) < len(points):
            self.step()
            counted, targets = points[len(state["points"])]
            if state[counted] >= targets:
                self.evaluate(counted, targets)
            if state["step"] % SAVE == 0:
                self.save()
        self.path.unlink(missing_ok=True)
        return {
            "parameters": sum(weight.numel() for weight in self.model.parameters()),
            "cpu_seconds": round(time.process_time() - self.began),
            "points": state["points"],
        }

    def parts(self) -> dict[str, Any]:
        parts = (self.model, self.average, self.optimizer)
        return {type(part).__name__: part for part in parts}

    def resume(self) -> None:
        if self.path.is_file():
            saved = torch.load(self.path)
            for name, part in self.parts().items():
                part.load_state_dict(saved[name])
            self.state.update(saved["state"])
        self.began = time.process_time() - self.state["cpu"]

    def save(self) -> None:
        self.args.folder.mkdir(parents=True, exist_ok=True)
        parts = {name: part.state_dict() for name, part in self.parts().items()}
        torch.save({"state": self.state, **parts}, self.path)

    def batch(self) -> tuple[Tensor, Tensor]:
        """The next rows and their labels, int64 (B, ROW)."""
        row, order = self.state["row"], self.order
        if row + BATCH > len(order):
            targets = len(order) * (ROW - 1)
            raise ValueError(
                f"{self.args.text} has {targets:,} targets: too few; lower --targets"
            )
        if not self.wide:
            rows = self.data.rows[order[row : row + BATCH]]
            return rows, mask_labels(self.rule, rows)
        rows = self.data.rows[order[row : row + 2 * BATCH]]
        labels = mask_labels(self.rule, rows)
        # Up to the row after which the kept targets of all steps are nearest to those of a
        # standard run.
        missing = (self.state["step"] + 1) * BATCH * (ROW - 1) - self.state["kept"]
        kept = (labels[:, 1:] != -100).sum(1).cumsum(0)
        wanted = int((kept - missing).abs().argmin()) + 1
        return rows[:wanted], labels[:wanted]

    def step(self) -> None:
        state = self.state
        rows, labels = self.batch()
        kept = int((labels[:, 1:] != -100).sum())
        self.model(
            input_ids=rows, labels=labels, num_items_in_batch=kept
        ).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.param_groups[0]["lr"] = RATE * min(
            1.0, (state["step"] + 1) / WARMUP
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update_parameters(self.model)
        state["step"] += 1
        state["row"] += len(rows)
        state["read"] += labels[:, 1:].numel()
        state["kept"] += kept
        state["cpu"] = time.process_time() - self.began

    def evaluate(self, counted: str, targets: int) -> None:
        state = self.state
        point = {"counted": counted, "share": round(targets / self.args.targets, 4)}
        point |= {key: state[key] for key in ("read", "kept", "step")}
        nll, losses = heldout(self.average.module, self.data.heldout, self.data.owners)
        point |= losses
        # On the tokens alone that a rule would drop.
        point["dropped_loss"] = {
            other: nll[dropped[:, 1:]].mean().item()
            for other, dropped in self.dropped.items()
        }
        state["points"].append(point)
        print(
            f"seed {self.seed} {self.name} {counted} {state[counted]:,}: {point['loss']:.4f} nats "
            f"per token, {state['cpu']:.0f} CPU s",
            flush=True,
        )


def table(results: list[dict[str, Any]]) -> str:
    """Goldfish - standard, nats per token: of each seed with its interval, and over the seeds."""
    runs = {(run["rule"], run["seed"]): run["points"] for run in results}
    pairs = [(rule, seed) for rule, seed in runs if ("standard", seed) in runs]
    rows = []
    for name in sorted({rule for rule, _ in pairs if rule != "standard"}):
        seeds = [seed for rule, seed in pairs if rule == name]
        labels = (
            ("supervised, steps",) if name.endswith(WIDE) else ("input", "supervised")
        )
        for number, label in enumerate(labels):
            points = [
                (runs[name, seed][number], runs["standard", seed]) for seed in seeds
            ]
            rows.append((name, label, *cells(name, label, points)))
    return markdown(HEAD, rows)


def cells(
    name: str, label: str, points: list[tuple[dict[str, Any], Any]]
) -> tuple[str, ...]:
    """The figures of one rule; `points`: its point of each seed, and all of the standard run."""
    own, share = name.removesuffix(WIDE), 1 - share_of(name)
    rates, intervals, differences, predicted, dropped = [], [], [], [], []
    for point, standard in points:
        last = standard[-1]
        rates.append(1 - point["kept"] / point["read"])
        intervals.append(paired([point], [last]))
        differences.append(point["loss"] - last["loss"])
        if label != "input":
            predicted.append(0.0)
        # A standard run made beside other rules was evaluated at their shares and tokens only.
        earlier = [other for other in standard if abs(other["share"] - share) < 0.001]
        if label == "input":
            predicted += [other["loss"] - last["loss"] for other in earlier]
        if own in last["dropped_loss"]:
            dropped.append(point["dropped_loss"][own] - last["dropped_loss"][own])
    averages = [
        f"{np.mean(each):+.4f}" if each else "" for each in (predicted, dropped)
    ]
    mean = mean_of(differences, 4)
    return f"{np.mean(rates):.3f}", ", ".join(intervals), averages[0], mean, averages[1]


if __name__ == "__main__":
    main()
