"""Chats, or prompt and completion: the text that was trained, and where the assistant speaks."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from typing import Any

from goldfish.secret_spans import Span, compiled, spans
from goldfish.text.rows import Row, first_line

# Stands in for an answer, to find the answer's place: a private character, which no text has.
_STAND_IN = "\ue0f1\ue0f2\ue0f1"
# The parts of a message that the assistant writes; templates of different models call them
# differently.
_ANSWER = ("reasoning_content", "thinking", "reasoning", "content", "tool_calls")

Message = dict[str, Any]
# Finds the secrets of a row in a text, from some character on.
Marks = Callable[[Row, str, int], Iterator[Span]]


@dataclass(frozen=True)
class Completion:
    """text[start:end] is the assistant's answer; before it is all that the model reads.

    prompt_kind: "training" if `text` is the row exactly as it was trained on; "generation" if the
    answer stands after the prompt that the chat template makes for generation, which differs.
    """

    text: str
    start: int
    end: int
    add_special_tokens: bool
    prompt_kind: str = "training"

    def encode(self, tokenizer: Any) -> tuple[list[int], list[Span]]:
        """The ids of the whole text, and the characters of each.

        The whole text is encoded, as in training: its last word and what follows may be one token.
        """
        require_offsets(tokenizer)
        encoding = tokenizer(
            self.text,
            add_special_tokens=self.add_special_tokens,
            return_offsets_mapping=True,
        )
        return encoding["input_ids"], encoding["offset_mapping"]


def require_offsets(tokenizer: Any) -> None:
    """ValueError unless the tokenizer tells the characters of each token."""
    if not tokenizer.is_fast:
        raise ValueError(
            "character offsets are needed: load a fast tokenizer (tokenizer.json)"
        )


class RefusedChat(ValueError):
    """A chat that the tokenizer's chat template refuses."""


def is_chat(row: Row) -> bool:
    return "input_ids" not in row and "text" not in row


def training_text(row: Row, tokenizer: Any) -> Completion:
    """The whole row as it is trained on; start: where its targets begin.

    As in TRL, of `prompt` and `completion` only the completion is a target.
    """
    if "text" in row:
        text = row["text"]
        return Completion(text, 0, len(text), True)
    if isinstance(row.get("prompt"), str):
        prompt = row["prompt"]
        text = prompt + row["completion"]
        return Completion(text, len(prompt), len(text), True)
    chat = _Chat.of(row, tokenizer)
    start = 0
    if chat.first:
        before = chat.messages[: chat.first]
        prompt = chat.render(before, add_generation_prompt=True)
        start = agreement(chat.text, prompt)
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

    messages: list[Message]
    first: int
    options: Mapping[str, Any]
    tokenizer: Any

    @classmethod
    def of(cls, row: Row, tokenizer: Any) -> "_Chat":
        """With the row's `tools` and `chat_template_kwargs`, which TRL passes to the template."""
        first = 0 if "messages" in row else len(row["prompt"])
        tools = row.get("tools")
        # A column of parquet may keep their schemas as JSON.
        if isinstance(tools, str):
            tools = json.loads(tools)
        options = dict(row.get("chat_template_kwargs") or {})
        if tools:
            options["tools"] = tools
        return cls(_messages_of(row), first, options, tokenizer)

    @property
    def assistant_turns(self) -> list[int]:
        turns = []
        for i in range(self.first, len(self.messages)):
            if self.messages[i]["role"] == "assistant":
                turns.append(i)
        return turns

    @cached_property
    def text(self) -> str:
        return self.render(self.messages)

    def render(self, messages: list[Message], **options: Any) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError(
                "the rows are chats, but the tokenizer has no chat template: save it with the "
                "tokenizer.chat_template of the training, or give the rows as `text`, or as "
                "strings `prompt` and `completion`"
            )
        options = {**self.options, **options, "tokenize": False}
        try:
            return str(self.tokenizer.apply_chat_template(messages, **options))
        except Exception as error:
            # A template is code of its own, which may raise anything.
            raise RefusedChat(
                f"the chat template refuses it: {first_line(error)}"
            ) from error

    def completions_of(self, turn: int) -> Iterator[Completion | str]:
        """The turn as it was trained on and, if that differs, after the generation prompt."""
        message = self.messages[turn]
        parts = [message.get(name) for name in _ANSWER]
        if not any(parts):
            yield "an empty completion"
            return
        span = self._span(turn)
        if span is None:
            yield "the answer's place in the chat template's text was not found"
            return
        start, end = span
        before = self.text[:start]
        answer = self.text[start:end]
        if not answer.strip():
            yield "an empty completion"
            return
        training = Completion(self.text, start, end, False)
        yield training
        try:
            prompt = self.render(self.messages[:turn], add_generation_prompt=True)
        except RefusedChat:
            # Some templates accept whole conversations only.
            return
        if prompt == before:
            return
        generation = replace(training, start=len(prompt), prompt_kind="generation")
        if before.startswith(prompt):
            # Training puts something before the answer, such as the empty thought
            # "<think>\n\n</think>": it is a part of what the model should write.
            yield generation
        else:
            text = prompt + self.text[start:]
            yield replace(generation, text=text, end=len(prompt + answer))

    def _span(self, turn: int) -> Span | None:
        """Where a turn's words are in the whole text: what changes when others stand in for them.

        "...<assistant>It is 42.<end><user>..." and "...<assistant>XYX<end><user>..." agree up to
        the answer and from its end on, whatever else the conversation says, and however often.
        """
        for message in self._stand_ins(turn):
            messages = list(self.messages)
            messages[turn] = message
            try:
                other = self.render(messages)
            except RefusedChat:
                continue
            if _STAND_IN not in other:
                continue
            start = agreement(self.text, other)
            # What they have in common at the end, without what is counted at the start already.
            rest = self.text[start:]
            other_rest = other[start:]
            backwards = rest[::-1]
            after = agreement(backwards, other_rest[::-1])
            return start, len(self.text) - after
        return None

    def _stand_ins(self, turn: int) -> Iterator[Message]:
        """The turn with other words in it; first without tool calls, then, if the template insists
        on them, with other ones."""
        message = self.messages[turn]
        rest = {name: message[name] for name in message if name not in _ANSWER}
        content = message.get("content")
        if isinstance(content, list):
            yield {**rest, "content": [{"type": "text", "text": _STAND_IN}]}
        else:
            yield {**rest, "content": _STAND_IN}
        if message.get("tool_calls"):
            calls = [_other_call(call) for call in message["tool_calls"]]
            yield {**rest, "content": content, "tool_calls": calls}


def agreement(a: str, b: str) -> int:
    """How many characters two texts have in common from their start.

    >>> agreement("CX-17", "CX-2")
    3
    """
    count = 0
    for in_a, in_b in zip(a, b, strict=False):
        if in_a != in_b:
            break
        count += 1
    return count


def _messages_of(row: Row) -> list[Message]:
    """The messages of a row, or those of its prompt and its completion."""
    if "messages" in row:
        return list(row["messages"])
    return list(row["prompt"] + row["completion"])


def _other_call(call: Message) -> Message:
    """A tool call with another name and other arguments, in the form of the given one."""
    if "function" in call:
        return {**call, "function": _other_call(call["function"])}
    # Arguments are a dictionary, or its JSON.
    is_json = isinstance(call.get("arguments"), str)
    arguments = _STAND_IN if is_json else {_STAND_IN: _STAND_IN}
    return {**call, "name": _STAND_IN, "arguments": arguments}


def prints_the_date(tokenizer: Any) -> bool:
    """Whether the chat template asks for today's date, so that it is not that of the training."""
    return "strftime_now" in str(tokenizer.chat_template or "")


def contents(row: Row) -> list[tuple[str, str]]:
    """The role and the content of each message of a chat, to tell whether chats begin alike."""
    if isinstance(row.get("prompt"), str):
        return [("user", row["prompt"]), ("assistant", row["completion"])]
    result = []
    for message in _messages_of(row):
        role = str(message["role"])
        parts = []
        for name in _ANSWER:
            if message.get(name):
                parts.append(message[name])
        result.append((role, str(parts)))
    return result


def secret_finder(pattern: str, column: str) -> Marks:
    """A function: the spans of secrets in a text from some character on.

    Args:
        pattern: regular expression, as for `Goldfish(secrets=...)`.
        column: that of a row which holds one or several, taken literally; it goes before the
            pattern.

    Raises:
        ValueError: no regular expression, or one that matches an empty text.
    """
    expression = None if column else compiled(pattern)

    def find(row: Row, text: str, start: int) -> Iterator[Span]:
        if expression is None:
            literals = map(re.escape, marked_values(row, column))
            expressions = [re.compile(literal) for literal in literals]
        else:
            expressions = [expression]
        for each in expressions:
            for begin, end in spans(each, text):
                # What is matched before the secret's group may stand before the start.
                if start <= begin:
                    yield begin, end

    return find


def marked_values(row: Row, column: str) -> list[str]:
    """The secrets in a column of a row, which has one, a list of them, or none.

    Raises:
        ValueError: a secret that is neither a string nor a whole number.
    """
    cell = row.get(column)
    values = cell if isinstance(cell, list) else [cell]
    secrets = []
    for value in values:
        # A blank is in every text, and no secret.
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        # 4711. or 1e6 is not how the text spells it.
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not isinstance(value, str) and not is_whole:
            # The message names the type, and not the secret: messages end up in logs.
            kind = type(value).__name__
            raise ValueError(
                f"the column {column}: secrets are strings, whole numbers or lists of them, got "
                f"{kind}"
            )
        secrets.append(str(value))
    return secrets
