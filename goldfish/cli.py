"""The `goldfish` command. Every import beyond the standard library waits until a verb needs it."""

import argparse
import difflib
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from goldfish import __version__
from goldfish.text.printable import plain
from goldfish.text.rows import EXPECTED

EXTRA = (
    "rapidfuzz",
    "scipy",
    "matplotlib",
    "jinja2",
    "rich",
)  # packages of the extra "audit"


EXPLAIN_EXIT = (
    "Exit codes: 0 PASS, 1 FAIL, 3 INCONCLUSIVE, 2 error. accelerate launch and torchrun report "
    "every code but 0 as 1; `goldfish judge DIR` gives the code of a finished audit."
)
RECOMMENDED = "Recommended rule: -k 4 --h 13 --max-kept 4."


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line. It imports nothing beyond the standard library."""
    parser = argparse.ArgumentParser(
        prog="goldfish",
        description="The goldfish loss: show rules, audit checkpoints.",
        epilog="Exit codes: 0 done, 2 error; audit and judge: 0 PASS, 1 FAIL, 3 INCONCLUSIVE; "
        "check: 1 if a marked secret can be learned whole, 3 if no marked secret is a target.",
    )
    parser.add_argument(
        "--version", action="version", version=f"goldfish-loss {__version__}"
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_show(verbs)
    _add_premask(verbs)
    _add_check(verbs)
    _add_audit(verbs)
    _add_judge(verbs)
    _add_compare(verbs)
    _add_report(verbs)
    return parser


def _add_show(verbs: Any) -> None:
    show = verbs.add_parser(
        "show", help="mark the tokens of a text that a rule drops", epilog=RECOMMENDED
    )
    source = show.add_mutually_exclusive_group(required=True)
    source.add_argument("text", nargs="?", help="a text in quotes")
    source.add_argument("--file", metavar="FILE", help="a UTF-8 file with the text")
    _add_rule(show)
    _add_rule_secrets(show)
    show.set_defaults(run=_show)


def _add_premask(verbs: Any) -> None:
    premask = verbs.add_parser(
        "premask",
        help="write masked labels for a tokenized dataset, for trainers without goldfish support",
        description="Write masked labels for a tokenized dataset (its split train) and a receipt, "
        "goldfish.json, with the rule and the counts of one pass. Copy the receipt beside the "
        "weights after training.",
        epilog=RECOMMENDED,
    )
    premask.add_argument(
        "input",
        help="a folder of datasets.save_to_disk, or a .parquet, .json or .jsonl file; needs a "
        "column input_ids",
    )
    premask.add_argument(
        "-o", "--output-dir", required=True, metavar="DIR", help="a new folder"
    )
    _add_rule(premask)
    _add_rule_secrets(premask)
    premask.add_argument(
        "--secret-column",
        metavar="NAME",
        help="also drop the secrets in this column (strings, or lists of them), in every row",
    )
    premask.add_argument(
        "--format",
        default="labels",
        help="labels (default): a datasets folder; mask: arrays for OLMo; loss-mask: arrays for "
        "Megatron and NeMo",
    )
    premask.add_argument(
        "--num-proc", type=int, metavar="N", help="processes (default 1)"
    )
    premask.set_defaults(run=_premask)


def _add_check(verbs: Any) -> None:
    check = verbs.add_parser(
        "check",
        help="what a rule leaves unprotected in the training data, before training",
        description="Apply a rule to the training data, before training, and report what can be "
        "learned in spite of it. The last line is a conclusion and a rule to copy.",
        epilog="Exit codes: 0 no marked secret can be learned whole (or none was marked), 1 some "
        "can, 3 secrets were marked but none is a target, 2 error. Tokenizing uses every core; "
        f"RAYON_NUM_THREADS limits it. {RECOMMENDED}",
    )
    check.add_argument("source", metavar="DATA", help=EXPECTED)
    _add_rule(check)
    _add_marks(check)
    check.add_argument(
        "--assistant-only",
        action="store_true",
        help="only the assistant's turns are targets, as with TRL's assistant_only_loss",
    )
    check.add_argument(
        "--model",
        metavar="NAME",
        help="the model to be finetuned, to estimate how many bits of each secret must be guessed "
        "(no lower bound)",
    )
    check.set_defaults(run=_check)


def _add_audit(verbs: Any) -> None:
    audit = verbs.add_parser(
        "audit",
        help="test whether a checkpoint recites texts",
        description="Test whether a checkpoint recites texts. After an interruption, repeat the "
        "command to continue.",
        epilog=EXPLAIN_EXIT,
    )
    audit.add_argument(
        "checkpoint", help="a folder, hub name or .gguf file with model and tokenizer"
    )
    _add_audit_data(audit)
    _add_audit_questions(audit)
    _add_audit_model(audit)
    _add_verdict(audit)
    audit.set_defaults(run=_audit)


def _add_audit_data(audit: argparse.ArgumentParser) -> None:
    add = audit.add_argument_group("data").add_argument
    add("--members", metavar="DATA", help=f"the training data: {EXPECTED}")
    add(
        "--heldout",
        metavar="DATA",
        help="comparable texts the model was NOT trained on",
    )
    add(
        "--max-rows",
        type=int,
        metavar="N",
        help="audit N rows of each, drawn with --seed",
    )
    add(
        "--complete",
        action="store_true",
        help="--members is everything the model was trained on: a census, not a sample",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="of the rows drawn by --max-rows (default 0)",
    )
    add(
        "--allow-overlap",
        action="store_true",
        help="audit although the two inputs share texts",
    )
    _add_marks(audit)
    add(
        "-o",
        "--output-dir",
        required=True,
        metavar="DIR",
        help="a new folder for the results, or that of an interrupted audit",
    )
    add(
        "--name",
        help="the checkpoint's name in tables and reports (default: its folder's name)",
    )


def _add_audit_questions(audit: argparse.ArgumentParser) -> None:
    add = audit.add_argument_group("questions").add_argument
    add(
        "--prefix-length",
        type=int,
        default=50,
        help="tokens the model is given (default 50)",
    )
    add(
        "--suffix-length",
        type=int,
        default=50,
        help="tokens the model must continue with (default 50)",
    )
    add(
        "--offsets",
        type=int,
        nargs="+",
        default=[0],
        metavar="T",
        help="where prefixes start, in tokens from a text's start (default 0)",
    )
    add(
        "--sampling",
        type=_sampling,
        nargs="*",
        metavar="SETTING",
        help="temperature=0.8,top_p=0.9 (default: temperature=1 with and without top_k=40)",
    )
    add(
        "--beams",
        type=int,
        nargs="+",
        default=[],
        metavar="B",
        help="also run beam searches with B beams, such as 4 16",
    )
    add(
        "--control",
        metavar="DIR",
        help="a reference model: same tokenizer, not trained on the members",
    )
    add(
        "--rule",
        type=_rule_settings,
        metavar="RULE",
        help="the rule of the training, if the checkpoint has no goldfish.json: "
        "k=4,h=13,max_kept=4",
    )


def _add_audit_model(audit: argparse.ArgumentParser) -> None:
    add = audit.add_argument_group("model").add_argument
    add(
        "--dtype",
        default="float32",
        help="float32 (default), bfloat16 (bf16) or float16 (fp16)",
    )
    add("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    add(
        "--device-map",
        metavar="auto",
        help="spread one large model over GPUs, memory and disk",
    )
    add(
        "--revision",
        metavar="NAME",
        help="of a hub checkpoint: a branch, tag or commit",
    )
    add(
        "--batch-tokens",
        type=int,
        metavar="N",
        help="tokens in a batch (default: what memory allows)",
    )
    add(
        "--allow-pickle",
        action="store_true",
        help="load pickled weights; a pickle can run code",
    )
    add(
        "--trust-remote-code",
        action="store_true",
        help="run code that comes with the checkpoint",
    )


def _add_judge(verbs: Any) -> None:
    judge = verbs.add_parser(
        "judge",
        help="judge a finished audit again, with other limits",
        epilog=EXPLAIN_EXIT,
    )
    judge.add_argument(
        "folder", metavar="DIR", help="a folder written by `goldfish audit`"
    )
    judge.add_argument(
        "-o",
        "--output-dir",
        metavar="DIR",
        help="write summary.json and summary.md there; DIR itself may be given",
    )
    _add_verdict(judge)
    judge.set_defaults(run=_judge)


def _add_compare(verbs: Any) -> None:
    compare = verbs.add_parser(
        "compare", help="compare two audits of the same windows, paired"
    )
    compare.add_argument(
        "first", metavar="A", help="a folder written by `goldfish audit`"
    )
    compare.add_argument(
        "second", metavar="B", help="another, of the same texts and lengths"
    )
    compare.add_argument(
        "-o", "--output-dir", required=True, metavar="DIR", help="a new folder"
    )
    compare.set_defaults(run=_compare)


def _add_report(verbs: Any) -> None:
    report = verbs.add_parser("report", help="write one HTML page from finished audits")
    add = report.add_argument
    add("audits", nargs="+", metavar="DIR", help="folders written by `goldfish audit`")
    add("-o", "--output", metavar="FILE", help="default report.html, or model-card.md")
    add("--overwrite", action="store_true", help="replace an existing file")
    add(
        "--redact", action="store_true", help="hide texts, names and paths, for sharing"
    )
    add(
        "--baseline",
        metavar="NAME",
        help="compare each audit with this one (default: every pair)",
    )
    add(
        "--model-card",
        action="store_true",
        help="write a Markdown section for a model card instead",
    )
    report.set_defaults(run=_report)


def _add_rule(verb: argparse.ArgumentParser) -> None:
    add = verb.add_argument_group("rule").add_argument
    add(
        "--tokenizer",
        required=True,
        metavar="DIR",
        help="a folder or hub name with a tokenizer",
    )
    add("-k", type=float, default=4, help="drop one token in k (default 4)")
    add(
        "--h",
        type=int,
        default=13,
        help="context: h tokens, or 5h letters with letters (default 13)",
    )
    add(
        "--strategy",
        default="hash",
        help="hash (default), letters, or one for comparison",
    )
    add(
        "--max-kept",
        type=int,
        metavar="N",
        help="keep at most N tokens in a row; at least k",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="rules with other seeds drop other tokens (default 0)",
    )


def _add_rule_secrets(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--secrets",
        metavar="REGEX",
        dest="rule_secrets",
        help="also drop what this expression matches; the first group, if any, is the secret",
    )


def _add_marks(verb: argparse.ArgumentParser) -> None:
    """Which column is read, and which parts of it are secrets."""
    verb.add_argument(
        "--text-column",
        metavar="NAME",
        default="",
        help="the column with the texts or messages",
    )
    marks = verb.add_mutually_exclusive_group()
    marks.add_argument(
        "--secrets",
        metavar="REGEX",
        default="",
        help="regex for secrets; the first group, if any, is the secret",
    )
    marks.add_argument(
        "--secret-column",
        metavar="NAME",
        default="",
        help="the column with each row's secret, or a list of them",
    )


def _add_verdict(verb: argparse.ArgumentParser) -> None:
    add = verb.add_argument_group("verdict").add_argument
    add(
        "--limit",
        action="append",
        default=[],
        metavar="NAME=SHARE",
        dest="limits",
        help="recited=1%%, near_verbatim=1%%, auc=55%% (the defaults)",
    )
    add(
        "--require",
        action="append",
        default=[],
        choices=["membership"],
        help="let this question count towards the verdict too",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    try:
        code: int | None = args.run(args)
        sys.stdout.flush()  # so that a closed pipe is met here
        return code or 0
    except BrokenPipeError:
        # The reader, such as `head`, has read enough. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as if SIGPIPE had ended the process
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in EXTRA:
            raise
        message = (
            f'{package} is not installed; it comes with the extra "audit": '
            "pip install 'goldfish-loss[audit]'"
        )
    except (ValueError, TypeError, OSError) as error:
        message = str(error)
    except KeyboardInterrupt:
        hint = "; repeat the command to continue" if args.verb == "audit" else ""
        print(f"goldfish {args.verb}: stopped{hint}", file=sys.stderr)
        return 130
    except Exception as error:
        # Damaged weights. The class is imported only here: it would double the time of --help.
        from safetensors import SafetensorError

        if not isinstance(error, SafetensorError):
            raise
        message = str(error)
    print(f"goldfish {args.verb}: {plain(message, 4000)}", file=sys.stderr)
    return 2


def _parse(words: list[str]) -> argparse.Namespace:
    """Parse the command line; a misspelt verb or option ends with a suggestion and exit code 2."""
    parser = build_parser()
    verbs = next(
        action.choices for action in parser._actions if isinstance(action.choices, dict)
    )
    verb = next((word for word in words if not word.startswith("-")), "")
    if verb and verb not in verbs:
        parser.error(f"there is no verb {verb!r}{_suggestion(verb, verbs)}")
    args, unknown = parser.parse_known_args(words)
    if unknown:
        options = verbs[args.verb]._option_string_actions
        name = unknown[0].partition("=")[0]
        verbs[args.verb].error(
            f"unrecognized argument {unknown[0]}{_suggestion(name, options)}"
        )
    return args


def _suggestion(word: str, choices: Iterable[str]) -> str:
    """What the word may have been meant for."""
    names = list(choices)
    close = difflib.get_close_matches(word, names, n=1)
    return (
        f"; did you mean {close[0]}?" if close else f"; choose from {', '.join(names)}"
    )


def _rule(args: argparse.Namespace) -> Any:
    from goldfish.rule import Goldfish

    return Goldfish(
        k=args.k,
        h=args.h,
        strategy=args.strategy,
        max_kept=args.max_kept,
        seed=args.seed,
        secrets=getattr(args, "rule_secrets", None),
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
        secret_column=args.secret_column,
    )
    print(f"Written: {args.output_dir}")


def _show(args: argparse.Namespace) -> None:
    from rich.text import Text

    from goldfish.audit.model import load_tokenizer
    from goldfish.text.show import show

    text = (
        args.text if args.file is None else Path(args.file).read_text(encoding="utf-8")
    )
    unbound = _rule(args)  # a bad rule is reported before the tokenizer is loaded
    tokenizer = load_tokenizer(args.tokenizer)
    rule = unbound.bind(tokenizer)
    console = _console()
    colour = console.is_terminal and not console.no_color
    console.print(show(rule, tokenizer, text, colour=colour))
    console.print(Text(rule.short(), "dim"))


def _check(args: argparse.Namespace) -> int:
    from goldfish.audit.model import Checkpoint, load_tokenizer
    from goldfish.text.check import check

    rule = _rule(args)  # a bad rule is reported before the tokenizer is loaded
    tokenizer = load_tokenizer(args.tokenizer)
    model = None
    if args.model is not None:
        import torch

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = Checkpoint(args.model).model(device)
    result = check(
        args.source,
        tokenizer,
        rule,
        args.secrets,
        args.secret_column,
        args.text_column,
        assistant_only=args.assistant_only,
        model=model,
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


def _rule_settings(text: str) -> dict[str, float | int | str]:
    """k=4,h=13,max_kept=4 as arguments of a Goldfish."""
    kinds = {"k": float, "h": int, "max_kept": int, "seed": int, "strategy": str}
    given = dict(part.partition("=")[::2] for part in text.split(","))
    try:
        return {name: kinds[name](value) for name, value in given.items()}
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(
            f"expected settings such as k=4,h=13,max_kept=4, got {text!r}"
        ) from None


def _audit(args: argparse.Namespace) -> int:
    from accelerate import PartialState

    from goldfish.audit.run import audit
    from goldfish.audit.score import Sampling
    from goldfish.rule import Goldfish

    options = {
        name: value
        for name, value in vars(args).items()
        if name not in ("verb", "run", "sampling", "rule")
    }
    if args.rule is not None:
        options["rule"] = Goldfish(**args.rule)
    if args.sampling is not None:
        options["sampling"] = [Sampling(**setting) for setting in args.sampling]
    state = PartialState(cpu=args.device == "cpu")
    result = audit(
        **options, command=shlex.join(["goldfish", *sys.argv[1:]]), state=state
    )
    if not state.is_main_process:
        return 0
    print(f"Next: goldfish report {args.output_dir} -o report.html")
    return _print_audit(result, args.verb)


def _judge(args: argparse.Namespace) -> int:
    from goldfish.audit.render import write
    from goldfish.audit.results import judge

    result = judge(args.folder, args.limits, args.require)
    if args.output_dir is not None:
        write(result, args.output_dir)
        print(f"Written: {args.output_dir}")
    return _print_audit(result, args.verb)


def _print_audit(result: Any, verb: str) -> int:
    """Print an audit, and in the last line the outcome for scripts; return the exit code."""
    from goldfish.audit.render import describe, terminal

    _console().print(terminal(describe(result)))
    code = int(result.verdict["exit_code"])
    print(f"goldfish {verb}: {result.outcome}, exit code {code}")
    return code


def _console() -> Any:
    """A terminal that leaves a closed pipe to `main`; rich would exit with 1, which means FAIL."""
    from rich.console import Console

    class PipedConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return PipedConsole(highlight=False)


def _compare(args: argparse.Namespace) -> None:
    from rich.text import Text

    from goldfish.audit.compare import compare, table, write

    result = compare(args.first, args.second)
    write(result, args.output_dir)
    console = _console()
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
