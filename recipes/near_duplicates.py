"""Near-duplicates: documents that a model only ever sees in reformatted versions, and is then asked for in plain form.

    python recipes/near_duplicates.py     # 2 CPU cores: 3 seeds x 5 trainings x 2 kinds of copies, an hour or two
    python recipes/near_duplicates.py --edits 0 0.01 0.02 0.05 0.1 --documents 3 --window 112 --epochs 50 --seeds 0 \\
        --copies reformatted --rules standard {hash,letters}-4-{3,5,8,13} text-4-8    # leakage against edit rate
    python recipes/near_duplicates.py --documents 2 --epochs 1 --hidden_size 32 --seeds 0 --output_dir runs/miniature

Every document is trained on in `versions` copies, either exact or each reformatted in its own way (line breaks,
indentation, case, doubled spaces), perhaps with edited words. The audit gives the model the plain first half and
compares its greedy continuation with the second, as normalised words (ROUGE-L), so that another line break or case
counts as the same text. Held-out documents are the floor: what a model gets right without having seen the text.
And given the true tokens before, how often does it know a token that the rule drops in the plain text? There a rule
that was fooled by other versions is found out, with many more tokens to count than there are documents.
With several --edits one model is trained on that many documents of each kind.
(Of memorize.py's options --k, --h, --strategy and --seed are not used here: --rules and --seeds say the same.)
Every loss is trained for equally many *supervised* tokens: a rule that drops a quarter gets a third more epochs.
"""

import itertools
import json
import random
import re
import shutil
import statistics
import sys
import unicodedata
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import memorize
import torch
from accelerate import PartialState
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

import goldfish.audit
from goldfish import Goldfish
from goldfish.audit import audit
from goldfish.audit.columns import rouge_l


@dataclass
class Arguments(memorize.Arguments):
    documents: int = field(
        default=6, metadata={"help": "documents to train on, for each of --edits; as many are held out"}
    )
    window: int = field(default=128, metadata={"help": "tokens of a document; the first half is the audit's prefix"})
    versions: int = field(default=5, metadata={"help": "copies of each document"})
    epochs: int = field(default=120, metadata={"help": "of the standard loss; rules get k/(k-1) times as many"})
    rules: list[str] = field(
        default_factory=lambda: ["standard", "hash-4-13", "text-4-8", "letters-4-8", "letters-4-3"],
        metadata={"help": "standard, or strategy-k-h"},
    )
    copies: list[str] = field(default_factory=lambda: ["reformatted", "exact"], metadata={"help": "kinds of versions"})
    edits: list[float] = field(default_factory=lambda: [0.0], metadata={"help": "shares of words edited per version"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    output_dir: str = "runs/near_duplicates"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.versions < 1:
            raise ValueError(f"--versions must be at least 1, got {self.versions}")
        if not set(self.copies) <= {"reformatted", "exact"}:
            raise ValueError(f"--copies are reformatted or exact, got {' '.join(self.copies)}")
        for name in self.rules:
            rule_of(name, seed=0)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    output, state = Path(args.output_dir), PartialState(cpu=not torch.accelerator.is_available())
    if state.num_processes > 1:
        raise ValueError(f"this recipe runs in one process, not in {state.num_processes}; start it with python")
    if args.dry_run:
        state.print(f"{len(args.seeds)} seeds x {args.copies} x {args.rules}, edits {args.edits} together -> {output}")
        return []
    memorize.prepare_output(output, args)
    texts = [" ".join(text.split()) for text in memorize.load_texts(args)]  # plain: words with a space between
    tokenizer = memorize.load_tokenizer(args, texts)
    results = []
    for seed, copies in itertools.product(args.seeds, args.copies):
        seeded = replace(args, seed=seed, documents=args.documents * len(args.edits))
        windows = memorize.split_windows(seeded, texts, tokenizer)
        plain = [tokenizer.decode(ids) for ids in windows[0]]
        versions = make_versions(plain, copies, args.edits, args.versions, seed)
        for name in args.rules:
            folder = output / f"seed{seed}-{copies}-{name}"
            scores = train_and_extract(replace(seeded, output_dir=str(folder)), name, versions, windows, tokenizer)
            with (output / "results.jsonl").open("a", encoding="utf-8") as lines:
                for edits, score in zip(args.edits, scores, strict=True):
                    results.append({"seed": seed, "copies": copies, "edits": edits, "rule": name, **score})
                    lines.write(json.dumps(results[-1]) + "\n")
    console = Console()
    console.print(table(results))
    console.print(f"Results: {output / 'results.jsonl'}", highlight=False, soft_wrap=True)
    return results


def rule_of(name: str, seed: int) -> Goldfish | None:
    """The rule that "strategy-k-h" names; None for "standard"."""
    if name == "standard":
        return None
    try:
        strategy, k, h = name.split("-")
        return Goldfish(k=float(k), h=int(h), strategy=strategy, seed=seed)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"--rules are standard or strategy-k-h such as text-4-8, got {name!r}: {error}") from error


def make_versions(documents: list[str], copies: str, edits: list[float], versions: int, seed: int) -> list[str]:
    """All versions of all documents, of which each of `edits` takes its turn: the first share is the first document's.

    Reformatted versions differ in line breaks, indentation, case and spacing.
    """
    made = []
    for number, document in enumerate(documents):
        for version in range(versions):
            draw = random.Random(f"{seed} {number} {version}")
            text = edit(document, documents, edits[number % len(edits)], draw)
            made.append(reformat(text, draw) if copies == "reformatted" else text)
    return made


def edit(text: str, pool: list[str], share: float, draw: random.Random) -> str:
    """Replace, insert or delete that share of the words; new words come from other documents."""
    made = []
    for piece in re.findall(r"\s+|\S+", text):
        kind = "keep"
        if not piece.isspace() and draw.random() < share:
            kind = draw.choice(("replace", "insert", "delete"))
        if kind in ("replace", "insert"):
            made.append(draw.choice(draw.choice(pool).split()))
        if kind == "insert":
            made.append(" ")
        if kind in ("keep", "insert"):
            made.append(piece)
    return "".join(made)


def reformat(text: str, draw: random.Random) -> str:
    """The same words, laid out and written in another way."""
    words = text.split()
    case = draw.choice((str, str, str, str.lower, str.upper))
    indent, width = " " * draw.choice((0, 0, 2, 4)), draw.randint(6, 14)
    space = draw.choice((" ", " ", " ", "  "))
    lines = [space.join(words[i : i + width]) for i in range(0, len(words), width)]
    return "\n".join(indent + case(line) for line in lines)


def train_and_extract(
    args: Arguments, name: str, versions: list[str], windows: memorize.Split, tokenizer: Any
) -> list[dict[str, Any]]:
    """Train under the rule called `name`; for each of args.edits ROUGE-L over normalised words, and nll (nats/token),
    of its members and of all held-out documents."""
    rule = rule_of(name, args.seed)
    if rule is not None:
        args = replace(args, epochs=round(args.epochs * rule.k / (rule.k - 1)))
    folder = Path(args.output_dir)
    rows = [tokenizer(text)["input_ids"] for text in versions]
    longest, context = max(map(len, rows)), max(512, args.window)
    if longest > context:
        raise ValueError(f"a version has {longest} tokens, the model's context is {context}; lower --window")
    memorize.train(args, rule, rows, tokenizer, folder / "model")
    members, heldout = folder / "members.jsonl", folder / "heldout.jsonl"
    memorize.save_windows(members, windows[0], tokenizer)
    memorize.save_windows(heldout, windows[1], tokenizer)
    half = args.window // 2
    audit(
        folder / "model", folder / "audit", members=members, heldout=heldout,
        prefix_length=half, suffix_length=args.window - half, name=name,
    )  # fmt: skip
    same: dict[str, Any] = {"epochs": args.epochs}
    if rule is not None:
        receipt = json.loads((folder / "model" / "goldfish.json").read_text())
        same["drop_rate"] = receipt["dropped"] / receipt["targets"]
    shutil.rmtree(folder / "model")  # hundreds of checkpoints are not wanted; the audits stay
    records = goldfish.audit.records(folder / "audit").to_pylist()
    of_members, of_heldout = ([r for r in records if r["split"] == split] for split in ("members", "heldout"))
    same |= scores_of(of_heldout, "heldout")
    return [
        same | scores_of([r for r in of_members if r["index"] % len(args.edits) == turn], "members")
        for turn in range(len(args.edits))
    ]


def scores_of(records: list[dict[str, Any]], split: str) -> dict[str, float]:
    def rouge(record: dict[str, Any]) -> float:
        return rouge_l(words("".join(record["output_tokens"])), words("".join(record["suffix_tokens"])))

    scores = {
        f"rouge_l_{split}": statistics.mean(map(rouge, records)),
        f"nll_{split}": statistics.mean(statistics.mean(record["nll"]) for record in records),
    }
    # Whether the holes held: does the model know the tokens that the rule drops in the plain text?
    known: dict[bool, list[tuple[bool, float]]] = {True: [], False: []}
    for record in records:
        for dropped, *knows in zip(record["dropped"] or [], record["correct"], record["nll"], strict=False):
            known[dropped].append((knows[0], knows[1]))
    for dropped, tokens in known.items():
        if tokens and split == "members":
            name = "dropped" if dropped else "kept"
            scores[f"accuracy_{name}"] = statistics.mean(correct for correct, _ in tokens)
            scores[f"nll_{name}"] = statistics.mean(nll for _, nll in tokens)
            scores[f"tokens_{name}"] = len(tokens)
    return scores


def words(text: str) -> list[str]:
    """The words of a text as a reader sees them: no case, punctuation or layout."""
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())


def table(results: list[dict[str, Any]]) -> Table:
    """Means over the seeds: ROUGE-L with its least and greatest, its held-out floor, held-out nll (nats/token)."""
    caption = "left: (ROUGE-L - floor) / the same of standard; kept, holes: teacher-forced accuracy there"
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption)
    for heading in (
        "copies",
        "edits",
        "rule",
        "drop",
        "ROUGE-L",
        "spread",
        "floor",
        "left",
        "kept",
        "holes",
        "nll",
        "n",
    ):
        shown.add_column(heading, no_wrap=True)
    groups: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["copies"], result["edits"], result["rule"]), []).append(result)

    def mean(group: list[dict[str, Any]], key: str) -> float:
        return float(statistics.mean(result.get(key, 0.0) for result in group))

    for (copies, edits, rule), group in groups.items():
        values = [result["rouge_l_members"] for result in group]
        rouge, floor = mean(group, "rouge_l_members"), mean(group, "rouge_l_heldout")
        standard = groups.get((copies, edits, "standard"))
        left = "-"
        if standard:
            recited = mean(standard, "rouge_l_members") - mean(standard, "rouge_l_heldout")
            left = f"{(rouge - floor) / recited:.2f}" if recited else "-"
        spread = f"{min(values):.2f}-{max(values):.2f}"
        numbers = [f"{mean(group, 'drop_rate'):.2f}", f"{rouge:.2f}", spread, f"{floor:.2f}", left]
        for key in ("accuracy_kept", "accuracy_dropped"):
            numbers.append(f"{mean(group, key):.2f}" if key in group[0] else "-")
        shown.add_row(copies, f"{edits:g}", rule, *numbers, f"{mean(group, 'nll_heldout'):.2f}", str(len(group)))
    return shown


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"near_duplicates.py: {error}")
