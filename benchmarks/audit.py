"""The audit against one `generate` per prefix, on the same checkpoint and texts, with the same answers.

    python benchmarks/audit.py              # trains a small checkpoint in about a minute, then measures
    python benchmarks/audit.py --render     # the tables of the README, from every JSON there

Both answer, for every text: exact match, p_z under two sampling settings, the likelihoods that membership inference
needs, and ROUGE-L of the continuation; `sweep` also asks for exact match at ten prefix lengths. The baseline calls
`generate` at batch size 1 for every prefix and one forward for every text. All answers are compared, not only timed.
Cases run in turn, `--repeats` times; the first round warms up and does not count. Seconds are the processor's (one
thread), which other work on the machine disturbs less than the clock's.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from about import RESULTS, about, byte_level_bpe, small_llama
from rouge_score.rouge_scorer import _score_lcs
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TopKLogitsWarper, set_seed

from goldfish.audit import audit
from goldfish.audit.columns import rouge_l
from goldfish.audit.score import Sampling, Scorer
from goldfish.audit.windows import Cutter, Window
from goldfish.rows import read_rows

PREFIX, SUFFIX = 50, 50
SWEEP = tuple(range(5, PREFIX + 1, 5))
TOP_K = 40
Answers = dict[str, object]


def build(folder: Path, documents: int, width: int, steps: int) -> list[Window]:
    """A small Llama that knows half of the texts by heart, as far as `steps` carry it, and these texts as windows."""
    texts = [topics[name] for name in sorted(topics)]
    tokenizer = byte_level_bpe(texts, vocab_size=4096)
    ids = tokenizer("\n".join(texts))["input_ids"]
    rows = [ids[i * 500 : i * 500 + PREFIX + SUFFIX] for i in range(2 * documents)]
    set_seed(0)
    model = LlamaForCausalLM(small_llama(tokenizer, width, eos_token_id=None, tie_word_embeddings=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    members = torch.tensor(rows[:documents])
    for _ in range(steps):
        batch = members[torch.randperm(documents)[:16]]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"trained {steps} steps, loss {loss.item():.3f} nats/token", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    windows = []
    for split, part in (("members", rows[:documents]), ("heldout", rows[documents:])):
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in part))
        cutter = Cutter(tokenizer, PREFIX, SUFFIX)
        windows += [w for w in cutter.cut(read_rows(path), split) if isinstance(w, Window)]
    return windows


@torch.inference_mode()
def one_by_one(model: LlamaForCausalLM, windows: list[Window], prefixes: tuple[int, ...]) -> Answers:
    """One generate for each prefix, one forward for each text, and the usual ROUGE package."""
    exact, likelihoods, rouge = [], [], []
    for window in windows:
        for prefix in prefixes:
            start = torch.tensor([window.ids[:prefix]])
            output = model.generate(
                start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=SUFFIX, pad_token_id=0
            )[0, prefix:].tolist()
            exact.append(output == window.ids[prefix : prefix + SUFFIX])
            if prefix == PREFIX:
                rouge.append(_score_lcs(window.suffix, output).fmeasure)
        ids = torch.tensor([window.ids])
        logits = model(input_ids=ids).logits[0, :-1].float()
        target = ids[0, 1:, None]
        log_p = logits.log_softmax(-1)
        mean = (log_p.exp() * log_p).sum(-1)
        cut = TopKLogitsWarper(TOP_K)(None, logits[PREFIX - 1 :]).log_softmax(-1)
        likelihoods += [
            log_p.gather(-1, target).sum().item(),
            log_p[PREFIX - 1 :].gather(-1, target[PREFIX - 1 :]).sum().item(),
            cut.gather(-1, target[PREFIX - 1 :]).sum().item(),
            mean.sum().item(),
            ((log_p.exp() * log_p.square()).sum(-1) - mean.square()).sqrt().sum().item(),
        ]
    return {"exact": exact, "likelihoods": likelihoods, "rouge": rouge}


def in_one_pass(model: LlamaForCausalLM, windows: list[Window], prefixes: tuple[int, ...]) -> Answers:
    """The same from Scorer, which the audit uses."""
    exact, likelihoods, rouge = [], [], []
    for window, score in zip(windows, Scorer(model, (Sampling(), Sampling(top_k=TOP_K))).score(windows), strict=True):
        for prefix in prefixes:
            greedy = score.greedy[prefix - 1 : prefix - 1 + SUFFIX].tolist()
            exact.append(greedy == window.ids[prefix : prefix + SUFFIX])
        plain, cut = score.log_q.sum(-1, dtype="float64")
        likelihoods += [
            -score.nll.sum(dtype="float64"), plain, cut, score.entropy_mean.sum(dtype="float64"),
            score.entropy_std.sum(dtype="float64"),
        ]  # fmt: skip
        rouge.append(rouge_l(score.output, window.suffix))
    return {"exact": exact, "likelihoods": likelihoods, "rouge": rouge}


def compare(ours: Answers, theirs: Answers) -> dict[str, object]:
    """SystemExit where a verdict differs; the largest relative difference of likelihoods."""
    if ours["exact"] != theirs["exact"]:
        raise SystemExit("exact match differs between the audit and generate")
    if max(abs(a - b) for a, b in zip(ours["rouge"], theirs["rouge"], strict=True)) > 1e-12:
        raise SystemExit("ROUGE-L differs between the audit and generate")
    a, b = (torch.tensor(answers["likelihoods"], dtype=torch.float64) for answers in (ours, theirs))
    finite = a.isfinite() & b.isfinite()
    if not torch.equal(a.isfinite(), b.isfinite()):
        raise SystemExit("p_z is 0 for one and not for the other")
    difference = ((a - b).abs() / b.abs().clamp(min=1))[finite].max().item()
    if difference > 1e-3:  # the published formula of sigma cancels digits in float32
        raise SystemExit(f"likelihoods differ by {difference:.1e}")
    exact = ours["exact"]
    return {"verdicts": len(exact), "recited": sum(exact), "largest_relative_difference": difference}


def measure(folder: Path, windows: list[Window], repeats: int) -> list[dict[str, object]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    runs: dict[tuple[str, str], list[float]] = {}
    same: dict[str, dict[str, object]] = {}
    for repeat in range(repeats + 1):
        for case, prefixes in (("one prefix, with ROUGE-L", (PREFIX,)), ("whole prefix sweep", SWEEP)):
            answers = {}
            for name, method in (("goldfish", in_one_pass), ("generate", one_by_one)):
                if name == "generate" and not repeat:  # warmed up by a few texts: it is slow
                    method(model, windows[:2], (PREFIX,))
                    continue
                begin = time.process_time()
                answers[name] = method(model, windows, prefixes)
                if repeat:
                    runs.setdefault((case, name), []).append(time.process_time() - begin)
            if repeat:
                same[case] = compare(answers["goldfish"], answers["generate"])
        with tempfile.TemporaryDirectory() as output:
            begin = time.process_time()
            audit(
                folder, Path(output) / "audit", members=folder / "members.jsonl", heldout=folder / "heldout.jsonl",
                prefix_length=PREFIX, suffix_length=SUFFIX, device="cpu",
            )  # fmt: skip
            if repeat:
                runs.setdefault(("whole audit() with loading, records and files", "goldfish"), []).append(
                    time.process_time() - begin
                )
    return [
        {"case": case, "name": name, "seconds": seconds, "median": statistics.median(seconds), **same.get(case, {})}
        for (case, name), seconds in runs.items()
    ]


def render() -> str:
    parts = []
    for path in sorted(RESULTS.glob("audit-*.json")):
        data = json.loads(path.read_text())
        source, results = data["about"], data["results"]
        parts.append(
            f"{source['texts']} texts of {source['prefix_length']} + {source['suffix_length']} tokens; "
            f"{source['model']}; {source['device']}, {source['threads']} thread(s); "
            f"torch {source['versions']['torch']}, transformers "
            f"{source['versions']['transformers']}; commit {source['commit'][:12]}; `{source['command']}`\n\n"
            "| | one `generate` per prefix | goldfish | faster |\n|---|---|---|---|"
        )
        for case in dict.fromkeys(result["case"] for result in results):
            times = {result["name"]: result for result in results if result["case"] == case}
            ours, theirs = times["goldfish"], times.get("generate")
            factor = f"{theirs['median'] / ours['median']:.0f}x" if theirs else ""
            parts.append(f"| {case} | {_seconds(theirs)} | {_seconds(ours)} | {factor} |")
    return "\n".join(parts)


def _seconds(result: dict | None) -> str:
    if result is None:
        return ""
    spread = (max(result["seconds"]) - min(result["seconds"])) / result["median"]
    return f"{result['median']:.3g} s (±{spread / 2:.0%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="print the tables and stop")
    parser.add_argument("--documents", type=int, default=16, help="members, and as many held-out texts")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=80, help="of training")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "audit-cpu.json")
    args = parser.parse_args()
    if args.render:
        print(render())
        return
    torch.set_num_threads(args.threads)
    settings = about("rouge-score", "rapidfuzz") | {
        "texts": 2 * args.documents,
        "prefix_length": PREFIX,
        "suffix_length": SUFFIX,
        "prefix_lengths_of_the_sweep": SWEEP,
        "model": f"Llama, 4 layers of {args.width}, vocabulary 4096, float32",
    }
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), build(Path(folder), args.documents, args.width, args.steps), args.repeats)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps({"about": settings, "results": results}, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
