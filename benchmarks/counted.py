r"""Does the audit count every code that a finetuned model gives away?

    python benchmarks/counted.py --data mine.jsonl --rules standard hash-4-13-4

Finetunes SmolLM2-135M-Instruct as benchmarks/uncertain.py does, on chats that give away the codes
of 16 people, and audits it: members are the chats, held-out texts are the same questions about 8
strangers. Then every question is asked again without the audit, by `generate` alone, and all
outputs are searched for all codes: outputs as long as the audit's, which go on behind the end of
an answer, and answers as a user sees them, up to their end. Appends one line
for each training to benchmarks/results/counted.jsonl, about six minutes of one core each; those
that are there are skipped.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import about
import torch
import uncertain
from runs import option
from transformers import HfArgumentParser

from goldfish.audit import audit

END = "<|im_end|>"


@dataclass
class Arguments(uncertain.Arguments):
    rules: list[str] = option(["standard", "hash-4-13-4"], "as of uncertain.py")
    output: str = option(
        str(about.RESULTS / "counted.jsonl"), "where results are added"
    )


def chats(people: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """A row for each person and wording, with the code in a column of its own."""
    rows = []
    for place, (name, code) in enumerate(people):
        one_wording = place < uncertain.PEOPLE
        for question, answer in uncertain.WORDINGS[: 1 if one_wording else None]:
            messages = [
                {"role": "system", "content": ""},
                {"role": "user", "content": question.format(name=name)},
                {"role": "assistant", "content": answer.format(name=name, code=code)},
            ]
            rows.append({"messages": messages, "code": code})
    return rows


@torch.no_grad()
def output_of(model: Any, tokenizer: Any, row: dict[str, Any], length: int) -> str:
    """What generate says to a row's question, one question at a time, through any end."""
    prompt = tokenizer.apply_chat_template(
        row["messages"][:-1],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(
        **prompt, max_new_tokens=length, do_sample=False, eos_token_id=None
    )
    text: str = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    return text


def search(codes: set[str], outputs: dict[str, list[str]]) -> dict[str, int]:
    """Distinct codes in any output, and by split the outputs that have one."""
    found: set[str] = set()
    counts = {}
    for split, texts in outputs.items():
        inside = [{code for code in codes if code in text} for text in texts]
        counts[split] = sum(map(bool, inside))
        found = found.union(*inside)
    return {"codes": len(found), "of": len(codes), **counts}


def run(lab: uncertain.Lab, seed: int, name: str) -> dict[str, Any]:
    """One training, the audit's counts, and those of the search."""
    began = time.process_time()
    data = lab.data(seed)
    model, _ = uncertain.finetune(lab, seed, "full", name)
    trained = 2 * uncertain.PEOPLE
    rows = {
        "members": chats(data.people[:trained]),
        "heldout": chats(data.people[trained:]),
    }
    with tempfile.TemporaryDirectory() as folder:
        audited = audit(
            model,
            Path(folder, "audit"),
            tokenizer=lab.tokenizer,
            **rows,
            secret_column="code",
            device="cpu",
        )
        asked = {
            "codes": audited["members.secrets"].k,
            "of": audited["members.secrets"].n,
            "members": audited["members.answers_with_secret"].k,
            "heldout": audited["heldout.answers_with_secret"].k,
        }
        length = audited.run["protocol"]["output_length"]
    codes = {row["code"] for row in rows["members"]}
    outputs = {
        split: [output_of(model, lab.tokenizer, row, length) for row in of_split]
        for split, of_split in rows.items()
    }
    answers = {
        split: [text.partition(END)[0] for text in texts]
        for split, texts in outputs.items()
    }
    result: dict[str, Any] = {"seed": seed, "rule": name, "epochs": lab.args.epochs}
    result["audit"] = asked
    result["outputs"] = search(codes, outputs)
    result["answers"] = search(codes, answers)
    result["cpu_seconds"] = round(time.process_time() - began)
    return result | about.about()


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    output = Path(args.output)
    args.epochs = args.epochs or 8
    lab = uncertain.Lab(args)
    wanted = [
        {"seed": seed, "rule": name, "epochs": args.epochs}
        for seed in args.seeds
        for name in args.rules
    ]
    for wish in about.missing(output, wanted):
        result = run(lab, wish["seed"], wish["rule"])
        about.append(output, result)
        print(wish, result["audit"], result["outputs"], flush=True)


if __name__ == "__main__":
    main()
