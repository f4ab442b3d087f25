"""Near-duplicates: documents that a model only sees in reformatted versions, and is then asked for in plain form.

    python recipes/near_duplicates.py     # 2 CPU cores: 3 seeds x 4 trainings x 2 kinds of copies, an hour or two
    python recipes/near_duplicates.py --edits 0 0.01 0.02 0.05 0.1 --documents 3 --window 112 --epochs 50 --seeds 0 \\
        --copies reformatted --rules standard {hash,letters}-4-{3,5,8,13} text-4-8    # leakage against edit rate
    python recipes/near_duplicates.py --documents 2 --epochs 1 --hidden-size 32 --seeds 0 --output-dir runs/miniature

Every document is trained on in `versions` copies, either exact or each reformatted in its own way (line breaks,
indentation, case, doubled spaces), optionally with edited words. The audit gives the model the plain first half and
compares its greedy continuation with the second as normalised words (ROUGE-L), so that another line break or case
counts as the same text. Held-out documents are the floor: what a model gets right without having seen the text. The
teacher-forced accuracy on tokens that the rule drops in the plain text shows whether other versions taught them.
With several --edits, one model is trained on that many documents of each kind. Every loss is trained for equally many
*supervised* tokens: a rule that drops a quarter gets a third more epochs. A stopped run goes on with its command.
"""

import itertools
import random
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import numpy as np
import pandas
import runs
from transformers import HfArgumentParser, LlamaForCausalLM, set_seed

from goldfish import audit
from goldfish.audit.columns import rouge_l
from goldfish.receipt import read_receipt


@dataclass
class Arguments:
    rules: list[str] = field(
        default_factory=lambda: ["standard", "hash-4-13", "letters-4-8", "letters-4-3"],
        metadata={"help": "standard, or strategy-k-h[-max_kept]"},
    )
    copies: list[str] = field(default_factory=lambda: ["reformatted", "exact"], metadata={"help": "kinds of versions"})
    versions: int = field(default=5, metadata={"help": "copies of each document"})
    edits: list[float] = field(default_factory=lambda: [0.0], metadata={"help": "shares of words edited per version"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    documents: int = field(
        default=6, metadata={"help": "documents to train on, for each of --edits; as many are held out"}
    )
    window: int = field(default=128, metadata={"help": "tokens of a document; the first half is the audit's prefix"})
    epochs: int = field(default=120, metadata={"help": "of the standard loss; rules get k/(k-1) times as many"})
    batch_size: int = field(default=8, metadata={"help": "versions per optimiser step"})
    learning_rate: float = 2e-3
    hidden_size: int = field(default=128, metadata={"help": "of the small Llama that is trained from scratch"})
    vocab_size: int = field(default=2048, metadata={"help": "of the byte-level BPE that is trained on the corpus"})
    text: str | None = field(default=None, metadata={"help": "corpus: .txt, or .jsonl with a `text` field"})
    output_dir: str = "runs/near_duplicates"

    def __post_init__(self) -> None:
        runs.at_least(1, self, "versions", "documents", "epochs", "batch_size")
        runs.at_least(8, self, "window")
        if not set(self.copies) <= {"reformatted", "exact"}:
            raise ValueError(f"--copies are reformatted or exact, got {' '.join(self.copies)}")
        for name in self.rules:
            common.rule_of(name)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    state, output = runs.start(args.batch_size), Path(args.output_dir)
    if state.num_processes > 1:
        raise ValueError(f"this recipe runs in one process, not in {state.num_processes}; start it with python")
    runs.begin(output, args)
    texts = [" ".join(text.split()) for text in common.load_texts(args.text)]  # plain: words with a space between
    tokenizer = common.byte_level_bpe(texts, args.vocab_size)
    for seed, copies in itertools.product(args.seeds, args.copies):
        split = common.split_windows(texts, tokenizer, args.documents * len(args.edits), args.window, seed)
        plain = [tokenizer.decode(ids) for ids in split[0]]
        versions = make_versions(plain, copies, args.edits, args.versions, seed)
        for rule in args.rules:
            known = runs.read_results(output / "results.jsonl")
            if (seed, copies, rule) in {(r["seed"], r["copies"], r["rule"]) for r in known}:
                continue
            folder = output / f"seed{seed}-{copies}-{rule}"
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
            trained = train(args, rule, seed, versions, tokenizer, folder / "model")
            inputs = common.save_windows(folder, split, tokenizer)
            common.audit_halves(folder / "model", folder / "audit", inputs, args.window, rule)
            shutil.rmtree(folder / "model")  # nobody needs hundreds of checkpoints; the audits stay
            for edits, scores in zip(args.edits, scores_of(folder / "audit", len(args.edits)), strict=True):
                result = {"seed": seed, "copies": copies, "edits": edits, "rule": rule} | trained | scores
                runs.append(output / "results.jsonl", result | runs.about())
    results = runs.read_results(output / "results.jsonl")
    print(f"\n{table(results)}\nResults: {output / 'results.jsonl'}")
    return results


def make_versions(documents: list[str], copies: str, edits: list[float], versions: int, seed: int) -> list[str]:
    """All versions of all documents; document i is edited with share i of `edits`, which repeat.

    Reformatted versions differ in line breaks, indentation, case and spacing.
    """
    result = []
    for number, document in enumerate(documents):
        for version in range(versions):
            draw = random.Random(f"{seed} {number} {version}")
            text = edit(document, documents, edits[number % len(edits)], draw)
            result.append(reformat(text, draw) if copies == "reformatted" else text)
    return result


def edit(text: str, pool: list[str], share: float, draw: random.Random) -> str:
    """Replace, insert or delete that share of the words; new words come from other documents."""
    pieces = []
    for piece in re.findall(r"\s+|\S+", text):
        kind = "keep"
        if not piece.isspace() and draw.random() < share:
            kind = draw.choice(("replace", "insert", "delete"))
        if kind in ("replace", "insert"):
            pieces.append(draw.choice(draw.choice(pool).split()))
        if kind == "insert":
            pieces.append(" ")
        if kind in ("keep", "insert"):
            pieces.append(piece)
    return "".join(pieces)


def reformat(text: str, draw: random.Random) -> str:
    """The same words in another layout and case."""
    words = text.split()
    case = draw.choice((str, str, str, str.lower, str.upper))
    indent, width = " " * draw.choice((0, 0, 2, 4)), draw.randint(6, 14)
    space = draw.choice((" ", " ", " ", "  "))
    lines = [space.join(words[i : i + width]) for i in range(0, len(words), width)]
    return "\n".join(indent + case(line) for line in lines)


def train(
    args: Arguments, rule_name: str, seed: int, versions: list[str], tokenizer: Any, folder: Path
) -> dict[str, Any]:
    """Train under a rule; returns its epochs and its drop rate."""
    rule, epochs = common.rule_of(rule_name, seed), args.epochs
    if rule is not None:
        epochs = round(epochs * rule.k / (rule.k - 1))
    rows = [tokenizer(text)["input_ids"] for text in versions]
    longest, context = max(map(len, rows)), max(512, args.window)
    if longest > context:
        raise ValueError(f"a version has {longest} tokens, the model's context is {context}; lower --window")
    set_seed(seed)
    model = LlamaForCausalLM(common.small_llama(tokenizer, args.hidden_size, context))
    settings = common.training_settings(
        folder, len(rows), epochs=epochs, batch_size=args.batch_size, learning_rate=args.learning_rate, seed=seed
    )
    runs.train_or_resume(common.make_trainer(model, settings, rows, tokenizer, rule), folder)
    receipt = read_receipt(folder)
    return {"epochs": epochs} | ({"drop_rate": receipt["dropped"] / receipt["targets"]} if receipt else {})


def scores_of(folder: Path, kinds: int) -> list[dict[str, float]]:
    """For each share of edits: scores of its members and of all held-out documents."""
    records = audit.records(folder).to_pandas()
    text = [[common.words("".join(tokens)) for tokens in records[f"{part}_tokens"]] for part in ("output", "suffix")]
    records["words"] = [rouge_l(*pair) for pair in zip(*text, strict=True)]
    records["nats"] = records["nll"].map(np.mean)
    heldout, members = (records[records["split"] == split] for split in ("heldout", "members"))
    floor = {"rouge_l_heldout": heldout["words"].mean(), "nll_heldout": heldout["nats"].mean()}
    result = []
    for _, group in members.groupby(members["index"] % kinds):
        scores = {"rouge_l_members": group["words"].mean(), "nll_members": group["nats"].mean()}
        if group["dropped"].notna().all():
            dropped, correct, nll = (np.concatenate(group[name].tolist()) for name in ("dropped", "correct", "nll"))
            for name, where in (("dropped", dropped), ("kept", ~dropped)):
                if where.any():
                    scores |= {f"accuracy_{name}": correct[where].mean(), f"nll_{name}": nll[where].mean()}
                    scores[f"tokens_{name}"] = int(where.sum())
        result.append(
            {name: value if isinstance(value, int) else float(value) for name, value in (floor | scores).items()}
        )
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Means over the seeds. left: (ROUGE-L - floor) / the same of standard; kept, dropped: accuracy on these tokens."""
    frame = pandas.DataFrame(results)
    frame = frame.reindex(columns=frame.columns.union(["drop_rate", "accuracy_kept", "accuracy_dropped"], sort=False))
    groups = frame.groupby(["copies", "edits", "rule"], sort=False)
    mean = groups.mean(numeric_only=True)
    recited = mean["rouge_l_members"] - mean["rouge_l_heldout"]
    shown = pandas.DataFrame(
        {
            "drop": mean["drop_rate"],
            "ROUGE-L": mean["rouge_l_members"],
            "least": groups["rouge_l_members"].min(),
            "greatest": groups["rouge_l_members"].max(),
            "floor": mean["rouge_l_heldout"],
            "left": [
                value / recited.get((copies, edits, "standard"), np.nan)
                for (copies, edits, _), value in recited.items()
            ],
            "kept": mean["accuracy_kept"],
            "dropped": mean["accuracy_dropped"],
            "nll": mean["nll_heldout"],
            "seeds": groups.size(),
        }
    )
    return str(shown.reset_index().to_string(index=False, float_format="%.2f", na_rep="-"))


if __name__ == "__main__":
    runs.command_line(main)
