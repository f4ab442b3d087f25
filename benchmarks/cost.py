"""What the goldfish loss costs: held-out loss against the standard loss, at equal input and at equal supervised tokens.

    python benchmarks/cost.py --text documents.jsonl             # goes on with what benchmarks/results/cost.jsonl lacks
    python benchmarks/cost.py --table                            # the table of the runs so far; no training

A small Llama reads its training documents once, row by row; no token is read twice. All runs of a seed start from the
same weights and read the same rows in the same order, whatever their rule. The learning rate is constant after the
warm-up and an average of the weights (EMA) is evaluated, so every point of a run is a finished training of its length:
with a decaying rate the points of one run could not be compared with the ends of others.

The standard run ends after --targets targets. A goldfish run is evaluated twice: when it has read as many targets
(equal input), and when it has kept as many (equal supervised; it has then read k / (k - 1) times the rows). So at equal
supervised tokens goldfish has read more text, as in the paper: the claim is about what the dropped tokens cost. It has
then also taken more optimiser steps, which early in training is worth more than the targets. So there is a third
comparison, with `--wide RULES`: each optimiser step takes as many rows as hold the kept targets of a standard step, so
supervised tokens and steps are equal.

What would have been seen, said before the runs. The held-out set is 56 documents of 7,500 tokens. With a standard
deviation of 0.05 nats between the documents' paired differences, the interval of one pair of runs is +-0.013 nats, as
far as the choice of documents goes. Runs also differ by chance: with a standard deviation of 0.01 nats between the
seeds' differences, the t interval of three seeds is +-0.025 nats, and of two seeds +-0.09. The prediction that can
fail: a dropped token costs its own gradient and nothing else, so goldfish at equal input equals the standard run after
(1 - drop rate) of the targets (the column "predicted", from the same seed's standard run), and goldfish at equal
supervised tokens, with as many steps or more, differs by 0.
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
    heldout,
    load_texts,
    markdown,
    mean_of,
    paired,
    read_results,
    rule_of,
    small_llama,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from goldfish import Goldfish, mask_labels

RULES = ("standard", "hash-4-13", "hash-3-13", "hash-8-13", "letters-4-8")  # strategy-k-h
WIDE = " wide"  # behind the name of a rule
HEAD = (
    "rule",
    "at equal",
    "drop rate",
    "goldfish - standard: each seed [95% over documents]",
    "predicted",
    "mean [95% over seeds]",
    "on tokens that the rule would drop",
)
ROW, BATCH = 256, 8  # tokens, rows an optimiser step
RATE, WARMUP, EMA = 2e-3, 100, 0.99


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--text", help="training and held-out documents: .jsonl with a `text` field"
    )
    parser.add_argument(
        "--targets", type=int, default=3_000_000, help="targets of the standard run"
    )
    parser.add_argument(
        "--hidden", type=int, default=128, help="hidden size: 128 is 1.0M parameters"
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--heldout", type=int, default=420_000, help="held-out tokens, at least")
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    parser.add_argument(
        "--wide", nargs="*", default=[], help="rules to train with as many kept targets a step, too"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS / "cost.jsonl")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/cost"), help="checkpoints of the run in progress"
    )
    parser.add_argument(
        "--table", action="store_true", help="print the table of the results and stop"
    )
    args = parser.parse_args(argv)
    size = {
        name: getattr(args, name)
        for name in ("targets", "hidden", "layers", "vocabulary", "heldout")
    }
    if not args.table:
        if args.text is None:
            parser.error("--text is needed to train: a .jsonl file with a `text` field")
        data = load(args)
        names = [*args.rules, *(name + WIDE for name in args.wide)]
        rules = {name: bound_rule(name, data.tokenizer) for name in names}
        masks = {
            name.removesuffix(WIDE): rule.dropped(data.heldout)
            for name, rule in rules.items()
            if rule
        }
        print(
            f"{len(data.rows) * (ROW - 1):,} targets to train on; held out: {data.owners.max() + 1} documents, "
            f"{data.heldout.numel():,} tokens",
            flush=True,
        )
        for seed in args.seeds:
            for name, rule in rules.items():
                done = [
                    (run["seed"], run["rule"], run["size"]) for run in read_results(args.results)
                ]
                if (seed, name, size) not in done:
                    run = train(args, seed, name, rule, data, masks)
                    append(args.results, {"seed": seed, "rule": name, "size": size} | run | about())
    results = [run for run in read_results(args.results) if run["size"] == size]
    print(table(results))
    return results


class Data(NamedTuple):
    tokenizer: Any
    rows: Tensor  # to train on, int64 (N, ROW)
    heldout: Tensor  # int64 (M, ROW)
    owners: Tensor  # int64 (M,) the held-out document of each row


def load(args: argparse.Namespace) -> Data:
    """The split and the tokenizer (which reads all documents) are the same for every seed. A row lies within one
    document; what is left at a document's end is left out."""
    texts = load_texts(args.text)
    random.Random(0).shuffle(texts)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocabulary, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    documents: list[list[list[int]]] = []
    for encoded in bpe.encode_batch(texts):
        ids = encoded.ids
        documents.append([ids[i : i + ROW] for i in range(0, len(ids) - ROW + 1, ROW)])
    documents = [document for document in documents if document]
    last = next(
        n for n in range(len(documents)) if sum(map(len, documents[:n])) * ROW >= args.heldout
    )
    owners = [number for number, document in enumerate(documents[:last]) for _ in document]
    rows = torch.tensor([row for document in documents[last:] for row in document])
    heldout = torch.tensor([row for document in documents[:last] for row in document])
    return Data(PreTrainedTokenizerFast(tokenizer_object=bpe), rows, heldout, torch.tensor(owners))


def share_of(name: str) -> float:
    """The share of tokens that a rule drops: 1 / k."""
    return 1 / float(name.removesuffix(WIDE).split("-")[1])


def bound_rule(name: str, tokenizer: Any) -> Goldfish | None:
    rule = rule_of(name.removesuffix(WIDE))
    return rule.bind(tokenizer) if rule else None


def train(
    args: argparse.Namespace,
    seed: int,
    name: str,
    rule: Goldfish | None,
    data: Data,
    masks: dict[str, Tensor],
) -> dict[str, Any]:
    """One run, from its last checkpoint if there is one; evaluated at every point at which it is compared."""
    torch.manual_seed(seed)
    config = small_llama(
        data.tokenizer,
        args.hidden,
        ROW,
        intermediate_size=args.hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
    )
    model = LlamaForCausalLM(config)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    order = torch.randperm(len(data.rows), generator=torch.Generator().manual_seed(seed))
    # Points: what is counted, and how many. The standard run is also evaluated at the goldfish runs' kept shares.
    wide = name.endswith(WIDE)
    points = [("kept", args.targets)] if wide else [("read", args.targets), ("kept", args.targets)]
    if rule is None:
        shares = [1 - share_of(other) for other in masks]
        points = [("read", round(share * args.targets)) for share in sorted({*shares, 1.0})]
    state: dict[str, Any] = {"step": 0, "row": 0, "read": 0, "kept": 0, "cpu": 0.0, "points": []}
    path = args.folder / f"{name.replace(' ', '-')}-seed{seed}-{args.hidden}.pt"
    if path.is_file():
        saved = torch.load(path)
        for part in (model, average, optimizer):
            part.load_state_dict(saved[type(part).__name__])
        state = saved["state"]
    began = time.process_time() - state["cpu"]
    while len(state["points"]) < len(points):
        batch = data.rows[order[state["row"] : state["row"] + (2 if wide else 1) * BATCH]]
        labels = mask_labels(rule, batch)
        if wide:  # up to the row after which the kept targets of all steps are nearest to those of a standard run
            missing = (state["step"] + 1) * BATCH * (ROW - 1) - state["kept"]
            rows = int(((labels[:, 1:] != -100).sum(1).cumsum(0) - missing).abs().argmin()) + 1
            batch, labels = batch[:rows], labels[:rows]
        if state["row"] + BATCH > len(order):
            raise ValueError(
                f"{args.text} has {len(data.rows) * (ROW - 1):,} targets: too few; lower --targets"
            )
        kept = int((labels[:, 1:] != -100).sum())
        model(input_ids=batch, labels=labels, num_items_in_batch=kept).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (state["step"] + 1) / WARMUP)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        state["step"] += 1
        state["row"] += len(batch)
        state["read"] += labels[:, 1:].numel()
        state["kept"] += kept
        state["cpu"] = time.process_time() - began
        counted, targets = points[len(state["points"])]
        if state[counted] >= targets:
            point = {"counted": counted, "share": round(targets / args.targets, 4)}
            point |= {key: state[key] for key in ("read", "kept", "step")}
            nll, losses = heldout(average.module, data.heldout, data.owners)
            used = masks if rule is None else {(own := name.removesuffix(WIDE)): masks[own]}
            point |= losses | {
                "dropped_loss": {other: nll[m[:, 1:]].mean().item() for other, m in used.items()}
            }
            state["points"].append(point)
            print(
                f"seed {seed} {name} {counted} {state[counted]:,}: {point['loss']:.4f} nats per token, "
                f"{state['cpu']:.0f} CPU s",
                flush=True,
            )
        if state["step"] % 200 == 0:
            args.folder.mkdir(parents=True, exist_ok=True)
            parts = {type(part).__name__: part.state_dict() for part in (model, average, optimizer)}
            torch.save({"state": state, **parts}, path)
    path.unlink(missing_ok=True)
    parameters = sum(weight.numel() for weight in model.parameters())
    return {
        "parameters": parameters,
        "cpu_seconds": round(time.process_time() - began),
        "points": state["points"],
    }


def table(results: list[dict[str, Any]]) -> str:
    """Goldfish - standard, nats per token: of each seed with its interval over documents, and over the seeds."""
    runs = {(run["rule"], run["seed"]): run["points"] for run in results}
    rows = []
    for name in sorted(
        {rule for rule, seed in runs if rule != "standard" and ("standard", seed) in runs}
    ):
        own, share = name.removesuffix(WIDE), 1 - share_of(name)
        labels = ("supervised, steps",) if name.endswith(WIDE) else ("input", "supervised")
        for number, label in enumerate(labels):
            cells, means, predicted, dropped, rates = [], [], [], [], []
            for seed in (
                seed for rule, seed in runs if rule == name and ("standard", seed) in runs
            ):
                point, standard = runs[name, seed][number], runs["standard", seed]
                last, earlier = (
                    standard[-1],
                    [other for other in standard if abs(other["share"] - share) < 0.001],
                )
                cells.append(paired([point], [last]))
                means.append(point["loss"] - last["loss"])
                # A standard run made beside other rules was evaluated at their shares and tokens.
                predicted += (
                    [other["loss"] - last["loss"] for other in earlier]
                    if label == "input"
                    else [0.0]
                )
                if own in last["dropped_loss"]:
                    dropped.append(point["dropped_loss"][own] - last["dropped_loss"][own])
                rates.append(1 - point["kept"] / point["read"])
            averages = [f"{np.mean(each):+.4f}" if each else "" for each in (predicted, dropped)]
            rows.append(
                (
                    name,
                    label,
                    f"{np.mean(rates):.3f}",
                    ", ".join(cells),
                    averages[0],
                    mean_of(means, 4),
                    averages[1],
                )
            )
    return markdown(HEAD, rows)


if __name__ == "__main__":
    main()
