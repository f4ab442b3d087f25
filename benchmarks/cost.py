"""What the goldfish loss costs: held-out loss against the standard loss, at equal input and at equal supervised tokens.

    python benchmarks/cost.py --text documents.jsonl             # goes on with what benchmarks/results/cost.jsonl lacks
    python benchmarks/cost.py --table                            # the table of the runs so far; no training

A small Llama reads its training documents once, row by row; no token is read twice. All runs of a seed start from the
same weights and read the same rows in the same order, whatever their rule. The learning rate is constant after the
warm-up and an average of the weights (EMA) is evaluated, so every point of a run is a finished training of its length:
with a decaying rate the points of one run could not be compared with the ends of others.

The standard run ends after --targets targets. A goldfish run is evaluated twice: when it has read as many targets
(equal input), and when it has kept as many (equal supervised; it has then read k / (k - 1) times the rows). So at equal
supervised tokens goldfish has read more text, as in the paper: the claim is about what the dropped tokens cost.

What would have been seen, said before the runs. The held-out set is 56 documents of 7,500 tokens. With a standard
deviation of 0.05 nats between the documents' paired differences, the interval of one pair of runs is +-0.013 nats, as
far as the choice of documents goes. Runs also differ by chance: with a standard deviation of 0.01 nats between the
seeds' differences, the t interval of three seeds is +-0.025 nats, and of two seeds +-0.09. The prediction that can
fail: a dropped token costs its own gradient and nothing else, so goldfish at equal input equals the standard run after
(1 - drop rate) of the targets (the column "predicted", from the same seed's standard run), and goldfish at equal
supervised tokens differs by 0.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from about import RESULTS, about
from runs import append, read_results
from scipy.stats import t as student
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from goldfish import Goldfish, mask_labels

RULES = ("standard", "hash-4-13", "hash-3-13", "hash-8-13", "letters-4-8")  # strategy-k-h
HELDOUT = 420_000  # tokens at least
ROW, BATCH = 256, 8  # tokens, rows an optimiser step
RATE, WARMUP, EMA = 2e-3, 100, 0.99


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="training and held-out documents: .jsonl with a `text` field")
    parser.add_argument("--targets", type=int, default=3_000_000, help="targets of the standard run")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size: 128 is 1.0M parameters")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--heldout", type=int, default=HELDOUT, help="held-out tokens, at least")
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS / "cost.jsonl")
    parser.add_argument("--folder", type=Path, default=Path("runs/cost"), help="checkpoints of the run in progress")
    parser.add_argument("--table", action="store_true", help="print the table of the results and stop")
    args = parser.parse_args(argv)
    size = {name: getattr(args, name) for name in ("targets", "hidden", "layers", "vocabulary", "heldout")}
    if not args.table:
        if args.text is None:
            parser.error("--text is needed to train: a .jsonl file with a `text` field")
        tokenizer, rows, heldout, owners = load(args)
        masks = {name: rule_of(name, tokenizer).dropped(heldout) for name in args.rules if name != "standard"}
        print(f"{len(rows) * (ROW - 1):,} targets to train on; held out: {owners.max() + 1} documents, "
              f"{heldout.numel():,} tokens", flush=True)  # fmt: skip
        for seed in args.seeds:
            for name in args.rules:
                done = [(run["seed"], run["rule"], run["size"]) for run in read_results(args.results)]
                if (seed, name, size) in done:
                    continue
                used = [name] if name in masks else list(masks)
                run = train(args, seed, name, rule_of(name, tokenizer), rows, heldout, owners, masks, used)
                append(args.results, {"seed": seed, "rule": name, "size": size} | run | about())
    results = [run for run in read_results(args.results) if run["size"] == size]
    print(table(results))
    return results


def load(args: argparse.Namespace) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Tokenizer, training rows (N, ROW), held-out rows (M, ROW), and which held-out document each of them is of.

    The split and the tokenizer (which reads all documents) are the same for every seed. A row lies within one document;
    what is left at a document's end is left out.
    """
    texts = [json.loads(line)["text"] for line in Path(args.text).read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(texts)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=args.vocabulary, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    documents: list[list[list[int]]] = []
    for encoded in bpe.encode_batch(texts):
        ids = encoded.ids
        documents.append([ids[i : i + ROW] for i in range(0, len(ids) - ROW + 1, ROW)])
    documents = [document for document in documents if document]
    last = next(n for n in range(len(documents)) if sum(map(len, documents[:n])) * ROW >= args.heldout)
    owners = [number for number, document in enumerate(documents[:last]) for _ in document]
    rows = torch.tensor([row for document in documents[last:] for row in document])
    heldout = torch.tensor([row for document in documents[:last] for row in document])
    return PreTrainedTokenizerFast(tokenizer_object=bpe), rows, heldout, torch.tensor(owners)


def rule_of(name: str, tokenizer: Any) -> Goldfish | None:
    rule = common.rule_of(name, seed=0)
    return rule.bind(tokenizer) if rule else None


def train(
    args: argparse.Namespace, seed: int, name: str, rule: Goldfish | None, rows: Tensor, heldout: Tensor,
    owners: Tensor, masks: dict[str, Tensor], used: list[str],
) -> dict[str, Any]:  # fmt: skip
    """One run, from its last checkpoint if there is one; evaluated at every point at which it is compared."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=args.hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 32, max_position_embeddings=ROW,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    # Points: what is counted, and how many. The standard run is also evaluated at the goldfish runs' kept shares.
    points = [("read", args.targets), ("kept", args.targets)]
    if rule is None:
        shares = [1 - 1 / float(other.split("-")[1]) for other in masks]
        points = [("read", round(share * args.targets)) for share in sorted({*shares, 1.0})]
    state: dict[str, Any] = {"step": 0, "read": 0, "kept": 0, "cpu": 0.0, "points": []}
    path = args.folder / f"{name}-seed{seed}-{args.hidden}.pt"
    if path.is_file():
        saved = torch.load(path)
        for part in (model, average, optimizer):
            part.load_state_dict(saved[type(part).__name__])
        state = saved["state"]
    began = time.process_time() - state["cpu"]
    while len(state["points"]) < len(points):
        batch = rows[order[state["step"] * BATCH : (state["step"] + 1) * BATCH]]
        if len(batch) < BATCH:
            raise ValueError(f"{args.text} has {len(rows) * (ROW - 1):,} targets to train on: too few; lower --targets")
        labels = mask_labels(rule, batch)
        kept = int((labels[:, 1:] != -100).sum())
        model(input_ids=batch, labels=labels, num_items_in_batch=kept).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (state["step"] + 1) / WARMUP)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        state["step"] += 1
        state["read"] += labels[:, 1:].numel()
        state["kept"] += kept
        state["cpu"] = time.process_time() - began
        counted, targets = points[len(state["points"])]
        if state[counted] >= targets:
            point = {"counted": counted, "share": round(targets / args.targets, 4)}
            point |= {key: state[key] for key in ("read", "kept", "step")}
            point |= evaluate(average.module, heldout, owners, {other: masks[other] for other in used})
            state["points"].append(point)
            print(f"seed {seed} {name} {counted} {state[counted]:,}: {point['loss']:.4f} nats per token, "
                  f"{state['cpu']:.0f} CPU s", flush=True)  # fmt: skip
        if state["step"] % 200 == 0:
            args.folder.mkdir(parents=True, exist_ok=True)
            parts = {type(part).__name__: part.state_dict() for part in (model, average, optimizer)}
            torch.save({"state": state, **parts}, path)
    path.unlink(missing_ok=True)
    parameters = sum(weight.numel() for weight in model.parameters())
    return {"parameters": parameters, "cpu_seconds": round(time.process_time() - began), "points": state["points"]}


@torch.no_grad()
def evaluate(model: Any, rows: Tensor, owners: Tensor, masks: dict[str, Tensor]) -> dict[str, Any]:
    """Held-out loss, nats per token; its sum in each document; and the loss of the tokens that each rule would drop."""
    model.eval()
    losses = []
    for batch in rows.split(16):
        logits = model(input_ids=batch).logits[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none"))
    nll = torch.cat(losses).double()
    documents = torch.zeros(int(owners.max()) + 1, dtype=torch.float64).index_add(0, owners, nll.sum(1))
    return {
        "loss": nll.mean().item(),
        "dropped_loss": {name: nll[mask[:, 1:]].mean().item() for name, mask in masks.items()},
        "documents": [round(value, 3) for value in documents.tolist()],
        "tokens": (owners.bincount() * (ROW - 1)).tolist(),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Goldfish - standard, nats per token: of each seed with its interval over documents, and over the seeds."""
    runs = {(run["rule"], run["seed"]): run["points"] for run in results}
    lines = [
        "| rule | at equal | drop rate | goldfish - standard: each seed [95% over documents] | predicted "
        "| mean [95% over seeds] | on tokens that the rule would drop |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in sorted({run["rule"] for run in results} - {"standard"}):
        seeds = [seed for rule, seed in runs if rule == name and ("standard", seed) in runs]
        for number, label in enumerate(("input", "supervised")):
            cells, means, predicted, dropped, rates = [], [], [], [], []
            for seed in seeds:
                point, standard = runs[name, seed][number], runs["standard", seed]
                last = standard[-1]
                difference, lower, upper = paired(point, last)
                cells.append(f"{difference:+.4f} [{lower:+.4f}, {upper:+.4f}]")
                means.append(difference)
                share = 1 - 1 / float(name.split("-")[1])
                earlier = min(standard, key=lambda other: abs(other["share"] - share))
                predicted.append(earlier["loss"] - last["loss"] if label == "input" else 0.0)
                dropped.append(point["dropped_loss"][name] - last["dropped_loss"][name])
                rates.append(1 - point["kept"] / point["read"])
            if seeds:
                interval = ""
                if len(seeds) > 1:
                    half = student.ppf(0.975, len(seeds) - 1) * statistics.stdev(means) / len(seeds) ** 0.5
                    interval = f" [{statistics.fmean(means) - half:+.4f}, {statistics.fmean(means) + half:+.4f}]"
                lines.append(
                    f"| {name} | {label} | {statistics.fmean(rates):.3f} | {', '.join(cells)} "
                    f"| {statistics.fmean(predicted):+.4f} | {statistics.fmean(means):+.4f}{interval} "
                    f"| {statistics.fmean(dropped):+.4f} |"
                )
    return "\n".join(lines)


def paired(point: dict[str, Any], other: dict[str, Any]) -> tuple[float, float, float]:
    """Difference of two held-out losses, and its 95% bootstrap interval over documents."""
    tokens = np.array(point["tokens"])
    differences = np.array(point["documents"]) - np.array(other["documents"])
    drawn = np.random.default_rng(0).integers(len(tokens), size=(4000, len(tokens)))
    samples = differences[drawn].sum(1) / tokens[drawn].sum(1)
    lower, upper = np.quantile(samples, (0.025, 0.975))
    return float(differences.sum() / tokens.sum()), float(lower), float(upper)


if __name__ == "__main__":
    main()
