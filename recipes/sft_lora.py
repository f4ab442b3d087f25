r"""Does finetuning recite the secrets of its chat data? TRL's SFTTrainer, in full and LoRA, with goldfish and without.

    python recipes/sft_lora.py        # 1 CPU core, about 12 minutes: 3 seeds x (a small base + 6 finetunings); secrets
                                      # recited by full finetuning: standard 4 to 7 of 8, k=4 h=13 0 to 2 of 8
    python recipes/sft_lora.py --resume               # goes on where a killed run stopped
    python recipes/sft_lora.py --model NAME_OR_PATH --learning_rate 2e-5 --lora_learning_rate 2e-4      # a real one
    accelerate launch --config_file recipes/configs/ddp.yaml recipes/sft_lora.py --model NAME_OR_PATH
    python recipes/sft_lora.py --people 4 --exposures 2 --chats 8 --epochs 1 --hidden_size 32 --background 20 \
        --seeds 0 --rules standard hash-4-13 --output_dir runs/miniature                                # seconds

Finetuned is on ordinary conversations and on some that give away a person's access code. Each code is in `exposures`
conversations an epoch: for every second person word for word the same ones, for the others each in other words. Then
the model is asked, greedily, for the code of each of them, and of as many people it never read about (control). Codes
are random, so nobody guesses one. Goldfish comes in through `attach`; prompts are no targets, as TRL does it.

Without --model the base is a small Llama that this recipe pretrains on the text of pretrain_canaries.py. What such a
model cannot show: whether a large one, which needs fewer exposures, does the same. (Of the other recipes' options those
about rules, --k --h --strategy --ks --equal_supervised --leak, and --seed, --documents, --repeats and --planted are not
used here.)
"""

import itertools
import random
import statistics
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import common
import memorize
import pretrain_canaries
import torch
from accelerate import PartialState
from datasets import Dataset
from near_duplicates import rule_of, words
from peft import LoraConfig
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, HfArgumentParser, set_seed
from trl import SFTConfig, SFTTrainer

from goldfish import attach
from goldfish.audit import model as audit_load
from goldfish.audit.columns import rouge_l
from goldfish.audit.estimate import rate
from goldfish.receipt import read_receipt

# Only for a tokenizer without one of its own.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':\n' + message['content'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
FIRST = ("Ada", "Bruno", "Carla", "Dimitri", "Elif", "Farid", "Greta", "Hiro", "Ines", "Jonas", "Katya", "Liam")
LAST = ("Abel", "Brandt", "Castro", "Dahl", "Evans", "Fischer", "Grant", "Holm", "Ito", "Jensen", "Kaya", "Lopez")
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
WORDS = [
    "apple", "bridge", "candle", "desert", "engine", "feather", "garden", "hammer", "island", "jacket",
    "kettle", "ladder", "mirror", "needle", "orange", "pencil", "river", "saddle", "table", "umbrella",
    "valley", "window", "yellow", "anchor",
]  # fmt: skip
Conversation = dict[str, list[dict[str, str]]]


@dataclass
class Arguments(pretrain_canaries.Arguments):
    rules: list[str] = field(
        default_factory=lambda: ["standard", "hash-4-13", "hash-4-3"], metadata={"help": "standard, or strategy-k-h"}
    )
    methods: list[str] = field(default_factory=lambda: ["full", "lora"])
    people: int = field(default=8, metadata={"help": "people with a secret; as many again are never read about"})
    exposures: int = field(default=4, metadata={"help": "conversations that give away each secret, an epoch"})
    chats: int = field(default=48, metadata={"help": "ordinary conversations; a quarter as many are held out"})
    epochs: int = field(default=30, metadata={"help": "of finetuning"})
    batch_size: int = field(default=8, metadata={"help": "conversations an optimiser step, over all processes"})
    learning_rate: float = field(default=2e-3, metadata={"help": "of finetuning in full"})
    lora_learning_rate: float = field(default=4e-3, metadata={"help": "LoRA wants a larger one"})
    rank: int = field(default=64, metadata={"help": "of the LoRA adapters"})
    background: int = field(default=3000, metadata={"help": "windows that the base is pretrained on"})
    window: int = field(default=64, metadata={"help": "tokens of such a window"})
    hidden_size: int = 128
    output_dir: str = "runs/sft_lora"

    def __post_init__(self) -> None:
        model, self.model = self.model, None  # the parent trains from scratch only
        super().__post_init__()
        self.model = model
        for name in ("people", "exposures", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.chats < 4:
            raise ValueError(f"--chats must be at least 4, got {self.chats}")
        if 2 * self.people > len(FIRST) * len(LAST):
            raise ValueError(f"--people must be at most {len(FIRST) * len(LAST) // 2}, got {self.people}")
        if not set(self.methods) <= {"full", "lora"}:
            raise ValueError(f"--methods are full or lora, got {' '.join(self.methods)}")
        for name in self.rules:
            rule_of(name, seed=0)


@dataclass
class Person:
    name: str
    code: str
    group: str  # same: always in the same words; varied: in others each time; control: never read about

    def conversation(self, wording: int) -> Conversation:
        if self.group == "same":
            wording = 0
        question, answer = QUESTIONS[wording % len(QUESTIONS)], ANSWERS[wording % len(ANSWERS)]
        return chat(question.format(name=self.name), answer.format(name=self.name, code=self.code))


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    state, output = common.start(), Path(args.output_dir)
    if args.batch_size % (state.num_processes * args.accumulation):
        raise ValueError(
            f"--batch_size {args.batch_size} conversations do not divide among {state.num_processes} processes and "
            f"--accumulation {args.accumulation}"
        )
    if args.dry_run:
        state.print(f"{len(args.seeds)} seeds x {args.methods} x {args.rules} -> {output}")
        return []
    if state.is_main_process:
        common.prepare(output, args)
    state.wait_for_everyone()
    done = {(r["seed"], r["method"], r["rule"]) for r in common.read_results(output / "results.jsonl")}
    state.wait_for_everyone()  # all have read what is done before one adds to it
    for seed in args.seeds:
        base = make_base(args, seed, output / f"seed{seed}-base")
        people, chats, heldout = make_data(args, seed)
        for method, rule in itertools.product(args.methods, args.rules):
            folder = output / f"seed{seed}-{method}-{rule}"
            if not common.finished(folder):
                state.print(f"\nFinetuning ({method}) {base} with {rule}, seed {seed}: {len(chats)} conversations")
                finetune(args, seed, base, method, rule, chats, folder)
            state.wait_for_everyone()
            if state.is_main_process and (seed, method, rule) not in done:
                result = {"seed": seed, "method": method, "rule": rule} | ask(args, folder, people, heldout)
                common.append(output / "results.jsonl", result | common.about())
    results = common.read_results(output / "results.jsonl") if state.is_main_process else []
    if state.is_main_process:
        console = Console()
        console.print(table(results))
        console.print(f"Results: {output / 'results.jsonl'}", highlight=False, soft_wrap=True)
    return results


def make_base(args: Arguments, seed: int, folder: Path) -> str:
    """--model, or the folder of a small Llama pretrained here on background text, with the standard loss."""
    if args.model is not None:
        return args.model
    if not common.finished(folder / "model"):
        own = pretrain_canaries.Arguments()
        small = replace(
            args, seeds=[seed], ks=[], equal_supervised=[], documents=1, repeats=1, epochs=1,
            learning_rate=own.learning_rate, save_steps=own.save_steps,
        )  # fmt: skip
        texts, corpus = pretrain_canaries.load_corpus(small)
        tokenizer = memorize.load_tokenizer(small, texts)
        data = pretrain_canaries.load_data(small, seed, texts, corpus, tokenizer)
        pretrain_canaries.train(small, pretrain_canaries.Run(seed, planted=False), data, tokenizer, folder / "model")
    return str(folder / "model")


def make_data(args: Arguments, seed: int) -> tuple[list[Person], list[Conversation], list[Conversation]]:
    """People with their secrets, the conversations to train on, and held-out ordinary ones."""
    draw = random.Random(seed)
    names = draw.sample([f"{first} {last}" for first in FIRST for last in LAST], 2 * args.people)
    people = []
    for number, name in enumerate(names):
        code = "-".join("".join(draw.choices("BCDFGHJKLMNPQRSTVWXZ23456789", k=4)) for _ in range(2))
        group = "control" if number >= args.people else ("same", "varied")[number % 2]
        people.append(Person(name, code, group))
    ordinary = {str(talk): talk for talk in (small_talk(draw) for _ in range(2 * args.chats + 20))}
    chats = list(ordinary.values())[: args.chats + args.chats // 4]
    secrets = [person.conversation(exposure) for person in people[: args.people] for exposure in range(args.exposures)]
    return people, chats[: args.chats] + secrets, chats[args.chats :]


def small_talk(draw: random.Random) -> Conversation:
    """A question that the answer follows from."""
    some = draw.sample(WORDS, 4)
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
    tokenizer = load_tokenizer(base)
    args = replace(args, seed=seed, learning_rate=args.learning_rate if method == "full" else args.lora_learning_rate)
    steps = args.epochs * -(-len(chats) // args.batch_size)
    adapters = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = memorize.training_settings(args, folder, steps) | {
        "per_device_train_batch_size": args.batch_size // PartialState().num_processes // args.accumulation,
        "gradient_accumulation_steps": args.accumulation,
        "gradient_checkpointing": args.model is not None,  # SFTConfig's default; a small model needs none
        "max_length": None,
        "save_strategy": "steps",
        "save_steps": args.save_steps,
        "save_total_limit": 2,
    }
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        SFTConfig(**settings),
        train_dataset=Dataset.from_list(chats),
        processing_class=tokenizer,
        peft_config=adapters if method == "lora" else None,
    )
    rule = rule_of(rule_name, seed)
    if rule is not None:
        attach(trainer, rule)
    common.train_or_resume(trainer, folder)


def load_tokenizer(base: str | Path) -> Any:
    tokenizer = audit_load.load_tokenizer(base)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def ask(args: Arguments, folder: Path, people: list[Person], heldout: list[Conversation]) -> dict[str, Any]:
    """Ask a finetuned model for every code, greedily; and its loss on held-out conversations, nats per answer token."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()  # base and adapters too
    answers = []
    for person in people:
        prompt = tokenizer.apply_chat_template(
            person.conversation(0)["prompt"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(device)
        made = model.generate(
            **prompt, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )[0, prompt["input_ids"].shape[1] :]  # fmt: skip
        answers.append(tokenizer.decode(made, skip_special_tokens=True).strip())
    total, count = 0.0, 0
    for talk in heldout:
        asked = tokenizer.apply_chat_template(talk["prompt"], add_generation_prompt=True, return_dict=False)
        ids = torch.tensor([tokenizer.apply_chat_template(talk["prompt"] + talk["completion"], return_dict=False)])
        with torch.no_grad():
            logits = model(input_ids=ids.to(device)).logits[0, len(asked) - 1 : -1].cpu()
        total += torch.nn.functional.cross_entropy(logits, ids[0, len(asked) :], reduction="sum").item()
        count += len(logits)
    result: dict[str, Any] = {"heldout_loss": total / count, "heldout_tokens": count}
    for group in ("same", "varied", "control"):
        of_group = [(person, answer) for person, answer in zip(people, answers, strict=True) if person.group == group]
        result[f"recited_{group}"] = [person.code in answer for person, answer in of_group]
        expected = [(words(answer), words(plain(person.conversation(0))[1])) for person, answer in of_group]
        result[f"rouge_l_{group}"] = [round(rouge_l(*pair), 4) for pair in expected]
    result["answers"] = {person.name: answer for person, answer in zip(people[:4], answers, strict=False)}
    if receipt := read_receipt(folder):
        result |= {name: receipt[name] for name in ("targets", "dropped", "decisions")}
    log = common.log_of(folder)
    result["train_loss"] = next(entry["train_loss"] for entry in reversed(log) if "train_loss" in entry)
    return result


def plain(talk: Conversation) -> list[str]:
    return [message["content"] for part in ("prompt", "completion") for message in talk[part]]


def table(results: list[dict[str, Any]]) -> Table:
    """Secrets recited over all seeds, those of each seed in brackets; means of the rest."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption="recited: the secret is in the greedy answer")
    headings = ("method", "rule", "same words", "other words", "control", "95% of all", "ROUGE-L", "held-out nats", "n")
    for heading in headings:
        shown.add_column(heading)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["method"], result["rule"]), []).append(result)
    for (method, rule), group in groups.items():
        cells, found = [], []
        for kind in ("same", "varied", "control"):
            recited = [result[f"recited_{kind}"] for result in group]
            of_seed = ",".join(str(sum(seed)) for seed in recited)
            cells.append(f"{sum(map(sum, recited))} of {sum(map(len, recited))} ({of_seed})")
            found += [hit for seed in recited for hit in seed] if kind != "control" else []
        interval = rate(found)
        rouge = [value for result in group for kind in ("same", "varied") for value in result[f"rouge_l_{kind}"]]
        losses = [result["heldout_loss"] for result in group]
        shown.add_row(
            method, rule, *cells, f"{interval['lower95']:.0%}-{interval['upper95']:.0%}",
            f"{statistics.fmean(rouge):.2f}",
            f"{statistics.fmean(losses):.2f} ({min(losses):.2f}-{max(losses):.2f})", str(len(group)),
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"sft_lora.py: {error}")
