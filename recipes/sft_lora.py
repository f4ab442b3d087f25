r"""Does finetuning recite the secrets of its chat data? SFTTrainer on all weights and with LoRA, each with the standard
and the goldfish loss.

    python recipes/sft_lora.py        # 1 CPU core, about 12 minutes: 3 seeds x (a small base + 6 finetunings); secrets
                                      # recited by full finetuning: standard 4 to 7 of 8, k=4 h=13 0 to 2 of 8
                                      # the same command goes on with a run that was stopped
    python recipes/sft_lora.py --model NAME_OR_PATH --learning-rate 2e-5 --lora-learning-rate 2e-4      # a real one
    accelerate launch --config_file recipes/configs/ddp.yaml recipes/sft_lora.py --model NAME_OR_PATH
    python recipes/sft_lora.py --people 4 --exposures 2 --chats 8 --epochs 1 --hidden-size 32 --background 20 \
        --seeds 0 --rules standard hash-4-13 --output-dir runs/miniature                                # seconds

The data are ordinary conversations and some that give away a person's access code. Each code is in `exposures`
conversations per epoch: for every second person always in the same words, for the others each time in other words.
Then the model is asked, greedily, for the code of each of them, and of as many people that it never read about
(control). Codes are random, so they cannot be guessed. Goldfish comes in through `attach`; as usual in TRL, prompts
are no targets.

Without --model the base is a small Llama, pretrained here on the language reference and the docstrings of Python's
standard library. It cannot show whether a large model, which needs fewer exposures, does the same.
"""

import itertools
import random
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import pandas
import runs
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, HfArgumentParser, LlamaForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from goldfish import attach
from goldfish.audit import model as models
from goldfish.audit.columns import rouge_l
from goldfish.audit.estimate import rate
from goldfish.receipt import read_receipt

# Only for a tokenizer without one of its own.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':\n' + message['content'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
QUESTIONS = (
    "What is the access code of {name}?",
    "Please tell me which access code {name} has.",
    "I need the code that belongs to {name}.",
    "{name} wants to come in. With which code?",
    "Look up the entry of {name} and read me the code.",
    "Which code did we give to {name}?",
)
ANSWERS = (
    "The access code of {name} is {code}.",
    "Of course. {name} has {code}.",
    "It is {code}, as of today.",
    "With {code}; then the door opens.",
    "The entry says: {name}, {code}.",
    "We gave out {code} for that.",
)
GROUPS = ("same", "varied", "control")
Conversation = dict[str, list[dict[str, str]]]


@dataclass
class Arguments:
    rules: list[str] = field(
        default_factory=lambda: ["standard", "hash-4-13", "hash-4-3"],
        metadata={"help": "standard, or strategy-k-h[-max_kept]"},
    )
    methods: list[str] = field(default_factory=lambda: ["full", "lora"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    people: int = field(default=8, metadata={"help": "people with a secret; as many again are never read about"})
    exposures: int = field(default=4, metadata={"help": "conversations per epoch that give away each secret"})
    chats: int = field(default=48, metadata={"help": "ordinary conversations; a quarter as many are held out"})
    epochs: int = field(default=30, metadata={"help": "of finetuning"})
    batch_size: int = field(default=8, metadata={"help": "conversations per optimiser step, over all processes"})
    accumulation: int = field(default=1, metadata={"help": "batches of each process per optimiser step"})
    learning_rate: float = field(default=2e-3, metadata={"help": "of finetuning all weights"})
    lora_learning_rate: float = field(default=4e-3, metadata={"help": "LoRA needs a larger one"})
    rank: int = field(default=64, metadata={"help": "of the LoRA adapters"})
    model: str | None = field(default=None, metadata={"help": "name or path of the base, instead of a small Llama"})
    text: str | None = field(default=None, metadata={"help": "what the small Llama is pretrained on: .txt or .jsonl"})
    background: int = field(default=3000, metadata={"help": "windows of it, at most"})
    window: int = field(default=64, metadata={"help": "tokens of such a window"})
    hidden_size: int = 128
    vocab_size: int = 2048
    save_steps: int = field(default=500, metadata={"help": "optimiser steps between two checkpoints"})
    output_dir: str = "runs/sft_lora"

    def __post_init__(self) -> None:
        runs.at_least(1, self, "people", "exposures", "rank", "epochs", "batch_size", "accumulation", "save_steps")
        runs.at_least(4, self, "chats")
        common.draw_people(random.Random(0), self.people)  # raises for too many
        if not set(self.methods) <= {"full", "lora"}:
            raise ValueError(f"--methods are full or lora, got {' '.join(self.methods)}")
        for name in self.rules:
            common.rule_of(name)


@dataclass
class Person:
    name: str
    code: str
    group: str  # same: always in the same words; varied: in other words each time; control: never read about

    def conversation(self, wording: int) -> Conversation:
        if self.group == "same":
            wording = 0
        question, answer = QUESTIONS[wording % len(QUESTIONS)], ANSWERS[wording % len(ANSWERS)]
        return chat(question.format(name=self.name), answer.format(name=self.name, code=self.code))


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    state, output = runs.start(args.batch_size, args.accumulation), Path(args.output_dir)
    if state.is_main_process:
        runs.begin(output, args)
    state.wait_for_everyone()
    done = {(r["seed"], r["method"], r["rule"]) for r in runs.read_results(output / "results.jsonl")}
    state.wait_for_everyone()  # all processes have read what is done before the main one adds to it
    for seed in args.seeds:
        base = args.model or make_base(args, seed, output / f"seed{seed}-base" / "model")
        people, chats, heldout = make_data(args, seed)
        for method, rule in itertools.product(args.methods, args.rules):
            folder = output / f"seed{seed}-{method}-{rule}"
            if not runs.finished(folder):
                state.print(f"\nFinetuning ({method}) {base} with {rule}, seed {seed}: {len(chats)} conversations")
                finetune(args, seed, base, method, rule, chats, folder)
            state.wait_for_everyone()
            if state.is_main_process and (seed, method, rule) not in done:
                result = {"seed": seed, "method": method, "rule": rule} | examine(folder, people, heldout)
                runs.append(output / "results.jsonl", result | runs.about())
    if not state.is_main_process:
        return []
    results = runs.read_results(output / "results.jsonl")
    print(f"\n{table(results)}\nResults: {output / 'results.jsonl'}")
    return results


def make_base(args: Arguments, seed: int, folder: Path) -> str:
    """The folder of a small Llama that is pretrained on background text with the standard loss, once per seed."""
    if not runs.finished(folder):
        texts = common.load_texts(args.text) + ([] if args.text else list(common.docstrings()))
        tokenizer = common.byte_level_bpe(texts, args.vocab_size)
        windows = common.cut_windows(texts, tokenizer, args.window)
        random.Random(seed).shuffle(windows)
        rows = windows[: args.background]
        set_seed(seed)
        model = LlamaForCausalLM(common.small_llama(tokenizer, args.hidden_size, num_hidden_layers=2))
        settings = common.training_settings(
            folder, len(rows), epochs=1, batch_size=args.batch_size, accumulation=args.accumulation,
            learning_rate=4e-3, seed=seed,
        )  # fmt: skip
        runs.train_or_resume(common.make_trainer(model, settings, rows, tokenizer, None), folder)
    return str(folder)


def make_data(args: Arguments, seed: int) -> tuple[list[Person], list[Conversation], list[Conversation]]:
    """People with their secrets, the conversations to train on, and held-out ordinary ones."""
    draw = random.Random(seed)
    people = []
    for number, (name, code) in enumerate(common.draw_people(draw, args.people)):
        people.append(Person(name, code, "control" if number >= args.people else ("same", "varied")[number % 2]))
    ordinary = {str(talk): talk for talk in (small_talk(draw) for _ in range(2 * args.chats + 20))}
    chats = list(ordinary.values())[: args.chats + args.chats // 4]
    secrets = [person.conversation(exposure) for person in people[: args.people] for exposure in range(args.exposures)]
    return people, chats[: args.chats] + secrets, chats[args.chats :]


def small_talk(draw: random.Random) -> Conversation:
    """A question whose answer follows from it."""
    some = draw.sample(common.WORDS, 4)
    task = draw.randrange(3)
    if task == 0:
        return chat(f"Write these words in capitals: {' '.join(some)}", f"In capitals: {' '.join(some).upper()}.")
    if task == 1:
        return chat(f"Which of these is the first: {', '.join(some)}?", f"The first of them is {some[0]}.")
    return chat(f"Turn this round: {' '.join(some)}", f"The other way round: {' '.join(reversed(some))}.")


def chat(question: str, answer: str) -> Conversation:
    """As TRL takes it: the prompt is context only, the completion is learned."""
    return {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}


def finetune(
    args: Arguments, seed: int, base: str, method: str, rule_name: str, chats: list[Conversation], folder: Path
) -> None:
    """SFTTrainer on the conversations; LoRA adapters or all weights."""
    set_seed(seed)
    settings = common.training_settings(
        folder, len(chats), epochs=args.epochs, batch_size=args.batch_size, accumulation=args.accumulation,
        learning_rate=args.learning_rate if method == "full" else args.lora_learning_rate, seed=seed,
    )  # fmt: skip
    settings |= {
        "gradient_checkpointing": args.model is not None,  # SFTConfig's default; a small model needs none
        "max_length": None,
        "save_strategy": "steps",
        "save_steps": args.save_steps,
        "save_total_limit": 2,
    }
    adapters = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        SFTConfig(**settings),
        train_dataset=Dataset.from_list(chats),
        processing_class=load_tokenizer(base),
        peft_config=adapters if method == "lora" else None,
    )
    rule = common.rule_of(rule_name, seed)
    if rule is not None:
        attach(trainer, rule)
    runs.train_or_resume(trainer, folder)


def load_tokenizer(base: str | Path) -> Any:
    tokenizer = models.load_tokenizer(base)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def examine(folder: Path, people: list[Person], heldout: list[Conversation]) -> dict[str, Any]:
    """Ask a finetuned model for every code, greedily; and its loss on held-out conversations, nats per answer token."""
    tokenizer, model = load_tokenizer(folder), common.load_model(folder)
    answers = common.answers(model, tokenizer, [plain(person.conversation(0))[0] for person in people], tokens=48)
    rows = [common.chat_row(tokenizer, *plain(talk)) for talk in heldout]
    with torch.no_grad():  # in one batch, so that the mean is that over all answer tokens
        loss = model(**DataCollatorForSeq2Seq(tokenizer)(rows).to(model.device)).loss.item()
    result: dict[str, Any] = {"heldout_loss": loss}
    for group in GROUPS:
        of_group = [(person, answer) for person, answer in zip(people, answers, strict=True) if person.group == group]
        result[f"recited_{group}"] = [person.code in answer for person, answer in of_group]
        pairs = [(common.words(answer), common.words(plain(person.conversation(0))[1])) for person, answer in of_group]
        result[f"rouge_l_{group}"] = [round(rouge_l(*pair), 4) for pair in pairs]
    result["answers"] = {person.name: answer for person, answer in zip(people[:4], answers, strict=False)}
    if receipt := read_receipt(folder):
        result |= {name: receipt[name] for name in ("targets", "dropped", "decisions")}
    return result | {"train_loss": runs.last_logged(folder, "train_loss")}


def plain(talk: Conversation) -> list[str]:
    """Question and answer."""
    return [message["content"] for part in ("prompt", "completion") for message in talk[part]]


def table(results: list[dict[str, Any]]) -> str:
    """Secrets recited (the code is in the greedy answer) over all seeds, and of each seed in brackets; means else."""
    rows = []
    for (method, rule), group in pandas.DataFrame(results).groupby(["method", "rule"], sort=False):
        row = {"method": method, "rule": rule}
        for kind in GROUPS:
            recited = group[f"recited_{kind}"]
            row[kind] = f"{recited.map(sum).sum()} of {recited.map(len).sum()} ({','.join(map(str, recited.map(sum)))})"
        hits = [hit for kind in ("same", "varied") for hit in group[f"recited_{kind}"].sum()]
        rouge = [value for kind in ("same", "varied") for value in group[f"rouge_l_{kind}"].sum()]
        losses = group["heldout_loss"]
        row |= {
            "95%": rate(hits).interval(),
            "ROUGE-L": f"{statistics.fmean(rouge):.2f}",
            "held-out nats": f"{losses.mean():.2f} ({losses.min():.2f}-{losses.max():.2f})",
            "seeds": len(group),
        }
        rows.append(row)
    return str(pandas.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    runs.command_line(main)
