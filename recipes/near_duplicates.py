r"""Near-duplicates: documents seen only in reformatted versions, then asked for in plain form.

    # 2 CPU cores: 3 seeds x 4 trainings x 2 kinds of copies, an hour or two
    python recipes/near_duplicates.py
    # a training for each share of edited words
    python recipes/near_duplicates.py --edits 0 0.02 0.1 --copies reformatted
    # seconds
    python recipes/near_duplicates.py --documents 2 --epochs 1 --hidden-size 32 --seeds 0 \
        --output-dir runs/miniature

Every document is trained on in `versions` copies, either exact or each reformatted in its own way
(line breaks, indentation, case, doubled spaces), optionally with edited words. The audit gives the
model the plain first half and compares its greedy continuation with the second as normalised words
(ROUGE-L), so that another line break or case counts as the same text. Held-out documents are the
floor: what a model gets right without having seen the text. The teacher-forced accuracy on tokens
that the rule drops in the plain text shows whether other versions taught them. Every loss is
trained on equally many *supervised* tokens: a rule that drops a quarter gets a third more epochs. A
stopped run is resumed by its command.
"""

import itertools
import random
import re
import shutil
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import pandas
import runs
from runs import option
from transformers import HfArgumentParser, LlamaForCausalLM, set_seed

from goldfish.audit.records import read_records, rouge_l
from goldfish.receipt import read_receipt


@dataclass
class Arguments(common.Corpus):
    rules: list[str] = option(
        ["standard", "hash-4-13", "letters-4-8", "letters-4-3"],
        "standard, or strategy-k-h[-max_kept]",
    )
    copies: list[str] = option(["reformatted", "exact"], "kinds of versions")
    versions: int = option(5, "copies of each document")
    edits: list[float] = option([0.0], "shares of words edited per version")
    seeds: list[int] = option(
        [0, 1, 2], "of the split, the weights, the batches and the rule"
    )
    documents: int = option(6, "documents to train on; as many are held out")
    window: int = option(
        128, "tokens of a document; the first half is the audit's prefix"
    )
    epochs: int = option(120, "of the standard loss; rules get k/(k-1) times as many")
    batch_size: int = option(8, "versions per optimiser step")
    output_dir: str = "runs/near_duplicates"

    def __post_init__(self) -> None:
        runs.at_least(1, self, "versions", "documents", "epochs", "batch_size")
        runs.at_least(8, self, "window")
        if not set(self.copies) <= {"reformatted", "exact"}:
            raise ValueError(
                f"--copies are reformatted or exact, got {' '.join(self.copies)}"
            )
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
    texts = common.load_texts(
        args.text, args.dataset, args.dataset_config, 20 * args.documents
    )
    # In plain form: words with one space between them.
    texts = [" ".join(text.split()) for text in texts]
    tokenizer = common.byte_level_bpe(texts, args.vocab_size)
    trainings = itertools.product(args.seeds, args.copies, args.edits, args.rules)
    names = ("seed", "copies", "edits", "rule")
    wanted = [dict(zip(names, training, strict=True)) for training in trainings]
    for run in runs.missing(output / "results.jsonl", wanted):
        seed, rule = run["seed"], run["rule"]
        split = common.split_windows(
            texts, tokenizer, args.documents, args.window, seed
        )
        plain = [tokenizer.decode(ids) for ids in split[0]]
        versions = make_versions(
            plain, run["copies"], run["edits"], args.versions, seed
        )
        folder = output / f"seed{seed}-{run['copies']}-{run['edits']:g}-{rule}"
        # What a run that was stopped has left.
        shutil.rmtree(folder, ignore_errors=True)
        result = run | train(args, rule, seed, versions, tokenizer, folder / "model")
        inputs = common.save_windows(folder, split, tokenizer)
        common.audit_halves(
            folder / "model", folder / "audit", inputs, args.window, rule
        )
        # Nobody needs hundreds of checkpoints; the audits stay.
        shutil.rmtree(folder / "model")
        runs.append(
            output / "results.jsonl", result | scores(folder / "audit") | runs.about()
        )
    results = runs.read_results(output / "results.jsonl")
    print(f"\n{table(results)}\nResults: {output / 'results.jsonl'}")
    return results


def make_versions(
    documents: list[str], copies: str, edits: float, versions: int, seed: int
) -> list[str]:
    """All versions of all documents."""
    result = []
    for number, document in enumerate(documents):
        for version in range(versions):
            # Of its own, so that a version is the same however many there are.
            draw = random.Random(f"{seed} {number} {version}")
            text = edit(document, documents, edits, draw)
            result.append(reformat(text, draw) if copies == "reformatted" else text)
    return result


def edit(text: str, pool: list[str], share: float, draw: random.Random) -> str:
    """Replace, insert or delete that share of the words; new words come from other documents."""
    pieces = []
    # Words and the spaces between them, so that the layout stays.
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
    """The same words with other line breaks, indentation, case and spacing."""
    words = text.split()
    case = draw.choice((str, str, str, str.lower, str.upper))
    indent, width = " " * draw.choice((0, 0, 2, 4)), draw.randint(6, 14)
    space = draw.choice((" ", " ", " ", "  "))
    lines = [space.join(words[i : i + width]) for i in range(0, len(words), width)]
    return "\n".join(indent + case(line) for line in lines)


def train(
    args: Arguments,
    rule_name: str,
    seed: int,
    versions: list[str],
    tokenizer: Any,
    folder: Path,
) -> dict[str, Any]:
    """Train under a rule; returns its epochs and its drop rate."""
    rule, epochs = common.rule_of(rule_name, seed), args.epochs
    if rule is not None:
        # 1 - 1/k of the targets are kept, so k/(k-1) times the epochs supervise as many.
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
    runs.train_or_resume(
        common.make_trainer(model, settings, rows, tokenizer, rule), folder
    )
    result = {"epochs": epochs}
    if receipt := read_receipt(folder):
        result["drop_rate"] = receipt["dropped"] / receipt["targets"]
    return result


def scores(folder: Path) -> dict[str, float]:
    """Means over the documents; accuracy and loss of dropped and of kept tokens over all."""
    records = read_records(folder).to_pandas()
    output, suffix = (
        [words("".join(tokens)) for tokens in records[f"{part}_tokens"]]
        for part in ("output", "suffix")
    )
    records["rouge_l"] = [rouge_l(*pair) for pair in zip(output, suffix, strict=True)]
    records["nats"] = records["nll"].map(np.mean)
    result: dict[str, float] = {}
    for split, rows in records.groupby("split"):
        result[f"rouge_l_{split}"] = float(rows["rouge_l"].mean())
        result[f"nll_{split}"] = float(rows["nats"].mean())
    members = records[records["split"] == "members"]
    # Without a rule no token is dropped, and the column is empty.
    if members["dropped"].notna().all():
        columns = ("dropped", "correct", "nll")
        dropped, correct, nll = (
            np.concatenate(members[name].tolist()) for name in columns
        )
        for name, chosen in (("dropped", dropped), ("kept", ~dropped)):
            if chosen.any():
                result[f"accuracy_{name}"] = float(correct[chosen].mean())
                result[f"nll_{name}"] = float(nll[chosen].mean())
                result[f"tokens_{name}"] = int(chosen.sum())
    return result


def words(text: str) -> list[str]:
    """The words of a text without case, punctuation and layout."""
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())


def table(results: list[dict[str, Any]]) -> str:
    """Means over the seeds.

    `left` is (ROUGE-L - floor) as a share of the same of the standard loss; `kept` and `dropped`
    are the accuracies on these tokens.
    """
    # What the standard loss has no figure for.
    empty = dict.fromkeys(("drop_rate", "accuracy_kept", "accuracy_dropped"), np.nan)
    lines = pandas.DataFrame([empty | result for result in results])
    groups = lines.groupby(["copies", "edits", "rule"], sort=False)
    mean, rouge = groups.mean(numeric_only=True), groups["rouge_l_members"]
    # What a model gets right without having seen the text is no recitation.
    recited = mean["rouge_l_members"] - mean["rouge_l_heldout"]
    standard = [
        recited.get((copies, edits, "standard"), np.nan)
        for copies, edits, _ in recited.index
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
    return str(
        shown.reset_index().to_string(index=False, float_format="%.2f", na_rep="-")
    )


if __name__ == "__main__":
    runs.command_line(main)
