"""Marked secrets of an input: where they are, which are asked about, and why the others are not.

All of it does nothing if no secrets are marked.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from goldfish.text.chats import RefusedChat, marked_values, training_text
from goldfish.text.rows import Row

SHOWN = 5  # rows that are named for each reason
# Finds marked secrets in a row's text, from a character on: their spans.
Finder = Callable[[Row, str, int], Iterable[tuple[int, int]]]


class Marks:
    """Finds the marked secrets of rows.

    Args:
        find: see `chats.secret_finder`; None if nothing is marked.
        column: the secret column, if `find` was made with one.
    """

    def __init__(self, find: Finder | None, column: str, tokenizer: Any) -> None:
        self._find = find
        self._column = column
        self._tokenizer = tokenizer

    def of_row(self, row: Row) -> tuple[str, ...]:
        """Every marked secret of a row, wherever it stands."""
        if self._find is None:
            return ()
        try:
            if "input_ids" in row:
                text = self._decode(row["input_ids"])
            else:
                text = training_text(row, self._tokenizer).text
        except RefusedChat:
            # It has no windows either, and is counted as skipped.
            return ()
        return self.in_suffix(row, text, 0)

    def in_suffix(self, row: Row, text: str, start: int) -> tuple[str, ...]:
        """The secrets in text[start:] that the model could not read in text[:start]."""
        if self._find is None:
            return ()
        prompt = text[:start]
        # A dictionary is a set that keeps the order.
        secrets: dict[str, None] = {}
        for begin, end in self._find(row, text, start):
            secret = text[begin:end]
            if secret not in prompt:
                secrets[secret] = None
        return tuple(secrets)

    def in_window(
        self,
        row: Row,
        ids: Sequence[int],
        prefix_length: int,
        marked: Sequence[str],
    ) -> tuple[str, ...]:
        """The same of a part of a row's text; marked: all secrets of the row."""
        if self._find is None:
            return ()
        prompt = self._decode(ids[:prefix_length])
        text = self._decode(ids)
        whole = []
        for secret in self.in_suffix(row, text, len(prompt)):
            # If the part ends inside a secret, the pattern may fit what is left of it.
            is_inside = any(secret in each for each in marked)
            is_piece = is_inside and secret not in marked
            if not is_piece:
                whole.append(secret)
        return tuple(whole)

    def why_not_asked(
        self,
        secrets: Sequence[str],
        prefixes: Sequence[Sequence[int]],
    ) -> dict[str, str]:
        """By secret of a row, why no window of it asks about it. prefixes: of the windows."""
        reasons = {}
        # Decoded once, for all secrets.
        prompts = list(map(self._decode, prefixes)) if secrets else []
        for secret in secrets:
            if any(secret in prompt for prompt in prompts):
                reasons[secret] = "given in the prompt"
            elif prefixes:
                reasons[secret] = "outside of the windows"
            else:
                reasons[secret] = "in a row that was skipped"
        return reasons

    def absent(self, row: Row, marked: Sequence[str]) -> list[str]:
        """Values of the secret column that the row's text does not have: spelled otherwise there.

        marked: those that it has.
        """
        if not self._column:
            return []
        values = marked_values(row, self._column)
        return [value for value in values if value not in marked]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


class SecretCounts:
    """The distinct marked secrets of an input, and why some are not asked."""

    def __init__(self) -> None:
        self.asked: set[str] = set()
        # By secret: why it is not asked, and its first row. A later row may ask it.
        self._others: dict[str, tuple[str, int]] = {}

    def miss(self, secret: str, reason: str, index: int) -> None:
        """Note a secret that row `index` does not ask; the first reason stays."""
        self._others.setdefault(secret, (reason, index))

    @property
    def unasked(self) -> list[str]:
        return [secret for secret in self._others if secret not in self.asked]

    def counts(self) -> dict[str, Any]:
        """How many are marked and asked, and why the others are not."""
        unasked: dict[str, dict[str, Any]] = {}
        for secret in self.unasked:
            note(unasked, *self._others[secret])
        marked = self.asked | self._others.keys()
        return {
            "marked": len(marked),
            "asked": len(self.asked),
            "unasked": list(unasked.values()),
        }


def note(reasons: dict[str, dict[str, Any]], reason: str, index: int) -> None:
    """Count what could not be asked, with the first rows."""
    found = reasons.setdefault(reason, {"reason": reason, "count": 0, "rows": []})
    found["count"] += 1
    if len(found["rows"]) < SHOWN:
        found["rows"].append(index)
