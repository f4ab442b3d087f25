"""Chats, or prompt and completion: the text that was trained, and where the assistant speaks."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

from goldfish.secret_spans import spans
from goldfish.text.rows import Row, first_line

# Stands in for an answer, to find the answer's place: a private character, which no text has.
_STAND_IN = "\ue0f1\ue0f2\ue0f1"
_SAID = (
    "reasoning_content",
    "thinking",
    "reasoning",
    "content",
    "tool_calls",
)  # by the assistant


@dataclass(frozen=True)
class Completion:
    """text[start:end] is what the assistant says; before it is all that the model reads.

    asked: "training" if `text` is the row exactly as it was trained on; "generation" if the answer
    stands after the prompt that the chat template makes for generation, which differs.
    """

    text: str
    start: int
    end: int
    add_special_tokens: bool
    asked: str = "training"

    def encode(self, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of the whole text, and the characters of each.

        The whole text is encoded, as in training: its last word and what follows may be one token.
        """
        if not tokenizer.is_fast:
            raise ValueError(
                "character offsets are needed: load a fast tokenizer (tokenizer.json)"
            )
        encoding = tokenizer(
            self.text,
            add_special_tokens=self.add_special_tokens,
            return_offsets_mapping=True,
        )
        return encoding["input_ids"], encoding["offset_mapping"]


class RefusedChat(ValueError):
    """A chat that the tokenizer's chat template refuses."""


def is_chat(row: Row) -> bool:
    return "input_ids" not in row and "text" not in row


def training_text(row: Row, tokenizer: Any) -> Completion:
    """The whole row as it is trained on; start: where its targets begin.

    As in TRL, of `prompt` and `completion` only the completion is a target.
    """
    if "text" in row:
        return Completion(row["text"], 0, len(row["text"]), True)
    if isinstance(row.get("prompt"), str):
        text = row["prompt"] + row["completion"]
        return Completion(text, len(row["prompt"]), len(text), True)
    chat = _Chat.of(row, tokenizer)
    start = 0
    if chat.first:
        prompt = chat.render(chat.messages[: chat.first], add_generation_prompt=True)
        start = _agreement(chat.text, prompt)
    return Completion(chat.text, start, len(chat.text), False)


def completions(row: Row, tokenizer: Any) -> Iterator[Completion | str]:
    """Every turn of the assistant, or the reason why it cannot be asked.

    Of prompt and completion, turns in the completion only. Every turn is a place in the rendering
    of the whole conversation, which is what was trained: templates may render a turn differently
    when others follow. If the template's generation prompt differs from what stands before the
    turn, the turn is also asked after that.
    """
    if isinstance(row.get("prompt"), str):
        yield (
            training_text(row, tokenizer)
            if row["completion"].strip()
            else "an empty completion"
        )
        return
    chat = _Chat.of(row, tokenizer)
    turns = chat.assistant_turns
    if not turns:
        yield "no turn of the assistant"
        return
    try:
        chat.text  # noqa: B018
    except RefusedChat:  # the template's message may hold the chat's text
        yield "the chat template refuses it"
        return
    for turn in turns:
        yield from chat.completions_of(turn)


@dataclass(frozen=True)
class _Chat:
    """A conversation and how it is rendered; first: the message where the completion begins."""

    messages: list[dict[str, Any]]
    first: int
    options: Mapping[str, Any]
    tokenizer: Any

    @classmethod
    def of(cls, row: Row, tokenizer: Any) -> "_Chat":
        """With the row's `tools` and `chat_template_kwargs`, which TRL passes to the template."""
        prompt = [] if "messages" in row else row["prompt"]
        messages = row["messages"] if "messages" in row else prompt + row["completion"]
        tools = row.get("tools")
        if isinstance(tools, str):  # a column of parquet may keep their schemas as JSON
            tools = json.loads(tools)
        options = dict(row.get("chat_template_kwargs") or {})
        if tools:
            options["tools"] = tools
        return cls(messages, len(prompt), options, tokenizer)

    @property
    def assistant_turns(self) -> list[int]:
        numbers = range(self.first, len(self.messages))
        return [i for i in numbers if self.messages[i]["role"] == "assistant"]

    @cached_property
    def text(self) -> str:
        return self.render(self.messages)

    def render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError(
                "the rows are chats, but the tokenizer has no chat template: save it with the "
                "tokenizer.chat_template of the training, or give the rows as `text`, or as "
                "strings `prompt` and `completion`"
            )
        options = {**self.options, **options}
        try:
            return str(
                self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
            )
        except Exception as error:  # templates are code of others
            raise RefusedChat(
                f"the chat template refuses it: {first_line(error)}"
            ) from error

    def completions_of(self, turn: int) -> Iterator[Completion | str]:
        if not any(self.messages[turn].get(name) for name in _SAID):
            yield "an empty completion"
            return
        span = self._span(turn)
        if span is None:
            yield "the answer's place in the chat template's text was not found"
            return
        start, end = span
        if not self.text[start:end].strip():
            yield "an empty completion"
            return
        training = Completion(self.text, start, end, False)
        yield training
        try:
            prompt = self.render(self.messages[:turn], add_generation_prompt=True)
        except RefusedChat:  # some templates accept whole conversations only
            return
        if prompt == self.text[:start]:
            return
        if self.text[:start].startswith(prompt):
            # Training puts something before the answer, such as an empty thought: it is a part
            # of what the model should say.
            yield replace(training, start=len(prompt), asked="generation")
        else:
            text = prompt + self.text[start:]
            yield Completion(
                text, len(prompt), len(prompt) + end - start, False, asked="generation"
            )

    def _span(self, turn: int) -> tuple[int, int] | None:
        """Where a turn's words are in the whole text: what changes when others stand in for them.

        "...<assistant>It is 42.<end><user>..." and "...<assistant>XYX<end><user>..." agree up to
        the answer and from its end on, whatever else the conversation says, and however often.
        """
        for message in self._stand_ins(turn):
            others = [*self.messages[:turn], message, *self.messages[turn + 1 :]]
            try:
                other = self.render(others)
            except RefusedChat:
                continue
            if _STAND_IN not in other:
                continue
            start = _agreement(self.text, other)
            rest, other_rest = self.text[start:], other[start:]
            return start, len(self.text) - _agreement(rest[::-1], other_rest[::-1])
        return None

    def _stand_ins(self, turn: int) -> Iterator[dict[str, Any]]:
        """The turn with other words in it; first without tool calls, then, if the template insists
        on them, with other ones."""
        message = self.messages[turn]
        rest = {name: value for name, value in message.items() if name not in _SAID}
        in_parts = isinstance(message.get("content"), list)
        content = [{"type": "text", "text": _STAND_IN}] if in_parts else _STAND_IN
        yield {**rest, "content": content}
        if message.get("tool_calls"):
            calls = [_other_call(call) for call in message["tool_calls"]]
            yield {**rest, "content": message.get("content"), "tool_calls": calls}


def _agreement(a: str, b: str) -> int:
    """How many characters two texts have in common from their start."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def _other_call(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _other_call(call["function"])}
    in_words = isinstance(call.get("arguments"), str)
    arguments = _STAND_IN if in_words else {_STAND_IN: _STAND_IN}
    return {**call, "name": _STAND_IN, "arguments": arguments}


def prints_the_date(tokenizer: Any) -> bool:
    """Whether the chat template asks for today's date, so that it is not that of the training."""
    return "strftime_now" in str(tokenizer.chat_template or "")


def contents(row: Row) -> list[tuple[str, str]]:
    """The role of each message of a chat, and what it says: what conversations have in common."""
    if isinstance(row.get("prompt"), str):
        return [("user", row["prompt"]), ("assistant", row["completion"])]
    messages = (
        row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    )
    return [
        (
            str(message["role"]),
            str([message[name] for name in _SAID if message.get(name)]),
        )
        for message in messages
    ]


def secret_finder(
    pattern: str, column: str
) -> Callable[[Row, str, int], Iterator[tuple[int, int]]]:
    """A function: the spans of secrets in a text from some character on.

    Args:
        pattern: regular expression; the first group that has a part in a match, if any, as with
            `Goldfish(secrets=...)`.
        column: that of a row which holds one or several, taken literally; it goes before the
            pattern.

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
            values = marked_values(row, column)
            expressions = [re.compile(re.escape(value)) for value in values]
        for a, b in chain.from_iterable(spans(each, text) for each in expressions):
            if start <= a:  # what comes before a group may stand before the start
                yield a, b

    return find


def marked_values(row: Row, column: str) -> list[str]:
    """The secrets in a column of a row, which has one, a list of them, or none."""
    cell = row.get(column)
    values = cell if isinstance(cell, list) else [cell]
    return [str(value) for value in values if value not in (None, "")]
