"""Rows -> windows: a prefix that the model is given and the suffix that it may recite."""

import pickle
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from goldfish.audit.documents import Relations
from goldfish.audit.marks import Finder, Marks, SecretCounts, note
from goldfish.text.chats import (
    Completion,
    completions,
    is_chat,
)
from goldfish.text.prompts import filled
from goldfish.text.rows import Row, draw

STORED = 256  # windows that wait in memory before they are written


@dataclass(frozen=True)
class Window:
    """One question to a model: given ids[:prefix_length], does it go on with ids[prefix_length:]?

    split: "members" (trained on) or "heldout". index: the row of the input, from 0. name: its name.
    prefix_length: the longest asked for; shorter ones are read off the same scores.
    source: the rule it was trained under, where there was one for each source.
    count: how often the document was trained on, if the input says so.
    offset: how many tokens of the row come before the window (a BOS at its start not counted).
    completion: the suffix is what the assistant says in a chat, however long, and membership is
        about it alone.
    secrets: marked ones that are in the suffix, and not in the prompt, where the model could read
        them.
    document_ids: of the row, from its start to the window's end, where that is more than `ids`:
        they decide what its training dropped. The last len(ids) - 1 of them are ids[1:].
    prompt_kind: "training" if ids[:prefix_length] is exactly what stood before the suffix in
        training, "generation" if it is the chat template's generation prompt, where that differs.
    """

    split: str
    index: int
    name: str
    ids: list[int]
    prefix_length: int
    source: str | None = None
    count: int | None = None
    offset: int = 0
    completion: bool = False
    secrets: Sequence[str] = ()
    document_ids: Sequence[int] = ()
    prompt_kind: str = "training"

    @property
    def prefix(self) -> list[int]:
        return self.ids[: self.prefix_length]

    @property
    def suffix(self) -> list[int]:
        return self.ids[self.prefix_length :]

    @property
    def first_scored(self) -> int:
        """Membership scores are of ids[first_scored:]."""
        return self.prefix_length if self.completion else 1


def row_name(row: Row, split: str, index: int) -> str:
    """What tables call a row."""
    return str(row.get("name") or f"{split} {index}")


@dataclass(frozen=True)
class Cutter:
    """Cuts a row into windows: a text at each offset, a chat at each turn of the assistant.

    context: how many tokens the model takes; longer chats are skipped, longer windows are a
    ValueError. secrets, secret_column: of `Marks`.
    """

    tokenizer: Any
    prefix_length: int
    suffix_length: int
    offsets: Sequence[int] = (0,)
    context: int | None = None
    secrets: Finder | None = None
    secret_column: str = ""

    @cached_property
    def marks(self) -> Marks:
        return Marks(self.secrets, self.secret_column, self.tokenizer)

    def cut(self, row: Row, index: int, split: str) -> Iterator[Window | str]:
        """The windows of a row; for an offset or a turn without one, the reason."""
        # What all windows of the row have in common.
        about = {
            "split": split,
            "index": index,
            "name": row_name(row, split, index),
            "source": row.get("source"),
            "count": row.get("count"),
        }
        if not is_chat(row):
            yield from self._windows_of_text(row, about)
            return
        for each in completions(row, self.tokenizer):
            # A turn that cannot be asked comes as the reason.
            if isinstance(each, str):
                yield each
            else:
                yield self._completion(row, each, about)

    def _windows_of_text(
        self,
        row: Row,
        about: dict[str, Any],
    ) -> Iterator[Window | str]:
        """`input_ids` are taken as they are.

        A `text` is tokenized as the tokenizer does by default (with BOS where it adds one), but
        without an EOS at its end. A BOS that the tokenizer put there opens a window at any offset,
        as it would open an adversary's prompt.
        """
        length = self.prefix_length + self.suffix_length
        if self.context is not None and length > self.context:
            raise ValueError(
                f"windows of {length} tokens do not fit the model's context, {self.context} "
                "tokens; ask for a shorter prefix or suffix"
            )
        all_ids = row.get("input_ids")
        bos: list[int] = []
        if all_ids is None:
            most = max(self.offsets) + length
            all_ids = first_ids(self.tokenizer, row["text"], most)
            if all_ids[:1] == [self.tokenizer.bos_token_id]:
                bos = all_ids[:1]
        marked = self.marks.of_row(row)
        for offset in self.offsets:
            # With a BOS b and offset 2: b t1 t2 t3 t4 ... -> b t3 t4 ...
            behind = all_ids[len(bos) + offset :]
            ids = (bos + behind)[:length]
            if len(ids) < length:
                place = f" from token {offset} on" if offset else ""
                yield f"fewer than {length} tokens{place}"
                continue
            yield Window(
                **about,
                ids=ids,
                prefix_length=self.prefix_length,
                offset=offset,
                secrets=self.marks.in_window(row, ids, self.prefix_length, marked),
                document_ids=all_ids[: offset + length] if offset else (),
            )

    def _completion(
        self,
        row: Row,
        each: Completion,
        about: dict[str, Any],
    ) -> Window | str:
        ids, spans = each.encode(self.tokenizer)
        begins, ends = np.array(spans).reshape(-1, 2).T
        # The tokens that share a character with the answer.
        own = np.flatnonzero((ends > each.start) & (begins < each.end)).tolist()
        if not own:
            return "nothing in the completion"
        first = own[0]
        last = own[-1]
        if first == 0:
            return "nothing before the completion"
        # Never cut short: the whole answer is the question.
        if self.context is not None and last >= self.context:
            return f"longer than the model's context of {self.context} tokens"
        text = each.text[: each.end]
        return Window(
            **about,
            ids=ids[: last + 1],
            prefix_length=first,
            completion=True,
            secrets=self.marks.in_suffix(row, text, each.start),
            prompt_kind=each.prompt_kind,
        )


def first_ids(tokenizer: Any, text: str, count: int) -> list[int]:
    """The first `count` ids of tokenizer(text), or all of them, without an EOS at the end.

    Of a long text only a part is tokenized, where that gives the same ids: tokenizers split a text
    into words first (the pre-tokenizer), and a word that ends well before the cut is the same word
    in the whole text. A tokenizer that makes no words, or not a fast one, reads the whole text.
    """
    size = 8 * count + 1024
    # An added token may lie across the cut.
    margin = 64 + max(map(len, tokenizer.get_added_vocab()), default=0)
    while tokenizer.is_fast and len(text) > 2 * size:
        part = tokenizer(text[:size]).encodings[0]
        # The first token that may be another one in the whole text, and its word's first token.
        end = len(part.ids)
        for i, (_, stop) in enumerate(part.offsets):
            if stop > size - margin:
                end = i
                break
        if end < len(part.ids):
            end = part.word_ids.index(part.word_ids[end])
        if end >= count:
            return list(part.ids[:count])
        size *= 4  # tokens are long here, or one word takes all of the text
    ids: list[int] = tokenizer(text)["input_ids"]
    ends_with_eos = ids[-1:] == [tokenizer.eos_token_id]
    if ends_with_eos and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]
    return ids[:count]


class Survey:
    """The windows of an input, which is read once, from end to end, before anything is computed.

    So a bad line is reported at once. The windows wait in a file of the audit's own; the memory
    holds a few numbers for each, and a sketch of each long row.

    rows: of the input. drawn: those that are audited. asked: those that have a window. skipped: by
    reason, how many windows and the first rows. prompted: rows that a simple prompt asks about;
    unprompted: by template, how many rows lack its columns, and the first ones. longest_marked:
    tokens of the longest suffix with a marked secret. documents: of every window the number of its
    document, from `Relations.number_documents`.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        split: str,
        cutter: Cutter,
        path: Path,
        relations: Relations,
        max_rows: int | None = None,
        seed: int = 0,
        templates: Sequence[str] = (),
    ) -> None:
        """path: of the file to write. relations: of the audit; rows with windows are added.
        max_rows, seed: of the draw. templates: simple prompts.
        """
        self.rows = self.drawn = self.asked = 0
        self.completions = self.prompted = self.longest_marked = 0
        self.skipped: dict[str, dict[str, Any]] = {}
        self.unprompted: dict[str, dict[str, Any]] = {}
        # The largest id of all windows, and its row.
        self.largest_id = self.largest_at = -1
        self.indices = array("q")  # of every window: its row
        self.secrets = SecretCounts()
        self.documents: list[int] = []
        self._split = split
        self._cutter = cutter
        self._path = path
        self._relations = relations
        self._templates = templates
        # A sample: an answer may give away a secret of a row that is not drawn.
        not_drawn: dict[str, int] = {}
        if max_rows is not None:
            rows = self._watched(rows, not_drawn)
        with path.open("wb") as file:
            waiting: list[Window] = []
            for index, row in draw(self._counted(rows), max_rows, seed):
                waiting += self._add(index, row)
                if len(waiting) >= STORED:
                    pickle.dump(waiting, file)
                    waiting = []
            # What is left, and an empty list for the end.
            pickle.dump(waiting, file)
            pickle.dump([], file)
        for secret, index in not_drawn.items():
            self.secrets.miss(secret, "in a row that was not drawn", index)

    def _counted(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            self.rows += 1
            yield row

    def _watched(self, rows: Iterable[Row], secrets: dict[str, int]) -> Iterator[Row]:
        """The rows; `secrets` gets the first row of every marked secret, drawn or not."""
        for index, row in enumerate(rows):
            for secret in self._cutter.marks.of_row(row):
                secrets.setdefault(secret, index)
            yield row

    def _add(self, index: int, row: Row) -> list[Window]:
        """Count a row that was drawn; its windows."""
        self.drawn += 1
        windows: list[Window] = []
        for each in self._cutter.cut(row, index, self._split):
            if isinstance(each, str):
                note(self.skipped, each, index)
            else:
                windows.append(each)
        marked = self._cutter.marks.of_row(row)
        self._count_secrets(index, row, windows, marked)
        # A row without a window is skipped anyway, and told of there.
        if windows:
            self.asked += 1
            ids = [window.ids for window in windows]
            self._relations.add(row, self._split, windows[0].name, ids, marked)
            self._count_prompts(index, row)
        for window in windows:
            self._count(window)
        return windows

    def _count_secrets(
        self,
        index: int,
        row: Row,
        windows: Sequence[Window],
        marked: Sequence[str],
    ) -> None:
        marks = self._cutter.marks
        for window in windows:
            self.secrets.asked.update(window.secrets)
        missing = [each for each in marked if each not in self.secrets.asked]
        prefixes = [window.prefix for window in windows]
        for secret, reason in marks.why_not_asked(missing, prefixes).items():
            self.secrets.miss(secret, reason, index)
        for secret in marks.absent(row, marked):
            reason = "not in the text of its row"
            if not windows:
                reason = "in a row that was skipped"
            self.secrets.miss(secret, reason, index)

    def _count_prompts(self, index: int, row: Row) -> None:
        lacking = [each for each in self._templates if filled(each, row) is None]
        for template in lacking:
            note(self.unprompted, template, index)
        # One template is enough to ask for a document.
        if len(lacking) < len(self._templates):
            self.prompted += 1

    def _count(self, window: Window) -> None:
        self.indices.append(window.index)
        self.completions += window.completion
        if window.secrets:
            self.longest_marked = max(self.longest_marked, len(window.suffix))
        if (largest := max(window.ids)) > self.largest_id:
            self.largest_id = largest
            self.largest_at = window.index

    def counts(self) -> dict[str, Any]:
        """What run.json holds about the input."""
        counts = {
            "rows": self.rows,
            "drawn": self.drawn,
            "asked": self.asked,
            "windows": len(self.indices),
            "completions": self.completions,
            "documents": len(set(self.documents)),
            "secrets": self.secrets.counts(),
            "skipped": list(self.skipped.values()),
        }
        if self._templates:
            counts["prompted"] = self.prompted
            in_order = [each for each in self._templates if each in self.unprompted]
            counts["unprompted"] = [self.unprompted[each] for each in in_order]
        return counts

    def windows(self) -> Iterator[tuple[Window, int]]:
        """The windows in order, from the file, each with its document's number."""
        with self._path.open("rb") as file:
            stored = chain.from_iterable(iter(lambda: pickle.load(file), []))
            yield from zip(stored, self.documents, strict=True)

    @property
    def first_rows(self) -> dict[int, int]:
        """Of every document its first row."""
        # Read backwards, the first row of a document is the one that stays.
        return dict(zip(self.documents[::-1], self.indices[::-1], strict=True))


def first_divergence(output: Sequence[int], suffix: Sequence[int]) -> int:
    """min{t: output[t] != suffix[t]}, or the suffix's length if they agree as far as it goes."""
    for place, (here, there) in enumerate(zip(output, suffix, strict=False)):
        if here != there:
            return place
    return len(suffix)


def prefix_grid(prefix_length: int) -> list[int]:
    """Tenths of the prefix: the lengths that the prefix sweep reports."""
    lengths = {round(prefix_length * tenth / 10) for tenth in range(1, 11)}
    return sorted(lengths - {0})
