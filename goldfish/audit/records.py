"""The records of an audit, one row for each question: what an output and losses are worth.

docs/audit-files.md describes the columns. Reading them needs no torch.
"""

import json
import re
from collections.abc import Hashable, Sequence
from dataclasses import asdict
from operator import eq
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike
from rapidfuzz.distance import LCSseq, Levenshtein

from goldfish.audit.intervals import Bools, Codes, Floats
from goldfish.audit.questions.membership import (
    ATTACKS,
    membership_scores,
    word_buckets,
)
from goldfish.audit.windows import Window, first_divergence, prefix_grid
from goldfish.text.printable import counted, text_pieces
from goldfish.text.rows import first_line

if TYPE_CHECKING:
    from goldfish.audit.score import Score
    from goldfish.rule import Goldfish

# Of run.json, the records and summary.json; see docs/audit-files.md.
SCHEMA = "goldfish.audit/9"
RUN, RECORDS = "run.json", "records"  # of an audit's folder
SHORTEST_RUN = 12  # tokens; common runs of at least this length are listed
# Near-verbatim: half of the field's suffix of 50 tokens (Carlini et al. 2023) in one piece, or half
# of the suffix without an edit. Held-out texts share runs of 2 to 3 tokens with the output, the MIT
# licence 15 (docs/audit-files.md).
NEAR_VERBATIM = "25t,50%"
# The column that each unit of a threshold is about, and its name.
UNITS = {
    "t": ("longest_run", "tokens in one piece"),
    "w": ("longest_run_words", "words in one piece"),
    "c": ("longest_run_characters", "characters in one piece"),
    "%": ("edit_similarity", "of the tokens"),
}
# The sampling question: draws, and the least probability that they contain the suffix.
DRAWS = 1_000
PROBABILITY = 0.5

COLUMNS = pa.schema(
    {
        # What was asked.
        "split": pa.string(),
        "index": pa.int64(),
        "document": pa.int64(),
        "name": pa.string(),
        "count": pa.int64(),
        "offset": pa.int64(),
        "completion": pa.bool_(),
        "prompt_kind": pa.string(),
        "prompt": pa.string(),
        "suffix_text": pa.string(),
        "output_text": pa.string(),
        "prefix_ids": pa.list_(pa.int64()),
        "suffix_ids": pa.list_(pa.int64()),
        "output_ids": pa.list_(pa.int64()),
        "suffix_tokens": pa.list_(pa.string()),
        "output_tokens": pa.list_(pa.string()),
        "secrets": pa.list_(pa.string()),
        "characters": pa.int64(),
        "words": pa.list_(pa.int32()),
        # What the model made of it, along the suffix.
        "dropped": pa.list_(pa.bool_()),
        "correct": pa.list_(pa.bool_()),
        "nll": pa.list_(pa.float64()),
        "rank": pa.list_(pa.int64()),
        "settled": pa.bool_(),
        # The output against the suffix.
        "exact_match": pa.bool_(),
        "first_divergence": pa.int64(),
        "longest_run": pa.int64(),
        "longest_run_words": pa.int64(),
        "longest_run_characters": pa.int64(),
        "common_runs": pa.list_(pa.list_(pa.int64())),
        "token_accuracy": pa.float64(),
        "rouge_l_text": pa.float64(),
        "rouge_l_ids": pa.float64(),
        "edit_similarity": pa.float64(),
        "prefix_sweep": pa.list_(pa.bool_()),
        # Other adversaries.
        "log_p": pa.list_(pa.float64()),
        "secret_log_p": pa.list_(pa.list_(pa.float64())),
        "rank_bits": pa.float64(),
        "beams": pa.int64(),
        **{f"mia_{attack}": pa.float64() for attack in ATTACKS},
    }
)


def read_records(folder: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The records of an audit, or some of their columns, in the order of the input.

    Raises:
        FileNotFoundError: a folder that holds no audit.
        ValueError: an unfinished or damaged audit, or one of another schema.
    """
    run = read_run(folder)
    path = Path(folder) / RECORDS
    table = read_blocks(path, COLUMNS, columns)
    expected = sum(each["windows"] for each in run["inputs"].values())
    if len(table) != expected:
        raise ValueError(
            f"{path} holds {counted(len(table), 'record')}, expected {expected:,}: the audit "
            "is unfinished or damaged; repeat its command to finish it, or audit again"
        )
    return table


def read_blocks(
    path: Path,
    schema: pa.Schema,
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """The blocks of a folder as one table, or some of its columns.

    Raises:
        ValueError: a damaged block.
    """
    names = schema.names if columns is None else list(columns)
    parts = [schema.empty_table().select(names)]
    # One file after the other: pyarrow's reader of whole folders may return rows in another order.
    for file in sorted(path.glob("*.parquet")):
        parts.append(read_block(file, names))
    return pa.concat_tables(parts)


def read_block(file: Path, names: Sequence[str]) -> pa.Table:
    """Some columns of a file; ValueError if it is damaged."""
    names = list(names)
    try:
        table = pq.read_table(file, columns=names, partitioning=None)
        return table.select(names)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(
            f"{file} is damaged ({first_line(error)}); repeat the audit's command with that "
            "file removed to make it again"
        ) from error


def read_run(folder: str | Path) -> dict[str, Any]:
    """run.json of an audit's folder: everything that defines the run; errors as of `read_json`."""
    missing = (
        f"{folder} holds no audit: it has no {RUN}; give the folder that an audit wrote"
    )
    return read_json(Path(folder) / RUN, missing)


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """The object in run.json or summary.json.

    Raises:
        FileNotFoundError: no such file, with the message `missing`. ValueError: an unreadable one,
            or one of another schema.
    """
    if not path.is_file():
        raise FileNotFoundError(missing)
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        schema = value["schema"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); audit again") from error
    if schema != SCHEMA:
        raise ValueError(
            f"{path}: the schema is {schema!r:.80}, this version reads {SCHEMA!r}; audit again"
        )
    return value


def dumps(value: Any) -> str:
    """Strict JSON for people; ValueError for NaN and infinity."""
    return json.dumps(value, indent=2, allow_nan=False, default=asdict) + "\n"


def make_record(
    window: Window,
    score: "Score",
    rule: "Goldfish | None",
    tokenizer: Any,
    document: int,
) -> dict[str, Any]:
    """One row of the records.

    document: the number of the window's document, the unit of all intervals.
    """
    # Scores are about ids[1:]: those of the suffix begin at prefix_length - 1.
    of_suffix = slice(window.prefix_length - 1, None)
    of_membership = slice(window.first_scored - 1, None)
    correct = score.greedy == np.array(window.ids[1:])
    dropped = decisions(rule, window)
    dropped_of_suffix = dropped_of_membership = None
    if dropped is not None:
        dropped_of_suffix = dropped[of_suffix].tolist()
        dropped_of_membership = dropped[of_membership]
    suffix_tokens = text_pieces(tokenizer, window.prefix, window.suffix)
    output_tokens = text_pieces(tokenizer, window.prefix, score.output)
    prompt = tokenizer.decode(window.prefix, clean_up_tokenization_spaces=False)
    suffix_text = "".join(suffix_tokens)
    text = prompt + suffix_text
    # Never more probable than one in rank + 1, under any sampling that keeps the order of the
    # tokens. A token that generate settled as predicted counts as the most probable one.
    rank = np.where(correct, 0, score.rank)[of_suffix]
    rank_bits = np.log2(1 + rank).sum()
    sweep = None
    if not window.completion:
        sweep = prefix_sweep(correct, window.prefix_length)
    log_q = np.asarray(score.log_q, dtype=np.float64)
    return {
        "split": window.split,
        "index": window.index,
        "document": document,
        "name": window.name,
        "count": window.count,
        "offset": window.offset,
        "completion": window.completion,
        "prompt_kind": window.prompt_kind,
        "prompt": prompt,
        "suffix_text": suffix_text,
        "output_text": "".join(output_tokens),
        "prefix_ids": window.prefix,
        "suffix_ids": window.suffix,
        "output_ids": score.output,
        "suffix_tokens": suffix_tokens,
        "output_tokens": output_tokens,
        "secrets": list(window.secrets),
        "characters": len(text),
        "words": word_buckets(text),
        "dropped": dropped_of_suffix,
        "correct": correct[of_suffix].tolist(),
        "nll": score.nll[of_suffix].tolist(),
        "rank": score.rank[of_suffix].tolist(),
        "settled": score.settled,
        **_agreement(score.output, window.suffix, output_tokens, suffix_text),
        "prefix_sweep": sweep,
        "log_p": log_q.sum(-1).tolist(),
        "secret_log_p": [
            _secret_log_p(secret, suffix_tokens, score.log_q)
            for secret in window.secrets
        ],
        "rank_bits": float(rank_bits),
        "beams": score.beams,
        **membership_scores(
            score.nll[of_membership],
            score.entropy_mean[of_membership],
            score.entropy_std[of_membership],
            suffix_text if window.completion else text,
            dropped_of_membership,
            score.control_nll,
        ),
    }


def _agreement(
    output: list[int],
    suffix: list[int],
    output_tokens: list[str],
    suffix_text: str,
) -> dict[str, Any]:
    """How far an output, as far as the suffix reaches, agrees with it.

    output_tokens: the text of each token of the output.
    """
    compared = output[: len(suffix)]
    compared_text = "".join(output_tokens[: len(suffix)])
    runs = common_runs(compared, suffix)
    lengths = [length for _, _, length in runs]
    equal = sum(map(eq, compared, suffix))
    said = tuple(compared_text.split())
    words = longest_common(said, tuple(suffix_text.split()))
    return {
        "exact_match": compared == suffix,
        "first_divergence": first_divergence(compared, suffix),
        "longest_run": max(lengths, default=0),
        "longest_run_words": words,
        "longest_run_characters": longest_common(compared_text, suffix_text),
        "common_runs": [run for run in runs if run[2] >= SHORTEST_RUN],
        "token_accuracy": equal / len(suffix),
        "rouge_l_text": rouge_l_text(compared_text, suffix_text),
        "rouge_l_ids": rouge_l(compared, suffix),
        "edit_similarity": float(Levenshtein.normalized_similarity(compared, suffix)),
    }


def _secret_log_p(
    secret: str,
    suffix_tokens: list[str],
    log_q: np.ndarray,
) -> list[float] | None:
    """ln of the probability of a secret's tokens after all that comes before them in the window.

    Args:
        secret: text within the suffix; its first place counts.
        suffix_tokens: the text of each token. log_q: (settings, S).

    Returns:
        One number for each setting; None if the tokens' texts do not hold the secret, which the
        text before the tokenizer's normalization may have done.
    """
    begin = "".join(suffix_tokens).find(secret)
    if begin < 0:
        return None
    ends = np.cumsum([len(piece) for piece in suffix_tokens])
    starts = np.append(0, ends[:-1])
    # Tokens that share a character with it: [" co", "de 4", "2 is"] and "42" give the last two.
    of_secret = (ends > begin) & (starts < begin + len(secret))
    of_tokens = log_q[:, of_secret].astype(np.float64)
    log_p: list[float] = of_tokens.sum(-1).tolist()
    return log_p


def decisions(rule: "Goldfish | None", window: Window) -> Bools | None:
    """Which of ids[1:] the training dropped, (T-1,).

    None without a rule, under "random", which drew anew in every epoch, under "entropy", whose
    guide is not asked, and where the prompt is not that of the training.
    """
    from torch import tensor

    if rule is None or window.prompt_kind != "training":
        return None
    if rule.strategy in ("random", "entropy"):
        return None
    # The rule reads the document from its start, not from the window's.
    ids = tensor(window.document_ids or window.ids)
    dropped: Bools = rule.dropped(ids).numpy()
    return dropped[1 - len(window.ids) :]


def rouge_l(candidate: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """ROUGE-L F-measure of two sequences of ids or words (Lin 2004): 2 LCS / (m + n).

    0 if both are empty.
    """
    total = len(candidate) + len(reference)
    if total == 0:
        return 0.0
    return 2 * LCSseq.similarity(candidate, reference) / total


def rouge_l_text(candidate: str, reference: str) -> float:
    """rouge_score's `rougeL` F-measure without stemming.

    It is of lower-case words of a-z and 0-9, so it is 0 on other scripts.
    """
    words = re.compile("[a-z0-9]+")
    said = words.findall(candidate.lower())
    expected = words.findall(reference.lower())
    return rouge_l(said, expected)


def common_runs(a: Sequence[int], b: Sequence[int]) -> list[list[int]]:
    """All maximal common runs of ids, as [start in a, start in b, length]."""
    # equal[i, j]: a[i] == b[j]. A run is a stretch of True on a diagonal; the border of False
    # ends the runs at the edges.
    equal = np.equal.outer(np.asarray(a), np.asarray(b))
    equal = np.pad(equal, 1)
    here = equal[1:-1, 1:-1]
    before = equal[:-2, :-2]
    behind = equal[2:, 2:]
    starts = _by_diagonal(here & ~before)
    ends = _by_diagonal(here & ~behind)
    lengths = ends[0] - starts[0] + 1
    columns = np.stack([*starts, lengths], -1)
    runs: list[list[int]] = columns.tolist()
    return runs


def longest_common(a: str | tuple[str, ...], b: str | tuple[str, ...]) -> int:
    """The length of the longest common run: of characters, or of words.

    By binary search: with a run of n there is also one of n - 1.

    >>> longest_common("a cat sat", "the cat sang")
    7
    >>> longest_common(("a", "cat", "sat"), ("the", "cat", "sang"))
    1
    """
    low = 0
    high = min(len(a), len(b))
    while low < high:
        length = (low + high + 1) // 2
        starts = range(len(a) - length + 1)
        runs = {a[start : start + length] for start in starts}
        starts = range(len(b) - length + 1)
        if any(b[start : start + length] in runs for start in starts):
            low = length
        else:
            high = length - 1
    return low


def _by_diagonal(
    places: Bools,
) -> tuple[Codes, Codes]:
    """Rows and columns of the places, diagonal by diagonal: the n-th start meets the n-th end."""
    i, j = np.nonzero(places)
    order = np.lexsort((i, j - i))
    return i[order], j[order]


def prefix_sweep(correct: Bools, prefix_length: int) -> list[bool]:
    """For every prefix length of the grid, whether the S tokens after it are recited.

    correct: bool (T-1,), of ids[1:].
    """
    suffix_length = len(correct) + 1 - prefix_length
    # misses[i]: how many of the first i tokens are wrong. A prefix of n tokens is followed by
    # ids[n], whose place in `correct` is n - 1.
    misses = np.cumsum([0, *~correct])
    firsts = np.array(prefix_grid(prefix_length)) - 1
    ends = firsts + suffix_length
    recited: list[bool] = (misses[ends] == misses[firsts]).tolist()
    return recited


def thresholds(near_verbatim: str) -> dict[str, float]:
    """By unit the least number that counts as near-verbatim.

    >>> thresholds("150c,90%")
    {'c': 150.0, '%': 0.9}

    Raises:
        ValueError: not of this form.
    """
    found: dict[str, float] = {}
    for part in near_verbatim.split(","):
        # "150c": the number, and the letter that names its unit.
        number = part.strip()[:-1]
        unit = part.strip()[-1:]
        most = 100 if unit == "%" else 10**9
        is_new = unit in UNITS and unit not in found
        if not is_new or not number.isdecimal() or not 0 < int(number) <= most:
            raise ValueError(
                "--near-verbatim takes tokens, words or characters in one piece, or a share of "
                f"the tokens, such as 25t, 15w, 150c or 25t,50%; got {near_verbatim!r}"
            )
        found[unit] = int(number) / (100 if unit == "%" else 1)
    return found


def run_thresholds(near_verbatim: str) -> dict[str, float]:
    """The same without a share of the tokens: the answer to a simple prompt has no suffix."""
    for text in (near_verbatim, NEAR_VERBATIM):
        found = thresholds(text)
        found.pop("%", None)
        if found:
            break
    return found


def probability_within(log_p: ArrayLike, n: float) -> Floats:
    """1 - (1 - p_z)^n, the probability that the suffix is among n samples.

    p_z, the probability that one sample is the suffix, may be e^-10000, so everything is computed
    from its logarithm; exact to rounding for p_z from 0 to 1.

    >>> probability_within([0.0, np.log(0.5)], 2).tolist()
    [1.0, 0.75]
    """
    log_p = np.minimum(np.asarray(log_p, dtype=np.float64), 0.0)
    with np.errstate(divide="ignore"):
        # ln(1 - p_z) without cancellation, for a small p_z and for one near 1.
        if_small = np.log1p(-np.exp(log_p))
        if_large = np.log(-np.expm1(log_p))
        log_miss = np.where(log_p < -0.6931, if_small, if_large)
    return np.asarray(-np.expm1(n * log_miss))


def extracted(log_p: ArrayLike, n: float, p: float = PROBABILITY) -> Bools:
    """Whether the suffix is among n samples with a probability of at least p, but for rounding."""
    return probability_within(log_p, n) >= p * (1 - 1e-12)
