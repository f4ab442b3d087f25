"""The `goldfish` command: show | audit | compare | report. Training belongs to recipes, torchrun and accelerate."""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.text import Text
from safetensors import SafetensorError

from goldfish import __version__
from goldfish.rule import Goldfish, Strategy


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="goldfish", description="The goldfish loss: look at rules, audit checkpoints."
    )
    parser.add_argument("--version", action="version", version=f"goldfish-loss {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    show = verbs.add_parser("show", help="colour the tokens of a text that a rule drops")
    show.add_argument("text", nargs="+", help="a text, or a file that holds it; two of them are compared side by side")
    show.add_argument("--tokenizer", required=True, metavar="DIR", help="a folder or hub name with a tokenizer")
    show.add_argument("-k", type=float, default=4, help="one token in k is dropped (default 4)")
    show.add_argument(
        "--h", type=int, default=13, help="how many preceding tokens, or words of 5 letters, decide (default 13)"
    )
    show.add_argument("--strategy", choices=get_args(Strategy), default="hash")
    show.add_argument("--seed", type=int, default=0)
    show.add_argument("--html", metavar="FILE", help="write a page instead, to a new file")
    show.set_defaults(run=_show)

    audit = verbs.add_parser(
        "audit",
        help="ask a checkpoint to recite texts",
        description="Ask a checkpoint to recite texts. Stopped at any moment, it goes on where it was when the same "
        "command is given again. `accelerate launch -m goldfish audit ...` shares the work between processes.",
    )
    audit.add_argument("checkpoint", help="a folder or hub name with model and tokenizer")
    audit.add_argument("--members", metavar="FILE", help="texts that were trained on: .jsonl or .txt")
    audit.add_argument("--heldout", metavar="FILE", help="texts of the same kind that were not")
    audit.add_argument("-o", "--output_dir", required=True, metavar="DIR", help="a new folder for the results")
    audit.add_argument("--prefix_length", type=int, default=50, help="tokens that the model is given (default 50)")
    audit.add_argument("--suffix_length", type=int, default=50, help="tokens that it is to recite (default 50)")
    audit.add_argument(
        "--offsets", type=int, nargs="+", default=[0], metavar="TOKENS",
        help="where in a text the prefix begins, one window each (default 0)",
    )  # fmt: skip
    audit.add_argument(
        "--sampling", type=_sampling, nargs="*", metavar="SETTING",
        help="adversaries who sample, each such as temperature=0.8,top_k=40,top_p=0.95 "
        "(default: temperature=1 top_k=40)",
    )  # fmt: skip
    audit.add_argument(
        "--beams", type=int, nargs="+", default=[], metavar="B", help="adversaries who search with B beams, e.g. 4 16"
    )
    audit.add_argument("--lowercase", action="store_true", help="score the texts in lower case too (one more pass)")
    audit.add_argument(
        "--control", metavar="DIR", help="a checkpoint with the same tokenizer that never saw the members"
    )
    audit.add_argument("--tokens", action="store_true", help="also write tokens.parquet, one row a token")
    audit.add_argument("--name", help="what tables and reports call the checkpoint (default: its folder's name)")
    audit.add_argument(
        "--dtype", default="float32", metavar="DTYPE",
        help="float32 (default), bfloat16 or float16; in 16 bits, answers that hang on rounding are settled one by one",
    )  # fmt: skip
    audit.add_argument("--device", help="such as cpu or cuda:1 (default: the GPU where there is one)")
    audit.add_argument("--allow_pickle", action="store_true", help="load weights that are pickles, which can run code")
    audit.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the checkpoint")
    audit.add_argument("--fail-on", action="append", default=[], metavar="CONDITION", dest="fail_on",
                       help='exit 1 where it holds, 3 where nothing can be said: "em.upper95 > 0.01"')  # fmt: skip
    audit.set_defaults(run=_audit)

    compare = verbs.add_parser("compare", help="two audits of the same items, paired")
    compare.add_argument("first", metavar="A", help="a folder that `goldfish audit` wrote")
    compare.add_argument("second", metavar="B", help="another, of the same texts and lengths")
    compare.add_argument("-o", "--output_dir", required=True, metavar="DIR", help="a new folder for the results")
    compare.set_defaults(run=_compare)

    report = verbs.add_parser("report", help="one HTML page from finished audits")
    report.add_argument("audits", nargs="+", metavar="DIR", help="folders that `goldfish audit` wrote")
    report.add_argument("-o", "--output", default="report.html", metavar="FILE", help="default report.html")
    report.add_argument("--overwrite", action="store_true", help="replace an existing report")
    report.add_argument("--redact", action="store_true", help="leave the training text out, for sharing")
    report.set_defaults(run=_report)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when all went well, 2 with one line on stderr for a usage or data error.

    With `audit --fail-on`: 1 where a condition holds, 3 where nothing can be said about one.
    """
    args = build_parser().parse_args(argv)
    try:
        code: int | None = args.run(args)
        return code or 0
    except (ValueError, TypeError, OSError, SafetensorError) as error:
        print(f"goldfish {args.verb}: {error}", file=sys.stderr)
        return 2


def _show(args: argparse.Namespace) -> None:
    from goldfish.audit.model import load_tokenizer
    from goldfish.show import show_one, show_two, shown

    if len(args.text) > 2:
        raise ValueError(f"one text is shown, two are compared; got {len(args.text)}. Put a text with spaces in quotes")
    tokenizer = load_tokenizer(args.tokenizer)
    rule = Goldfish(k=args.k, h=args.h, strategy=args.strategy, seed=args.seed).bind(tokenizer)
    texts = [shown(rule, tokenizer, _text_or_file(text)) for text in args.text]
    console = Console(highlight=False, record=args.html is not None, file=io.StringIO() if args.html else None)
    console.print(show_one(*texts) if len(texts) == 1 else show_two(*texts))
    console.print(Text(f"k={rule.k:g}, h={rule.h}, strategy={rule.strategy}, seed={rule.seed}", "dim"))
    if args.html is not None:
        with open(args.html, "x", encoding="utf-8") as page:
            page.write(console.export_html(inline_styles=True))
        print(f"Page: {args.html}")


def _text_or_file(text: str) -> str:
    if len(text) < 256 and Path(text).is_file():
        return Path(text).read_text(encoding="utf-8")
    return text


def _sampling(text: str) -> dict[str, float | int]:
    """temperature=0.8,top_k=40 as the arguments of a Sampling."""
    kinds = {"temperature": float, "top_k": int, "top_p": float}
    given = dict(part.partition("=")[::2] for part in text.split(","))
    try:
        return {name: kinds[name](number) for name, number in given.items()}
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(
            f"expected settings such as temperature=0.8,top_k=40,top_p=0.95, got {text!r}"
        ) from None


def _audit(args: argparse.Namespace) -> int:
    from accelerate import PartialState

    from goldfish.audit import audit
    from goldfish.audit.gate import parse
    from goldfish.audit.score import Sampling

    conditions = [parse(text) for text in args.fail_on]  # before the work: a typo costs nothing then
    options = {name: value for name, value in vars(args).items() if name not in ("verb", "run", "sampling", "fail_on")}
    if args.sampling is not None:
        options["sampling"] = [Sampling(**setting) for setting in args.sampling]
    state = PartialState(cpu=args.device == "cpu")
    summary = audit(**options, state=state)
    return _tell(summary, conditions, Path(args.output_dir)) if state.is_main_process else 0


def _tell(summary: dict[str, Any], conditions: Sequence[Any], folder: Path) -> int:
    """Table, conditions, verdict; summary.md and junit.xml into the audit's folder; the exit code."""
    from goldfish.audit.formats import junit, markdown
    from goldfish.audit.gate import exit_code, judge
    from goldfish.audit.table import audit_table, verdict_line

    console = Console(highlight=False)
    console.print(audit_table(summary))
    for question in summary["verdict"]["questions"]:
        console.print(Text(f"{question['asks']} {question['outcome']}: {question['why']}"))
    checks = judge(summary, conditions)
    for check in checks:
        console.print(Text(f"{check.condition.text}: {check.outcome} ({check.says})"))
    (folder / "summary.md").write_text(markdown(summary, checks), encoding="utf-8")
    (folder / "junit.xml").write_text(junit(summary, checks), encoding="utf-8")
    console.print(Text(f"Next: goldfish report {folder} -o report.html"))
    console.print(verdict_line(summary))
    return exit_code(checks)


def _compare(args: argparse.Namespace) -> None:
    from goldfish.audit.compare import compare, table, write

    result = compare(args.first, args.second)
    write(result, args.output_dir)
    console = Console(highlight=False)
    console.print(table(result))
    console.print(Text(result["sentence"]))


def _report(args: argparse.Namespace) -> None:
    from goldfish.report import write_report

    path = write_report(args.audits, args.output, overwrite=args.overwrite, redact=args.redact)
    print(f"Report: {path}")
