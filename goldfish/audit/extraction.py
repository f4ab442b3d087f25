"""Scores -> records, one a window: exact match, first divergence, ROUGE-L, runs, probabilities, membership scores."""

import re
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from rapidfuzz.distance import LCSseq, Levenshtein

from goldfish.audit.attacks import scores
from goldfish.audit.attribution import decisions
from goldfish.audit.sampling import log_p
from goldfish.audit.score import Score, first_divergence
from goldfish.audit.windows import Window
from goldfish.pieces import text_pieces
from goldfish.rule import Goldfish

Record = dict[str, Any]


def rouge_l(candidate: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """ROUGE-L F-measure of two sequences of ids or words (Lin 2004): 2 LCS / (m + n); 0 where both are empty."""
    total = len(candidate) + len(reference)
    return 2 * LCSseq.similarity(candidate, reference) / total if total else 0.0


def rouge_l_text(candidate: str, reference: str) -> float:
    """What rouge_score's `rougeL` F-measure is without stemming: of lower-case words of a-z and 0-9, so 0 on text
    without such letters."""
    words = [re.findall("[a-z0-9]+", text.lower()) for text in (candidate, reference)]
    return rouge_l(*words)


def longest_run(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest contiguous run of ids that both hold."""
    second = np.asarray(b, dtype=np.int64)
    ending, longest = np.zeros(len(second) + 1, dtype=np.int64), 0  # ending[j + 1]: the common run that ends at b[j]
    for token in a:
        ending[1:] = (ending[:-1] + 1) * (second == token)
        longest = max(longest, int(ending.max()))
    return longest


def edit_similarity(a: Sequence[int], b: Sequence[int]) -> float:
    """1 - Levenshtein distance / the longer length; 1 where both are empty."""
    return float(Levenshtein.normalized_similarity(a, b))


def make_record(window: Window, score: Score, rule: Goldfish | None, tokenizer: Any) -> Record:
    """One row of records.parquet; docs/audit.md describes every column."""
    start = window.prefix_length
    prefix, suffix = window.ids[:start], window.suffix
    dropped, known = decisions(rule, window.ids, window.offset)
    correct = np.asarray(score.greedy) == np.asarray(window.ids[1:])
    first = first_divergence(score.output, suffix)
    suffix_tokens = text_pieces(tokenizer, prefix, suffix)
    output_tokens = text_pieces(tokenizer, prefix, score.output)
    prefix_text = tokenizer.decode(prefix, clean_up_tokenization_spaces=False)
    return {
        "split": window.split,
        "index": window.index,
        "document": window.document,
        "source": window.source,
        "count": window.count,
        "offset": window.offset,
        "prefix_ids": prefix,
        "suffix_ids": suffix,
        "output_ids": score.output,
        "prefix_text": prefix_text,
        "suffix_tokens": suffix_tokens,
        "output_tokens": output_tokens,
        "dropped": dropped[start:].tolist() if known[start:].all() else None,
        "greedy": score.greedy[start - 1 :].tolist(),
        "correct": correct[start - 1 :].tolist(),
        "prefix_correct": correct[: start - 1].tolist(),
        "nll": score.nll[start - 1 :].tolist(),
        "rank": score.rank[start - 1 :].tolist(),
        "smallest_margin": float(score.margin[start - 1 : start + first].min()),
        "settled": score.settled,
        "exact_match": score.output == suffix,
        "first_divergence": first,
        "longest_run": longest_run(score.output, suffix),
        "token_accuracy": sum(a == b for a, b in zip(score.output, suffix, strict=False)) / len(suffix),
        "rouge_l_text": rouge_l_text("".join(output_tokens), "".join(suffix_tokens)),
        "rouge_l_ids": rouge_l(score.output, suffix),
        "edit_similarity": edit_similarity(score.output, suffix),
        "type_token_ratio": len(set(suffix)) / len(suffix),
        "log_p": log_p(score.log_q),
        "beams": score.beams,
        **scores(score, prefix_text + "".join(suffix_tokens), dropped[1:], known[1:]),
    }
