"""Which k for one's own data? Reads the results of pretrain_canaries.py: a table, three pictures, and a choice of k.

    python recipes/pretrain_canaries.py --text mine.jsonl --output_dir runs/mine && python recipes/sweep.py runs/mine
    python recipes/sweep.py runs/mine --leak 0.3 --measure rouge_l      # by another measure; no training

A larger k costs fewer targets and protects less. `left` is the share of recitation that a k leaves: (planted documents
recited word for word - those of the control) / (the same of the standard loss), or with --measure rouge_l the same of
ROUGE-L, which also counts parts. Chosen is the largest k with `left` at most `leak`. How sure that is: the share of
2000 bootstrap samples of the documents (over all seeds) that choose each k.
"""

import argparse
import json
import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

Results = list[dict[str, Any]]
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "goldfish", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.titlesize": 9,
}  # fmt: skip
BINS = 20
SAMPLES = 2000


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output_dir of pretrain_canaries.py")
    parser.add_argument("--leak", type=float, default=0.1, help="the share of recitation that may be left")
    parser.add_argument("--measure", choices=("exact_match", "rouge_l"), default="exact_match", help="of recitation")
    args = parser.parse_args(argv)
    path = args.folder / "results.jsonl"
    if not path.is_file():
        parser.error(f"{path} does not exist; run pretrain_canaries.py --output_dir {args.folder} first")
    results = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return present(results, args.folder, args.leak, Console(), args.measure)


def present(
    results: Results, output: Path, leak: float, console: Console, measure: str = "exact_match"
) -> dict[str, Any]:
    """Print the table and the choice, draw the pictures; returns the choice."""
    console.print(table(results))
    for name, draw in (("rouge", draw_histograms), ("extraction", draw_extraction), ("heldout", draw_heldout)):
        save(output / f"{name}.svg", draw, results)
    choice = choose_k(results, leak, measure)
    console.print(choice["says"], highlight=False, soft_wrap=True)
    (output / "choice.json").write_text(json.dumps(choice, indent=2) + "\n", encoding="utf-8")
    console.print(f"Results and pictures: {output}", highlight=False, soft_wrap=True)
    return choice


def grouped(results: Results) -> dict[str, Results]:
    """The seeds of each training, in the order in which they were trained."""
    groups: dict[str, Results] = {}
    for result in results:
        groups.setdefault(result["run"], []).append(result)
    return groups


def pooled(group: Results, key: str) -> list[float]:
    """One number a document, those of all seeds after one another."""
    return [value for result in group for value in result[key]]


def share_left(recited: float, control: float, standard: float) -> float:
    return (recited - control) / (standard - control)


def choose_k(results: Results, leak: float, measure: str = "exact_match") -> dict[str, Any]:
    """The largest k that leaves at most `leak` of recitation, with the bootstrap's votes for every k (and for none)."""
    groups = grouped(results)
    if not {"standard", "control"} <= set(groups):
        raise ValueError(f"a choice needs the trainings standard and control, found {', '.join(groups) or 'none'}")
    recited = {name: pooled(group, f"{measure}_members") for name, group in groups.items() if "equal" not in name}
    if len({len(values) for values in recited.values()}) > 1:
        raise ValueError("not every training has the same seeds and documents; finish the run first (--resume)")
    ks = {groups[name][0]["k"]: name for name in recited if groups[name][0]["k"] is not None}

    def chosen(sample: Sequence[int]) -> float | None:
        means = {name: statistics.fmean(values[i] for i in sample) for name, values in recited.items()}
        if means["standard"] <= means["control"]:
            return max(ks, default=None)
        fit = [k for k, name in ks.items() if share_left(means[name], means["control"], means["standard"]) <= leak]
        return max(fit, default=None)

    documents = range(len(recited["standard"]))
    gained = statistics.fmean(recited["standard"]) - statistics.fmean(recited["control"])
    if gained < 0.05:
        says = (
            f"Nothing to choose: the standard loss recites hardly more than the control ({measure}: {gained:+.2f}). "
            "Plant more repeats, or train longer."
        )
        return {"k": None, "leak": leak, "measure": measure, "votes": {}, "says": says}
    draw = random.Random(0)
    votes = Counter(chosen(draw.choices(documents, k=len(documents))) for _ in range(SAMPLES))
    shares = {("none" if k is None else f"{k:g}"): votes[k] / SAMPLES for k in [*sorted(ks), None] if votes[k]}
    k = chosen(documents)
    cost = ""
    if k is not None:
        both = zip(groups[ks[k]], groups["standard"], strict=True)
        costs = [ours["validation_loss"] - theirs["validation_loss"] for ours, theirs in both]
        cost = f" It costs {statistics.fmean(costs):+.3f} nats/token held-out ({min(costs):+.3f} to {max(costs):+.3f})."
    best = f"k={k:g}" if k is not None else f"none of k={', '.join(f'{k:g}' for k in sorted(ks))}; try a smaller one"
    shown = ", ".join(f"k={k} {share:.0%}" for k, share in shares.items())
    says = (
        f"The largest k that leaves at most {leak:.0%} of recitation ({measure}): {best}.{cost} "
        f"Of {SAMPLES} bootstrap samples of {len(documents)} documents: {shown}."
    )
    return {"k": k, "leak": leak, "measure": measure, "votes": shares, "says": says}


def table(results: Results) -> Table:
    """Means over seeds, [least, greatest]."""
    shown = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption="recited: word for word, of all seeds' documents; left: by ROUGE-L",
    )
    for heading in ("run", "tokens", "recited", "ROUGE-L", "spread", "floor", "left", "held-out nats", "spread", "n"):
        shown.add_column(heading)
    groups = grouped(results)
    rouge = {name: statistics.fmean(pooled(group, "rouge_l_members")) for name, group in groups.items()}
    for name, group in groups.items():
        exact = [int(value) for value in pooled(group, "exact_match_members")]
        of_seed = [statistics.fmean(result["rouge_l_members"]) for result in group]
        losses = [result["validation_loss"] for result in group]
        left = "-"
        if rouge.get("standard", 0) > rouge.get("control", 1):
            left = f"{share_left(rouge[name], rouge['control'], rouge['standard']):.2f}"
        shown.add_row(
            name, f"{group[0]['input_tokens']:,}", f"{sum(exact)} of {len(exact)}", f"{rouge[name]:.3f}",
            f"{min(of_seed):.2f}-{max(of_seed):.2f}", f"{statistics.fmean(pooled(group, 'rouge_l_heldout')):.3f}",
            left, f"{statistics.fmean(losses):.3f}", f"{min(losses):.2f}-{max(losses):.2f}", str(len(group)),
        )  # fmt: skip
    return shown


def draw_histograms(figure: Figure, results: Results) -> None:
    """One panel a training: planted documents in colour, held-out ones in grey."""
    groups = {name: group for name, group in grouped(results).items() if "equal" not in name}
    figure.set_size_inches(7, 1.0 * len(groups) + 0.4)
    panels = figure.subplots(len(groups), sharex=True, squeeze=False)[:, 0]
    for panel, (name, group) in zip(panels, groups.items(), strict=True):
        members = pooled(group, "rouge_l_members")
        panel.hist(pooled(group, "rouge_l_heldout"), BINS, range=(0, 1), color="0.7", label="held out")
        panel.hist(members, BINS, range=(0, 1), alpha=0.7, label="planted")
        panel.set_ylabel(name, rotation=0, ha="right", va="center")
        panel.set_yticks([])
    panels[0].legend(frameon=False)
    panels[-1].set_xlabel(f"ROUGE-L of token ids, {len(members)} documents each")


def draw_extraction(figure: Figure, results: Results) -> None:
    """Exact match and ROUGE-L of planted documents against k; dots are seeds, lines the mean."""
    panels = figure.subplots(1, 2)
    for panel, key, label in zip(
        panels, ("exact_match_members", "rouge_l_members"), ("recited word for word", "ROUGE-L"), strict=True
    ):
        against_k(panel, results, lambda result, key=key: statistics.fmean(result[key]))  # type: ignore[misc]
        panel.set(ylim=(-0.03, 1.03), title=f"planted documents: {label}")
    panels[0].legend(frameon=False)


def draw_heldout(figure: Figure, results: Results) -> None:
    """Held-out loss against k, at equal input tokens and at equal supervised tokens."""
    panel = figure.subplots()
    against_k(panel, results, lambda result: float(result["validation_loss"]), equal_too=True)
    panel.set(title="held-out loss, nats per token")
    panel.legend(frameon=False)


def against_k(panel: Any, results: Results, value: Callable[[dict[str, Any]], float], equal_too: bool = False) -> None:
    lines = [("equal input tokens", False, "C0")] + [("equal supervised tokens", True, "C2")] * equal_too
    for label, equal, colour in lines:
        points: dict[float, list[float]] = {}
        for result in results:
            if result["k"] is not None and result["equal_supervised"] is equal:
                points.setdefault(result["k"], []).append(value(result))
        ks = sorted(points)
        panel.plot(
            ks, [statistics.fmean(points[k]) for k in ks], color=colour, label=label if equal_too else "goldfish"
        )
        for k in ks:
            panel.plot([k] * len(points[k]), points[k], "o", color=colour, markersize=3)
    for name, colour in (("standard", "C3"), ("control", "0.5")):
        values = [value(result) for result in results if result["run"] == name]
        if values:
            panel.axhline(statistics.fmean(values), color=colour, linestyle="--", label=name)
            panel.axhspan(min(values), max(values), color=colour, alpha=0.15, linewidth=0)
    panel.set_xscale("log", base=2)
    ks = sorted({result["k"] for result in results if result["k"] is not None})
    panel.set_xticks(ks, [f"{k:g}" for k in ks])
    panel.minorticks_off()
    panel.set_xlabel("k")


def save(path: Path, draw: Callable[[Figure, Results], None], results: Results) -> None:
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 2.8), layout="constrained")
        draw(figure, results)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"sweep.py: {error}") from error
