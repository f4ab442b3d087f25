"""Scores -> records (one a window) and their summary: exact match, first divergence, ROUGE-L, attribution."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from rapidfuzz.distance import LCSseq

from goldfish.audit.score import Score
from goldfish.audit.stats import mean, rate
from goldfish.audit.windows import Window
from goldfish.rule import Goldfish

Record = dict[str, Any]


def rouge_l(candidate: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """ROUGE-L F-measure of two sequences of ids or words (Lin 2004): 2 LCS / (m + n); 0 where both are empty."""
    total = len(candidate) + len(reference)
    return 2 * LCSseq.similarity(candidate, reference) / total if total else 0.0


def first_divergence(output: Sequence[int], suffix: Sequence[int]) -> int:
    """min{t: output[t] != suffix[t]}, or the suffix's length where they agree."""
    return next((t for t, (a, b) in enumerate(zip(output, suffix, strict=False)) if a != b), len(suffix))


def make_record(window: Window, score: Score, rule: Goldfish | None, tokenizer: Any) -> Record:
    """One row of records.parquet: what was asked, what came, and which tokens the training had dropped."""
    prefix, suffix = window.ids[: window.prefix_length], window.suffix
    of_suffix = slice(window.prefix_length - 1, None)
    dropped = None
    if rule is not None and rule.strategy != "random":  # whose holes were others in every epoch
        dropped = rule.dropped(torch.tensor(window.ids))[window.prefix_length :].tolist()
    return {
        "split": window.split,
        "index": window.index,
        "document": window.document,
        "prefix_ids": prefix,
        "suffix_ids": suffix,
        "output_ids": score.output,
        "prefix_text": tokenizer.decode(prefix, clean_up_tokenization_spaces=False),
        "suffix_tokens": text_pieces(tokenizer, prefix, suffix),
        "output_tokens": text_pieces(tokenizer, prefix, score.output),
        "dropped": dropped,
        "nll": score.nll[of_suffix].tolist(),
        "correct": [a == b for a, b in zip(score.greedy[of_suffix].tolist(), suffix, strict=True)],
        "exact_match": score.output == suffix,
        "first_divergence": first_divergence(score.output, suffix),
        "rouge_l_ids": rouge_l(score.output, suffix),
    }


def text_pieces(tokenizer: Any, prefix: list[int], ids: list[int]) -> list[str]:
    """The text that each token adds to what stands before it; "" until a character's last byte has come."""
    context = prefix[-4:]  # enough for a character cut by the prefix's end, and for spaces between words
    all_ids = context + ids

    def text(first: int, end: int) -> str:
        decoded: str = tokenizer.decode(all_ids[first:end], clean_up_tokenization_spaces=False)
        return decoded

    pieces, first, between = [], 0, [0]  # between: places where no character is cut
    shown = len(text(0, len(context)).rstrip("\ufffd"))
    for end in range(len(context) + 1, len(all_ids) + 1):
        now = text(first, end)
        complete = now.rstrip("\ufffd")
        if complete == now:
            between.append(end)
        elif end < len(all_ids):
            now = complete
        pieces.append(now[shown:])
        shown = max(shown, len(now))
        if between[-1] == end and end - first > 64:  # or the time would grow with the square of the length
            first = next(place for place in reversed(between) if place <= max(first, end - 16))
            shown = len(text(first, end))
    return pieces


def summarize(records: Sequence[Record], skipped: int) -> dict[str, Any]:
    """The numbers of one split; see README, "The audit", for their definitions. Tokens carry no interval."""

    def accuracy(dropped: bool | None) -> dict[str, Any] | None:
        correct = [
            hit
            for record in records
            for hit, gone in zip(record["correct"], record["dropped"] or [None] * len(record["correct"]), strict=True)
            if dropped is None or gone is dropped
        ]
        return rate(sum(correct), len(correct), interval=False)

    diverging = [record for record in records if not record["exact_match"] and record["dropped"] is not None]
    nll = [value for record in records for value in record["nll"]]
    return {
        "n": len(records),
        "skipped": skipped,
        "exact_match": rate(sum(record["exact_match"] for record in records), len(records)),
        "teacher_forced_accuracy": accuracy(None),
        "teacher_forced_accuracy_dropped": accuracy(True),
        "teacher_forced_accuracy_kept": accuracy(False),
        "rouge_l_ids": mean([record["rouge_l_ids"] for record in records]),
        "nll": {"mean": sum(nll) / len(nll), "n": len(nll)},
        "first_divergence_dropped": rate(
            sum(record["dropped"][record["first_divergence"]] for record in diverging), len(diverging)
        ),
    }
