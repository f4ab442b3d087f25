"""Which k for your data? Reads the results of pretrain_canaries.py: a table, three plots and a choice of rule.

    python recipes/pretrain_canaries.py --text mine.jsonl --output-dir runs/mine && python recipes/sweep.py runs/mine
    python recipes/sweep.py runs/mine --leak 0.3 --measure rouge_l      # by another measure; no training

A larger k costs fewer targets and protects less. `left` is the share of recitation that a rule leaves: (planted
documents recited word for word - those of the control) / (the same of the standard loss), or with --measure rouge_l the
same of ROUGE-L, which also counts parts. The choice is the rule of the largest k with `left` at most `leak`, and beside
it the share of 2000 bootstrap samples of the documents (over all seeds) that choose each rule.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import runs
from matplotlib import rc_context
from matplotlib.figure import Figure

STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "goldfish", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.titlesize": 9,
}  # fmt: skip
SAMPLES = 2000
Results = list[dict[str, Any]]
Groups = dict[str, Results]  # the seeds of each training, by its name, in the order of training


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output directory of pretrain_canaries.py")
    parser.add_argument("--leak", type=float, default=0.1, help="the share of recitation that may be left")
    parser.add_argument("--measure", choices=("exact_match", "rouge_l"), default="exact_match", help="of recitation")
    args = parser.parse_args(argv)
    results = runs.read_results(args.folder / "results.jsonl")
    if not results:
        parser.error(f"no results in {args.folder}; run pretrain_canaries.py --output-dir {args.folder} first")
    return present(results, args.folder, args.leak, args.measure)


def present(results: Results, output: Path, leak: float, measure: str = "exact_match") -> dict[str, Any]:
    """Print the table and the choice, draw the plots; returns the choice."""
    groups: Groups = {}
    for result in results:
        groups.setdefault(result["run"], []).append(result)
    print(f"\n{table(groups)}")
    for name, draw in (("rouge", draw_histograms), ("extraction", draw_extraction), ("heldout", draw_heldout)):
        with rc_context(STYLE):
            figure = Figure(figsize=(7, 2.8), layout="constrained")
            draw(figure, groups)
            figure.savefig(output / f"{name}.svg", format="svg", metadata={"Date": None, "Creator": None})
    choice = choose_k(groups, leak, measure)
    (output / "choice.json").write_text(json.dumps(choice, indent=2) + "\n", encoding="utf-8")
    print(f"{choice['says']}\nResults and plots: {output}")
    return choice


def pooled(group: Results, key: str) -> Any:
    """One number per document, those of all seeds one after another: float64 (documents,)."""
    return np.concatenate([result[key] for result in group]).astype(float)


def choose_k(groups: Groups, leak: float, measure: str = "exact_match") -> dict[str, Any]:
    """The rule of the largest k that leaves at most `leak` of recitation, and the bootstrap's votes (for none, too)."""
    if not {"standard", "control"} <= set(groups):
        raise ValueError(f"a choice needs the trainings standard and control, got {', '.join(groups) or 'none'}")
    recited = {name: pooled(group, f"{measure}_members") for name, group in groups.items() if "equal" not in name}
    documents = len(recited["standard"])
    if {len(values) for values in recited.values()} != {documents}:
        raise ValueError("not every training has the same seeds and documents; finish the run first: its command again")
    gain = recited["standard"].mean() - recited["control"].mean()
    choice: dict[str, Any] = {"run": None, "k": None, "leak": leak, "measure": measure, "votes": {}}
    if gain < 0.05:
        says = (
            f"Nothing to choose: the standard loss recites hardly more than the control ({measure}: {gain:+.2f}). "
            "Plant more repeats, or train longer."
        )
        return choice | {"says": says}

    draw = random.Random(0)
    samples = [list(range(documents))] + [draw.choices(range(documents), k=documents) for _ in range(SAMPLES)]
    means = {name: values[np.array(samples)].mean(axis=1) for name, values in recited.items()}
    gains = means["standard"] - means["control"]
    names = sorted((name for name in recited if k_of(groups[name])), key=lambda name: k_of(groups[name]))
    chosen = np.full(len(samples), "none", dtype=object)
    for name in names:
        chosen[(means[name] - means["control"] <= leak * gains) | (gains <= 0)] = name
    votes = {name: float(np.mean(chosen[1:] == name)) for name in [*names, "none"] if name in chosen[1:]}

    best, cost = chosen[0], ""
    if best == "none":
        best = f"none of {', '.join(names)}; try a smaller k"
    else:
        choice |= {"run": best, "k": k_of(groups[best])}
        both = zip(groups[best], groups["standard"], strict=True)
        costs = [ours["validation_loss"] - theirs["validation_loss"] for ours, theirs in both]
        cost = f" It costs {np.mean(costs):+.3f} nats/token held-out ({min(costs):+.3f} to {max(costs):+.3f})."
    says = (
        f"The largest k that leaves at most {leak:.0%} of recitation ({measure}): {best}.{cost} Of {SAMPLES} bootstrap "
        f"samples of {documents} documents: {', '.join(f'{name} {share:.0%}' for name, share in votes.items())}."
    )
    return choice | {"votes": votes, "says": says}


def k_of(group: Results) -> Any:
    """None for the standard loss and the control."""
    return group[0]["k"]


def table(groups: Groups) -> str:
    """Means over seeds with (least-greatest). recited: word for word, of all seeds' documents; left: by ROUGE-L."""
    rows = []
    rouge = {name: pooled(group, "rouge_l_members").mean() for name, group in groups.items()}
    gain = rouge.get("standard", 0) - rouge.get("control", 1)
    for name, group in groups.items():
        exact, losses = pooled(group, "exact_match_members"), [result["validation_loss"] for result in group]
        of_seed = [np.mean(result["rouge_l_members"]) for result in group]
        rows.append(
            {
                "training": name,
                "tokens": f"{group[0]['input_tokens']:,}",
                "recited": f"{exact.sum():.0f} of {len(exact)}",
                "ROUGE-L": f"{rouge[name]:.3f} ({min(of_seed):.2f}-{max(of_seed):.2f})",
                "floor": f"{pooled(group, 'rouge_l_heldout').mean():.3f}",
                "left": f"{(rouge[name] - rouge['control']) / gain:.2f}" if gain > 0 else "-",
                "held-out nats": f"{np.mean(losses):.3f} ({min(losses):.2f}-{max(losses):.2f})",
                "seeds": len(group),
            }
        )
    return str(pandas.DataFrame(rows).to_string(index=False))


def draw_histograms(figure: Figure, groups: Groups) -> None:
    """One panel per training: planted documents in colour, held-out ones in grey."""
    names = [name for name in groups if "equal" not in name]
    figure.set_size_inches(7, len(names) + 0.4)
    panels = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
    for panel, name in zip(panels, names, strict=True):
        members = pooled(groups[name], "rouge_l_members")
        panel.hist(pooled(groups[name], "rouge_l_heldout"), 20, range=(0, 1), color="0.7", label="held out")
        panel.hist(members, 20, range=(0, 1), alpha=0.7, label="planted")
        panel.set_ylabel(name, rotation=0, ha="right", va="center")
        panel.set_yticks([])
    panels[0].legend(frameon=False)
    panels[-1].set_xlabel(f"ROUGE-L of token ids, {len(members)} documents each")


def draw_extraction(figure: Figure, groups: Groups) -> None:
    """Exact match and ROUGE-L of planted documents against k."""
    groups = {name: group for name, group in groups.items() if "equal" not in name}
    titles = {"exact_match_members": "recited word for word", "rouge_l_members": "ROUGE-L"}
    for panel, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        against_k(panel, groups, key)
        panel.set(ylim=(-0.03, 1.03), title=f"planted documents: {title}")


def draw_heldout(figure: Figure, groups: Groups) -> None:
    """Held-out loss against k, at equal input tokens and at equal supervised tokens."""
    panel = figure.subplots()
    against_k(panel, groups, "validation_loss")
    panel.set(title="held-out loss, nats per token")


def against_k(panel: Any, groups: Groups, key: str) -> None:
    """Dots are seeds; a line goes through the means of one kind of rule."""
    lines: dict[str, list[tuple[float, list[float]]]] = {}
    for name, group in sorted(groups.items(), key=lambda item: k_of(item[1]) or 0):
        values = [float(np.mean(result[key])) for result in group]
        if k_of(group) is not None:
            label = "equal supervised tokens" if group[0]["equal_supervised"] else "equal input tokens"
            kind = label + ", max_kept" * (name.count("-") == 3)
            lines.setdefault(kind, []).append((k_of(group), values))
        else:
            colour = "C3" if name == "standard" else "0.5"
            panel.axhline(np.mean(values), color=colour, linestyle="--", label=name)
            panel.axhspan(min(values), max(values), color=colour, alpha=0.15, linewidth=0)
    for number, (kind, points) in enumerate(lines.items()):
        for k, values in points:
            panel.plot([k] * len(values), values, "o", color=f"C{2 * number}", markersize=3)
        means = [np.mean(values) for _, values in points]
        panel.plot([k for k, _ in points], means, color=f"C{2 * number}", label=kind)
    ks = sorted({k for points in lines.values() for k, _ in points})
    panel.set_xscale("log", base=2)
    panel.set_xticks(ks, [f"{k:g}" for k in ks])
    panel.minorticks_off()
    panel.set_xlabel("k")
    panel.legend(frameon=False)


if __name__ == "__main__":
    runs.command_line(main)
