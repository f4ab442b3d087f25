r"""What does `goldfish check` find before the trainings of uncertain.py, and what came out?

    python benchmarks/uncertain_check.py --data mine.jsonl --seeds 0 1 2

Writes the codes of each rule and seed to results/uncertain_check.json; uncertain_table.py compares
them with the codes that came out. Reads no model, only its tokenizer.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import about  # first: it makes the recipes importable
import finetune_private as recipe
from runs import option
from transformers import HfArgumentParser
from uncertain import Arguments as Settings
from uncertain import Lab, chats_with_codes
from uncertain_measures import CODE

from goldfish import Goldfish
from goldfish.text.check import check

# A rule that drops nothing.
NOTHING = Goldfish(k=10**9)


@dataclass
class Arguments:
    data: str = option("", "as of uncertain.py")
    rules: list[str] = option(
        [
            "standard",
            "hash-4-13",
            "hash-3-13",
            "hash-4-13-4",
            "hash-2-13-2",
            "standard+secrets",
            "hash-4-13-4+secrets",
        ],
        "rules of uncertain.py that are rules of goldfish",
    )
    seeds: list[int] = option([0, 1, 2], "of uncertain.py")
    base: str = option("runs/uncertain_base", "where the pretrained model is unpacked")


def main(argv: list[str] | None = None) -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    lab = Lab(Settings(data=args.data, base=args.base))
    result: dict[str, dict[int, list[str]]] = {}
    for seed in args.seeds:
        for name in args.rules:
            whole = learned_whole(lab, seed, name)
            result.setdefault(name, {})[seed] = whole
            print(f"seed {seed} {name}: {len(whole)}", flush=True)
    path = about.RESULTS / "uncertain_check.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def learned_whole(lab: Lab, seed: int, name: str) -> list[str]:
    """Codes of which no informative token is dropped in every place."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "chats.jsonl")
        write_chats(lab, seed, path)
        found = check(path, lab.tokenizer, rule_of(lab, name), pattern=CODE.pattern)
    return sorted(found.exposed())


def rule_of(lab: Lab, name: str) -> Goldfish:
    base, _, secrets = name.partition("+")
    rule = NOTHING if base == "standard" else recipe.rule_of(base, lab.tokenizer)
    return replace(rule, secrets=CODE.pattern) if secrets else rule


def write_chats(lab: Lab, seed: int, path: Path) -> None:
    """The chats with codes, as a user has them: prompt and completion."""
    with path.open("w", encoding="utf-8") as file:
        for question, answer, _ in chats_with_codes(lab.data(seed).people):
            prompt = [
                {"role": "system", "content": ""},
                {"role": "user", "content": question},
            ]
            completion = [{"role": "assistant", "content": answer}]
            row = {"prompt": prompt, "completion": completion}
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
