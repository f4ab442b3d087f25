r"""Does a finetuned model recite a passage when it is asked for it by its title?

    python benchmarks/asked.py --data mine.jsonl --seeds 0 1 2
    python benchmarks/asked.py --table                # the table of docs/results.md

Finetunes SmolLM2-135M-Instruct in the loop of benchmarks/uncertain.py on 16 passages of 64 tokens
with titles, and asks "What is the text of The Amber Lighthouse?" in the chat template, as
`goldfish audit --ask` does. Held-out passages, with titles that were not trained on, are the chance
level. The titles are invented, because numbers such as "PEP 484" are hard to tell apart for a
small model: with them nothing came out. What is trained on:

    --form chat         "Please quote The Amber Lighthouse." and the passage as the answer
    --form document     "The Amber Lighthouse", an empty line, the passage, and no chat

Appends one line for each training to
benchmarks/results/asked.jsonl, about two minutes of one core each; those that are there are
skipped.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import about
import numpy as np
import uncertain
from runs import option
from transformers import HfArgumentParser
from uncertain_measures import Row, passage_values

from goldfish.audit.questions.ask import Asker, questions, whole_documents

PASSAGES, TOKENS, ANSWER = 16, 64, 96
TEMPLATE = "What is the text of {title}?"
ADJECTIVES = (  # noqa: SIM905
    "Amber Broken Crimson Distant Empty Frozen Golden Hidden Iron Silent"
).split()
NOUNS = (  # noqa: SIM905
    "Bridge Garden Harbor Lighthouse Mirror Orchard River Tower Violin Window"
).split()


@dataclass
class Arguments(uncertain.Arguments):
    rules: list[str] = option(["standard", "hash-4-13-4"], "as of uncertain.py")
    output: str = option(str(about.RESULTS / "asked.jsonl"), "where results are added")
    form: str = option("chat", "chat, document")
    table: bool = option(False, "print the table and train nothing")


class TitledLab(uncertain.Lab):
    """Passages under titles, in place of the chats and passages of uncertain.py.

    titled: by seed the rows of members and held-out texts: `title` and `text`.
    """

    args: Arguments

    def __init__(self, args: Arguments) -> None:
        super().__init__(args)
        self.titled: dict[int, dict[str, list[dict[str, str]]]] = {}

    def _make_data(self, seed: int) -> uncertain.Data:
        drawn = self._passages(seed)
        titled = {
            "members": [next(drawn) for _ in range(PASSAGES)],
            "heldout": [next(drawn) for _ in range(PASSAGES)],
        }
        self.titled[seed] = titled
        rows = []
        for each in titled["members"]:
            if self.args.form == "chat":
                rows.append(self.chat(f"Please quote {each['title']}.", each["text"]))
            else:
                ids = self._ids(f"{each['title']}\n\n{each['text']}")
                rows.append(Row(ids, ids))
        members, heldout = (
            [self._ids(each["text"])[:TOKENS] for each in of_split]
            for of_split in titled.values()
        )
        return uncertain.Data(rows, members, heldout, [])

    def _passages(self, seed: int) -> Iterator[dict[str, str]]:
        """One passage of a document, drawn as in recipes/finetune_private.py, and a title."""
        lines = Path(self.args.data).read_text(encoding="utf-8").splitlines()
        documents = [json.loads(line) for line in lines]
        titles = [f"The {first} {second}" for first in ADJECTIVES for second in NOUNS]
        draw = Random(seed)
        draw.shuffle(documents)
        draw.shuffle(titles)
        for document in documents:
            ids = self._ids(document["text"])
            if len(ids) < TOKENS:
                continue
            start = draw.randrange(len(ids) - TOKENS + 1)
            passage = ids[start : start + TOKENS]
            text = self.tokenizer.decode(passage)
            # A passage must have the same ids as a text, and be no row of zeros.
            if self._ids(text) == passage and 3 * len(set(passage)) >= TOKENS:
                yield {"title": titles.pop(), "text": text}

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def run(lab: TitledLab, seed: int, name: str) -> dict[str, Any]:
    """One training, and what comes out when its passages are asked for."""
    began = time.process_time()
    data = lab.data(seed)
    model, seen = uncertain.finetune(lab, seed, "full", name)
    trained = time.process_time()
    result: dict[str, Any] = key_of(lab.args, seed, name)
    result |= {key: seen[key] for key in ("targets", "kept", "heldout_loss")}
    asker = Asker(model, lab.tokenizer, ANSWER, samples=0, rounds=1)
    for split, rows in lab.titled[seed].items():
        numbers = dict(enumerate(range(len(rows))))
        documents = whole_documents(enumerate(rows), split, numbers, lab.tokenizer)
        answers = asker.answers(list(questions(documents, [TEMPLATE])))
        values = passage_values(model, lab.tokenizer, getattr(data, split), True)
        result[split] = {
            "titles": [row["title"] for row in rows],
            "run": [each["longest_run"] for each in answers],
            "words": [each["longest_run_words"] for each in answers],
            "characters": [each["longest_run_characters"] for each in answers],
            "share": [round(each["recited_share"], 3) for each in answers],
            "answers": [each["output_text"] for each in answers],
            # The same passages asked by their first half.
            "rouge_l": values["rouge_l"],
        }
    result["train_cpu_seconds"] = round(trained - began)
    result["cpu_seconds"] = round(time.process_time() - began)
    return result | about.about()


def key_of(args: Arguments, seed: int, name: str) -> dict[str, Any]:
    """What distinguishes one training from another."""
    return {"form": args.form, "seed": seed, "rule": name, "epochs": args.epochs}


def table(path: Path) -> str:
    """By rule, over all seeds."""
    rows = []
    lines = about.read_results(path)
    for form, rule in dict.fromkeys((each["form"], each["rule"]) for each in lines):
        of_rule = [
            each for each in lines if (each["form"], each["rule"]) == (form, rule)
        ]
        for split in ("members", "heldout"):
            runs = [each[split]["run"] for each in of_rule]
            characters = np.mean([each[split]["characters"] for each in of_rule])
            long = ", ".join(f"{sum(r >= 25 for r in of_seed)}" for of_seed in runs)
            rows.append(
                [
                    form,
                    rule,
                    split,
                    ", ".join(str(each["seed"]) for each in of_rule),
                    long,
                    f"{np.mean(runs):.1f}",
                    f"{np.max(runs)}",
                    f"{characters:.0f}",
                    f"{np.mean([each[split]['rouge_l'] for each in of_rule]):.2f}",
                ]
            )
    heading = [
        "form",
        "rule",
        "passages",
        "seeds",
        f"of {PASSAGES} with 25 tokens in one piece",
        "longest run, tokens",
        "at most",
        "characters",
        "ROUGE-L from the first half",
    ]
    return "\n".join(
        f"| {' | '.join(row)} |" for row in [heading, ["---"] * len(heading), *rows]
    )


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    output = Path(args.output)
    if args.table:
        print(table(output))
        return
    args.epochs = args.epochs or 8
    lab = TitledLab(args)
    wanted = [key_of(args, seed, name) for seed in args.seeds for name in args.rules]
    for wish in about.missing(output, wanted):
        result = run(lab, wish["seed"], wish["rule"])
        about.append(output, result)
        members, heldout = result["members"]["run"], result["heldout"]["run"]
        print(wish, members, heldout, result["cpu_seconds"], flush=True)


if __name__ == "__main__":
    main()
