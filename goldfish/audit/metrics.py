"""What a window's output and losses are worth: overlaps of two sequences, membership scores."""

import re
import zlib
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import LCSseq

from goldfish.audit.windows import prefix_grid

FEATURES = 2**16  # buckets that words are hashed into
LOWEST = (
    0.2  # the share of tokens that Min-K% and Min-K%++ look at; both papers' default
)
WBC_SIZES = (2, 3, 4, 6, 9, 13, 18, 25, 32, 40)  # tokens, of the authors' experiments
# With a smaller standard deviation the model is certain, and (log P - mu) / sigma is rounding
# divided by rounding.
LEAST_STD = 1e-6


def rouge_l(candidate: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """ROUGE-L F-measure of two sequences of ids or words (Lin 2004): 2 LCS / (m + n).

    0 if both are empty.
    """
    total = len(candidate) + len(reference)
    return 2 * LCSseq.similarity(candidate, reference) / total if total else 0.0


def rouge_l_text(candidate: str, reference: str) -> float:
    """rouge_score's `rougeL` F-measure without stemming.

    It is of lower-case words of a-z and 0-9, so it is 0 on other scripts.
    """
    words = [re.findall("[a-z0-9]+", text.lower()) for text in (candidate, reference)]
    return rouge_l(*words)


def common_runs(a: Sequence[int], b: Sequence[int]) -> list[list[int]]:
    """All maximal common runs of ids, as [start in a, start in b, length]."""
    # equal[i, j]: a[i] == b[j]. A run is a stretch of True on a diagonal; the border of False
    # ends the runs at the edges.
    equal = np.pad(np.equal.outer(np.asarray(a), np.asarray(b)), 1)
    here, before, behind = equal[1:-1, 1:-1], equal[:-2, :-2], equal[2:, 2:]
    starts, ends = _by_diagonal(here & ~before), _by_diagonal(here & ~behind)
    lengths = ends[0] - starts[0] + 1
    runs: list[list[int]] = np.stack([*starts, lengths], -1).tolist()
    return runs


def _by_diagonal(
    places: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of the places, diagonal by diagonal: the n-th start meets the n-th end."""
    i, j = np.nonzero(places)
    order = np.lexsort((i, j - i))
    return i[order], j[order]


def prefix_sweep(correct: NDArray[np.bool_], prefix_length: int) -> list[bool]:
    """For every prefix length of the grid, whether the S tokens after it are recited.

    correct: bool (T-1,), of ids[1:].
    """
    suffix_length = len(correct) + 1 - prefix_length
    misses = np.cumsum([0, *~correct])
    # A prefix of n tokens is followed by ids[n], whose place in `correct` is n - 1.
    return [
        bool(misses[start - 1 + suffix_length] == misses[start - 1])
        for start in prefix_grid(prefix_length)
    ]


def membership_scores(
    nll: NDArray[np.float64],
    entropy_mean: NDArray[np.float64],
    entropy_std: NDArray[np.float64],
    text: str,
    dropped: NDArray[np.bool_] | None = None,
    reference_nll: NDArray[np.float64] | None = None,
) -> dict[str, float | None]:
    """The membership scores of n tokens, higher = more likely a member; None for what is unknown.

    docs/audit-files.md has their table and sources; Min-K%++ is (log P - mu) / sigma (Zhang et al.
    2025, equation 3).

    Args:
        nll: (n,) -log P of each token. entropy_mean, entropy_std: (n,) mean and standard deviation
            of log P over the vocabulary.
        text: of the tokens.
        dropped: (n,) which tokens the training dropped.
        reference_nll: (n,) the loss under the reference model.
    """
    log_p = -np.asarray(nll, dtype=np.float64)
    loss = float(-log_p.mean())
    kept_loss = dropped_loss = None
    if dropped is not None and dropped.any() and not dropped.all():
        kept_loss = float(-log_p[~dropped].mean())
        dropped_loss = float(-log_p[dropped].mean())
    compressed = len(zlib.compress(text.encode("utf-8", "replace")))
    normalized = (log_p - entropy_mean) / np.maximum(entropy_std, LEAST_STD)
    scores: dict[str, float | None] = {
        "mia_loss": -loss,
        "mia_zlib": float(log_p.sum()) / compressed,
        "mia_min_k": mean_of_lowest(log_p),
        "mia_min_k_plus_plus": mean_of_lowest(normalized),
        "mia_reference": None,
        "mia_wbc": None,
        "mia_kept_loss": None,
        "mia_dropped_gap": None,
    }
    if reference_nll is not None:
        scores["mia_reference"] = float(reference_nll.mean()) - loss
        scores["mia_wbc"] = window_votes(reference_nll + log_p)
    if kept_loss is not None and dropped_loss is not None:
        scores["mia_kept_loss"] = -kept_loss
        scores["mia_dropped_gap"] = dropped_loss - kept_loss
    return scores


def window_votes(differences: NDArray[np.float64]) -> float:
    """WBC (Chen et al. 2026, arXiv 2601.02751, section 4.1).

    The share of runs of consecutive tokens on which the reference model's summed loss is the higher
    one, averaged over WBC_SIZES; sizes beyond the text are the whole text.

    differences: (T-1,), loss under the reference model minus loss under the model.
    """
    total = np.cumsum(np.append(0.0, differences))
    sizes = np.minimum(WBC_SIZES, len(differences))
    shares = [np.mean(total[size:] > total[:-size]) for size in sizes]
    return float(np.mean(shares))


def mean_of_lowest(values: NDArray[np.float64], share: float = LOWEST) -> float:
    """Mean of the lowest floor(share * n) values, at least one (Shi et al. 2024, equation 1)."""
    count = max(1, int(share * len(values)))
    return float(np.partition(values, count - 1)[:count].mean())


def word_buckets(text: str) -> list[int]:
    """The distinct words of a text, each hashed into one of FEATURES buckets."""
    words = set(re.findall(r"\w+", text.lower()))
    return sorted(
        {zlib.crc32(word.encode("utf-8", "replace")) % FEATURES for word in words}
    )
