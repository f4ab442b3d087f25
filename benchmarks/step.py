"""A whole Trainer step of a small Llama: the standard loss, the goldfish loss on logits, and the fused goldfish loss.

    python benchmarks/step.py            # a few minutes on 2 CPU cores; writes benchmarks/results/step-<device>.json
    python benchmarks/step.py --render

Every repeat trains all three for a few steps in turn, from the same weights on the same random tokens; the time is
that of Trainer's own `training_step` and optimiser step, the first one left out.
"""

import argparse
import json
import statistics
import tempfile
import time

import torch
from about import RESULTS, about, markdown, source
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from goldfish import Goldfish, attach

WAYS = ("standard", "goldfish on logits", "goldfish")


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args, **kwargs) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
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
    rows = torch.randint(args.vocabulary, (args.batch * (args.steps + 1), args.length)).tolist()
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
    return [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]


def render() -> str:
    lines = []
    for path in sorted(RESULTS.glob("step-*.json")):
        data = json.loads(path.read_text())
        settings = ", ".join(f"{name} {value}" for name, value in data["settings"].items())
        lines.append(f"{source(data['about'])}; {settings}\n")
        base = statistics.median(data["seconds"]["standard"])
        rows = []
        for way, seconds in data["seconds"].items():
            median = statistics.median(seconds)
            spread = f"{min(seconds):.3f} - {max(seconds):.3f}"
            rows.append((way, f"{median:.3f}", spread, f"{median / base:.2f}", len(seconds)))
        lines += [
            markdown(("step", "seconds, median", "least - greatest", "of standard", "n"), rows),
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--render", action="store_true", help="print the tables and stop")
    parser.add_argument("--k", type=float, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4, help="timed steps a repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    if args.render:
        print(render())
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    provenance = about()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(args.repeats):
        for way in WAYS:
            seconds[way] += train(way, args)
            print(f"{way}: {statistics.median(seconds[way]):.3f} s", flush=True)
    settings = {name: value for name, value in vars(args).items() if name != "render"}
    out = RESULTS / f"step-{device}{'-bf16' * args.bf16}.json"
    out.write_text(
        json.dumps({"about": provenance, "settings": settings, "seconds": seconds}, indent=1) + "\n"
    )
    print(render())


if __name__ == "__main__":
    main()
