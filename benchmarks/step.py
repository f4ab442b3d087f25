"""A whole Trainer step of a small Llama: standard loss, goldfish on logits, fused goldfish loss.

    # a few minutes on 2 CPU cores; writes benchmarks/results/step-<device>.json
    python benchmarks/step.py
    # on a GPU, where the default is bound by kernel launches
    python benchmarks/step.py --bf16 --hidden 2048 --vocabulary 128256 --batch 8 --length 2048
    python benchmarks/step.py --render

Every repeat trains all three for a few steps in turn, from the same weights on the same random
tokens; the time is that of Trainer's own `training_step` and optimiser step, the first one left
out. Then the rules alone decide one batch of the same size.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from about import RESULTS, about, markdown, parser, seconds_of, source
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from goldfish import Goldfish, attach
from goldfish.letters import Vocabulary

# fused=False keeps the model's own head and loss: what masking alone costs.
WAYS = ("standard", "goldfish on logits", "goldfish")
RULES = {
    "hash": Goldfish(k=4, h=13),
    "hash, max_kept=4": Goldfish(k=4, h=13, max_kept=4),
    "letters": Goldfish(k=4, h=8, strategy="letters"),
}
CALLS = 30


def synchronize() -> None:
    """Wait for the GPU: its work is queued, and would be timed as nothing."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args, **kwargs) -> None:
        synchronize()
        self.times.append(time.perf_counter())


def train(way: str, args: argparse.Namespace) -> list[float]:
    """Seconds of each step but the first."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=args.length,
        tie_word_embeddings=True,
    )
    rows = torch.randint(
        args.vocabulary, (args.batch * (args.steps + 1), args.length)
    ).tolist()
    # Random tokens: what is measured does not depend on them, except that every k-th is dropped.
    clock = Clock()
    model = LlamaForCausalLM(config).to(torch.bfloat16 if args.bf16 else torch.float32)
    data = [{"input_ids": row, "labels": row} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            per_device_train_batch_size=args.batch,
            max_steps=args.steps + 1,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model, settings, train_dataset=data, callbacks=[clock])
        if way != "standard":
            attach(trainer, Goldfish(k=args.k), fused=way == "goldfish")
        trainer.train()
    return [
        after - before
        for before, after in zip(clock.times, clock.times[1:], strict=False)
    ]


def decide(name: str, args: argparse.Namespace) -> list[float]:
    """Seconds of each call of a rule on one batch; the first ones are left out."""
    # Words of one to five letters, half of them after a space: what `letters` reads.
    words = [
        bytes(97 + (i * 7 + j) % 26 for j in range(1 + i % 5))
        for i in range(args.vocabulary)
    ]
    vocabulary = Vocabulary([b" " * (i % 2) + word for i, word in enumerate(words)])
    rule = RULES[name]
    if rule.strategy == "letters":
        rule = Goldfish(k=rule.k, h=rule.h, strategy="letters", vocabulary=vocabulary)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.randint(args.vocabulary, (args.batch, args.length), device=device)
    times = []
    for _ in range(CALLS + 3):
        synchronize()
        began = time.perf_counter()
        rule.dropped(ids)
        synchronize()
        times.append(time.perf_counter() - began)
    # Tables are made and kernels compiled in the first calls.
    return times[3:]


def render(folder: Path) -> str:
    """A table for each JSON file: steps, then the rules."""
    lines = []
    for path in sorted(folder.glob("step-*.json")):
        data = json.loads(path.read_text())
        settings = ", ".join(
            f"{name} {value}" for name, value in data["settings"].items()
        )
        lines.append(f"{source(data['about'])}; {settings}\n")
        base = statistics.median(data["seconds"]["standard"])
        rows = []
        for way, seconds in data["seconds"].items():
            times = f"{statistics.median(seconds) / base:.2f}"
            rows.append((way, *seconds_of(seconds), times, len(seconds)))
        head = ("step", "seconds, median", "least - greatest", "of standard", "n")
        lines += [markdown(head, rows), ""]
        rules = []
        # Older files have no rules.
        for name, seconds in data.get("rules", {}).items():
            median = statistics.median(seconds)
            rules.append(
                (name, f"{1e3 * median:.2f}", f"{median / base:.2%}", len(seconds))
            )
        if rules:
            head = ("the rule alone", "ms, median", "of a standard step", "n")
            lines += [markdown(head, rules), ""]
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--render", action="store_true", help="print the tables and stop"
    )
    options.add_argument("--k", type=float, default=4)
    options.add_argument("--hidden", type=int, default=512)
    options.add_argument("--vocabulary", type=int, default=32000)
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--steps", type=int, default=4, help="timed steps a repeat")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--bf16", action="store_true")
    options.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of the JSON files"
    )
    args = options.parse_args()
    if args.render:
        print(render(args.output))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {
        name: value
        for name, value in vars(args).items()
        if name not in ("render", "output")
    }
    result = {"about": about(), "settings": settings, "seconds": {}, "rules": {}}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    args.output.mkdir(parents=True, exist_ok=True)
    out = args.output / f"step-{device}{'-bf16' * args.bf16}.json"
    for _ in range(args.repeats):
        for way in WAYS:
            seconds[way] += train(way, args)
            print(f"{way}: {statistics.median(seconds[way]):.3f} s", flush=True)
        # After each turn, so that a run that is stopped leaves what it has.
        out.write_text(json.dumps(result | {"seconds": seconds}, indent=1) + "\n")
    result["rules"] = {name: decide(name, args) for name in RULES}
    out.write_text(json.dumps(result | {"seconds": seconds}, indent=1) + "\n")
    print(render(args.output))


if __name__ == "__main__":
    main()
