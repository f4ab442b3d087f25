"""Near-duplicates: documents that a model only sees in reformatted versions, and is then asked for in plain form.

    python recipes/near_duplicates.py     # 2 CPU cores: 3 seeds x 4 trainings x 2 kinds of copies, an hour or two
    python recipes/near_duplicates.py --edits 0 0.02 0.1 --copies reformatted      # a training for each share of edits
    python recipes/near_duplicates.py --documents 2 --epochs 1 --hidden-size 32 --seeds 0 --output-dir runs/miniature

Every document is trained on in `versions` copies, either exact or each reformatted in its own way (line breaks,
indentation, case, doubled spaces), optionally with edited words. The audit gives the model the plain first half and
compares its greedy continuation with the second as normalised words (ROUGE-L), so that another line break or case
counts as the same text. Held-out documents are the floor: what a model gets right without having seen the text. The
teacher-forced accuracy on tokens that the rule drops in the plain text shows whether other versions taught them.
Every loss is trained for equally many *supervised* tokens: a rule that drops a quarter gets a third more epochs. A
stopped run goes on with its command.
"""

import itertools
import random
import re
import shutil
import unicodedata
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
    copies: list[str] = field(
        default_factory=lambda: ["reformatted", "exact"], metadata={"help": "kinds of versions"}
    )
    versions: int = field(default=5, metadata={"help": "copies of each document"})
    edits: list[float] = field(
        default_factory=lambda: [0.0], metadata={"help": "shares of words edited per version"}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    documents: int = field(
        default=6, metadata={"help": "documents to train on; as many are held out"}
    )
    window: int = field(
        default=128, metadata={"help": "tokens of a document; the first half is the audit's prefix"}
    )
    epochs: int = field(
        default=120, metadata={"help": "of the standard loss; rules get k/(k-1) times as many"}
    )
    batch_size: int = field(default=8, metadata={"help": "versions per optimiser step"})
    learning_rate: float = 2e-3
    hidden_size: int = field(
        default=128, metadata={"help": "of the small Llama that is trained from scratch"}
    )
    vocab_size: int = field(
        default=2048, metadata={"help": "of the byte-level BPE that is trained on the corpus"}
    )
    text: str | None = field(
        default=None, metadata={"help": "corpus: .txt, or .jsonl with a `text` field"}
    )
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
    if runs.start(args.batch_size).num_processes > 1:
        raise ValueError(
            "this recipe runs in one process; start it with python, not with accelerate launch"
        )
    output = Path(args.output_dir)
    runs.begin(output, args)
    texts = [
        " ".join(text.split()) for text in common.load_texts(args.text)
    ]  # plain: words with a space between
    tokenizer = common.byte_level_bpe(texts, args.vocab_size)
    done = {
        (r["seed"], r["copies"], r["edits"], r["rule"])
        for r in runs.read_results(output / "results.jsonl")
    }
    for training in itertools.product(args.seeds, args.copies, args.edits, args.rules):
        if training in done:
            continue
        seed, copies, edits, rule = training
        split = common.split_windows(texts, tokenizer, args.documents, args.window, seed)
        versions = make_versions(
            [tokenizer.decode(ids) for ids in split[0]], copies, edits, args.versions, seed
        )
        folder = output / f"seed{seed}-{copies}-{edits:g}-{rule}"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
        result = {"seed": seed, "copies": copies, "edits": edits, "rule": rule}
        result |= train(args, rule, seed, versions, tokenizer, folder / "model")
        inputs = common.save_windows(folder, split, tokenizer)
        common.audit_halves(folder / "model", folder / "audit", inputs, args.window, rule)
        shutil.rmtree(folder / "model")  # nobody needs hundreds of checkpoints; the audits stay
        runs.append(output / "results.jsonl", result | scores(folder / "audit") | runs.about())
    results = runs.read_results(output / "results.jsonl")
    print(f"\n{table(results)}\nResults: {output / 'results.jsonl'}")
    return results


def make_versions(
    documents: list[str], copies: str, edits: float, versions: int, seed: int
) -> list[str]:
    """All versions of all documents. Reformatted ones differ in line breaks, indentation, case and spacing."""
    result = []
    for number, document in enumerate(documents):
        for version in range(versions):
            draw = random.Random(f"{seed} {number} {version}")
            text = edit(document, documents, edits, draw)
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
        raise ValueError(
            f"a version has {longest} tokens, the model's context is {context}; lower --window"
        )
    set_seed(seed)
    model = LlamaForCausalLM(common.small_llama(tokenizer, args.hidden_size, context))
    settings = common.training_settings(
        folder,
        len(rows),
        epochs=epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=seed,
    )
    runs.train_or_resume(common.make_trainer(model, settings, rows, tokenizer, rule), folder)
    receipt = read_receipt(folder)
    return {"epochs": epochs} | (
        {"drop_rate": receipt["dropped"] / receipt["targets"]} if receipt else {}
    )


def scores(folder: Path) -> dict[str, float]:
    """Means over the documents; accuracy and loss of dropped and of kept tokens over all of them."""
    records = audit.records(folder).to_pandas()
    text = [
        [words("".join(tokens)) for tokens in records[f"{part}_tokens"]]
        for part in ("output", "suffix")
    ]
    records["rouge_l"] = [rouge_l(*pair) for pair in zip(*text, strict=True)]
    records["nats"] = records["nll"].map(np.mean)
    result: dict[str, float] = {}
    for split, rows in records.groupby("split"):
        result |= {
            f"rouge_l_{split}": float(rows["rouge_l"].mean()),
            f"nll_{split}": float(rows["nats"].mean()),
        }
    members = records[records["split"] == "members"]
    if members["dropped"].notna().all():
        dropped, correct, nll = (
            np.concatenate(members[name].tolist()) for name in ("dropped", "correct", "nll")
        )
        for name, where in (("dropped", dropped), ("kept", ~dropped)):
            if where.any():
                result |= {
                    f"accuracy_{name}": float(correct[where].mean()),
                    f"nll_{name}": float(nll[where].mean()),
                }
                result[f"tokens_{name}"] = int(where.sum())
    return result


def words(text: str) -> list[str]:
    """The words of a text without case, punctuation and layout."""
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())


def table(results: list[dict[str, Any]]) -> str:
    """Means over the seeds. left: (ROUGE-L - floor) / the same of standard; kept, dropped: accuracy on these tokens."""
    empty = {
        "drop_rate": np.nan,
        "accuracy_kept": np.nan,
        "accuracy_dropped": np.nan,
    }  # of the standard loss
    groups = pandas.DataFrame([empty | result for result in results]).groupby(
        ["copies", "edits", "rule"], sort=False
    )
    mean, rouge = groups.mean(numeric_only=True), groups["rouge_l_members"]
    recited = mean["rouge_l_members"] - mean["rouge_l_heldout"]
    standard = [
        recited.get((copies, edits, "standard"), np.nan) for copies, edits, _ in recited.index
    ]
    shown = pandas.DataFrame(
        {
            "drop": mean["drop_rate"],
            "ROUGE-L": mean["rouge_l_members"],
            "least": rouge.min(),
            "greatest": rouge.max(),
            "floor": mean["rouge_l_heldout"],
            "left": recited / standard,
            "kept": mean["accuracy_kept"],
            "dropped": mean["accuracy_dropped"],
            "nll": mean["nll_heldout"],
            "seeds": groups.size(),
        }
    )
    return str(shown.reset_index().to_string(index=False, float_format="%.2f", na_rep="-"))


if __name__ == "__main__":
    runs.command_line(main)
