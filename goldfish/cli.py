"""The `goldfish` command: show, premask, check, audit, judge, compare, report. Recipes and torchrun train."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from safetensors import SafetensorError

from goldfish import __version__
from goldfish.text.printable import plain
from goldfish.text.rows import EXPECTED

EXTRA = ("rapidfuzz", "scipy", "matplotlib", "jinja2", "rich")  # packages of the extra "audit"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="goldfish", description="The goldfish loss: show rules, audit checkpoints."
    )
    parser.add_argument("--version", action="version", version=f"goldfish-loss {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    show = verbs.add_parser("show", help="colour the tokens of a text that a rule drops")
    show.add_argument("text", help="a text in quotes, or a file with one")
    _add_rule(show)
    show.set_defaults(run=_show)

    premask = verbs.add_parser(
        "premask",
        help="write the labels of a tokenized dataset, for trainers that know nothing of the rule",
        description="Write masked labels for a tokenized dataset (its split train), and a receipt, goldfish.json, with "
        "the rule and the counts of one pass; copy it beside the weights.",
    )
    premask.add_argument(
        "input", help="a folder of datasets.save_to_disk, or .parquet, .json, .jsonl; has input_ids"
    )
    premask.add_argument("-o", "--output-dir", required=True, metavar="DIR", help="a new folder")
    _add_rule(premask)
    premask.add_argument(
        "--format",
        default="labels",
        help="labels (default): a datasets folder; mask: arrays for OLMo; loss-mask: arrays for "
        "Megatron and NeMo",
    )
    premask.add_argument("--num-proc", type=int, metavar="N", help="processes (default 1)")
    premask.set_defaults(run=_premask)

    check = verbs.add_parser(
        "check",
        help="what a rule leaves unprotected, from the training data",
        description="Read the training data under a rule, before the training. Exits with 1 where a secret has no "
        "token that is dropped in every place, with 3 where secrets were marked but none occurs.",
    )
    check.add_argument("source", metavar="DATA", help=EXPECTED)
    _add_rule(check)
    check.set_defaults(run=_check)

    audit = verbs.add_parser(
        "audit",
        help="test whether a checkpoint recites texts",
        description="Test whether a checkpoint recites texts. After an interruption the same command continues it.",
    )
    audit.add_argument(
        "checkpoint", help="a folder, hub name or .gguf file with model and tokenizer"
    )
    audit.add_argument("--members", metavar="DATA", help=f"what was trained on: {EXPECTED}")
    audit.add_argument(
        "--heldout", metavar="DATA", help="texts or chats of the same kind that were not"
    )
    audit.add_argument(
        "--max-rows", type=int, metavar="N", help="audit N rows of each, drawn with --seed"
    )
    audit.add_argument("--seed", type=int, default=0)
    audit.add_argument(
        "-o", "--output-dir", required=True, metavar="DIR", help="a new folder for the results"
    )
    audit.add_argument(
        "--prefix-length", type=int, default=50, help="tokens that the model is given (default 50)"
    )
    audit.add_argument(
        "--suffix-length", type=int, default=50, help="tokens that it is to recite (default 50)"
    )
    audit.add_argument(
        "--offsets",
        type=int,
        nargs="+",
        default=[0],
        metavar="T",
        help="tokens before a prefix (0)",
    )
    audit.add_argument(
        "--sampling",
        type=_sampling,
        nargs="*",
        metavar="SETTING",
        help="temperature=0.8,top_p=0.9 (default: temperature=1 with and without top_k=40)",
    )
    audit.add_argument(
        "--beams",
        type=int,
        nargs="+",
        default=[],
        metavar="B",
        help="beam searches with B beams: 4 16",
    )
    audit.add_argument(
        "--control",
        metavar="DIR",
        help="a checkpoint of the same tokenizer that never saw the members",
    )
    audit.add_argument(
        "--name", help="what tables and reports call the checkpoint (default: its folder's name)"
    )
    audit.add_argument(
        "--dtype", default="float32", help="float32 (default), bfloat16 (bf16) or float16 (fp16)"
    )
    audit.add_argument(
        "--device", help="such as cpu or cuda:1 (default: the GPU where there is one)"
    )
    audit.add_argument(
        "--device-map", metavar="auto", help="spread one large model over GPUs, memory and disk"
    )
    audit.add_argument(
        "--revision", metavar="NAME", help="of a checkpoint on the hub: a branch, tag or commit"
    )
    audit.add_argument(
        "--batch-tokens",
        type=int,
        metavar="N",
        help="tokens in a batch (default: what memory allows)",
    )
    audit.add_argument(
        "--allow-overlap", action="store_true", help="audit although some texts are in both inputs"
    )
    audit.add_argument(
        "--allow-pickle",
        action="store_true",
        help="load weights that are pickles, which can run code",
    )
    audit.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the checkpoint"
    )
    audit.set_defaults(run=_audit)

    for verb in (check, audit):
        verb.add_argument(
            "--text-column", metavar="NAME", default="", help="the column of the texts or messages"
        )
        marks = verb.add_mutually_exclusive_group()
        marks.add_argument(
            "--secrets",
            metavar="REGEX",
            default="",
            help="what the secrets look like; its first group",
        )
        marks.add_argument(
            "--secret-column", metavar="NAME", default="", help="the column that holds them"
        )

    judge = verbs.add_parser(
        "judge", help="judge a finished audit again, with other limits or conditions"
    )
    judge.add_argument("folder", metavar="DIR", help="a folder that `goldfish audit` wrote")
    judge.set_defaults(run=_judge)
    for verb in (audit, judge):
        verb.add_argument(
            "--limit",
            action="append",
            default=[],
            metavar="NAME=SHARE",
            dest="limits",
            help="of the verdict: recited=1%%, near_verbatim=1%%, auc=55%% (the defaults)",
        )
        verb.add_argument(
            "--require",
            action="append",
            default=[],
            choices=["membership"],
            help="let this question count towards the verdict too",
        )
        verb.add_argument(
            "--fail-on",
            action="append",
            default=[],
            metavar="CONDITION",
            help='exit 1 where it holds, 3 where that is undecided: "em.upper95 > 0.01"',
        )

    compare = verbs.add_parser("compare", help="two audits of the same windows, paired")
    compare.add_argument("first", metavar="A", help="a folder that `goldfish audit` wrote")
    compare.add_argument("second", metavar="B", help="another, of the same texts and lengths")
    compare.add_argument(
        "-o", "--output-dir", required=True, metavar="DIR", help="a new folder for the results"
    )
    compare.set_defaults(run=_compare)

    report = verbs.add_parser("report", help="one HTML page from finished audits")
    report.add_argument(
        "audits", nargs="+", metavar="DIR", help="folders that `goldfish audit` wrote"
    )
    report.add_argument(
        "-o", "--output", metavar="FILE", help="default report.html, or model-card.md"
    )
    report.add_argument("--overwrite", action="store_true", help="replace an existing file")
    report.add_argument(
        "--redact", action="store_true", help="hide texts, names and paths, for sharing"
    )
    report.add_argument(
        "--baseline", metavar="NAME", help="compare each audit with this one (default: every pair)"
    )
    report.add_argument(
        "--model-card",
        action="store_true",
        help="write a Markdown section for a model card instead",
    )
    report.set_defaults(run=_report)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Options may have underscores, as in 0.1."""
    args = build_parser().parse_args(
        [_dashed(word) for word in (sys.argv[1:] if argv is None else argv)]
    )
    try:
        code: int | None = args.run(args)
        return code or 0
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in EXTRA:
            raise
        message = f"{package} is not installed; it comes with the extra \"audit\": pip install 'goldfish-loss[audit]'"
    except (ValueError, TypeError, OSError, SafetensorError) as error:
        message = str(error)
    except KeyboardInterrupt:
        hint = "; the same command continues it" if args.verb == "audit" else ""
        print(f"goldfish {args.verb}: stopped{hint}", file=sys.stderr)
        return 130
    print(f"goldfish {args.verb}: {plain(message, 4000)}", file=sys.stderr)
    return 2


def _dashed(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _add_rule(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="a folder or hub name with a tokenizer"
    )
    verb.add_argument("-k", type=float, default=4, help="one token in k is dropped (default 4)")
    verb.add_argument(
        "--h",
        type=int,
        default=13,
        help="preceding tokens, or words of 5 letters, that decide (13)",
    )
    verb.add_argument(
        "--strategy",
        default="hash",
        help='"hash" (default), "letters", or one of those for comparison',
    )
    verb.add_argument(
        "--max-kept",
        type=int,
        metavar="N",
        help="never keep more than N tokens in a row; at least k",
    )
    verb.add_argument("--seed", type=int, default=0)


def _rule(args: argparse.Namespace) -> Any:
    from goldfish.rule import Goldfish

    return Goldfish(
        k=args.k, h=args.h, strategy=args.strategy, max_kept=args.max_kept, seed=args.seed
    )


def _premask(args: argparse.Namespace) -> None:
    from goldfish.audit.model import load_tokenizer
    from goldfish.premasking import premask_files

    tokenizer = load_tokenizer(args.tokenizer)
    premask_files(
        args.input,
        args.output_dir,
        _rule(args),
        tokenizer,
        format=args.format,
        num_proc=args.num_proc,
    )
    print(f"Written: {args.output_dir}")


def _show(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.text import Text

    from goldfish.audit.model import load_tokenizer
    from goldfish.text.show import read_text, show

    tokenizer = load_tokenizer(args.tokenizer)
    rule = _rule(args).bind(tokenizer)
    console = Console(highlight=False)
    colour = console.is_terminal and not console.no_color
    console.print(show(rule, tokenizer, read_text(args.text), colour=colour))
    console.print(Text(rule.short(), "dim"))


def _check(args: argparse.Namespace) -> int:
    from goldfish.audit.model import load_tokenizer
    from goldfish.text.check import check

    tokenizer = load_tokenizer(args.tokenizer)
    result = check(
        args.source, tokenizer, _rule(args), args.secrets, args.secret_column, args.text_column
    )
    print("\n".join(result.lines()))
    return result.exit_code()


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

    from goldfish.audit.run import audit
    from goldfish.audit.score import Sampling

    options = {
        name: value for name, value in vars(args).items() if name not in ("verb", "run", "sampling")
    }
    if args.sampling is not None:
        options["sampling"] = [Sampling(**setting) for setting in args.sampling]
    state = PartialState(cpu=args.device == "cpu")
    summary = audit(**options, command=shlex.join(["goldfish", *sys.argv[1:]]), state=state)
    return _tell(summary, args.output_dir, args) if state.is_main_process else 0


def _judge(args: argparse.Namespace) -> int:
    from goldfish.audit.tell import publish

    return _tell(publish(args.folder, args.limits, args.require, args.fail_on), args.folder, args)


def _tell(summary: dict[str, Any], folder: str, args: argparse.Namespace) -> int:
    """Print a summary, and in the last line the outcome for scripts; return the exit code.

    `accelerate launch` and torchrun report every exit code but 0 as 1; the last line and summary.json do not.
    """
    from rich.console import Console

    from goldfish.audit.tell import describe, terminal

    print(f"Next: goldfish report {folder} -o report.html")
    Console(highlight=False).print(terminal(describe(summary)))
    print(
        f"goldfish {args.verb}: {summary['verdict']['outcome']}, exit code {summary['exit_code']}"
    )
    return int(summary["exit_code"])


def _compare(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.text import Text

    from goldfish.audit.compare import compare, table, write

    result = compare(args.first, args.second)
    write(result, args.output_dir)
    console = Console(highlight=False)
    console.print(table(result))
    console.print(Text(plain(result["sentence"], 1000)))


def _report(args: argparse.Namespace) -> None:
    from goldfish.report import write_model_card, write_report

    if args.model_card:
        path = write_model_card(
            args.audits, args.output or "model-card.md", overwrite=args.overwrite
        )
    else:
        path = write_report(
            args.audits,
            args.output or "report.html",
            overwrite=args.overwrite,
            redact=args.redact,
            baseline=args.baseline,
        )
    print(f"Report: {path}")
