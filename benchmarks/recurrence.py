"""Smaller k where text recurs: is that better than deduplication, or than a small k everywhere?

    python benchmarks/recurrence.py --text documents.jsonl            # goes on with what results/recurrence.jsonl lacks
    python benchmarks/recurrence.py --text documents.jsonl --static   # words that recur and drop rates, no training
    python benchmarks/recurrence.py --table                           # the tables of the runs so far; no training

One training reads unique documents once, and planted passages of 64 tokens in 1, 2, 5 or 20 versions: exact copies,
reformatted ones, or copies with 2% or 5% of their words edited. A model this small recites nothing that it reads once,
so every version is read --repeats times, as in as many epochs. Then the audit gives the plain first half of each
passage and compares the continuation with the second half, as normalised words. All runs of a seed read equally many
tokens, in the same order, from the same weights.

Recurrence is counted over documents (a version is one; reading it again does not count). The shingle of a word is the
key of the 30 letters before it. A word recurs if, of the words from 8 before to 18 after it, 2 or more have a shingle
that 3 or more documents hold. It is a later copy if it recurs and 2 or more of those words were in earlier documents.

standard         nothing is dropped.
letters-4, -2    strategy "letters", h=8, k=4 or k=2 everywhere.
max-kept-4       letters-4 with max_kept=4.
recur-2          letters, k=2 where words recur; nothing is dropped elsewhere.
recur-2-4        letters, k=2 where words recur; k=4 elsewhere.
dedup-labels     all words of later copies are dropped.
dedup            rows that are mostly later copies are replaced by unseen unique text of the same length.
oracle-2         letters, k=2 on all planted passages and nowhere else: k per source, if somebody knows the source.

What would have been seen, said before the runs. Extraction: 8 passages for each number of versions and seed. With a
standard deviation of 0.25 between the passages' paired differences in ROUGE-L, the interval of 24 of them is +-0.11,
and that of 5 and 20 versions together (48) +-0.07. Held-out loss: 60 documents; with a standard deviation of 0.05 nats
between their paired differences +-0.013 nats, as far as the choice of documents goes; with 0.01 nats between seeds
+-0.025. Decision: recurrence is better than another rule if it is better in ROUGE-L (5 and 20 versions) or in held-out
loss, with an interval without 0, and in the other not worse by 0.05 ROUGE-L or 0.02 nats (mean). It must be better than
`dedup`, `dedup-labels` and `letters-2`, or it is not built.
"""

import argparse
import json
import random
import time
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from about import (
    RESULTS,
    about,
    append,
    audited,
    byte_level_bpe,
    heldout,
    load_texts,
    markdown,
    mean_of,
    paired,
    read_results,
    small_llama,
    split_windows,
)
from near_duplicates import edit, reformat, words
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlamaForCausalLM, get_cosine_schedule_with_warmup

from goldfish import Goldfish, spec
from goldfish.audit.columns import rouge_l
from goldfish.hashing import mix, prefix_hashes, shift_right, signed, window_hashes
from goldfish.vocabulary import characters

RULES = ("standard", "dedup", "recur-2-4", "letters-2", "recur-2", "letters-4", "max-kept-4", "oracle-2",
         "dedup-labels")  # fmt: skip
KINDS = {"exact": 0.0, "reformatted": 0.0, "2%": 0.02, "5%": 0.05}  # share of words edited
VERSIONS = (1, 2, 5, 20)
HEAD = ("rule", "seeds", "drop rate", "held-out loss", "- standard [95% over documents]", "ROUGE-L, 1 version", "2",
        "5", "20", "floor", "verbatim, 5", "20")  # fmt: skip
AGAINST = ("rule - other", "seeds", "ROUGE-L, 5 and 20 versions [95% over passages]",
           "held-out loss [95% over documents]", "each seed")  # fmt: skip
SHINGLE, BITS, BEFORE, AFTER, LEAST_WORDS, LEAST_DOCUMENTS = 30, 28, 8, 18, 2, 3
ROW, BATCH, PASSAGE, VOCABULARY = 96, 4, 64, 2048
HELDOUT, HELDOUT_ROWS, POOL = 60, 20, 300  # held-out documents, rows of each at most, documents that passages are from


class Words(NamedTuple):
    """The words of one document. A word is a run of letters and digits in the normal form of strategy "letters"."""

    buckets: NDArray[np.int64]  # (W,) of the shingle before each word; -1 where fewer than 30 letters are before it
    starts: NDArray[np.int64]  # (W,) the letters before each word
    letters: NDArray[np.int64]  # (C + 1,) the letters before each character of the text, and in all of it


class Data(NamedTuple):
    """What the runs of one seed read. N rows: those of unique documents, of planted versions, and spare unique ones."""

    ids: Tensor  # int64 (N, ROW), padded at the right
    reads: Tensor  # int64 (R,) row numbers in the order of reading, and the length of each
    lengths: Tensor
    planted: Tensor  # bool (N,)
    recurs: Tensor  # bool (N, ROW): the token's word recurs
    later: Tensor  # bool (N, ROW): it is a later copy
    spare: list[int]  # rows that only `dedup` reads
    flagged: dict[str, list[int]]  # words that recur, and all words: of unique documents and of each kind of version
    windows: tuple[list[list[int]], list[list[int]]]  # planted and held-out passages, PASSAGE token ids each
    cells: list[tuple[int, str]]  # versions and kind of each planted passage
    heldout: Tensor  # int64 (M, ROW)
    owners: Tensor  # int64 (M,) the held-out document of each row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="JSONL file; the field `text` of each line is used")
    parser.add_argument("--rows", type=int, default=2800, help="rows of unique text, 96 tokens each")
    parser.add_argument("--passages", type=int, default=2, help="planted passages of each kind and number of versions")
    parser.add_argument("--repeats", type=int, default=10, help="readings of each version")
    parser.add_argument("--hidden", type=int, default=192, help="hidden size: 192 is 1.4M parameters")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    parser.add_argument("--results", type=Path, default=RESULTS / "recurrence.jsonl")
    parser.add_argument("--static", action="store_true", help="only count what is flagged and dropped, in seed 0")
    parser.add_argument("--table", action="store_true", help="print the tables of the results and stop")
    args = parser.parse_args(argv)
    if not args.table:
        if args.text is None:
            parser.error("--text is needed: a .jsonl file with a `text` field")
        texts = load_texts(args.text)
        random.Random(0).shuffle(texts)
        tokenizer = byte_level_bpe(texts[HELDOUT : HELDOUT + 2 * POOL], VOCABULARY)
        if args.static:
            data = make_data(args, 0, texts, tokenizer)
            recurs, _ = count([read_words(text) for text in texts])
            everything = {"all documents, nothing planted": [sum(map(int, map(np.sum, recurs))), sum(map(len, recurs))]}
            rates = {rule: drop_rate(data, *arrange(rule, data, tokenizer)) for rule in RULES}
            print(json.dumps({"words that recur": data.flagged | everything, "drop rates": rates}, indent=1))
            return
        size = {name: getattr(args, name) for name in ("rows", "passages", "repeats", "hidden")}
        for seed in args.seeds:
            data = None
            for rule in args.rules:
                run = {"seed": seed, "rule": rule, **size}
                if any(all(known[key] == run[key] for key in run) for known in read_results(args.results)):
                    continue
                data = data or make_data(args, seed, texts, tokenizer)
                began = time.process_time()
                result = train(rule, seed, args.hidden, tokenizer, data)
                append(args.results, run | result | {"cpu_seconds": round(time.process_time() - began)} | about())
                print(f"seed {seed} {rule}: {result['heldout_loss']:.4f} nats, ROUGE-L "
                      f"{fmean(result['rouge_l']):.3f}", flush=True)  # fmt: skip
    print(table(read_results(args.results)))


def read_words(text: str) -> Words:
    """The words of a document and the buckets of their shingles."""
    forms = [characters()[ord(character)] for character in text]
    form = np.array([ord(character) for character in "".join(forms)], dtype=np.int64)
    is_letter = form != ord(" ")
    begins = np.flatnonzero(is_letter & ~np.append(False, is_letter[:-1]))
    starts = (np.cumsum(is_letter) - is_letter)[begins]
    letters = np.cumsum([0] + [len(f) - f.count(" ") for f in forms])
    prefix = prefix_hashes(mix(torch.from_numpy(form[is_letter])[None]))
    end = torch.from_numpy(starts)[None]
    state = window_hashes(prefix, (end - SHINGLE).clamp(min=0), end)
    keys = mix(state + SHINGLE + signed(spec.mix(spec.mix(0))))[0]  # spec.key of the letters, seed 0
    buckets = shift_right(mix(keys), 64 - BITS).numpy()
    return Words(np.where(starts >= SHINGLE, buckets, -1), starts, letters)


def count(documents: list[Words]) -> tuple[list[NDArray[np.bool_]], list[NDArray[np.bool_]]]:
    """For every word of every document whether it recurs, and whether it is a later copy."""
    distinct = [np.unique(document.buckets[document.buckets >= 0]) for document in documents]
    table, first, counts = np.unique(np.concatenate(distinct), return_index=True, return_counts=True)
    of_document = np.repeat(np.arange(len(documents)), [len(buckets) for buckets in distinct])[first]
    recurs, later = [], []
    for number, document in enumerate(documents):
        place = np.searchsorted(table, document.buckets).clip(max=len(table) - 1)
        known = table[place] == document.buckets
        recurs.append(near(known & (counts[place] >= LEAST_DOCUMENTS)))
        later.append(recurs[-1] & near(known & (of_document[place] < number)))
    return recurs, later


def near(marks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Where enough words from BEFORE before to AFTER after a word are marked."""
    total = np.append(0, np.cumsum(marks))
    place = np.arange(len(marks))
    return total[np.minimum(place + AFTER + 1, len(marks))] - total[np.maximum(place - BEFORE, 0)] >= LEAST_WORDS


def on_tokens(flags: NDArray[np.bool_], document: Words, offsets: list[tuple[int, int]]) -> NDArray[np.bool_]:
    """The flag of each token's word: that of its first letter or, if it has none, the word before it."""
    begin, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    letter = document.letters[begin] - (document.letters[begin] == document.letters[end])
    word = np.searchsorted(document.starts, letter, side="right") - 1
    return flags[np.maximum(word, 0)] if len(flags) else np.zeros(len(word), dtype=bool)


def make_data(args: argparse.Namespace, seed: int, texts: list[str], tokenizer: Any) -> Data:
    cells = [(versions, kind) for versions in VERSIONS for kind in KINDS for _ in range(args.passages)]
    pool = [" ".join(text.split()) for text in texts[HELDOUT : HELDOUT + POOL]]
    windows = split_windows(pool, tokenizer, len(cells), PASSAGE, seed)
    plain = [tokenizer.decode(ids) for ids in windows[0]]
    documents, spare = [], []  # name and text: "unique" or "spare", or the passage's versions and kind
    for number, (passage, (versions, kind)) in enumerate(zip(plain, cells, strict=True)):
        for version in range(versions):
            draw = random.Random(f"{seed} {number} {version}")
            text = edit(passage, plain, KINDS[kind], draw)
            documents.append((f"{versions} {kind}", reformat(text, draw) if kind == "reformatted" else text))
    needed, needed_spare = args.rows, args.repeats * len(documents)
    others = texts[HELDOUT + POOL :]
    random.Random(seed).shuffle(others)
    for text in others:
        rows = len(tokenizer(text)["input_ids"]) // ROW
        if needed > 0:
            documents.append(("unique", text))
            needed -= rows
        elif needed_spare > 0:
            spare.append(("spare", text))
            needed_spare -= rows
    if needed > 0 or needed_spare > 0:
        raise ValueError(f"{args.text} is too short; lower --rows, --passages or --repeats")
    documents = random.Random(seed).sample(documents, len(documents))  # which copy is the first

    read = [read_words(text) for _, text in documents]
    recurs, later = count(read)
    flagged: dict[str, list[int]] = {}
    for (name, _), flags in zip(documents, recurs, strict=True):
        before = flagged.get(name, (0, 0))
        flagged[name] = [before[0] + int(flags.sum()), before[1] + len(flags)]

    ids, lengths, marks, kinds = [], [], [], []
    for number, (name, text) in enumerate(documents + spare):
        encoding = tokenizer(text, return_offsets_mapping=True)
        tokens, at = encoding["input_ids"], np.zeros((2, len(encoding["input_ids"])), dtype=bool)
        if name != "spare":
            at = np.stack([on_tokens(f[number], read[number], encoding["offset_mapping"]) for f in (recurs, later)])
        kind = name if name in ("unique", "spare") else "planted"
        for begin in [0] if kind == "planted" else range(0, len(tokens) - ROW + 1, ROW):
            row = tokens[begin : begin + ROW]
            lengths.append(len(row))
            ids.append(row + [tokenizer.eos_token_id] * (ROW - len(row)))
            marks.append(np.pad(at[:, begin : begin + ROW], ((0, 0), (0, ROW - len(row)))))
            kinds.append(kind)
    unique, planted, spared = (np.flatnonzero(np.array(kinds) == kind) for kind in ("unique", "planted", "spare"))
    reads = torch.from_numpy(np.concatenate([unique[: args.rows], *[planted] * args.repeats]))
    reads = reads[torch.randperm(len(reads), generator=torch.Generator().manual_seed(seed))]

    rows, owners = [], []
    for owner, text in enumerate(texts[:HELDOUT]):
        tokens = tokenizer(text[: 20 * ROW * HELDOUT_ROWS])["input_ids"]
        cut = [tokens[i : i + ROW] for i in range(0, len(tokens) - ROW + 1, ROW)][:HELDOUT_ROWS]
        rows += cut
        owners += [owner] * len(cut)
    return Data(
        torch.tensor(ids), reads, torch.tensor(lengths)[reads], torch.tensor([kind == "planted" for kind in kinds]),
        *torch.from_numpy(np.stack(marks)).unbind(1), spared.tolist(), flagged, windows, cells,
        torch.tensor(rows), torch.tensor(owners),
    )  # fmt: skip


def arrange(rule: str, data: Data, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """The rows that are read, int64 (R,), and which tokens of each row are dropped, bool (N, ROW)."""

    def letters(k: float, max_kept: int | None = None) -> Tensor:
        return Goldfish(k=k, h=8, strategy="letters", max_kept=max_kept).bind(tokenizer).dropped(data.ids)

    reads, drop = data.reads, torch.zeros_like(data.recurs)
    if rule.startswith("letters"):
        drop = letters(float(rule.removeprefix("letters-")))
    elif rule == "max-kept-4":
        drop = letters(4, max_kept=4)
    elif rule == "recur-2":
        drop = letters(2) & data.recurs
    elif rule == "recur-2-4":
        drop = torch.where(data.recurs, letters(2), letters(4))
    elif rule == "oracle-2":
        drop = letters(2) & data.planted[:, None]
    elif rule == "dedup-labels":
        drop = data.later
    elif rule == "dedup":
        copies = 2 * data.later[reads].sum(1) > data.lengths
        reads = reads.clone()
        reads[copies] = torch.tensor(data.spare[: int(copies.sum())])
    return reads, drop


def drop_rate(data: Data, reads: Tensor, drop: Tensor) -> float:
    """The share of targets that are dropped."""
    inside = torch.arange(1, ROW) < data.lengths[:, None]
    return round(float((drop[reads][:, 1:] & inside).sum() / inside.sum()), 4)


def train(rule: str, seed: int, hidden: int, tokenizer: Any, data: Data) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(small_llama(tokenizer, hidden, ROW, num_hidden_layers=2))
    reads, drop = arrange(rule, data, tokenizer)
    steps = len(reads) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    for step in range(steps):
        here = slice(step * BATCH, (step + 1) * BATCH)
        ids, outside = data.ids[reads[here]], torch.arange(ROW) >= data.lengths[here, None]
        labels = ids.masked_fill(drop[reads[here]] | outside, -100)
        targets = int((labels[:, 1:] != -100).sum())
        model(input_ids=ids, labels=labels, num_items_in_batch=max(1, targets)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    result = {
        "input_targets": int((data.lengths - 1).sum()),
        "drop_rate": drop_rate(data, reads, drop),
        "replaced": int((reads != data.reads).sum()),
        "flagged": data.flagged,
        "cells": data.cells,
    }
    _, losses = heldout(model, data.heldout, data.owners)
    return result | {"heldout_loss": losses.pop("loss")} | losses | extract(model, tokenizer, data)


def extract(model: Any, tokenizer: Any, data: Data) -> dict[str, Any]:
    """Of each planted passage: ROUGE-L and exact match over normalised words; `floor`: of held-out passages."""
    result: dict[str, Any] = {"rouge_l": [], "exact": [], "floor": []}
    for record in sorted(audited(model, tokenizer, data.windows), key=lambda record: record["index"]):
        output, suffix = (words("".join(record[f"{part}_tokens"])) for part in ("output", "suffix"))
        score = round(rouge_l(output, suffix), 4)
        if record["split"] == "members":
            result["rouge_l"].append(score)
            result["exact"].append(output == suffix)
        else:
            result["floor"].append(score)
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Three tables: all rules; recurrence against the others; words that recur and ROUGE-L by kind of version."""
    runs = {rule: [run for run in results if run["rule"] == rule] for rule in RULES}
    runs = {rule: group for rule, group in runs.items() if group}
    rows = []
    for rule, group in runs.items():
        drop_rate, loss = (f"{fmean([run[name] for run in group]):.3f}" for name in ("drop_rate", "heldout_loss"))
        rouge = [f"{fmean(scores(group, 'rouge_l', (versions,))):.3f}" for versions in VERSIONS]
        exact = [scores(group, "exact", (versions,)) for versions in (5, 20)]
        rows.append((rule, len(group), drop_rate, loss, compare(group, runs.get("standard", []))[2], *rouge,
                     f"{fmean(value for run in group for value in run['floor']):.3f}",
                     *(f"{sum(values)} of {len(values)}" for values in exact)))  # fmt: skip
    tables = [markdown(HEAD, rows)]

    against = [
        (f"{rule} - {other}", *compare(runs[rule], runs[other]))
        for rule in ("recur-2-4", "recur-2") for other in runs
        if rule in runs and other not in (rule, "recur-2-4")
    ]  # fmt: skip
    tables.append(markdown(AGAINST, [row for row in against if row[1]]))

    rows = []
    flags = {run["seed"]: run["flagged"] for run in results}.values()
    for versions, kind in [(0, "unique"), *((versions, kind) for versions in VERSIONS for kind in KINDS)]:
        name = f"{versions} {kind}" if versions else kind
        recur, number = (sum(flag[name][i] for flag in flags) for i in (0, 1))
        rouge = [f"{fmean(scores(group, 'rouge_l', (versions,), kind)):.2f}" for group in runs.values() if versions]
        rows.append((name, f"{number:,}", f"{recur / number:.3f}", *(rouge or [""] * len(runs))))
    tables.append(markdown(("versions", "words", "that recur", *(f"ROUGE-L: {rule}" for rule in runs)), rows))
    return "\n\n".join(tables)


def scores(runs: list[dict[str, Any]], name: str, versions: tuple[int, ...], kind: str = "") -> list[float]:
    """Of the passages with so many versions, of one kind or of all."""
    pairs = [pair for run in runs for pair in zip(run[name], run["cells"], strict=True)]
    return [score for score, (number, other) in pairs if number in versions and kind in ("", other)]


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> tuple[int, str, str, str]:
    """ours - theirs: the number of common seeds, ROUGE-L, held-out loss, and held-out loss of each seed."""
    of_seed = {run["seed"]: run for run in theirs}
    pairs = [(run, of_seed[run["seed"]]) for run in ours if run["seed"] in of_seed and ours is not theirs]
    if not pairs:
        return 0, "", "", ""
    left, right = map(list, zip(*pairs, strict=True))
    rouge = mean_of(np.subtract(scores(left, "rouge_l", (5, 20)), scores(right, "rouge_l", (5, 20))), 3)
    each = ", ".join(f"{a['heldout_loss'] - b['heldout_loss']:+.4f}" for a, b in pairs)
    return len(pairs), rouge, paired(left, right), each


if __name__ == "__main__":
    main()
