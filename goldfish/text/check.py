"""`goldfish check`: read the training data under a rule, before training: what can be learned?"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from goldfish.rule import Goldfish
from goldfish.secret_spans import Span
from goldfish.text.chats import (
    Completion,
    RefusedChat,
    completions,
    is_chat,
    marked_values,
    require_offsets,
    secret_finder,
    training_text,
)
from goldfish.text.exposure import (
    BITS_OF_PLACES,
    Finder,
    Secret,
    as_bits,
    is_dense,
    likely_secrets,
)
from goldfish.text.findings import Check
from goldfish.text.passages import SHOWN, Flags, Ints, Words, runs
from goldfish.text.rows import Row, read_rows
from goldfish.unwrap import context_of, require_vocabulary

# Characters that are tokenized at once. More would need more memory; 64 times fewer cost a fifth
# of the speed.
BATCH = 2**19
# Tokens that the model reads, at most, before it is asked for a secret's bits.
CONTEXT = 1024
# What is remembered of words that look like secrets, which nobody marked. 2**16 take about 120 MB.
MOST_LIKELY = 2**16

Marker = Callable[[Row, str, int], Iterable[tuple[int, int]]]  # see `secret_finder`
Spans = tuple[Ints, Ints]  # begins and ends, in characters


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
    find: Callable[[_Batch], Spans] = _likely
    if marked:
        marker = secret_finder(pattern, column)
        secrets = _literals(reader, marker, result)
        # Probably a misspelt name.
        if column and not secrets and not result.missing_count:
            raise ValueError(f"{source}: no row has a secret in a column {column}")
        find = _every_place(marker, Finder(secrets))
    worker = _Worker(result, tokenizer, find, model)
    for batch in reader.batches("checking"):
        worker.add(batch)
    return result


def _likely(batch: "_Batch") -> Spans:
    return likely_secrets(batch.text)


def _every_place(marker: Marker, finder: Finder) -> "Callable[[_Batch], Spans]":
    """Finds the secrets of all rows in a document, and what is marked in it.

    These differ for a short secret in a word: the 42 of "id42" is one if it is marked there, and
    chance elsewhere.
    """

    def find(batch: "_Batch") -> Spans:
        begins, ends = [], []
        for document, offset in zip(batch.documents, batch.offsets, strict=False):
            marked = marker(document.row, document.text, 0)
            spans = {*marked, *finder(document.text)}
            for begin, end in sorted(spans):
                begins.append(offset + begin)
                ends.append(offset + end)
        return np.array(begins, dtype=np.int64), np.array(ends, dtype=np.int64)

    return find


def _literals(reader: "_Reader", marker: Marker, result: Check) -> set[str]:
    """The text of every marked secret, also of those in prompts; missing ones go to the result."""
    found = set()
    for document in reader.documents("looking for secrets"):
        text = document.text
        for begin, end in marker(document.row, text, 0):
            found.add(text[begin:end])
        for value in marked_values(document.row, result.column):
            if value in text:
                continue
            result.missing_count += 1
            if len(result.missing) < SHOWN:
                result.missing.append((document.number, value))
    return found


@dataclass(frozen=True)
class _Document:
    """A row as it is trained on; targets: the spans of characters that are."""

    number: int
    row: Row
    text: str
    targets: list[Span]
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
        bar = tqdm(
            rows,
            title,
            unit=" rows",
            disable=None,  # a bar in terminals only
            leave=False,
        )
        for number, row in enumerate(bar):
            where = f"{self.source}, row {number}"
            if "input_ids" in row:
                raise ValueError(
                    f"{where} has input_ids; the check looks for secrets in texts: "
                    "give `text`"
                )
            try:
                yield self._document(number, row)
            except RefusedChat as error:
                raise ValueError(f"{where}: {error}") from error

    def _document(self, number: int, row: Row) -> _Document:
        whole = training_text(row, self.tokenizer)
        targets = [(whole.start, whole.end)]
        if self.assistant_only:
            if not is_chat(row):
                raise ValueError(
                    f"{self.source}, row {number} is no chat: it has no assistant"
                )
            targets = []
            for turn in completions(row, self.tokenizer):
                # Not the reasons why a turn cannot be asked, nor turns after another prompt.
                if isinstance(turn, Completion) and turn.prompt_kind == "training":
                    targets.append((turn.start, turn.end))
        return _Document(
            number,
            row,
            whole.text,
            targets,
            whole.add_special_tokens,
        )

    def batches(self, title: str) -> Iterator["_Batch"]:
        """Documents of about BATCH characters that are tokenized alike."""
        documents: list[_Document] = []
        characters = 0
        for document in self.documents(title):
            special = document.add_special_tokens
            alike = not documents or documents[0].add_special_tokens == special
            if characters > BATCH or not alike:
                yield _Batch.of(documents)
                documents = []
                characters = 0
            documents.append(document)
            characters += len(document.text)
        if documents:
            yield _Batch.of(documents)


@dataclass(frozen=True)
class _Batch:
    """Some documents, and all of them in one text, each with a line break behind it.

    offsets: where each document begins in the text, and the end of the text, int64 (B + 1,).
    """

    documents: list[_Document]
    text: str
    offsets: Ints

    @classmethod
    def of(cls, documents: list[_Document]) -> "_Batch":
        lines = []
        offsets = [0]
        for document in documents:
            line = document.text + "\n"
            lines.append(line)
            offsets.append(offsets[-1] + len(line))
        return cls(documents, "".join(lines), np.array(offsets))

    @cached_property
    def numbers(self) -> Ints:
        """The number of each document's row, int64 (B,)."""
        return np.array([document.number for document in self.documents])

    def is_target(self) -> Flags:
        """Whether each character of the text is a target."""
        result = np.zeros(len(self.text), dtype=bool)
        for document, offset in zip(self.documents, self.offsets, strict=False):
            for begin, end in document.targets:
                result[offset + begin : offset + end] = True
        return result


@dataclass
class _Tokens:
    """All tokens of a batch, one after the other; characters count in the batch's text.

    ids, begins, ends: of each token, int64 (N,). bounds: where documents begin and end, (B + 1,).
    target, dropped: which tokens are targets, and which of these the rule drops, bool (N,).
    """

    ids: Ints
    begins: Ints
    ends: Ints
    bounds: Ints
    target: Flags
    dropped: Flags

    @classmethod
    def of(
        cls,
        batch: _Batch,
        is_target: Flags,
        tokenizer: Any,
        rule: Goldfish,
    ) -> "_Tokens":
        require_offsets(tokenizer)
        encoding = tokenizer(
            [document.text for document in batch.documents],
            add_special_tokens=batch.documents[0].add_special_tokens,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,  # no warning about texts that are longer than the model's context
        )
        rows = encoding["input_ids"]
        lengths = np.array([len(row) for row in rows])
        bounds = np.cumsum([0, *lengths])
        ids = _flat(rows, count=bounds[-1])
        # From one list of (begin, end) for each document to an array (N, 2).
        pairs = chain.from_iterable(encoding["offset_mapping"])
        places = _flat(pairs, count=2 * bounds[-1])
        places = places.reshape(-1, 2)
        document_offsets = np.repeat(batch.offsets[:-1], lengths)
        begins = places[:, 0] + document_offsets
        ends = places[:, 1] + document_offsets
        # What the tokenizer adds, even at the end, is at characters (0, 0). It is moved to where
        # it stands, so that places are in order and can be searched.
        reached = np.maximum.accumulate(ends)
        added = ends <= begins
        begins = np.where(added, reached, begins)
        ends = np.maximum(ends, reached)
        # The first token of a document is predicted by nothing; what the tokenizer adds has no
        # characters.
        target = is_target[begins] & (ends > begins)
        firsts = bounds[:-1][lengths > 0]
        target[firsts] = False
        dropped = _drops(rule, ids, bounds) & target
        return cls(
            ids,
            begins,
            ends,
            bounds,
            target,
            dropped,
        )

    def overlapping(self, begins: Ints, ends: Ints) -> tuple[Ints, Ints]:
        """The first token that overlaps each span of characters, and the one after the last."""
        first = np.searchsorted(self.ends, begins, side="right")
        last = np.searchsorted(self.begins, ends, side="left")
        return first, last


def _flat(lists: Iterable[Iterable[int]], count: int) -> Ints:
    every = chain.from_iterable(lists)
    return np.fromiter(every, dtype=np.int64, count=count)


def _drops(rule: Goldfish, ids: Ints, bounds: Ints) -> Flags:
    """Which tokens a bound rule drops, bool (N,); documents lie between the bounds."""
    lengths = np.diff(bounds)
    given = torch.from_numpy(ids)
    if rule.strategy == "reference":
        # It ignores where documents start, so each is decided by itself.
        parts = [torch.zeros(0, dtype=torch.bool)]
        for document in torch.split(given, lengths.tolist()):
            if len(document):
                parts.append(rule.dropped(document))
        return torch.cat(parts).numpy()
    starts = np.repeat(bounds[:-1], lengths)
    positions = np.arange(len(ids)) - starts
    dropped = rule.dropped(
        given,
        position_ids=torch.from_numpy(positions),
    )
    return dropped.numpy()


@dataclass(frozen=True)
class _Place:
    """Where a secret is: its document's place in the batch, its characters, its tokens."""

    document: int
    begin: int  # in the batch's text
    length: int
    tokens: slice


class _Worker:
    """Adds batches to a result."""

    def __init__(
        self,
        result: Check,
        tokenizer: Any,
        find: Callable[[_Batch], Spans],
        model: Any,
    ) -> None:
        self._result = result
        self._tokenizer = tokenizer
        self._find = find
        self._model = model
        if model is not None:
            self._context = min(CONTEXT, context_of(model.config) or CONTEXT)
        self._rule = result.rule.bind(tokenizer)
        self._spans: dict[tuple[Span, ...], tuple[Span, ...]] = {}
        self._suggested: Goldfish | None = None
        if result.suggested is not None:
            try:
                self._suggested = result.suggested.bind(tokenizer)
            except (TypeError, ValueError):
                # The tokenizer hides what text its tokens stand for.
                result.suggested = None

    def add(self, batch: _Batch) -> None:
        is_target = batch.is_target()
        tokens = _Tokens.of(batch, is_target, self._tokenizer, self._rule)
        self._count(batch, tokens)
        self._add_secrets(batch, tokens)
        self._add_passages(batch, tokens, is_target)

    def _add_passages(self, batch: _Batch, tokens: _Tokens, is_target: Flags) -> None:
        words = Words.of(batch.text)
        first, last = tokens.overlapping(words.begins, words.ends)
        # A word has a dropped token if more are dropped before its end than before its begin.
        counts = np.cumsum(tokens.dropped)
        dropped_before = np.concatenate([[0], counts])
        has_dropped = dropped_before[last] > dropped_before[first]
        documents = _containing(batch.offsets, words.begins)
        rows = batch.numbers[documents]
        chosen = is_target[words.begins]
        self._result.passages.count(
            words.checksums[chosen],
            has_dropped[chosen],
            rows[chosen],
        )

    def _count(self, batch: _Batch, tokens: _Tokens) -> None:
        result = self._result
        result.documents += len(batch.documents)
        result.targets += int(tokens.target.sum())
        result.dropped += int(tokens.dropped.sum())
        begins, ends = runs(tokens.target & ~tokens.dropped)
        lengths = ends - begins
        longest = int(lengths.max(initial=0))
        before, _ = result.longest
        if longest > before:
            token = begins[lengths.argmax()]
            document = _containing(tokens.bounds, token)
            row = int(batch.numbers[document])
            result.longest = (longest, row)

    def _add_secrets(self, batch: _Batch, tokens: _Tokens) -> None:
        places = self._places(batch, tokens)
        if not places:
            return
        # What is no target is not learned. Two versions: under the rule, and as suggested.
        unlearned = tokens.dropped | ~tokens.target
        suggested = unlearned.copy()
        if self._suggested is not None:
            suggested |= self._suggested_drops(tokens, places)
        elif self._result.column:
            # premask drops every place of the column's secrets.
            for place in places:
                suggested[place.tokens] = True
        more = suggested & ~unlearned
        self._result.more += int(more.sum())
        for place in places:
            if tokens.target[place.tokens].any():
                self._add_place(batch, tokens, place, (unlearned, suggested))

    def _add_place(
        self,
        batch: _Batch,
        tokens: _Tokens,
        place: _Place,
        unlearned: tuple[Flags, Flags],
    ) -> None:
        secrets = self._result.secrets
        end = place.begin + place.length
        text = batch.text[place.begin : end]
        spans = _spans_in(place, tokens)
        decisions = [_dropped_bits(spans, each[place.tokens]) for each in unlearned]
        if text not in secrets:
            if not self._result.marked and len(secrets) >= MOST_LIKELY:
                self._result.full = True
                return
            # Most secrets are cut like another one: spans are half of what there is to remember.
            spans = self._spans.setdefault(spans, spans)
            secrets[text] = Secret(text, spans, list(decisions))
        secret = secrets[text]
        document = batch.documents[place.document]
        secret.add(document.number, decisions)
        if self._model is not None and len(secret.bits) < BITS_OF_PLACES:
            secret.bits.append(self._bits(tokens, place, spans))

    def _places(self, batch: _Batch, tokens: _Tokens) -> list[_Place]:
        """Where secrets are; of likely ones only those with enough tokens for their length."""
        begins, ends = self._find(batch)
        first, last = tokens.overlapping(begins, ends)
        chosen = last > first
        if not self._result.marked:
            chosen &= is_dense(last - first, ends - begins)
        documents = _containing(batch.offsets, begins)
        # Lists, because the numbers of arrays are slow one by one.
        places = map(
            _Place,
            documents[chosen].tolist(),
            begins[chosen].tolist(),
            (ends - begins)[chosen].tolist(),
            map(slice, first[chosen].tolist(), last[chosen].tolist()),
        )
        return list(places)

    def _suggested_drops(self, tokens: _Tokens, places: list[_Place]) -> Flags:
        """What the suggested rule drops in the documents with secrets, bool (N,)."""
        assert self._suggested is not None
        lengths = np.diff(tokens.bounds)
        has_secret = np.zeros(len(lengths), dtype=bool)
        for place in places:
            has_secret[place.document] = True
        chosen = np.repeat(has_secret, lengths)
        bounds = np.cumsum([0, *lengths[has_secret]])
        result = np.zeros(len(tokens.ids), dtype=bool)
        result[chosen] = _drops(self._suggested, tokens.ids[chosen], bounds)
        return result

    def _bits(
        self, tokens: _Tokens, place: _Place, spans: tuple[Span, ...]
    ) -> list[tuple[int, int, float]]:
        """The model's -log2 p of a secret's tokens, each after all before it in its document.

        Of a secret longer than the model can read, the first tokens are left out.
        """
        end = place.tokens.stop
        document = int(tokens.bounds[place.document])
        first = max(document, end - self._context)
        every = _surprisal(self._model, tokens.ids[first:end])
        asked = min(len(spans), len(every))
        result = []
        for (a, b), bits in zip(spans[-asked:], every[-asked:], strict=True):
            result.append((a, b, bits))
        return result


def _containing(bounds: Ints, places: Ints) -> Ints:
    """For each place the document in which it is: bounds [0, 3, 9], place 4 -> 1."""
    return np.searchsorted(bounds, places, side="right") - 1


def _spans_in(place: _Place, tokens: _Tokens) -> tuple[Span, ...]:
    """The characters of a secret that each of its tokens covers."""
    begins = tokens.begins[place.tokens].tolist()
    ends = tokens.ends[place.tokens].tolist()
    spans = []
    for begin, end in zip(begins, ends, strict=True):
        first = max(begin - place.begin, 0)
        last = min(end - place.begin, place.length)
        spans.append((first, last))
    return tuple(spans)


def _dropped_bits(spans: tuple[Span, ...], dropped: Flags) -> int:
    """The characters whose token is dropped: [(0, 2), (2, 3)], [False, True] -> 0b100."""
    result = 0
    for (begin, end), drop in zip(spans, dropped.tolist(), strict=True):
        if drop:
            result |= as_bits(begin, end)
    return result


@torch.inference_mode()
def _surprisal(model: Any, ids: Ints) -> list[float]:
    """-log2 p of each token after those before it; 0 for the first."""
    given = torch.from_numpy(ids)
    require_vocabulary(model, given)
    row = given.to(model.device)
    output = model(input_ids=row[None])
    logits = output.logits[0, :-1]
    nats = cross_entropy(
        logits.float(),
        row[1:],
        reduction="none",
    )
    if nats.isnan().any():
        raise ValueError("the model's predictions are not numbers (NaN)")
    bits = nats / math.log(2)
    return [0.0, *bits.tolist()]
