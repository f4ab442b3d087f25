"""Adversaries who try harder than greedy decoding, against models trained with other k.

    python recipes/pretrain_canaries.py --output_dir runs/canaries      # or with fewer --rules and --seeds
    python benchmarks/adversaries.py runs/canaries                      # goes on with what the results file lacks
    python benchmarks/adversaries.py --table --plot adversaries.svg     # of the results so far; no model is needed

Each of them wants planted windows word for word. Search: beams 1 to 30; the suffix is among the finished beams. Share
held: the adversary is given 10% to 90% of a window and wants the rest. Sampling: the expected share of suffixes drawn
at least once in 10 to 1,000,000 samples at temperature 1, computed from their probability. Offset: 8 tokens are given
and 8 wanted, from further and further into the window. Membership: every attack, with the run "control" of the same
seed, which never saw the planted windows, as reference, and blind baselines that see texts but no model.

Paper (Hans et al. 2024, sections 5 and 6): beam search with 30 beams extracts more than greedy decoding, the more the
larger k is, and little at k = 3 and 4; membership inference stays possible.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from about import RESULTS, about
from matplotlib import rc_context
from matplotlib.figure import Figure
from runs import append, read_results

from goldfish.audit import audit, read

BEAMS = (1, 2, 4, 8, 16, 30)
TENTHS = range(1, 10)
SAMPLES = tuple(10**power for power in range(1, 7))
PANELS = {"beams": "beams", "held": "share of the text held", "samples": "samples", "offset": "offset, tokens"}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="output_dir of pretrain_canaries.py")
    parser.add_argument("--results", type=Path, default=RESULTS / "adversaries.jsonl")
    parser.add_argument("--table", action="store_true", help="print the table of the results and stop")
    parser.add_argument("--plot", type=Path, help="write the picture, SVG")
    args = parser.parse_args(argv)
    if not args.table:
        if args.folder is None or not list(args.folder.glob("seed*/model")):
            parser.error("give the output_dir of pretrain_canaries.py, with its trained models: seed*/model")
        for folder in sorted(path.parent for path in args.folder.glob("seed*/model")):
            seed, run = folder.name.removeprefix("seed").split("-", 1)
            if (int(seed), run) in {(r["seed"], r["run"]) for r in read_results(args.results)}:
                continue
            began = time.process_time()
            control = args.folder / f"seed{seed}-control" / "model"
            result = {"seed": int(seed), "run": run} | attack(
                folder, control if control.is_dir() and run != "control" else None
            )
            append(args.results, result | {"cpu_seconds": round(time.process_time() - began)} | about())
            print(f"seed {seed} {run}: {result['beams']}", flush=True)
    results = read_results(args.results)
    print(table(results))
    if args.plot:
        draw(results, args.plot)
    return results


def attack(folder: Path, control: Path | None) -> dict[str, Any]:
    """Windows recited, [number, of], or expected share, for every strength of every adversary."""
    files = {split: folder / f"{split}.jsonl" for split in ("members", "heldout")}
    window = len(json.loads(files["members"].read_text(encoding="utf-8").splitlines()[0])["input_ids"])
    result: dict[str, Any] = {"window": window}
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary)
        half = window // 2
        audit(
            folder / "model", target / "main", **files, prefix_length=half, suffix_length=window - half,
            beams=BEAMS, control=control,
        )  # fmt: skip
        figures = read(target / "main")
        result["beams"] = {width: hits(figures[f"members.beam_search@{width}"]) for width in BEAMS}
        result["beams_heldout"] = hits(figures[f"heldout.beam_search@{BEAMS[-1]}"])
        result["samples"] = {n: estimate(figures[f"members.expected@{n}"]) for n in SAMPLES}
        names = [
            *figures.summary["membership"]["attacks"],
            *(f"blind.{b}" for b in figures.summary["membership"]["blind"]),
        ]
        result["membership"] = {name: estimate(figures[f"mia.{name}.auc"]) for name in names}
        result["held"], result["offset"] = {}, {}
        for tenth in TENTHS:
            length = round(window * tenth / 10)
            audit(folder / "model", target / f"held{tenth}", members=files["members"], sampling=(),
                  prefix_length=length, suffix_length=window - length)  # fmt: skip
            result["held"][tenth / 10] = hits(read(target / f"held{tenth}")["members.exact_match"])
        offsets = range(0, window - 15, 4)
        audit(folder / "model", target / "offset", members=files["members"], sampling=(), prefix_length=8,
              suffix_length=8, offsets=offsets)  # fmt: skip
        figures = read(target / "offset")
        result["offset"] = {offset: hits(figures[f"members.offset_sweep@{offset}"]) for offset in offsets}
    return result


def hits(figure: Any) -> list[int]:
    return [figure.k, figure.n]


def estimate(figure: Any) -> list[float | None]:
    return [None if value is None else round(value, 4) for value in (figure.value, figure.lower95, figure.upper95)]


def merge(results: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Run -> adversary -> strength -> share recited, over all seeds."""
    shares: dict[str, dict[str, dict[str, float]]] = {}
    for run in sorted({result["run"] for result in results}, key=order):
        group = [result for result in results if result["run"] == run]
        shares[run] = {}
        for panel in PANELS:
            shares[run][panel] = {}
            for strength in group[0][panel]:
                values = [result[panel][strength] for result in group]
                if panel == "samples":
                    share = sum(value[0] for value in values) / len(values)
                else:
                    share = sum(value[0] for value in values) / sum(value[1] for value in values)
                shares[run][panel][strength] = share
    return shares


def order(run: str) -> tuple[int, float, str]:
    """Control, then k rising, then the standard loss."""
    if not run.startswith("k"):
        return (0 if run == "control" else 2, 0.0, run)
    return (1, float(run.removeprefix("k").split("-")[0]), run)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: the share of planted windows recited by each adversary; then the AUC of every membership attack."""
    if not results:
        return "no results yet"
    shares = merge(results)
    first = next(iter(shares.values()))
    lines = []
    for panel, title in PANELS.items():
        strengths = list(first[panel])
        lines += [f"| {title} | windows | " + " | ".join(strengths) + " |", "|---" * (len(strengths) + 2) + "|"]
        for run in shares:
            group = [result for result in results if result["run"] == run]
            windows = sum(result["beams"]["1"][1] for result in group)
            lines.append(f"| {run} | {windows} | " + " | ".join(f"{v:.2f}" for v in shares[run][panel].values()) + " |")
        lines.append("")
    names = list(dict.fromkeys(name for result in results for name in result["membership"]))
    lines += ["| AUC of each seed | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for run in shares:
        cells = []
        for name in names:
            values = [result["membership"].get(name) for result in results if result["run"] == run]
            cells.append(", ".join(auc(*value) for value in values if value and value[0] is not None))
        lines.append(f"| {run} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def auc(value: float, lower: float | None, upper: float | None) -> str:
    return f"{value:.2f}" + ("" if lower is None or upper is None else f" [{lower:.2f}, {upper:.2f}]")


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """One panel for each adversary; a line for each run."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "goldfish", "font.size": 9}):
        figure = Figure(figsize=(10, 2.8), layout="constrained")
        axes = figure.subplots(1, len(PANELS), sharey=True)
        for axis, (panel, title) in zip(axes, PANELS.items(), strict=True):
            for run, by_panel in merge(results).items():
                strengths = [float(strength) for strength in by_panel[panel]]
                axis.plot(strengths, list(by_panel[panel].values()), marker=".", label=run)
            axis.set_xscale("log" if panel in ("beams", "samples") else "linear")
            axis.set_xlabel(title)
        axes[0].set_ylim(-0.03, 1.03)
        axes[0].set_ylabel("planted windows recited")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right")
        figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
