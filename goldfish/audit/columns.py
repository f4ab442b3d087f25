"""The records of an audit, one row a window: every column is made here, and read back here.

docs/audit-files.md describes the columns. Reading them needs no torch.
"""

import re
import zlib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow.compute import list_flatten, list_value_length
from rapidfuzz.distance import LCSseq, Levenshtein

from goldfish.audit.estimate import read_json
from goldfish.audit.windows import Window, first_divergence, prefix_grid
from goldfish.text.printable import text_pieces
from goldfish.text.rows import first_line

if TYPE_CHECKING:
    from goldfish.audit.score import Score
    from goldfish.rule import Goldfish

RUN, RECORDS = "run.json", "records"  # of an audit's folder
ATTACKS = (
    "loss",
    "zlib",
    "reference",
    "min_k",
    "min_k_plus_plus",
    "kept_loss",
    "dropped_gap",
    "wbc",
)
OF_CONTROLS = ("reference", "wbc")  # attacks that need a control model
SHORTEST_RUN = 12  # tokens; common runs of at least this length are listed
FEATURES = 2**16  # buckets that words are hashed into
LOWEST = 0.2  # the share of tokens that Min-K% and Min-K%++ look at; both papers' default
WBC_SIZES = (2, 3, 4, 6, 9, 13, 18, 25, 32, 40)  # tokens, of the authors' experiments
LEAST_STD = (
    1e-6  # below it the model is certain, and (log P - mu) / sigma is rounding over rounding
)

COLUMNS = pa.schema(
    [
        *((name, pa.string()) for name in ("split", "document", "source")),
        *((name, pa.int64()) for name in ("index", "cluster", "count", "offset")),
        *((name, pa.list_(pa.int64())) for name in ("prefix_ids", "suffix_ids", "output_ids")),
        ("prefix_text", pa.string()),
        *((name, pa.list_(pa.string())) for name in ("suffix_tokens", "output_tokens")),
        ("dropped", pa.list_(pa.bool_())),
        ("greedy", pa.list_(pa.int64())),
        *((name, pa.list_(pa.bool_())) for name in ("correct", "prefix_correct", "prefix_sweep")),
        ("nll", pa.list_(pa.float64())),
        ("rank", pa.list_(pa.int64())),
        *(
            (name, pa.bool_())
            for name in ("settled", "exact_match", "completion", "secret_recited")
        ),
        *((name, pa.int64()) for name in ("first_divergence", "longest_run", "characters")),
        ("common_runs", pa.list_(pa.list_(pa.int64()))),
        *(
            (name, pa.float64())
            for name in ("token_accuracy", "rouge_l_text", "rouge_l_ids", "edit_similarity")
        ),
        ("log_p", pa.list_(pa.float64())),
        ("rank_bits", pa.float64()),
        ("beams", pa.int64()),
        *((f"mia_{attack}", pa.float64()) for attack in ATTACKS),
        ("words", pa.list_(pa.int32())),
    ]
)


def records(folder: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The records of an audit, or some of their columns, in the order of the input.

    Raises:
        FileNotFoundError: a folder that holds no audit.
        ValueError: an unfinished or damaged audit, or one of another schema.
    """
    run, path = read_run(folder), Path(folder) / RECORDS
    names = COLUMNS.names if columns is None else list(columns)
    try:
        # One file after the other: pyarrow's reader of whole folders may return rows in another order.
        parts = [
            pq.read_table(file, columns=names, partitioning=None)
            for file in sorted(path.glob("*.parquet"))
        ]
        table = (
            pa.concat_tables(parts).select(names) if parts else COLUMNS.empty_table().select(names)
        )
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(
            f"the records in {path} are damaged ({first_line(error)}); audit again"
        ) from error
    expected = sum(each["windows"] for each in run["inputs"].values())
    if len(table) != expected:
        raise ValueError(
            f"{path} holds {len(table)} records, {expected} were expected: the audit is unfinished or damaged; "
            "repeat its command to finish it, or audit again"
        )
    return table


def read_run(folder: str | Path) -> dict[str, Any]:
    """run.json of an audit's folder: everything that defines the run; errors as of `read_json`."""
    missing = (
        f"{folder} holds no audit: it has no {RUN}; give the folder that `goldfish audit` wrote"
    )
    return read_json(Path(folder) / RUN, missing)


def sums(table: pa.Table, name: str) -> NDArray[np.float64]:
    """Of each window the sum of a column of lists of numbers."""
    windows = np.repeat(np.arange(len(table)), list_value_length(table[name]).to_numpy())
    totals = np.bincount(windows, list_flatten(table[name]).to_numpy(), len(table))
    return np.asarray(totals, dtype=np.float64)


def make_record(
    window: Window, score: "Score", rule: "Goldfish | None", tokenizer: Any, cluster: int
) -> dict[str, Any]:
    """One row of the records. `cluster`: the number of the window's document, the unit of all intervals."""
    start, ids = window.prefix_length, np.array(window.ids)
    prefix, suffix, output = window.ids[:start], window.suffix, score.output
    all_dropped = decisions(rule, window)
    dropped = None if all_dropped is None else all_dropped[start - 1 :]
    correct = score.greedy == ids[1:]
    first = first_divergence(output, suffix)
    suffix_tokens, output_tokens = (
        text_pieces(tokenizer, prefix, each) for each in (suffix, output)
    )
    prefix_text = tokenizer.decode(prefix, clean_up_tokenization_spaces=False)
    suffix_text, output_text = "".join(suffix_tokens), "".join(output_tokens)
    text = prefix_text + suffix_text
    own_text = suffix_text if window.completion else text
    runs = common_runs(output, suffix)
    return {
        **{
            name: getattr(window, name)
            for name in ("split", "index", "document", "source", "count", "offset")
        },
        "cluster": cluster,
        "prefix_ids": prefix,
        "suffix_ids": suffix,
        "output_ids": output,
        "prefix_text": prefix_text,
        "suffix_tokens": suffix_tokens,
        "output_tokens": output_tokens,
        "dropped": None if dropped is None else dropped.tolist(),
        "greedy": score.greedy[start - 1 :].tolist(),
        "correct": correct[start - 1 :].tolist(),
        "prefix_correct": correct[: start - 1].tolist(),
        "prefix_sweep": None if window.completion else prefix_sweep(correct, start),
        "nll": score.nll[start - 1 :].tolist(),
        "rank": score.rank[start - 1 :].tolist(),
        "settled": score.settled,
        "exact_match": output == suffix,
        "completion": window.completion,
        "secret_recited": any(each in output_text for each in window.secrets)
        if window.secrets
        else None,
        "first_divergence": first,
        "longest_run": max((length for _, _, length in runs), default=0),
        "common_runs": [run for run in runs if run[2] >= SHORTEST_RUN],
        "characters": len(text),
        "token_accuracy": sum(a == b for a, b in zip(output, suffix, strict=True)) / len(suffix),
        "rouge_l_text": rouge_l_text(output_text, suffix_text),
        "rouge_l_ids": rouge_l(output, suffix),
        "edit_similarity": float(Levenshtein.normalized_similarity(output, suffix)),
        "log_p": np.asarray(score.log_q, dtype=np.float64).sum(-1).tolist(),
        # Never more probable than one in rank + 1, under any sampling that keeps the order of the tokens.
        "rank_bits": float(np.log2(1 + np.where(correct, 0, score.rank))[start - 1 :].sum()),
        "beams": score.beams,
        **membership_scores(score, own_text, window.first_scored, all_dropped),
        "words": word_buckets(text),
    }


def rouge_l(candidate: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """ROUGE-L F-measure of two sequences of ids or words (Lin 2004): 2 LCS / (m + n); 0 where both are empty."""
    total = len(candidate) + len(reference)
    return 2 * LCSseq.similarity(candidate, reference) / total if total else 0.0


def rouge_l_text(candidate: str, reference: str) -> float:
    """rouge_score's `rougeL` F-measure without stemming: of lower-case words of a-z and 0-9, so 0 on other scripts."""
    words = [re.findall("[a-z0-9]+", text.lower()) for text in (candidate, reference)]
    return rouge_l(*words)


def common_runs(a: Sequence[int], b: Sequence[int]) -> list[list[int]]:
    """All maximal common runs of ids, as [start in a, start in b, length]."""
    equal = np.pad(np.equal.outer(np.asarray(a), np.asarray(b)), 1)
    here = equal[1:-1, 1:-1]
    edges = []
    for neighbour in (equal[:-2, :-2], equal[2:, 2:]):  # before and behind on the diagonal
        i, j = np.nonzero(here & ~neighbour)
        order = np.lexsort((i, j - i))
        edges.append((i[order], j[order]))
    (i, j), (end, _) = edges
    runs: list[list[int]] = np.stack([i, j, end - i + 1], -1).tolist()
    return runs


def prefix_sweep(correct: NDArray[np.bool_], prefix_length: int) -> list[bool]:
    """For every prefix length of the grid, whether the S tokens after it are recited; `correct`: (T-1,), of ids[1:]."""
    length = len(correct) + 1 - prefix_length
    misses = np.cumsum([0, *~correct])
    return [
        bool(misses[start - 1 + length] == misses[start - 1])
        for start in prefix_grid(prefix_length)
    ]


def decisions(rule: "Goldfish | None", window: Window) -> NDArray[np.bool_] | None:
    """Which of ids[1:] the training dropped, (T-1,); None without a rule and under "random", which drew anew in every
    epoch."""
    from torch import tensor

    if rule is None or rule.strategy == "random":
        return None
    dropped: NDArray[np.bool_] = rule.dropped(tensor(window.document_ids or window.ids)).numpy()
    return dropped[1 - len(window.ids) :]


def membership_scores(
    score: "Score", text: str, first_scored: int, dropped: NDArray[np.bool_] | None
) -> dict[str, float | None]:
    """The membership scores of a window, higher = more likely a member; None for what was not asked for.

    docs/audit-files.md has their table and sources; Min-K%++ is (log P - mu) / sigma (Zhang et al. 2025, equation 3).

    Args:
        text: the window's. first_scored: scores are of the ids from there on. dropped: bool (T-1,), of ids[1:], what
            the training dropped; None: not known.
    """
    nll, mean, std = (
        each[first_scored - 1 :] for each in (score.nll, score.entropy_mean, score.entropy_std)
    )
    log_p = -np.asarray(nll, dtype=np.float64)
    loss, control = float(-log_p.mean()), score.control_nll
    here = np.zeros(0, dtype=bool) if dropped is None else dropped[first_scored - 1 :]
    kept_loss = dropped_loss = None
    if here.any() and not here.all():
        kept_loss, dropped_loss = float(-log_p[~here].mean()), float(-log_p[here].mean())
    return {
        "mia_loss": -loss,
        "mia_zlib": float(log_p.sum()) / len(zlib.compress(text.encode("utf-8", "replace"))),
        "mia_reference": None if control is None else float(control.mean()) - loss,
        "mia_min_k": mean_of_lowest(log_p),
        "mia_min_k_plus_plus": mean_of_lowest((log_p - mean) / np.maximum(std, LEAST_STD)),
        "mia_kept_loss": None if kept_loss is None else -kept_loss,
        "mia_dropped_gap": None
        if kept_loss is None or dropped_loss is None
        else dropped_loss - kept_loss,
        "mia_wbc": None if control is None else window_votes(control + log_p),
    }


def window_votes(differences: NDArray[np.float64]) -> float:
    """WBC (Chen et al. 2026, arXiv 2601.02751, section 4.1): the share of runs of consecutive tokens on which the
    control's summed loss is the higher one, averaged over WBC_SIZES; sizes beyond the text are the whole text.

    differences: (T-1,), loss under the control minus loss under the model.
    """
    total = np.cumsum(np.append(0.0, differences))
    shares = [
        np.mean(total[size:] > total[:-size]) for size in np.minimum(WBC_SIZES, len(differences))
    ]
    return float(np.mean(shares))


def mean_of_lowest(values: NDArray[np.float64], share: float = LOWEST) -> float:
    """Mean of the lowest floor(share * n) values, at least one (Shi et al. 2024, equation 1)."""
    count = max(1, int(share * len(values)))
    return float(np.partition(values, count - 1)[:count].mean())


def word_buckets(text: str) -> list[int]:
    """The distinct words of a text, each hashed into one of FEATURES buckets, for the blind baseline."""
    words = set(re.findall(r"\w+", text.lower()))
    return sorted({zlib.crc32(word.encode("utf-8", "replace")) % FEATURES for word in words})
