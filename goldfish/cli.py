"""The `goldfish` command: show | audit | report. Training belongs to recipes, torchrun and accelerate."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.text import Text

from goldfish import __version__
from goldfish.rule import Goldfish, Strategy

DROPPED = "bold white on dark_red"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="goldfish", description="The goldfish loss: look at rules, audit checkpoints."
    )
    parser.add_argument("--version", action="version", version=f"goldfish-loss {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    show = verbs.add_parser("show", help="colour the tokens of a text that a rule drops")
    show.add_argument("text", help="the text, or a file that holds it")
    show.add_argument("--tokenizer", required=True, metavar="DIR", help="a folder or hub name with a tokenizer")
    show.add_argument("-k", type=float, default=4, help="one token in k is dropped (default 4)")
    show.add_argument("--h", type=int, default=13, help="how many preceding tokens decide (default 13)")
    show.add_argument("--strategy", choices=get_args(Strategy), default="hash")
    show.add_argument("--seed", type=int, default=0)
    show.set_defaults(run=_show)

    audit = verbs.add_parser("audit", help="ask a checkpoint to recite texts")
    audit.add_argument("checkpoint", help="a folder or hub name with model and tokenizer")
    audit.add_argument("--members", metavar="FILE", help="texts that were trained on: .jsonl or .txt")
    audit.add_argument("--heldout", metavar="FILE", help="texts of the same kind that were not")
    audit.add_argument("-o", "--output_dir", required=True, metavar="DIR", help="a new folder for the results")
    audit.add_argument("--prefix_length", type=int, default=50, help="tokens that the model is given (default 50)")
    audit.add_argument("--suffix_length", type=int, default=50, help="tokens that it is to recite (default 50)")
    audit.set_defaults(run=_audit)

    report = verbs.add_parser("report", help="one HTML page from finished audits")
    report.add_argument("audits", nargs="+", metavar="DIR", help="folders that `goldfish audit` wrote")
    report.add_argument("-o", "--output", default="report.html", metavar="FILE", help="default report.html")
    report.add_argument("--overwrite", action="store_true", help="replace an existing report")
    report.add_argument("--redact", action="store_true", help="leave the training text out, for sharing")
    report.set_defaults(run=_report)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when all went well, 2 with one line on stderr for a usage or data error."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, TypeError, OSError) as error:
        print(f"goldfish {args.verb}: {error}", file=sys.stderr)
        return 2
    return 0


def _show(args: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    text = args.text
    if len(text) < 256 and Path(text).is_file():
        text = Path(text).read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    rule = Goldfish(k=args.k, h=args.h, strategy=args.strategy, seed=args.seed).bind(tokenizer)
    Console(highlight=False).print(show_text(rule, tokenizer, tokenizer(text)["input_ids"]))


def show_text(rule: Goldfish, tokenizer: Any, ids: list[int]) -> Text:
    """The text of `ids` with the dropped tokens marked, and a line that counts them."""
    import torch

    from goldfish.audit.extraction import text_pieces
    from goldfish.report.text import plain

    dropped = rule.dropped(torch.tensor(ids, dtype=torch.int64)).tolist()
    shown = Text()
    for piece, gone in zip(text_pieces(tokenizer, [], ids), dropped, strict=True):
        harmless = "".join(char if char in "\n\t" else plain(char) for char in piece)
        shown.append(harmless, style=DROPPED if gone else None)
    count = f"{sum(dropped)} of {len(ids)} tokens dropped"
    return shown.append(f"\n\n{count} (k={rule.k:g}, h={rule.h}, strategy={rule.strategy}, seed={rule.seed})", "dim")


def _audit(args: argparse.Namespace) -> None:
    from goldfish.audit import audit
    from goldfish.audit.table import summary_table

    summary = audit(
        args.checkpoint,
        args.output_dir,
        members=args.members,
        heldout=args.heldout,
        prefix_length=args.prefix_length,
        suffix_length=args.suffix_length,
    )
    console = Console()
    console.print(summary_table([summary]))
    console.print(f"Next: goldfish report {args.output_dir} -o report.html", highlight=False)


def _report(args: argparse.Namespace) -> None:
    from goldfish.report import write_report

    path = write_report(args.audits, args.output, overwrite=args.overwrite, redact=args.redact)
    print(f"Report: {path}")
