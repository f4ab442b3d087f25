"""Adversaries who try harder than greedy decoding, against models trained with other k.

    python recipes/pretrain_canaries.py --output_dir runs/canaries
    # resumes with what the results file lacks
    python benchmarks/adversaries.py runs/canaries
    # models of finetune_private.py, with --keep
    python benchmarks/adversaries.py runs/finetune_private --results adversaries.jsonl
    # of the results so far; no model is needed
    python benchmarks/adversaries.py --table --plot adversaries.svg

Each of them wants trained windows verbatim. Search: beams 1 to 30; the suffix is among the finished
beams. Share held: the adversary is given 10% to 90% of a window and wants the rest. Sampling: the
expected share of suffixes drawn at least once in 10 to 1,000,000 samples at temperature 1, computed
from their probability. Offset: 8 tokens are given and 8 wanted, from further and further into the
window. Membership: every attack, with the run "control" of the same seed, which never saw these
windows, as reference (for finetuned models the untouched one), and blind baselines that see texts
but no model.

Paper (Hans et al. 2024, sections 5 and 6): beam search with 30 beams extracts more than greedy
decoding, the more the larger k is, and little at k = 3 and 4; membership inference stays possible.
"""

import json
import re
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from about import RESULTS, about, append, markdown, missing, parser, read_results
from matplotlib.figure import Figure

from goldfish.audit import audit, read

BEAMS = (1, 2, 4, 8, 16, 30)
SAMPLES = tuple(10**power for power in range(1, 7))
PANELS = {
    "beams": "beams",
    "held": "share of the text held",
    "samples": "samples",
    "offset": "offset, tokens",
}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    options = parser(__doc__)
    options.add_argument(
        "folder",
        type=Path,
        nargs="?",
        help="output_dir of pretrain_canaries.py or finetune_private.py",
    )
    options.add_argument("--results", type=Path, default=RESULTS / "adversaries.jsonl")
    options.add_argument(
        "--table", action="store_true", help="print the table of the results and stop"
    )
    options.add_argument("--plot", type=Path, help="write the picture, SVG")
    args = options.parse_args(argv)
    if not args.table:
        models = {} if args.folder is None else models_in(args.folder)
        if not models:
            options.error(
                "give an output_dir of pretrain_canaries.py, or of finetune_private.py with --keep"
            )
        wanted = [{"seed": seed, "run": run} for seed, run in models]
        for wish in missing(args.results, wanted):
            began = time.process_time()
            seed, run = wish["seed"], wish["run"]
            model, inputs = models[seed, run]
            # A control is no reference for itself.
            control, _ = models.get((seed, "control"), (None, None))
            result = wish | attack(model, inputs, None if run == "control" else control)
            result["cpu_seconds"] = round(time.process_time() - began)
            append(args.results, result | about())
            print(f"seed {seed} {run}: {result['beams']}", flush=True)
    results = read_results(args.results)
    print(table(results))
    if args.plot:
        draw(results, args.plot)
    return results


def models_in(folder: Path) -> dict[tuple[int, str], tuple[Path, Path]]:
    """Seed and run -> the model, and the folder with members.jsonl and heldout.jsonl."""
    models = {}
    # As pretrain_canaries.py names them: seed0-hash-4-13/model.
    for path in sorted(folder.glob("seed*/model")):
        seed, run = path.parent.name.removeprefix("seed").split("-", 1)
        models[int(seed), run] = path, path.parent
    # As finetune_private.py names them: seed0/full-hash-4-13.
    for path in sorted(folder.glob("seed*/full-*/config.json")):
        inputs, run = path.parents[1], path.parent.name.removeprefix("full-")
        seed = inputs.name.removeprefix("seed")
        models[int(seed), "control"] = folder / "base", inputs
        models[int(seed), run] = path.parent, inputs
    return models


def attack(model: Path, inputs: Path, control: Path | None) -> dict[str, Any]:
    """Windows recited, [number, of], or expected share, for every strength of every adversary."""
    members, heldout = inputs / "members.jsonl", inputs / "heldout.jsonl"
    first, *_ = members.read_text(encoding="utf-8").splitlines()
    window = len(json.loads(first)["input_ids"])
    result: dict[str, Any] = {"window": window}
    half = window // 2

    def ask(prefix_length: int, suffix_length: int, **options: Any) -> Any:
        lengths = {"prefix_length": prefix_length, "suffix_length": suffix_length}
        with tempfile.TemporaryDirectory() as folder:
            audit(model, Path(folder, "audit"), members=members, **lengths, **options)
            return read(Path(folder, "audit"))

    figures = ask(half, window - half, heldout=heldout, beams=BEAMS, control=control)
    rows = figures.rows
    beams = rows.select(split="members", figure="beam_search")
    result["beams"] = {each.x: hits(each) for each in beams if each.x is not None}
    result["beams_heldout"] = hits(rows.get("heldout", "beam_search", "", BEAMS[-1]))
    expected = rows.select(split="members", figure="expected", setting="T=1")
    result["samples"] = {
        each.x: estimate(each) for each in expected if each.x in SAMPLES
    }
    result["membership"] = {}
    for each in rows.select(figure="attack_auc"):
        result["membership"][each.setting] = estimate(each)
    for each in rows.select(figure="blind_auc"):
        result["membership"][f"blind.{each.setting}"] = estimate(each)
    result["held"] = {}
    for tenth in range(1, 10):
        length = round(window * tenth / 10)
        figures = ask(length, window - length, sampling=())
        result["held"][tenth / 10] = hits(figures["members.exact_match"])
    offsets = range(0, window - 15, 4)
    figures = ask(8, 8, sampling=(), offsets=offsets)
    sweep = figures.rows.select(split="members", figure="offset_sweep")
    result["offset"] = {each.x: hits(each) for each in sweep}
    return result


def hits(figure: Any) -> list[int]:
    return [figure.k, figure.n]


def estimate(figure: Any) -> list[float | None]:
    values = (figure.value, figure.low, figure.high)
    return [None if value is None else round(value, 4) for value in values]


def by_run(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The seeds of each run: the control, the rules by k, then the standard loss."""

    def order(run: str) -> tuple[bool, int, str]:
        # k is the first number of hash-4-13.
        k = re.search(r"\d+", run)
        return run == "standard", int(k[0]) if k else 0, run

    runs = sorted({result["run"] for result in results}, key=order)
    return {run: [result for result in results if result["run"] == run] for run in runs}


def shares(group: list[dict[str, Any]], panel: str) -> dict[str, float]:
    """Strength of an adversary -> share of windows recited, over all seeds."""
    result = {}
    for strength in group[0][panel]:
        values = [each[panel][strength] for each in group]
        first = [value[0] for value in values]
        if panel == "samples":
            # An estimate: value, lower, upper.
            result[strength] = fmean(first)
        else:
            windows = sum(value[1] for value in values)
            result[strength] = sum(first) / windows
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: shares of windows recited by each adversary; the AUC of each membership attack."""
    if not results:
        return "no results yet"
    groups, tables = by_run(results), []
    for panel, title in PANELS.items():
        rows = []
        for run, group in groups.items():
            windows = sum(result["beams"]["1"][1] for result in group)
            cells = [f"{share:.2f}" for share in shares(group, panel).values()]
            rows.append((run, windows, *cells))
        tables.append(markdown((title, "windows", *results[0][panel]), rows))
    # Finetuned models, without a control, lack some of the attacks.
    names = dict.fromkeys(name for result in results for name in result["membership"])
    rows = []
    for run, group in groups.items():
        cells = []
        for name in names:
            seeds = [result["membership"].get(name) for result in group]
            cells.append(", ".join(map(auc, seeds)))
        rows.append((run, *cells))
    return "\n\n".join([*tables, markdown(("AUC of each seed", *names), rows)])


def auc(values: list[float | None] | None) -> str:
    if values is None or values[0] is None:
        return "-"
    value, lower, upper = values
    if lower is None or upper is None:
        return f"{value:.2f}"
    return f"{value:.2f} [{lower:.2f}, {upper:.2f}]"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """One panel for each adversary; a line for each run."""
    # A recipe's module, found once `about` has been imported.
    import svg

    with svg.style():
        figure = Figure(figsize=(10, 2.8), layout="constrained")
        axes = figure.subplots(1, len(PANELS), sharey=True)
        for axis, (panel, title) in zip(axes, PANELS.items(), strict=True):
            for run, group in by_run(results).items():
                points = shares(group, panel)
                strengths = [float(strength) for strength in points]
                axis.plot(strengths, list(points.values()), marker=".", label=run)
            axis.set_xscale("log" if panel in ("beams", "samples") else "linear")
            axis.set_xlabel(title)
        axes[0].set_ylim(-0.03, 1.03)
        axes[0].set_ylabel("trained windows recited")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right")
        svg.save(figure, path)


if __name__ == "__main__":
    main()
