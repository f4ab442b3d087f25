r"""Which k for your data? Reads the results of pretrain_canaries.py: table, plots, choice of rule.

    python recipes/pretrain_canaries.py --text mine.jsonl --output-dir runs/mine
    python recipes/sweep.py runs/mine
    # by another measure; no training
    python recipes/sweep.py runs/mine --leak 0.3 --measure rouge_l

A larger k costs fewer targets and protects less. `left` is the share of recitation that a rule
leaves: (planted documents recited verbatim - those of the control) / (the same of the standard
loss), or with --measure rouge_l the same of ROUGE-L, which also counts parts. The choice is the
rule of the largest k with `left` at most `leak`, and beside it the share of 2000 bootstrap samples
of the documents (over all seeds) that choose each rule.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import runs
import svg
from matplotlib.figure import Figure

EXTRACTION = {
    "exact_match_members": "planted documents: recited verbatim",
    "rouge_l_members": "ROUGE-L",
}
HELDOUT = {"validation_loss": "held-out loss, nats per token"}
# Of the bootstrap.
SAMPLES = 2000


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = runs.parser(__doc__)
    parser.add_argument(
        "folder", type=Path, help="output directory of pretrain_canaries.py"
    )
    parser.add_argument(
        "--leak",
        type=float,
        default=0.1,
        help="the share of recitation that may be left",
    )
    parser.add_argument(
        "--measure",
        choices=("exact_match", "rouge_l"),
        default="exact_match",
        help="of recitation",
    )
    args = parser.parse_args(argv)
    results = runs.read_results(args.folder / "results.jsonl")
    if not results:
        parser.error(
            f"no results in {args.folder}; run pretrain_canaries.py --output-dir {args.folder} "
            "first"
        )
    return present(results, args.folder, args.leak, args.measure)


def present(
    results: list[dict[str, Any]],
    output: Path,
    leak: float,
    measure: str = "exact_match",
) -> dict[str, Any]:
    """Print the table and the choice, draw the plots; returns the choice."""
    groups = by_training(results)
    print(f"\n{table(groups)}")
    with svg.style():
        svg.save(draw_histograms(groups), output / "rouge.svg")
        svg.save(draw_against_k(groups, EXTRACTION), output / "extraction.svg")
        svg.save(draw_against_k(groups, HELDOUT), output / "heldout.svg")
    choice = choose_k(groups, leak, measure)
    (output / "choice.json").write_text(
        json.dumps(choice, indent=2) + "\n", encoding="utf-8"
    )
    print(f"{choice['says']}\nResults and plots: {output}")
    return choice


def by_training(results: list[dict[str, Any]]) -> dict[str, Any]:
    """A DataFrame for each training, in the order of training; its rows are the seeds."""
    return dict(iter(pandas.DataFrame(results).groupby("run", sort=False)))


def pooled(group: Any, key: str) -> Any:
    """One number per document, those of all seeds one after another: float64 (documents,)."""
    return np.concatenate(group[key].tolist()).astype(float)


def choose_k(
    groups: dict[str, Any], leak: float, measure: str = "exact_match"
) -> dict[str, Any]:
    """The rule of the largest k that leaves at most `leak` of recitation.

    `votes` are the shares of bootstrap samples that choose each rule, or none of them.
    """
    recited = recitation(groups, measure)
    documents = len(recited["standard"])
    choice: dict[str, Any] = {
        "run": None,
        "k": None,
        "leak": leak,
        "measure": measure,
        "votes": {},
    }
    gain = recited["standard"].mean() - recited["control"].mean()
    # Below this, `left` would divide noise by noise.
    if gain < 0.05:
        says = (
            "Nothing to choose: the standard loss recites hardly more than the control "
            f"({measure}: {gain:+.2f}). Plant more repeats, or train longer."
        )
        return choice | {"says": says}

    draw = random.Random(0)
    # The first sample is all documents as they are; it makes the choice, the others vote.
    samples = [list(range(documents))]
    samples += [draw.choices(range(documents), k=documents) for _ in range(SAMPLES)]
    means = {
        name: values[np.array(samples)].mean(axis=1) for name, values in recited.items()
    }
    gains = means["standard"] - means["control"]
    rules = [name for name in recited if name not in ("standard", "control")]
    rules.sort(key=lambda name: groups[name]["k"].iloc[0])
    chosen = np.full(len(samples), "none", dtype=object)
    # By growing k, so that the last one that is good enough stays.
    for name in rules:
        chosen[(means[name] - means["control"] <= leak * gains) | (gains <= 0)] = name
    votes = {name: float(np.mean(chosen[1:] == name)) for name in [*rules, "none"]}
    votes = {name: share for name, share in votes.items() if share}

    best, cost = chosen[0], ""
    if best == "none":
        best = f"none of {', '.join(rules)}; try a smaller k"
    else:
        choice |= {"run": best, "k": float(groups[best]["k"].iloc[0])}
        cost = cost_of(groups[best], groups["standard"])
    shares = ", ".join(f"{name} {share:.0%}" for name, share in votes.items())
    says = (
        f"The largest k that leaves at most {leak:.0%} of recitation ({measure}): {best}.{cost} Of "
        f"{SAMPLES} bootstrap samples of {documents} documents: {shares}."
    )
    return choice | {"votes": votes, "says": says}


def recitation(groups: dict[str, Any], measure: str) -> dict[str, Any]:
    """For each training at equal input: its figure on every planted document, float64.

    Raises:
        ValueError: a training is missing, or has other documents than the rest.
    """
    if not {"standard", "control"} <= set(groups):
        raise ValueError(
            f"a choice needs the trainings standard and control, got {', '.join(groups) or 'none'}"
        )
    recited = {
        name: pooled(group, f"{measure}_members")
        for name, group in groups.items()
        if "equal" not in name
    }
    if len({len(values) for values in recited.values()}) > 1:
        raise ValueError(
            "not every training has the same seeds and documents; finish the run first: its "
            "command again"
        )
    return recited


def cost_of(rule: Any, standard: Any) -> str:
    """A sentence on the held-out loss of a rule, paired with the standard loss by seed."""
    costs = rule["validation_loss"].to_numpy() - standard["validation_loss"].to_numpy()
    return (
        f" It costs {costs.mean():+.3f} nats/token held-out "
        f"({costs.min():+.3f} to {costs.max():+.3f})."
    )


def table(groups: dict[str, Any]) -> str:
    """Means over seeds, with (least-greatest).

    `recited` counts verbatim documents of all seeds; `left` is computed from ROUGE-L.
    """
    rows = []
    rouge = {
        name: pooled(group, "rouge_l_members").mean() for name, group in groups.items()
    }
    gain = rouge.get("standard", 0) - rouge.get("control", 1)
    for name, group in groups.items():
        # The exact matches are counted; of ROUGE-L, the spread over seeds is shown.
        exact, losses = pooled(group, "exact_match_members"), group["validation_loss"]
        of_seed = group["rouge_l_members"].map(np.mean)
        rows.append(
            {
                "training": name,
                "tokens": f"{group['input_tokens'].iloc[0]:,}",
                "recited": f"{exact.sum():.0f} of {len(exact)}",
                "ROUGE-L": f"{rouge[name]:.3f} ({of_seed.min():.2f}-{of_seed.max():.2f})",
                "floor": f"{pooled(group, 'rouge_l_heldout').mean():.3f}",
                "left": f"{(rouge[name] - rouge['control']) / gain:.2f}"
                if gain > 0
                else "-",
                "held-out nats": f"{losses.mean():.3f} ({losses.min():.2f}-{losses.max():.2f})",
                "seeds": len(group),
            }
        )
    return str(pandas.DataFrame(rows).to_string(index=False))


def draw_histograms(groups: dict[str, Any]) -> Figure:
    """ROUGE-L, one panel per training: planted documents in colour, held-out ones in grey."""
    names = [name for name in groups if "equal" not in name]
    figure = Figure(figsize=(7, len(names) + 0.4), layout="constrained")
    panels = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
    for panel, name in zip(panels, names, strict=True):
        members = pooled(groups[name], "rouge_l_members")
        heldout = pooled(groups[name], "rouge_l_heldout")
        panel.hist(heldout, 20, range=(0, 1), color="0.7", label="held out")
        panel.hist(members, 20, range=(0, 1), alpha=0.7, label="planted")
        panel.set_ylabel(name, rotation=0, ha="right", va="center")
        panel.set_yticks([])
    panels[0].legend()
    panels[-1].set_xlabel(f"ROUGE-L of token ids, {len(members)} documents each")
    return figure


def draw_against_k(groups: dict[str, Any], figures: dict[str, str]) -> Figure:
    """A panel for each figure.

    Dots are seeds, and a line connects the means of one kind of rule. Bands are least to greatest
    of the standard loss and of the control.
    """
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    panels = figure.subplots(1, len(figures), squeeze=False)[0]
    for panel, (key, title) in zip(panels, figures.items(), strict=True):
        draw_bands(panel, groups, key)
        points = pandas.concat(points_of(groups, key))
        for number, (kind, dots) in enumerate(points.groupby("kind")):
            # Every second colour: C1 and C3 are too near to each other in print.
            colour = f"C{2 * number}"
            panel.plot(dots["k"], dots["value"], "o", color=colour, markersize=3)
            panel.plot(dots.groupby("k")["value"].mean(), color=colour, label=kind)
        ks = sorted(points["k"].unique())
        panel.set_xscale("log", base=2)
        panel.set_xticks(ks, [f"{k:g}" for k in ks])
        panel.minorticks_off()
        panel.set(xlabel="k", title=title)
        if key in EXTRACTION:
            panel.set_ylim(-0.03, 1.03)
    panel.legend()
    return figure


def draw_bands(panel: Any, groups: dict[str, Any], key: str) -> None:
    """The trainings without a rule: a dashed line at the mean, a band over the seeds."""
    for name, colour in (("standard", "C3"), ("control", "0.5")):
        if name in groups:
            values = groups[name][key].map(np.mean)
            panel.axhline(values.mean(), color=colour, linestyle="--", label=name)
            panel.axhspan(
                values.min(), values.max(), color=colour, alpha=0.15, linewidth=0
            )


def points_of(groups: dict[str, Any], key: str) -> list[Any]:
    """A frame for each training under a rule, with a row for each seed."""
    points = []
    for name, group in groups.items():
        if name not in ("standard", "control"):
            kind = (
                "equal supervised tokens" if "equal" in name else "equal input tokens"
            )
            # strategy-k-h-max_kept
            kind += ", max_kept" * (name.count("-") == 3)
            values = {"kind": kind, "k": group["k"], "value": group[key].map(np.mean)}
            points.append(pandas.DataFrame(values))
    return points


if __name__ == "__main__":
    runs.command_line(main)
