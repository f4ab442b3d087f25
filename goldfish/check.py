"""`goldfish check`: reads training data under a rule before the training, and names what the rule does not protect."""

import heapq
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset

from goldfish.pieces import plain
from goldfish.rule import Goldfish

KINDS = {".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text", ".md": "text"}  # for load_dataset
LIKELY = re.compile(r"\w[\w@#%&*+/=.:~-]{4,}\w", re.ASCII)  # where no secrets are marked; see DENSE
DENSE = 6, 2  # at least so many tokens, of at most so many characters: words have more
WORD = re.compile(r"[^\W_]+")
PASSAGE = 8  # words
MEMORY = 2**20  # passages; of more, a sample is kept, chosen by checksum
SHOWN = 10  # of each list


@dataclass
class Check:
    """What `check` says. Rows count from 0; a passage is a run of 8 words, or a shorter text."""

    rules: list[Goldfish]  # that of the training, then others that may protect more
    marked: bool  # whether the user said which texts are secrets
    documents: int = 0
    targets: int = 0
    dropped: int = 0
    longest: list[tuple[int, int]] = field(default_factory=list)  # (kept targets in a row, row), greatest first
    # The rows of every secret and, under each rule, its tokens (spans of characters) that are dropped in every place
    # where it occurs. A token that is kept in one place is learned there.
    secrets: dict[str, tuple[list[int], list[set[tuple[int, int]]]]] = field(default_factory=dict)
    passages: int = 0  # of them every `sampled`-th is counted
    sampled: int = 1
    recurring: int = 0  # passages of an earlier row
    differing: int = 0  # recurring passages in which other words are dropped
    repeated: list[tuple[int, int, float]] = field(default_factory=list)  # row, earlier row, share of passages in it

    def exposed(self, rule: int = 0, tokens: int = 0) -> list[str]:
        """The secrets of which only so many tokens are dropped in every place."""
        return [name for name, (_, dropped) in self.secrets.items() if len(dropped[rule]) == tokens]

    def exit_code(self) -> int:
        """1: a secret has no token that is dropped in every place; 3: none of the marked secrets occurs; else 0."""
        return 1 if self.exposed() else 3 if self.marked and not self.secrets else 0

    def lines(self) -> Iterator[str]:
        """The result for a terminal."""
        rule, share = self.rules[0], self.dropped / max(1, self.targets)
        yield f"{self.documents:,} documents, {self.targets:,} targets, {share:.1%} dropped ({_name(rule)})"
        yield "Longest runs of kept tokens: " + ", ".join(f"{run} (row {row})" for run, row in self.longest)
        yield f"{len(self.secrets):,} secrets" + ("" if self.marked else ": likely ones, because none are marked")
        for tokens, what in enumerate(("no token dropped in every place", "only one such token")):
            names = self.exposed(tokens=tokens)
            yield f"  {what}: {len(names):,}"
            for name in names[:SHOWN]:
                rows = self.secrets[name][0]
                yield f"    {plain(name)} (rows {', '.join(map(str, rows[:5]))}{', ...' * (len(rows) > 5)})"
        if self.exposed():
            best = min(range(len(self.rules)), key=lambda i: len(self.exposed(i)))
            fewest = f"{len(self.exposed(best))} with {_name(self.rules[best])}"
            yield f"  fewest without one, among {len(self.rules)} rules tried: {fewest}"
        recurring, differing = self.recurring / max(1, self.passages), self.differing / max(1, self.recurring)
        yield f"{recurring:.1%} of passages occur in an earlier row, {differing:.1%} of these with other dropped words"
        yield f"rows with at least half of their passages in one earlier row: {len(self.repeated):,}"
        for row, earlier, share in self.repeated[:SHOWN]:
            yield f"    row {row}: {share:.0%} in row {earlier}"


def check(path: str | Path, tokenizer: Any, rule: Goldfish, pattern: str = "", column: str = "") -> Check:
    """Read a file once, each row as a document of its own.

    Args:
        path: .jsonl, .parquet or .csv with `text`, `messages`, or `prompt` and `completion` (where, as in TRL, only
            the completion is a target); or .txt.
        pattern: regular expression for secrets; its first group, if it has one. column: the column that holds them.

    Raises:
        FileNotFoundError, ValueError: a file or row that cannot be read, with what was expected.
    """
    others = [replace(rule, seed=(rule.seed + i) % 2**64) for i in range(1, 9)]
    rules = [each.bind(tokenizer) for each in (rule, *others, *(replace(rule, k=k) for k in (3, 2) if k < rule.k))]
    result, find = Check(rules, bool(pattern or column)), re.compile(pattern) if pattern else LIKELY
    seen: dict[int, tuple[int, tuple[bool, ...]]] = {}
    for number, row in enumerate(_rows(Path(path))):
        text, start, special = _text(row, tokenizer, number)
        encoding = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        ids = torch.tensor(encoding["input_ids"], dtype=torch.int64)
        begins, ends = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        target = (begins >= start) & (ends > begins) & (np.arange(len(ids)) > 0)  # not what the tokenizer adds
        begins, ends = begins[target], ends[target]
        dropped = rules[0].dropped(ids).numpy()[target]
        runs = np.diff(np.flatnonzero(np.concatenate([[True], dropped, [True]]))) - 1
        result.documents += 1
        result.targets += len(dropped)
        result.dropped += int(dropped.sum())
        result.longest = heapq.nlargest(SHOWN, [*result.longest, (int(runs.max()), number)])

        drops = [dropped]  # under each rule; only rows with secrets need the others
        for a, b in _secrets(row, text, start, find, column):
            inside = range(np.searchsorted(ends, a, "right"), np.searchsorted(begins, b, "left"))
            if not result.marked and (len(inside) < DENSE[0] or b - a > DENSE[1] * len(inside)):
                continue
            if len(drops) == 1:
                drops += [each.dropped(ids).numpy()[target] for each in rules[1:]]
            here = [
                {(max(int(begins[i]) - a, 0), min(int(ends[i]), b) - a) for i in inside if drop[i]} for drop in drops
            ]
            rows, everywhere = result.secrets.setdefault(text[a:b], ([], here))
            rows.append(number)
            everywhere[:] = [old & new for old, new in zip(everywhere, here, strict=True)]

        marks = bytearray(len(text))
        for a, b in zip(begins[dropped], ends[dropped], strict=True):
            marks[a:b] = b"\1" * (b - a)
        words = [(m.group().casefold(), 1 in marks[slice(*m.span())]) for m in WORD.finditer(text, start)]
        _count_passages(result, seen, number, words)
    return result


def _count_passages(result: Check, seen: dict[int, Any], number: int, words: list[tuple[str, bool]]) -> None:
    """Compare a row's passages with those seen: by checksum their first row, and which of their words are dropped."""
    total, earlier = 0, Counter[int]()
    for i in range(max(1, len(words) - PASSAGE + 1) if words else 0):
        passage, drop = zip(*words[i : i + PASSAGE], strict=True)
        checksum = zlib.crc32(" ".join(passage).encode("utf-8", "replace"))
        if checksum % result.sampled:
            continue
        first, before = seen.setdefault(checksum, (number, drop))
        total += 1
        if first != number:
            earlier[first] += 1
            result.differing += before != drop
    result.passages += total
    result.recurring += earlier.total()
    for first, count in earlier.most_common(1):
        if 2 * count >= total:
            result.repeated.append((number, first, count / total))
    while len(seen) > MEMORY:  # keep half of them
        result.sampled *= 2
        for checksum in [each for each in seen if each % result.sampled]:
            del seen[checksum]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file() or path.suffix.lower() not in KINDS:
        problem = f"{path} is not one of {', '.join(KINDS)}" if path.exists() else f"no file {path}"
        raise FileNotFoundError(problem) if not path.exists() else ValueError(problem)
    kind = KINDS[path.suffix.lower()]
    options = {"sample_by": "document"} if kind == "text" else {}
    yield from load_dataset(kind, data_files=str(path), split="train", streaming=True, **options)


def _text(row: dict[str, Any], tokenizer: Any, number: int) -> tuple[str, int, bool]:
    """What is trained on, the character where its targets begin, and whether the tokenizer adds special tokens."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if row.get("messages"):
        return tokenizer.apply_chat_template(row["messages"], tokenize=False), 0, False
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion, len(prompt), True
    if prompt and completion:
        opening = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(prompt + completion, tokenize=False)
        return text, len(opening) if text.startswith(opening) else 0, False
    if isinstance(row.get("text"), str):
        return row["text"], 0, True
    raise ValueError(f"row {number}: expected text, messages, or prompt and completion, got {', '.join(row)}")


def _secrets(
    row: dict[str, Any], text: str, start: int, find: re.Pattern[str], column: str
) -> Iterator[tuple[int, int]]:
    """Where the secrets of a row begin and end."""
    values = (row.get(column) or []) if column else [find]
    for value in [values] if isinstance(values, str) else values:
        for match in re.finditer(re.escape(value) if column else value, text[start:]):
            a, b = match.span(min(1, match.re.groups))
            if b > a:
                yield start + a, start + b


def _name(rule: Goldfish) -> str:
    return f"k={rule.k:g}, h={rule.h}, strategy={rule.strategy}, seed={rule.seed}"
