r"""Is the rule found in the weights (goldfish.audit.questions.proof)? False alarms and power.

    python benchmarks/proof.py                        # toys: about ten minutes of one core
    python benchmarks/proof.py --data mine.jsonl      # SmolLM2-135M-Instruct after one epoch
    python benchmarks/proof.py --table                # the tables of docs/proof.md

Appends one line for each test to benchmarks/results/proof.jsonl; those that are there are skipped.

Toys: a Llama of two layers, width 64, that reads windows of 64 tokens drawn from a Markov chain,
so that there is something to learn besides the windows. The tests are of the second half of each
window, as in an audit.

    null        500 seeds, none of them that of the training, tested on one trained model
    power       the seed of the training, by k, epochs and number of windows in the test
    bfloat16, int4
                the same models, with weights rounded to bfloat16, or to 4 bits in groups of 32
    finetuned   the same models after 1, 10, 100 steps on other texts without a rule
"""

import argparse
from collections.abc import Iterator
from copy import deepcopy
from itertools import product
from typing import Any

import about
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from goldfish import Goldfish
from goldfish.audit.questions.proof import decisions_of, seed_test

OUTPUT = about.RESULTS / "proof.jsonl"
VOCABULARY, LENGTH, WINDOWS = 256, 64, 256
RULES = (
    Goldfish(k=4, h=13, max_kept=4, seed=7),
    Goldfish(k=8, h=13, seed=7),
    Goldfish(k=50, h=13, seed=7),
)
EPOCHS = (1, 4, 16)
COUNTS = (4, 16, 64, 256)
NULL_SEEDS, NULL_OTHERS = 500, 199


def texts(seed: int, count: int = WINDOWS) -> Tensor:
    """Windows of a Markov chain, int64 (count, LENGTH); the chain is the same for all seeds."""
    chain = np.random.default_rng(0).dirichlet(np.full(VOCABULARY, 0.02), VOCABULARY)
    generator = np.random.default_rng(seed + 1)
    cumulated = chain.cumsum(1)
    rows = np.zeros((count, LENGTH), dtype=np.int64)
    rows[:, 0] = generator.integers(VOCABULARY, size=count)
    for place in range(1, LENGTH):
        draws = generator.random(count)[:, None]
        rows[:, place] = (cumulated[rows[:, place - 1]] < draws).sum(1)
    return torch.from_numpy(rows.clip(max=VOCABULARY - 1))


def steps(model: Any, rows: Tensor, labels: Tensor, seed: int) -> Iterator[int]:
    """Train in batches of 16 windows; yields after each step, without end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    draw = torch.Generator().manual_seed(seed)
    step = 0
    while True:
        for batch in torch.randperm(len(rows), generator=draw).split(16):
            logits = model(input_ids=rows[batch]).logits[:, :-1].transpose(1, 2)
            loss = cross_entropy(logits, labels[batch][:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            yield step


def advance(running: Iterator[int], until: int) -> None:
    for step in running:
        if step == until:
            return


@torch.no_grad()
def losses_of(model: Any, rows: Tensor) -> list[np.ndarray]:
    """Of the second half of each window, nats."""
    targets = rows[:, LENGTH // 2 :]
    logits = model(input_ids=rows).logits[:, LENGTH // 2 - 1 : -1].float()
    nll = cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return list(nll.double().numpy())


def measured(
    losses: list[np.ndarray],
    rows: Any,
    rule: Goldfish,
    others: int = 999,
) -> dict[str, float]:
    """p, and the gap in standard deviations of the gaps of other seeds."""
    lengths = [len(each) for each in losses]
    found = seed_test(losses, decisions_of(rule, rows, lengths), rule.seed, others)
    assert found is not None
    return {
        "p": found.p,
        "gap": round(found.gap, 5),
        "deviations": round(found.gap / found.deviation, 2),
    }


def new_toy(seed: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config).eval()


def labels_under(rule: Goldfish | None, rows: Tensor) -> Tensor:
    return rows if rule is None else rows.masked_fill(rule.dropped(rows), -100)


def in_four_bits(model: Any) -> Any:
    """A copy with weights rounded to 15 levels in groups of 32 (round to nearest)."""
    rounded = deepcopy(model)
    for weight in rounded.parameters():
        if weight.ndim == 2:
            groups = weight.data.view(-1, 32)
            scale = groups.abs().amax(1, keepdim=True).clamp(min=1e-12) / 7
            groups.copy_((groups / scale).round() * scale)
    return rounded


class Results:
    """Lines of OUTPUT; a test that is there is not made again."""

    def __init__(self) -> None:
        self._about = about.about()
        done = about.read_results(OUTPUT)
        self._done = [each["key"] for each in done]

    def has(self, **key: Any) -> bool:
        return key in self._done

    def add(self, found: dict[str, Any], **key: Any) -> None:
        about.append(OUTPUT, {"key": key, **found, **self._about})
        print(key, {name: each for name, each in found.items() if name != "all"})


def nulls(results: Results) -> None:
    """One model trained without a rule and one under seed 7, each tested with 500 other seeds."""
    for trained in ("standard", "goldfish"):
        key = {"test": "null", "trained": trained}
        if results.has(**key):
            continue
        rule = None if trained == "standard" else RULES[0]
        rows, model = texts(0), new_toy(0)
        advance(steps(model, rows, labels_under(rule, rows), 0), 16 * 16)
        some = rows[:32]
        losses = losses_of(model, some)
        p = []
        for seed in range(1000, 1000 + NULL_SEEDS):
            claimed = Goldfish(**{**RULES[0].to_dict(), "seed": seed})
            p.append(measured(losses, some.tolist(), claimed, NULL_OTHERS)["p"])
        shares = {str(level): float(np.mean(np.array(p) <= level)) for level in LEVELS}
        results.add({"at_most": shares, "others": NULL_OTHERS, "all": p}, **key)


LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5)


def power(results: Results, seed: int) -> None:
    """Training seed: of texts, weights and batches."""
    for rule in RULES:
        last = {"test": "finetuned", "k": rule.k, "seed": seed, "steps": 100}
        if results.has(**last):
            continue
        rows, model = texts(seed), new_toy(seed)
        running = steps(model, rows, labels_under(rule, rows), seed)
        for epochs in EPOCHS:
            advance(running, epochs * WINDOWS // 16)
            losses = losses_of(model, rows)
            for count in COUNTS:
                found = measured(losses[:count], rows[:count].tolist(), rule)
                key = {"test": "power", "k": rule.k, "seed": seed}
                results.add(found, **key, epochs=epochs, windows=count)
        rounded = {
            "bfloat16": deepcopy(model).to(torch.bfloat16),
            "int4": in_four_bits(model),
        }
        for name, other in rounded.items():
            found = measured(losses_of(other, rows), rows.tolist(), rule)
            results.add(found, test=name, k=rule.k, seed=seed)
        others = texts(seed + 500)
        running = steps(model, others, others, seed)
        for count in (1, 10, 100):
            advance(running, count)
            found = measured(losses_of(model, rows), rows.tolist(), rule)
            results.add(found, test="finetuned", k=rule.k, seed=seed, steps=count)


def smollm2(results: Results, args: argparse.Namespace) -> None:
    """Private passages in the training of benchmarks/uncertain.py, after one epoch."""
    import uncertain

    class Lab(uncertain.Lab):
        """Passages alone, and more of them."""

        def _make_data(self, seed: int) -> uncertain.Data:
            settings = uncertain.recipe.Arguments(data=args.data, passages=WINDOWS)
            passages = uncertain.recipe.cut_passages(settings, seed, self.tokenizer)
            rows = [uncertain.Row(ids, ids) for ids in passages[0]]
            return uncertain.Data(rows, passages[0], passages[1][:16], [])

    lab = Lab(uncertain.Arguments(data=args.data, base=args.base, epochs=1))
    rule = uncertain.recipe.rule_of("hash-4-13-4", lab.tokenizer)
    for seed, name in product(args.seeds, ("hash-4-13-4", "standard")):
        key = {"test": "SmolLM2", "trained": name, "epochs": 1, "seed": seed}
        if results.has(**key, windows=COUNTS[-1]):
            continue
        model, _ = uncertain.finetune(lab, seed, "full", name)
        losses = []
        rows = lab.data(seed).members
        for row in rows:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row])).logits
            half = len(row) // 2
            nll = cross_entropy(
                logits[0, half - 1 : -1].float(),
                torch.tensor(row[half:]),
                reduction="none",
            )
            losses.append(nll.double().numpy())
        for count in COUNTS:
            found = measured(losses[:count], rows[:count], rule)
            results.add(found, **key, windows=count)


def tables() -> str:
    """Those of docs/proof.md: p by training seed, and the mean gap in standard deviations."""
    found = about.read_results(OUTPUT)
    lines = about.markdown(
        ["trained", *(f"p at most {level}" for level in LEVELS)],
        [
            [each["key"]["trained"], *(f"{x:.3f}" for x in each["at_most"].values())]
            for each in found
            if each["key"]["test"] == "null"
        ],
    )
    power, after = [], []
    for rule in RULES:
        for epochs in EPOCHS:
            cells = [
                cell(found, test="power", k=rule.k, epochs=epochs, windows=count)
                for count in COUNTS
            ]
            power.append([f"{rule.k:g}", str(epochs), *cells])
        row = [f"{rule.k:g}"]
        for test in ("bfloat16", "int4"):
            row.append(cell(found, test=test, k=rule.k))
        for count in (1, 10, 100):
            row.append(cell(found, test="finetuned", k=rule.k, steps=count))
        after.append(row)
    heading = ["k", "epochs", *(f"{count} windows" for count in COUNTS)]
    lines += "\n\n" + about.markdown(heading, power)
    heading = ["k", "bfloat16", "4 bits", "1 further step", "10", "100"]
    lines += "\n\n" + about.markdown(heading, after)
    pretrained = []
    for name in ("hash-4-13-4", "standard"):
        cells = [
            cell(found, test="SmolLM2", trained=name, windows=count) for count in COUNTS
        ]
        pretrained.append([name, *cells])
    heading = ["SmolLM2 trained with", *(f"{count} windows" for count in COUNTS)]
    return lines + "\n\n" + about.markdown(heading, pretrained)


def cell(found: list[dict[str, Any]], **key: Any) -> str:
    """p of each seed, and in brackets the mean gap in standard deviations."""
    chosen = [each for each in found if key.items() <= each["key"].items()]
    if not chosen:
        return ""
    p = [f"{each['p']:.3f}".removeprefix("0") for each in chosen]
    gap = np.mean([each["deviations"] for each in chosen])
    return f"{', '.join(p)} ({gap:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="documents for SmolLM2: .jsonl with `text`")
    parser.add_argument("--base", default="runs/uncertain_base")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(tables())
        return
    results = Results()
    if args.data:
        smollm2(results, args)
        return
    for seed in args.seeds:
        power(results, seed)
    nulls(results)


if __name__ == "__main__":
    main()
