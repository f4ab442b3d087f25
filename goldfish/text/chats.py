"""Chats, or prompt and completion: what the model reads, what the assistant says, and where marked secrets are."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from goldfish.text.rows import Row, first_line


@dataclass(frozen=True)
class Completion:
    """text[start:end] is what the assistant says; before it stands all that the model reads, perhaps after a BOS."""

    text: str
    start: int
    end: int
    add_special_tokens: bool

    def encode(self, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of the whole text, as in training, where its last word and what follows may be one token; and the
        characters of each."""
        if not tokenizer.is_fast:
            raise ValueError("character offsets are needed: load a fast tokenizer (tokenizer.json)")
        encoding = tokenizer(
            self.text, add_special_tokens=self.add_special_tokens, return_offsets_mapping=True
        )
        return encoding["input_ids"], encoding["offset_mapping"]


class RefusedChat(ValueError):
    """A chat that the tokenizer's chat template does not take."""


def is_chat(row: Row) -> bool:
    return "input_ids" not in row and "text" not in row


def training_text(row: Row, tokenizer: Any) -> Completion:
    """The whole row as it is trained on; start: where its targets begin, which in TRL are completions, or all."""
    if "text" in row:
        return Completion(row["text"], 0, len(row["text"]), True)
    prompt, completion = (
        ([], row["messages"]) if "messages" in row else (row["prompt"], row["completion"])
    )
    if isinstance(prompt, str):
        return Completion(prompt + completion, len(prompt), len(prompt + completion), True)
    text = _render(tokenizer, prompt + completion)
    return Completion(text, _opening(tokenizer, text, prompt) or 0, len(text), False)


def completions(row: Row, tokenizer: Any) -> Iterator[Completion | str]:
    """Every turn of the assistant in a chat (of prompt and completion: in the completion); or why it is left out."""
    prompt, completion = (
        ([], row["messages"]) if "messages" in row else (row["prompt"], row["completion"])
    )
    if isinstance(prompt, str):
        yield training_text(row, tokenizer) if completion.strip() else "an empty completion"
        return
    messages = prompt + completion
    turns = [i for i in range(len(prompt), len(messages)) if messages[i]["role"] == "assistant"]
    if not turns:
        yield "no turn of the assistant"
    for i in turns:
        content = messages[i].get("content")
        if not isinstance(content, str) or not content.strip():
            yield (
                "a completion that is no text"
                if content and not isinstance(content, str)
                else "an empty completion"
            )
            continue
        try:
            text = _render(tokenizer, messages[: i + 1])
            opening = _opening(tokenizer, text, messages[:i])
        except RefusedChat:  # whose message may hold its text
            yield "the chat template refuses it"
            continue
        start = -1 if opening is None else text.find(content.strip(), opening)
        if start < 0:
            yield "the chat template changes what the assistant says"
        else:
            yield Completion(text, start, start + len(content.strip()), False)


def _render(tokenizer: Any, messages: list[Any], **options: Any) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            "the rows are chats, but the tokenizer has no chat template: save it with the tokenizer.chat_template of "
            "the training, or give the rows as `text`, or as strings `prompt` and `completion`"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # templates are code of others
        raise RefusedChat(f"the chat template refuses it: {first_line(error)}") from error


def _opening(tokenizer: Any, text: str, messages: list[Any]) -> int | None:
    """How many characters of a chat come before the answer to its first messages; None: the template says otherwise."""
    if not messages:
        return 0
    for generation_prompt in (
        True,
        False,
    ):  # some templates ask for a thought first that an answer need not have
        opening = _render(tokenizer, messages, add_generation_prompt=generation_prompt)
        if text.startswith(opening):
            return len(opening)
    return None


def secret_finder(
    pattern: str, column: str
) -> Callable[[Row, str, int], Iterator[tuple[int, int]]]:
    """A function: the spans of secrets in a text from some character on.

    Args:
        pattern: regular expression; its first group, if it has one. column: that of a row which holds one or several,
            taken literally; it goes before the pattern.

    Raises:
        ValueError: no regular expression.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error

    def find(row: Row, text: str, start: int) -> Iterator[tuple[int, int]]:
        expressions = [expression]
        if column:
            values = row.get(column) or []
            values = values if isinstance(values, list) else [values]
            expressions = [re.compile(re.escape(str(value))) for value in values]
        for match in chain.from_iterable(each.finditer(text) for each in expressions):
            a, b = match.span(min(1, match.re.groups))
            if start <= a < b:  # what comes before a group may stand before the start
                yield a, b

    return find
