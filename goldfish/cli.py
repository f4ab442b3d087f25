"""The `goldfish` command. Every import beyond the standard library waits until a verb needs it."""

import argparse
import difflib
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from goldfish import __version__
from goldfish.text.printable import plain
from goldfish.text.rows import EXPECTED

# Packages of the extra "audit".
EXTRA = ("rapidfuzz", "scipy", "matplotlib", "jinja2", "rich")

OVERVIEW = """\
The goldfish loss: train language models that do not recite their training data, and test whether
they do. Training itself is Python: GoldfishTrainer, or goldfish.attach(trainer, rule)."""
EXAMPLES = """\
examples, in the order of a training:
  goldfish show "a text in quotes" --tokenizer MODEL -k 4 --h 13 --max-kept 4
  goldfish check train.jsonl --tokenizer MODEL -k 4 --h 13 --max-kept 4
  goldfish premask tokenized -o masked --tokenizer MODEL -k 4 --h 13 --max-kept 4
  goldfish audit runs/model --members train.jsonl --heldout other.jsonl -o audit
  goldfish judge audit --limit recited=2%
  goldfish compare audit-of-one audit-of-another -o comparison
  goldfish report audit -o report.html

Exit codes: 0 done, 2 error. audit and judge: 0 PASS, 1 FAIL, 3 INCONCLUSIVE. check: 1 a marked
secret can be learned whole, 3 no marked secret is trained on.
Each command explains its options: goldfish check --help"""
AUDIT_FOLDER = "a folder written by `goldfish audit`"
EXIT = "Exit codes: 0 done, 2 error."
EXIT_OF_AUDIT = (
    "Exit codes: 0 PASS, 1 FAIL, 3 INCONCLUSIVE, 2 error. accelerate launch and torchrun report "
    "every code but 0 as 1; `goldfish judge DIR` gives the code of a finished audit."
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line. It imports nothing beyond the standard library."""
    parser = argparse.ArgumentParser(
        prog="goldfish",
        description=OVERVIEW,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"goldfish-loss {__version__}"
    )
    verbs = parser.add_subparsers(
        dest="verb", required=True, metavar="COMMAND", title="commands"
    )
    _add_show(verbs)
    _add_check(verbs)
    _add_premask(verbs)
    _add_audit(verbs)
    _add_judge(verbs)
    _add_compare(verbs)
    _add_report(verbs)
    return parser


def _add_verb(
    verbs: Any,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    summary: str,
    more: str = "",
    epilog: str = EXIT,
) -> argparse.ArgumentParser:
    """Add a verb.

    Args:
        summary: its line in `goldfish --help`, and the beginning of its own help.
        more: the rest of its own description.
    """
    sentence = f"{summary[0].upper()}{summary[1:]}."
    verb: argparse.ArgumentParser = verbs.add_parser(
        name, help=summary, description=f"{sentence} {more}", epilog=epilog
    )
    verb.set_defaults(run=run)
    return verb


def _add_show(verbs: Any) -> None:
    show = _add_verb(
        verbs, "show", _show, "mark the tokens of a text that a rule drops"
    )
    source = show.add_mutually_exclusive_group(required=True)
    source.add_argument("text", nargs="?", help="a text in quotes")
    source.add_argument("--file", metavar="FILE", help="a UTF-8 file with the text")
    _add_rule(show, complete=True)


def _add_check(verbs: Any) -> None:
    check = _add_verb(
        verbs,
        "check",
        _check,
        "report what a rule leaves unprotected in the training data, before training",
        "The last line is a conclusion, with a rule to copy. Tokenizing uses every core; the "
        "environment variable RAYON_NUM_THREADS limits it.",
        "Exit codes: 0 no marked secret can be learned whole, or none was marked; 1 some can; "
        "3 secrets were marked but none is trained on; 2 error.",
    )
    add = check.add_argument
    add("source", metavar="DATA", help=EXPECTED)
    add(
        "--assistant-only",
        action="store_true",
        help="only the assistant's turns are trained on, as with TRL's assistant_only_loss",
    )
    add(
        "--model",
        metavar="NAME",
        help="the model to be finetuned, to estimate how many bits of each secret must be guessed "
        "(an estimate, not a lower bound)",
    )
    _add_marks(check)
    _add_rule(check)


def _add_premask(verbs: Any) -> None:
    premask = _add_verb(
        verbs,
        "premask",
        _premask,
        "write masked labels for a tokenized dataset, for trainers without goldfish support",
        "If the dataset has several splits, train is read. Beside the labels it writes a receipt, "
        "goldfish.json, with the rule and what it dropped in one pass; copy it beside the weights "
        "after training.",
    )
    add = premask.add_argument
    add(
        "input",
        help="a folder of datasets.save_to_disk, or a .parquet, .json or .jsonl file; needs a "
        "column input_ids",
    )
    add("-o", "--output-dir", required=True, metavar="DIR", help="a new folder")
    add(
        "--format",
        default="labels",
        help="labels (default): a datasets folder; mask: arrays for OLMo; loss-mask: arrays for "
        "Megatron and NeMo",
    )
    add("--num-proc", type=int, metavar="N", help="processes (default 1)")
    add(
        "--secret-column",
        metavar="NAME",
        help="also drop the secrets in this column (strings, or lists of them), in every row",
    )
    _add_rule(premask, complete=True)


def _add_audit(verbs: Any) -> None:
    audit = _add_verb(
        verbs,
        "audit",
        _audit,
        "test whether a checkpoint recites texts",
        "Give --members, --heldout or both. After an interruption, repeat the command to continue.",
        EXIT_OF_AUDIT,
    )
    audit.add_argument(
        "checkpoint", help="a folder, hub name or .gguf file with model and tokenizer"
    )
    _add_audit_data(audit)
    _add_marks(audit)
    _add_audit_questions(audit)
    _add_audit_model(audit)
    _add_verdict(audit)


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
        help="audit N rows of each, drawn at random (default: all)",
    )
    add("--seed", type=int, default=0, help="random seed of that draw (default 0)")
    add(
        "--complete",
        action="store_true",
        help="--members is everything the model was trained on: a census, not a sample",
    )
    add(
        "--allow-overlap",
        action="store_true",
        help="audit even if texts are in both --members and --heldout",
    )
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
        metavar="N",
        help="tokens the model is given (default 50)",
    )
    add(
        "--suffix-length",
        type=int,
        default=50,
        metavar="N",
        help="tokens the model must continue with (default 50)",
    )
    add(
        "--offsets",
        type=int,
        nargs="+",
        default=[0],
        metavar="N",
        help="where in each text the prefix starts, in tokens; may be several (default 0)",
    )
    add(
        "--sampling",
        type=_settings_of(_SAMPLING, "temperature=0.8,top_k=40,top_p=0.95"),
        nargs="*",
        metavar="SETTING",
        help="compute the probability that sampling recites a text, for settings such as "
        "temperature=0.8,top_p=0.9 (default: temperature=1, and the same with top_k=40)",
    )
    add(
        "--beams",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="also run beam searches with N beams, such as 4 16",
    )
    add(
        "--near-verbatim",
        default="25t,50%",
        metavar="AT-LEAST",
        help="what counts as near-verbatim: a run of tokens (25t), words (15w) or characters "
        "(150c), or a share of unedited tokens (90%%); default 25t,50%%",
    )
    add(
        "--ask",
        action="append",
        default=[],
        metavar="TEMPLATE",
        help='ask simple prompts with columns of the rows, such as "What is the text of {title}?"',
    )
    add(
        "--ask-length",
        type=int,
        default=256,
        metavar="N",
        help="longest answer to such a prompt, in tokens (default 256)",
    )
    add(
        "--ask-samples",
        type=int,
        default=0,
        metavar="N",
        help="also draw N answers to each such prompt at temperature 1 (default 0)",
    )
    add(
        "--ask-rounds",
        type=int,
        default=1,
        metavar="N",
        help="if an answer recites, ask the model to go on, up to N rounds in all (default 1)",
    )
    add(
        "--control",
        metavar="DIR",
        help="a reference model: same tokenizer, not trained on the members",
    )
    add(
        "--rule",
        type=_settings_of(_RULE, "k=4,h=13,max_kept=4"),
        metavar="RULE",
        help="the rule of the training, if the checkpoint has no goldfish.json, such as "
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
        help="a branch, tag or commit of a hub checkpoint",
    )
    add(
        "--batch-tokens",
        type=int,
        metavar="N",
        help="tokens per batch (default: what memory allows)",
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
    judge = _add_verb(
        verbs,
        "judge",
        _judge,
        "judge a finished audit again, perhaps with other limits",
        "The model is not run again. Files are written only with -o.",
        EXIT_OF_AUDIT,
    )
    judge.add_argument("folder", metavar="DIR", help=AUDIT_FOLDER)
    judge.add_argument(
        "-o",
        "--output-dir",
        metavar="DIR",
        help="write summary.json and summary.md there; DIR itself may be given",
    )
    _add_verdict(judge)


def _add_compare(verbs: Any) -> None:
    compare = _add_verb(
        verbs,
        "compare",
        _compare,
        "compare two audits of the same texts, text by text",
    )
    add = compare.add_argument
    add("first", metavar="A", help=AUDIT_FOLDER)
    add("second", metavar="B", help="another, of the same texts and lengths")
    add("-o", "--output-dir", required=True, metavar="DIR", help="a new folder")


def _add_report(verbs: Any) -> None:
    report = _add_verb(
        verbs, "report", _report, "write one HTML page from finished audits"
    )
    add = report.add_argument
    add("audits", nargs="+", metavar="DIR", help=AUDIT_FOLDER)
    add(
        "-o",
        "--output",
        metavar="FILE",
        help="the new file (default report.html, or model-card.md)",
    )
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


def _add_rule(verb: argparse.ArgumentParser, *, complete: bool = False) -> None:
    group = verb.add_argument_group(
        "rule",
        "Recommended: -k 4 --h 13 --max-kept 4. Without options, the paper's rule.",
    )
    add = group.add_argument
    add(
        "--tokenizer",
        required=True,
        metavar="DIR",
        help="a folder or hub name with a tokenizer",
    )
    add("-k", type=float, default=4, help="drop one token in K, on average (default 4)")
    add(
        "--h",
        type=int,
        default=13,
        help="decide from the H tokens before a token; with --strategy letters, from the 5H "
        "letters before it (default 13)",
    )
    # Not checked here: the list of strategies is in goldfish.rule, which imports torch.
    add(
        "--strategy",
        default="hash",
        help="hash (default): decide from the tokens before; letters: from the letters and digits "
        "before, so copies with another layout have the same dropped tokens; entropy: drop what "
        "the model is uncertain of before training. For comparison only: static, random, "
        "reference",
    )
    add(
        "--max-kept",
        type=int,
        metavar="N",
        help="keep at most N tokens in a row; N must be at least K (default: no limit)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="another seed drops other tokens (default 0)",
    )
    # `check` has secrets of its own, and reads the data without a model.
    if complete:
        add(
            "--guide",
            metavar="MODEL",
            help="with --strategy entropy: the model to be trained, a folder or hub name",
        )
        add(
            "--secrets",
            metavar="REGEX",
            dest="rule_secrets",
            help="also drop what this expression matches, or its first group, if it has groups",
        )


def _add_marks(verb: argparse.ArgumentParser) -> None:
    """Which column is read, and which parts of it are secrets."""
    group = verb.add_argument_group("columns and secrets")
    group.add_argument(
        "--text-column",
        metavar="NAME",
        default="",
        help="the column with the texts or messages",
    )
    marks = group.add_mutually_exclusive_group()
    marks.add_argument(
        "--secrets",
        metavar="REGEX",
        default="",
        help="secrets are the matches of this expression, or of its first group, if it has groups",
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
        help="the highest value that is still a PASS; may be repeated (defaults: recited=1%%, "
        "near_verbatim=1%%, auc=55%%)",
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
    """Parse the command line; a misspelt word ends with a suggestion and exit code 2."""
    parser = build_parser()
    verbs = next(
        action.choices for action in parser._actions if isinstance(action.choices, dict)
    )
    verb = next((word for word in words if not word.startswith("-")), "")
    if verb and verb not in verbs:
        parser.error(f"there is no command {verb!r}{_suggestion(verb, verbs)}")
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


def _model(name: str | None) -> Any:
    """The model of a checkpoint, on a GPU if there is one; None without a name."""
    if name is None:
        return None
    import torch

    from goldfish.checkpoint import Checkpoint

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Checkpoint(name).model(device)


def _premask(args: argparse.Namespace) -> None:
    from goldfish.checkpoint import load_tokenizer
    from goldfish.premasking import premask_files

    tokenizer = load_tokenizer(args.tokenizer)
    premask_files(
        args.input,
        args.output_dir,
        _rule(args),
        tokenizer,
        guide=_model(args.guide),
        format=args.format,
        num_proc=args.num_proc,
        secret_column=args.secret_column,
    )
    print(f"Written: {args.output_dir}")


def _show(args: argparse.Namespace) -> None:
    from rich.text import Text

    from goldfish.checkpoint import load_tokenizer
    from goldfish.text.show import show

    text = (
        args.text if args.file is None else Path(args.file).read_text(encoding="utf-8")
    )
    unbound = _rule(args)  # a bad rule is reported before the tokenizer is loaded
    tokenizer = load_tokenizer(args.tokenizer)
    rule = unbound.bind(tokenizer)
    if args.guide is not None:
        from goldfish.guide import Guide

        batch = {"input_ids": [tokenizer(text)["input_ids"]]}
        rule = Guide(_model(args.guide)).read(rule, batch)
    console = _console()
    colour = console.is_terminal and not console.no_color
    console.print(show(rule, tokenizer, text, colour=colour))
    console.print(Text(rule.short(), "dim"))


def _check(args: argparse.Namespace) -> int:
    from goldfish.checkpoint import load_tokenizer
    from goldfish.text.check import check

    rule = _rule(args)  # a bad rule is reported before the tokenizer is loaded
    tokenizer = load_tokenizer(args.tokenizer)
    result = check(
        args.source,
        tokenizer,
        rule,
        args.secrets,
        args.secret_column,
        args.text_column,
        assistant_only=args.assistant_only,
        model=_model(args.model),
    )
    print("\n".join(result.lines()))
    return result.exit_code()


Kinds = dict[str, Callable[[str], Any]]
_SAMPLING: Kinds = {"temperature": float, "top_k": int, "top_p": float}
_RULE: Kinds = {"k": float, "h": int, "max_kept": int, "seed": int, "strategy": str}


def _settings_of(kinds: Kinds, example: str) -> Callable[[str], dict[str, Any]]:
    """The type of an option such as `example`: a function that makes keyword arguments of it."""

    def parse(text: str) -> dict[str, Any]:
        settings = {}
        for part in text.split(","):
            name, _, value = part.partition("=")
            try:
                settings[name] = kinds[name](value)
            except (KeyError, ValueError):
                raise argparse.ArgumentTypeError(
                    f"expected settings such as {example}, got {text!r}"
                ) from None
        return settings

    return parse


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
    next_step = f"Next: goldfish report {args.output_dir} -o report.html"
    return _print_audit(result, args.verb, next_step)


def _judge(args: argparse.Namespace) -> int:
    from goldfish.audit.render import write
    from goldfish.audit.results import judge

    result = judge(args.folder, args.limits, args.require)
    if args.output_dir is not None:
        write(result, args.output_dir)
        print(f"Written: {args.output_dir}")
    return _print_audit(result, args.verb)


def _print_audit(result: Any, verb: str, next_step: str = "") -> int:
    """Print an audit, and in the last line the outcome for scripts; return the exit code."""
    from goldfish.audit.render import describe, terminal

    _console().print(terminal(describe(result)))
    code = int(result.verdict["exit_code"])
    if next_step:
        print(next_step)
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
