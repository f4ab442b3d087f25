"""`goldfish check`: read the training data under a rule, before training: what can be learned?"""

import heapq
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from goldfish.rule import Goldfish
from goldfish.text.chats import (
    Completion,
    RefusedChat,
    completions,
    is_chat,
    marked_values,
    secret_finder,
    training_text,
)
from goldfish.text.exposure import (
    BITS_OF_PLACES,
    SHOWN_ROWS,
    Finder,
    Secret,
    as_bits,
    informative_characters,
)
from goldfish.text.passages import Passages
from goldfish.text.printable import plain
from goldfish.text.rows import Row, read_rows

LIKELY = r"(?a:\w[\w@#%&*+/=.:~-]{4,}\w)"  # used if no secrets are marked; see DENSE
DENSE = 6, 2  # at least 6 tokens, of at most 2 characters on average: words have more
SHOWN = 10  # of each list
BATCH = 2**19  # characters that are tokenized at once
CONTEXT = (
    1024  # tokens that the model reads, at most, before it is asked for a secret's bits
)

Find = Callable[["_Document"], Iterable[tuple[int, int]]]  # spans of characters
Marker = Callable[[Row, str, int], Iterable[tuple[int, int]]]  # see secret_finder


@dataclass
class Check:
    """What `check` found. Rows count from 0.

    marked: whether the user marked secrets; if not, `secrets` are words that look like some.
    targets, dropped: tokens. more: tokens that `suggested` drops besides.
    longest: (kept targets in a row, row, drop rate of the row), greatest first.
    missing: (row, value) of marked values that do not occur in the text of their row, the first
        SHOWN of missing_count.
    suggested: the rule with the secrets' expression; None if that is no help.
    """

    rule: Goldfish
    marked: bool
    column: str = ""
    suggested: Goldfish | None = None
    documents: int = 0
    targets: int = 0
    dropped: int = 0
    more: int = 0
    longest: list[tuple[int, int, float]] = field(default_factory=list)
    missing: list[tuple[int, str]] = field(default_factory=list)
    missing_count: int = 0
    secrets: dict[str, Secret] = field(default_factory=dict)
    passages: Passages = field(default_factory=Passages)

    def exposed(self, tokens: int = 0, rule: int = 0) -> list[str]:
        """The secrets with exactly so many informative tokens that are dropped in every place.

        Args:
            rule: 0, the rule itself; 1, with the secrets' tokens dropped as `suggested`.
        """
        return [
            name
            for name, secret in self.secrets.items()
            if len(secret.protected(self._informative[name], rule)) == tokens
        ]

    @cached_property
    def _informative(self) -> dict[str, int]:
        """Needs all secrets: asked for after the last batch only."""
        return informative_characters(self.secrets)

    def exit_code(self) -> int:
        """1: a marked secret can be learned whole; 3: none of the marked secrets occurs; else 0."""
        if not self.marked:
            return 0
        if not self.secrets:
            return 3
        return 1 if self.exposed() else 0

    def lines(self) -> Iterator[str]:
        """The result for a terminal; the last line is the conclusion."""
        share = self.dropped / max(1, self.targets)
        documents = counted(self.documents, "document")
        targets = counted(self.targets, "target")
        yield f"{documents}, {targets}, {share:.1%} dropped ({self.rule.short()})"
        yield "longest runs of kept tokens:"
        for run, row, rate in self.longest:
            yield f"    row {row}: {run} ({rate:.1%} of the row dropped)"
        yield from self._lines_on_passages()
        yield from self._lines_on_secrets()
        yield self.conclusion()

    def _lines_on_passages(self) -> Iterator[str]:
        found = self.passages
        recurring = found.recurring / max(1, found.total)
        differing = found.differing / max(1, found.recurring)
        yield (
            f"{recurring:.1%} of passages occur in an earlier row, "
            f"{differing:.1%} of these with other dropped words"
        )
        repeated = found.repeated
        yield f"rows with at least half of their passages in one earlier row: {len(repeated):,}"
        for row, first, share in repeated[:SHOWN]:
            yield f"    row {row}: {share:.0%} in row {first}"

    def _lines_on_secrets(self) -> Iterator[str]:
        found = counted(len(self.secrets), "secret")
        if not self.marked:
            likely = counted(len(self.secrets), "likely secret")
            found = f"{likely} (none are marked)"
        yield f"{found}; a token counts if it differs between secrets"
        for tokens, what in enumerate(
            ("no token dropped in every place", "only one such token")
        ):
            names = self.exposed(tokens)
            yield f"  {what}: {len(names):,}"
            for name in names[:SHOWN]:
                secret = self.secrets[name]
                more = ", ..." if secret.count > SHOWN_ROWS else ""
                rows = "rows" if len(secret.rows) > 1 else "row"
                yield f"    {plain(name)} ({rows} {', '.join(map(str, secret.rows))}{more})"
        bits = self.bits()
        if bits:
            yield (
                "  bits of the dropped tokens, by the model before training "
                "(an estimate, not a lower bound):"
            )
            for name in sorted(bits, key=bits.__getitem__)[:SHOWN]:
                yield f"    {plain(name)}: {bits[name]:.1f}"
        if self.missing:
            yield f"{self._missing_values()} in the text of their row:"
            for row, value in self.missing:
                yield f"    {plain(value)} (row {row})"

    def _missing_values(self) -> str:
        verb = "does" if self.missing_count == 1 else "do"
        return f"{counted(self.missing_count, 'marked value')} {verb} not occur"

    def bits(self) -> dict[str, float]:
        """-log2 p under the given model of what is dropped of each secret; empty without a model.

        An estimate of what somebody must guess who knows the rest of the secret. It is no lower
        bound: the trained model has learned from other secrets what a secret looks like (measured:
        docs/results-log.md, "Uncertain tokens and marked secrets"). The place where guessing is
        easiest counts, of the first 8 places.
        """
        result = {}
        for name, secret in self.secrets.items():
            bits = secret.bits_to_guess(self._informative[name])
            if bits is not None:
                result[name] = bits
        return result

    def conclusion(self) -> str:
        """One sentence and one rule to copy; another sentence if marked values were not found."""
        conclusion = self._conclusion_on_secrets()
        if self.missing_count:
            missing = f"{self._missing_values()} in the text of their row"
            conclusion += f" {missing}: look for other spellings."
        return conclusion

    def _conclusion_on_secrets(self) -> str:
        if not self.secrets:
            if self.marked:
                return "None of the marked secrets occurs among the targets."
            return "Nothing looks like a secret. Mark secrets with --secrets or --secret-column."
        total = counted(len(self.secrets), "secret" if self.marked else "likely secret")
        exposed = f"{len(self.exposed()):,} of {total} can be learned whole."
        if not self.marked:
            return f"{exposed} Mark the real ones with --secrets or --secret-column."
        if not self.exposed():
            return f"{exposed} Each has an informative token that is dropped in every place."
        return f"{exposed} {self._advice()}"

    def _advice(self) -> str:
        """What drops the secrets that can be learned, with its cost."""
        left = len(self.exposed(rule=1))
        remaining = f"{left:,} left" if left else "none left"
        share = self.more / max(1, self.targets)
        cost = f"{share:.1%} more tokens dropped, {remaining}."
        if self.suggested is not None:
            return f"Train with {as_python(self.suggested)}: {cost}"
        if self.column:
            command = f"goldfish premask --secret-column {self.column}"
            return f"Write the labels with: {command}: {cost}"
        return "Replace them in the data, or give them in a --secret-column."


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 secret", "2,000 secrets"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def as_python(rule: Goldfish) -> str:
    r"""The rule to copy into a script.

    >>> print(as_python(Goldfish(k=4, h=13, max_kept=4, secrets=r"code (\d+)")))
    Goldfish(k=4, h=13, max_kept=4, secrets=r'code (\d+)')
    """
    parts = [f"k={rule.k:g}", f"h={rule.h}"]
    if rule.strategy != "hash":
        parts.append(f'strategy="{rule.strategy}"')
    if rule.max_kept is not None:
        parts.append(f"max_kept={rule.max_kept}")
    if rule.seed:
        parts.append(f"seed={rule.seed}")
    if rule.secrets is not None:
        raw = "'" not in rule.secrets and not rule.secrets.endswith("\\")
        shown = (
            f"r'{rule.secrets}'"
            if raw and rule.secrets.isprintable()
            else repr(rule.secrets)
        )
        parts.append(f"secrets={shown}")
    return f"Goldfish({', '.join(parts)})"


def check(
    source: str | Path,
    tokenizer: Any,
    rule: Goldfish,
    pattern: str = "",
    column: str = "",
    text_column: str = "",
    *,
    assistant_only: bool = False,
    model: Any = None,
) -> Check:
    """Read an input, each row as a document of its own: twice if secrets are marked.

    Secrets are collected first; then every place of their text counts, in whichever row it is.

    Args:
        source, text_column: see `rows.read_rows`. Of `prompt` and `completion`, as in TRL, only the
            completion is a target; `input_ids` are refused.
        pattern, column: what marks secrets, see `chats.secret_finder`.
        assistant_only: of chats, only the assistant's turns are targets, as with TRL's
            assistant_only_loss.
        model: the model to be finetuned, for `Check.bits`.

    Raises:
        FileNotFoundError, ValueError: a file or row that cannot be read, with what was expected.
    """
    marked = bool(pattern or column)
    suggested = None
    if pattern and rule.secrets is None and rule.strategy != "reference":
        suggested = replace(rule, secrets=pattern)
    result = Check(rule, marked, column, suggested)
    reader = _Reader(source, tokenizer, text_column, assistant_only)
    find: Find = _likely
    if marked:
        marker = secret_finder(pattern, column)
        find = _every_place(marker, Finder(_literals(reader, marker, result)))
    worker = _Worker(result, tokenizer, find, model)
    for batch in reader.batches("checking"):
        worker.add(batch)
    return result


def _likely(document: "_Document") -> Iterator[tuple[int, int]]:
    return (match.span() for match in re.finditer(LIKELY, document.text))


def _every_place(marker: Marker, finder: Finder) -> Find:
    """Finds the secrets of all rows in a document, and what is marked in it.

    These differ for a short secret in a word: the 42 of "id42" is one if it is marked there, and
    chance elsewhere.
    """

    def find(document: "_Document") -> list[tuple[int, int]]:
        marked = marker(document.row, document.text, 0)
        return sorted({*marked, *finder(document.text)})

    return find


def _literals(reader: "_Reader", marker: Marker, result: Check) -> set[str]:
    """The text of every marked secret, also of those in prompts; missing ones go to the result."""
    found = set()
    for document in reader.documents("looking for secrets"):
        text = document.text
        found |= {text[a:b] for a, b in marker(document.row, text, 0)}
        values = marked_values(document.row, result.column)
        missing = [value for value in values if value not in text]
        result.missing_count += len(missing)
        room = SHOWN - len(result.missing)
        result.missing += [(document.number, value) for value in missing[:room]]
    return found


@dataclass(frozen=True)
class _Document:
    """A row as it is trained on; targets: the spans of characters that are."""

    number: int
    row: Row
    text: str
    targets: list[tuple[int, int]]
    add_special_tokens: bool


@dataclass(frozen=True)
class _Reader:
    source: str | Path
    tokenizer: Any
    text_column: str
    assistant_only: bool

    def documents(self, title: str) -> Iterator[_Document]:
        from tqdm import tqdm

        rows = read_rows(self.source, self.text_column)
        # disable=None: a bar in terminals only
        for number, row in enumerate(
            tqdm(rows, title, unit=" rows", disable=None, leave=False)
        ):
            if "input_ids" in row:
                raise ValueError(
                    f"{self.source}, row {number} has input_ids; the check looks for secrets in "
                    "texts: give `text`"
                )
            try:
                yield self._document(number, row)
            except RefusedChat as error:
                raise ValueError(f"{self.source}, row {number}: {error}") from error

    def _document(self, number: int, row: Row) -> _Document:
        whole = training_text(row, self.tokenizer)
        targets = [(whole.start, whole.end)]
        if self.assistant_only:
            if not is_chat(row):
                raise ValueError(
                    f"{self.source}, row {number} is no chat: it has no assistant"
                )
            targets = [
                (turn.start, turn.end)
                for turn in completions(row, self.tokenizer)
                if isinstance(turn, Completion) and turn.asked == "training"
            ]
        return _Document(number, row, whole.text, targets, whole.add_special_tokens)

    def batches(self, title: str) -> Iterator[list[_Document]]:
        """Documents of about BATCH characters that are tokenized alike."""
        batch: list[_Document] = []
        characters = 0
        for document in self.documents(title):
            alike = (
                not batch or batch[0].add_special_tokens == document.add_special_tokens
            )
            if characters > BATCH or not alike:
                yield batch
                batch, characters = [], 0
            batch.append(document)
            characters += len(document.text)
        if batch:
            yield batch


@dataclass
class _Tokens:
    """All tokens of a batch, one after the other; characters count in the joined text.

    ids, begins, ends: of each token (N,), int64. bounds: where documents begin and end, (B + 1,).
    """

    ids: NDArray[np.int64]
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]
    bounds: NDArray[np.int64]

    @classmethod
    def of(
        cls, batch: list[_Document], offsets: list[int], tokenizer: Any
    ) -> "_Tokens":
        if not tokenizer.is_fast:
            raise ValueError(
                "character offsets are needed: load a fast tokenizer (tokenizer.json)"
            )
        encoding = tokenizer(
            [document.text for document in batch],
            add_special_tokens=batch[0].add_special_tokens,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,  # no warning about texts that are longer than the model's context
        )
        lengths = [len(ids) for ids in encoding["input_ids"]]
        count = sum(lengths)
        ids = _flat(encoding["input_ids"], count)
        spans = chain.from_iterable(encoding["offset_mapping"])
        characters = (
            _flat(spans, 2 * count).reshape(-1, 2)
            + np.repeat(offsets, lengths)[:, None]
        )
        begins, ends = characters.T
        # What the tokenizer adds, even at the end, is at characters (0, 0). It is moved to where
        # it stands, so that places are in order and can be searched.
        reached = np.maximum.accumulate(ends)
        begins, ends = (
            np.where(ends > begins, begins, reached),
            np.maximum(ends, reached),
        )
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        return cls(ids, begins, ends, bounds)

    def dropped_by(self, rule: Goldfish) -> NDArray[np.bool_]:
        """Which tokens a bound rule drops, bool (N,)."""
        ids = torch.from_numpy(self.ids)
        if rule.strategy == "reference":  # it ignores where documents start
            lengths = np.diff(self.bounds).tolist()
            parts = [
                rule.dropped(part) for part in torch.split(ids, lengths) if len(part)
            ]
            return torch.cat([torch.zeros(0, dtype=torch.bool), *parts]).numpy()
        lengths = torch.from_numpy(np.diff(self.bounds))
        starts = torch.from_numpy(self.bounds[:-1]).repeat_interleave(lengths)
        return rule.dropped(ids, position_ids=torch.arange(len(ids)) - starts).numpy()


def _flat(lists: Iterable[Iterable[int]], count: int) -> NDArray[np.int64]:
    return np.fromiter(chain.from_iterable(lists), dtype=np.int64, count=count)


@dataclass(frozen=True)
class _Place:
    """Where a secret is: its document's place in the batch, its characters, its tokens."""

    document: int
    begin: int  # in the joined text
    length: int
    tokens: slice


class _Worker:
    """Adds batches to a result."""

    def __init__(self, result: Check, tokenizer: Any, find: Find, model: Any) -> None:
        self._result = result
        self._tokenizer = tokenizer
        self._find = find
        self._model = model
        self._rule = result.rule.bind(tokenizer)
        self._suggested: Goldfish | None = None
        if result.suggested is not None:
            try:
                self._suggested = result.suggested.bind(tokenizer)
            except (
                TypeError,
                ValueError,
            ):  # the tokenizer hides what text its tokens stand for
                result.suggested = None

    def add(self, batch: list[_Document]) -> None:
        joined = "\n".join(document.text for document in batch)
        sizes = [len(document.text) + 1 for document in batch]
        offsets = [0, *np.cumsum(sizes).tolist()]
        tokens = _Tokens.of(batch, offsets[:-1], self._tokenizer)
        is_target = np.zeros(len(joined) + 1, dtype=bool)
        for document, offset in zip(batch, offsets, strict=False):
            for begin, end in document.targets:
                is_target[offset + begin : offset + end] = True
        # The first token of a document is predicted by nothing; what the tokenizer adds has no
        # characters.
        target = is_target[tokens.begins] & (tokens.ends > tokens.begins)
        target[tokens.bounds[:-1][np.diff(tokens.bounds) > 0]] = False
        dropped = tokens.dropped_by(self._rule) & target
        self._count(batch, tokens, target, dropped)
        self._add_secrets(batch, offsets, tokens, target, dropped)
        marks = np.stack([is_target, _characters(tokens, dropped, len(is_target))])
        rows = [document.number for document in batch]
        self._result.passages.count(joined, rows, offsets[:-1], marks)

    def _count(
        self,
        batch: list[_Document],
        tokens: _Tokens,
        target: NDArray[np.bool_],
        dropped: NDArray[np.bool_],
    ) -> None:
        result = self._result
        result.documents += len(batch)
        result.targets += int(target.sum())
        result.dropped += int(dropped.sum())
        for i, document in enumerate(batch):
            inside = slice(tokens.bounds[i], tokens.bounds[i + 1])
            drops = dropped[inside][target[inside]]
            # Between two breaks of [start, drop, ..., drop, end] are the kept targets.
            breaks = np.flatnonzero(np.concatenate([[True], drops, [True]]))
            run = int(np.diff(breaks).max()) - 1
            rate = float(drops.sum()) / max(1, len(drops))
            entry = (run, document.number, rate)
            if len(result.longest) < SHOWN or entry > result.longest[-1]:
                result.longest = heapq.nlargest(SHOWN, [*result.longest, entry])

    def _add_secrets(
        self,
        batch: list[_Document],
        offsets: list[int],
        tokens: _Tokens,
        target: NDArray[np.bool_],
        dropped: NDArray[np.bool_],
    ) -> None:
        places = self._places(batch, offsets, tokens)
        if not places:
            return
        suggested = dropped.copy()
        if self._suggested is not None:
            documents = {place.document for place in places}
            suggested |= self._suggested_drops(tokens, documents) & target
        elif self._result.column:  # premask drops every place of the column's secrets
            for place in places:
                suggested[place.tokens] = True
            suggested &= target
        self._result.more += int((suggested & ~dropped).sum())
        # What is no target in a place is not learned there either.
        unlearned = (dropped | ~target, suggested | ~target)
        for place in places:
            inside = np.arange(place.tokens.start, place.tokens.stop)
            if target[inside].any():
                begin = place.begin - offsets[place.document]
                text = batch[place.document].text[begin : begin + place.length]
                self._add_place(text, batch, place, tokens, unlearned)

    def _add_place(
        self,
        text: str,
        batch: list[_Document],
        place: _Place,
        tokens: _Tokens,
        unlearned: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    ) -> None:
        inside = np.arange(place.tokens.start, place.tokens.stop)
        spans = [_span(tokens, i, place) for i in inside]
        decisions = [_dropped_bits(spans, each[inside]) for each in unlearned]
        secret = self._result.secrets.get(text)
        if secret is None:
            secret = Secret(text, spans, decisions)
            self._result.secrets[text] = secret
        secret.add(batch[place.document].number, decisions)
        if self._model is not None and len(secret.bits) < BITS_OF_PLACES:
            first = int(tokens.bounds[place.document])
            secret.bits.append(self._bits(tokens, first, inside, spans))

    def _places(
        self, batch: list[_Document], offsets: list[int], tokens: _Tokens
    ) -> list[_Place]:
        """Where secrets are; of likely ones only those with enough tokens for their length."""
        found = [
            (i, offsets[i] + begin, offsets[i] + end)
            for i, document in enumerate(batch)
            for begin, end in self._find(document)
        ]
        documents, begins, ends = np.array(found, dtype=np.int64).reshape(-1, 3).T
        first = np.searchsorted(tokens.ends, begins, side="right")
        last = np.searchsorted(tokens.begins, ends, side="left")
        chosen = last > first
        if not self._result.marked:
            counts = last - first
            chosen &= (counts >= DENSE[0]) & (counts >= (ends - begins) / DENSE[1])
        columns = (documents, begins, ends - begins, first, last)
        rows = zip(*(column[chosen].tolist() for column in columns), strict=True)
        return [
            _Place(i, begin, length, slice(a, b)) for i, begin, length, a, b in rows
        ]

    def _suggested_drops(
        self, tokens: _Tokens, documents: set[int]
    ) -> NDArray[np.bool_]:
        """What the suggested rule drops in the documents with secrets, bool (N,)."""
        assert self._suggested is not None
        result = np.zeros(len(tokens.ids), dtype=bool)
        for i in documents:
            inside = slice(tokens.bounds[i], tokens.bounds[i + 1])
            result[inside] = self._suggested.dropped(
                torch.from_numpy(tokens.ids[inside])
            ).numpy()
        return result

    def _bits(
        self,
        tokens: _Tokens,
        first: int,
        inside: NDArray[np.int64],
        spans: list[tuple[int, int]],
    ) -> list[tuple[int, int, float]]:
        """The model's -log2 p of the tokens `inside` a document that begins at token `first`."""
        last = int(inside[-1]) + 1
        first = max(first, last - CONTEXT)
        every = _surprisal(self._model, tokens.ids[first:last])
        chosen = zip(spans, inside - first, strict=True)
        return [(begin, end, every[i]) for (begin, end), i in chosen]


def _span(tokens: _Tokens, i: int, place: _Place) -> tuple[int, int]:
    """The characters of a secret that token i covers."""
    begin = max(int(tokens.begins[i]) - place.begin, 0)
    return begin, min(int(tokens.ends[i]) - place.begin, place.length)


def _dropped_bits(spans: list[tuple[int, int]], dropped: NDArray[np.bool_]) -> int:
    """The characters whose token is dropped: [(0, 2), (2, 3)], [False, True] -> 0b100."""
    result = 0
    for (begin, end), drop in zip(spans, dropped.tolist(), strict=True):
        result |= as_bits(begin, end) if drop else 0
    return result


def _characters(
    tokens: _Tokens, chosen: NDArray[np.bool_], length: int
) -> NDArray[np.bool_]:
    """Which of the characters belong to a chosen token: +1 where one begins, -1 where it ends."""
    steps = np.zeros(length + 1, dtype=np.int64)
    np.add.at(steps, tokens.begins[chosen], 1)
    np.add.at(steps, tokens.ends[chosen], -1)
    return np.cumsum(steps)[:length] > 0


@torch.inference_mode()
def _surprisal(model: Any, ids: NDArray[np.int64]) -> list[float]:
    """-log2 p of each token after those before it; 0 for the first."""
    row = torch.from_numpy(ids).to(model.device)
    logits = model(input_ids=row[None]).logits[0, :-1].float()
    nats = torch.nn.functional.cross_entropy(logits, row[1:], reduction="none")
    return [0.0, *(nats / math.log(2)).tolist()]
