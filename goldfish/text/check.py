"""`goldfish check`: reads training data under a rule before the training, and names what the rule does not protect."""

import heapq
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from goldfish.rule import MOST_KEPT, Goldfish
from goldfish.text.chats import RefusedChat, secret_finder, training_text
from goldfish.text.printable import plain
from goldfish.text.rows import read_rows

LIKELY = r"(?a:\w[\w@#%&*+/=.:~-]{4,}\w)"  # where no secrets are marked; see DENSE
DENSE = 6, 2  # at least so many tokens, of at most so many characters: words have more
WORD = re.compile(r"[^\W_]+")
PASSAGE = 8  # words
MOST = (
    2**20
)  # passages that are held; of more, every second one is forgotten (by checksum), again and again
SHOWN = 10  # of each list


@dataclass
class Check:
    """What `check` says. Rows count from 0; a passage is a run of 8 words, or a shorter text.

    rules: that of the training, then others that may protect more. marked: whether the user said what the secrets are.
    longest: (kept targets in a row, row, drop rate of the row), greatest first.
    secrets: of each its rows and, under each rule, its tokens (spans of characters) that are dropped in every place
    where it occurs; a token that is kept in one place is learned there.
    passages: counted ones. recurring: those of an earlier row; differing: of these, with other words dropped.
    repeated: (row, earlier row, share of its passages in it).
    """

    rules: list[Goldfish]
    marked: bool
    documents: int = 0
    targets: int = 0
    dropped: int = 0
    longest: list[tuple[int, int, float]] = field(default_factory=list)
    secrets: dict[str, tuple[list[int], list[set[tuple[int, int]]]]] = field(default_factory=dict)
    passages: int = 0
    recurring: int = 0
    differing: int = 0
    repeated: list[tuple[int, int, float]] = field(default_factory=list)
    # Passages seen so far: checksum -> first row, which of its words are dropped; of checksums that _every divides.
    _seen: dict[int, tuple[int, tuple[bool, ...]]] = field(default_factory=dict, repr=False)
    _every: int = 1

    def exposed(self, rule: int = 0, tokens: int = 0) -> list[str]:
        """The secrets of which only so many tokens are dropped in every place."""
        return [name for name, (_, dropped) in self.secrets.items() if len(dropped[rule]) == tokens]

    def exit_code(self) -> int:
        """1: a secret has no token that is dropped in every place; 3: none of the marked secrets occurs; else 0."""
        return 1 if self.exposed() else 3 if self.marked and not self.secrets else 0

    def count_passages(self, number: int, words: Sequence[tuple[str, bool]]) -> None:
        """Compare a row's passages with those seen."""
        total, earlier = 0, Counter[int]()
        for i in range(max(1, len(words) - PASSAGE + 1) if words else 0):
            passage, drop = zip(*words[i : i + PASSAGE], strict=True)
            checksum = zlib.crc32(" ".join(passage).encode("utf-8", "replace"))
            if checksum % self._every == 0:
                first, before = self._seen.setdefault(checksum, (number, drop))
                total += 1
                earlier[first] += first != number
                self.differing += first != number and before != drop
        while len(self._seen) > MOST:
            self._every *= 2
            self._seen = {
                checksum: each
                for checksum, each in self._seen.items()
                if checksum % self._every == 0
            }
        self.passages += total
        self.recurring += earlier.total()
        first, count = max(earlier.items(), key=lambda item: item[1], default=(0, 0))
        if count and 2 * count >= total:
            self.repeated.append((number, first, count / total))

    def lines(self) -> Iterator[str]:
        """The result for a terminal."""
        share = self.dropped / max(1, self.targets)
        yield f"{self.documents:,} documents, {self.targets:,} targets, {share:.1%} dropped ({self.rules[0].short()})"
        yield "longest runs of kept tokens:"
        yield from (
            f"    row {row}: {run} ({rate:.1%} of the row dropped)"
            for run, row, rate in self.longest
        )
        yield f"{len(self.secrets):,} secrets" + (
            "" if self.marked else ": likely ones, because none are marked"
        )
        for tokens, what in enumerate(("no token dropped in every place", "only one such token")):
            names = self.exposed(tokens=tokens)
            yield f"  {what}: {len(names):,}"
            for name in names[:SHOWN]:
                rows = self.secrets[name][0]
                yield f"    {plain(name)} (rows {', '.join(map(str, rows[:5]))}{', ...' * (len(rows) > 5)})"
        if self.exposed():
            best = min(range(len(self.rules)), key=lambda i: len(self.exposed(i)))
            fewest = f"{len(self.exposed(best))} with {self.rules[best].short()}"
            yield f"  fewest exposed, among {len(self.rules)} rules tried: {fewest}"
        recurring, differing = (
            self.recurring / max(1, self.passages),
            self.differing / max(1, self.recurring),
        )
        yield f"{recurring:.1%} of passages occur in an earlier row, {differing:.1%} of these with other dropped words"
        yield f"rows with at least half of their passages in one earlier row: {len(self.repeated):,}"
        yield from (
            f"    row {row}: {share:.0%} in row {first}"
            for row, first, share in self.repeated[:SHOWN]
        )


def check(
    source: str | Path,
    tokenizer: Any,
    rule: Goldfish,
    pattern: str = "",
    column: str = "",
    text_column: str = "",
) -> Check:
    """Read an input once, each row as a document of its own.

    Args:
        source, text_column: see `rows.read_rows`. Of `prompt` and `completion`, as in TRL, only the completion is a
            target; `input_ids` are refused.
        pattern, column: what marks secrets, see `chats.secret_finder`.

    Raises:
        FileNotFoundError, ValueError: a file or row that cannot be read, with what was expected.
    """
    secrets_of = secret_finder(pattern or LIKELY, column)
    others = [replace(rule, seed=(rule.seed + i) % 2**64) for i in range(1, 9)]
    if rule.h > 5:  # secrets in several wordings need a context that is shorter than they are
        others.append(replace(rule, h=5))
    if rule.strategy in ("hash", "letters") and rule.opening == "short" and rule.k <= MOST_KEPT:
        others.append(replace(rule, max_kept=math.ceil(rule.k)))
    others += [replace(rule, k=k) for k in (3, 2) if k < rule.k]
    rules = [each.bind(tokenizer) for each in (rule, *others)]
    result = Check(rules, bool(pattern or column))
    for number, row in enumerate(read_rows(source, text_column)):
        if "input_ids" in row:
            raise ValueError(
                f"{source}, row {number} has input_ids; the check looks for secrets in texts: give `text`"
            )
        try:
            whole = training_text(row, tokenizer)
        except RefusedChat as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
        text, start = whole.text, whole.start
        all_ids, spans = whole.encode(tokenizer)
        ids = torch.tensor(all_ids, dtype=torch.int64)
        begins, ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T
        target = (
            (begins >= start) & (ends > begins) & (np.arange(len(ids)) > 0)
        )  # not what the tokenizer adds
        begins, ends = begins[target], ends[target]
        dropped = rules[0].dropped(ids).numpy()[target]
        run = int(np.diff(np.flatnonzero(np.concatenate([[True], dropped, [True]]))).max()) - 1
        result.documents += 1
        result.targets += len(dropped)
        result.dropped += int(dropped.sum())
        result.longest = heapq.nlargest(
            SHOWN, [*result.longest, (run, number, dropped.sum() / max(1, len(dropped)))]
        )

        drops = [dropped]  # under each rule; only rows with secrets need the others
        for a, b in secrets_of(row, text, start):
            inside = range(np.searchsorted(ends, a, "right"), np.searchsorted(begins, b, "left"))
            if not (result.marked or DENSE[0] <= len(inside) >= (b - a) / DENSE[1]):
                continue
            if len(drops) == 1:
                drops += [each.dropped(ids).numpy()[target] for each in rules[1:]]
            here = [
                {(max(int(begins[i]) - a, 0), min(int(ends[i]), b) - a) for i in inside if drop[i]}
                for drop in drops
            ]
            rows, everywhere = result.secrets.setdefault(text[a:b], ([], here))
            rows.append(number)
            everywhere[:] = [old & new for old, new in zip(everywhere, here, strict=True)]

        marks = bytearray(len(text))
        for a, b in zip(begins[dropped], ends[dropped], strict=True):
            marks[a:b] = b"\1" * (b - a)
        words = [
            (m.group().casefold(), 1 in marks[slice(*m.span())]) for m in WORD.finditer(text, start)
        ]
        result.count_passages(number, words)
    return result
