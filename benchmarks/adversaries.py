"""Adversaries who try harder than greedy decoding, against models trained with other k.

    python recipes/pretrain_canaries.py --output_dir runs/canaries      # or with fewer --rules and --seeds
    python benchmarks/adversaries.py runs/canaries                      # goes on with what the results file lacks
    python benchmarks/adversaries.py runs/finetune_private --results adversaries.jsonl    # its models, with --keep
    python benchmarks/adversaries.py --table --plot adversaries.svg     # of the results so far; no model is needed

Each of them wants trained windows word for word. Search: beams 1 to 30; the suffix is among the finished beams. Share
held: the adversary is given 10% to 90% of a window and wants the rest. Sampling: the expected share of suffixes drawn
at least once in 10 to 1,000,000 samples at temperature 1, computed from their probability. Offset: 8 tokens are given
and 8 wanted, from further and further into the window. Membership: every attack, with the run "control" of the same
seed, which never saw these windows, as reference (of finetuned models the untouched one), and blind baselines that see
texts but no model.

Paper (Hans et al. 2024, sections 5 and 6): beam search with 30 beams extracts more than greedy decoding, the more the
larger k is, and little at k = 3 and 4; membership inference stays possible.
"""

import argparse
import json
import re
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from about import RESULTS, about, append, markdown, read_results
from matplotlib import rc_context
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        help="output_dir of pretrain_canaries.py or finetune_private.py",
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "adversaries.jsonl")
    parser.add_argument(
        "--table", action="store_true", help="print the table of the results and stop"
    )
    parser.add_argument("--plot", type=Path, help="write the picture, SVG")
    args = parser.parse_args(argv)
    if not args.table:
        models = {} if args.folder is None else models_in(args.folder)
        if not models:
            parser.error(
                "give an output_dir of pretrain_canaries.py, or of finetune_private.py with --keep"
            )
        for (seed, run), (model, inputs) in models.items():
            if (seed, run) in {(r["seed"], r["run"]) for r in read_results(args.results)}:
                continue
            began = time.process_time()
            control, _ = models.get((seed, "control"), (None, None))
            result = {"seed": seed, "run": run} | attack(
                model, inputs, None if run == "control" else control
            )
            append(
                args.results, result | {"cpu_seconds": round(time.process_time() - began)} | about()
            )
            print(f"seed {seed} {run}: {result['beams']}", flush=True)
    results = read_results(args.results)
    print(table(results))
    if args.plot:
        draw(results, args.plot)
    return results


def models_in(folder: Path) -> dict[tuple[int, str], tuple[Path, Path]]:
    """Seed and run -> the model, and the folder with members.jsonl and heldout.jsonl."""
    models = {}
    for path in sorted(
        folder.glob("seed*/model")
    ):  # of pretrain_canaries.py: seed0-hash-4-13/model
        seed, run = path.parent.name.removeprefix("seed").split("-", 1)
        models[int(seed), run] = path, path.parent
    for path in sorted(
        folder.glob("seed*/full-*/config.json")
    ):  # of finetune_private.py: seed0/full-hash-4-13
        inputs, run = path.parents[1], path.parent.name.removeprefix("full-")
        seed = inputs.name.removeprefix("seed")
        models[int(seed), "control"] = folder / "base", inputs
        models[int(seed), run] = path.parent, inputs
    return models


def attack(model: Path, inputs: Path, control: Path | None) -> dict[str, Any]:
    """Windows recited, [number, of], or expected share, for every strength of every adversary."""
    files = {split: inputs / f"{split}.jsonl" for split in ("members", "heldout")}
    window = len(
        json.loads(files["members"].read_text(encoding="utf-8").splitlines()[0])["input_ids"]
    )
    result: dict[str, Any] = {"window": window}
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary)
        half = window // 2
        audit(
            model,
            target / "main",
            **files,
            prefix_length=half,
            suffix_length=window - half,
            beams=BEAMS,
            control=control,
        )
        figures = read(target / "main")
        result["beams"] = {width: hits(figures[f"members.beam_search@{width}"]) for width in BEAMS}
        result["beams_heldout"] = hits(figures[f"heldout.beam_search@{BEAMS[-1]}"])
        result["samples"] = {n: estimate(figures[f"members.expected@{n}"]) for n in SAMPLES}
        membership = figures.summary["membership"]
        names = [*membership["attacks"], *(f"blind.{name}" for name in membership["blind"])]
        result["membership"] = {name: estimate(figures[f"mia.{name}.auc"]) for name in names}
        result["held"] = {}
        for tenth in range(1, 10):
            length = round(window * tenth / 10)
            audit(
                model,
                target / f"held{tenth}",
                members=files["members"],
                sampling=(),
                prefix_length=length,
                suffix_length=window - length,
            )
            result["held"][tenth / 10] = hits(read(target / f"held{tenth}")["members.exact_match"])
        offsets = range(0, window - 15, 4)
        audit(
            model,
            target / "offset",
            members=files["members"],
            sampling=(),
            prefix_length=8,
            suffix_length=8,
            offsets=offsets,
        )
        figures = read(target / "offset")
        result["offset"] = {
            offset: hits(figures[f"members.offset_sweep@{offset}"]) for offset in offsets
        }
    return result


def hits(figure: Any) -> list[int]:
    return [figure.k, figure.n]


def estimate(figure: Any) -> list[float | None]:
    return [
        None if value is None else round(value, 4)
        for value in (figure.value, figure.lower95, figure.upper95)
    ]


def by_run(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The seeds of each run: the control, the rules by k, then the standard loss."""

    def order(run: str) -> tuple[bool, int, str]:
        k = re.search(r"\d+", run)  # the first number of hash-4-13
        return run == "standard", int(k[0]) if k else 0, run

    runs = sorted({result["run"] for result in results}, key=order)
    return {run: [result for result in results if result["run"] == run] for run in runs}


def shares(group: list[dict[str, Any]], panel: str) -> dict[str, float]:
    """Strength of an adversary -> share of windows recited, over all seeds."""
    result = {}
    for strength in group[0][panel]:
        values = [each[panel][strength] for each in group]
        if panel == "samples":
            result[strength] = fmean(value[0] for value in values)
        else:
            result[strength] = sum(value[0] for value in values) / sum(value[1] for value in values)
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: the share of trained windows recited by each adversary; then the AUC of every membership attack."""
    if not results:
        return "no results yet"
    groups, tables = by_run(results), []
    for panel, title in PANELS.items():
        rows = []
        for run, group in groups.items():
            windows = sum(result["beams"]["1"][1] for result in group)
            rows.append(
                (run, windows, *(f"{share:.2f}" for share in shares(group, panel).values()))
            )
        tables.append(markdown((title, "windows", *results[0][panel]), rows))
    names = dict.fromkeys(name for result in results for name in result["membership"])
    rows = [
        (
            run,
            *(", ".join(auc(result["membership"].get(name)) for result in group) for name in names),
        )
        for run, group in groups.items()
    ]
    return "\n\n".join([*tables, markdown(("AUC of each seed", *names), rows)])


def auc(values: list[float | None] | None) -> str:
    if values is None or values[0] is None:
        return "-"
    value, lower, upper = values
    return f"{value:.2f}" + (
        "" if lower is None or upper is None else f" [{lower:.2f}, {upper:.2f}]"
    )


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """One panel for each adversary; a line for each run."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "goldfish", "font.size": 9}):
        figure = Figure(figsize=(10, 2.8), layout="constrained")
        axes = figure.subplots(1, len(PANELS), sharey=True)
        for axis, (panel, title) in zip(axes, PANELS.items(), strict=True):
            for run, group in by_run(results).items():
                points = shares(group, panel)
                axis.plot(list(map(float, points)), list(points.values()), marker=".", label=run)
            axis.set_xscale("log" if panel in ("beams", "samples") else "linear")
            axis.set_xlabel(title)
        axes[0].set_ylim(-0.03, 1.03)
        axes[0].set_ylabel("trained windows recited")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right")
        figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
