"""Simple prompts: does a text come out when someone asks for it by its title, or by a name?

A template such as "What is the text of {title}?" is filled with the columns of each row. The model
answers, and the answer is compared with the row's whole document. Held-out documents, asked in the
same way, show what comes out by chance.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.compute import is_in, list_flatten

from goldfish.audit.intervals import Bools, Figure, Side
from goldfish.audit.questions import too_many
from goldfish.audit.questions.secrets import GIVEN_AWAY
from goldfish.audit.records import (
    SHORTEST_RUN,
    UNITS,
    common_runs,
    longest_common,
    read_blocks,
    run_thresholds,
)
from goldfish.audit.windows import first_ids, row_name
from goldfish.text.chats import training_text
from goldfish.text.printable import counted, text_pieces
from goldfish.text.prompts import filled
from goldfish.text.rows import Row

ASKED = "asked"  # the folder of the answers, in that of the audit
ELSEWHERE = "asked_elsewhere.parquet"  # the other documents that answers recite
CONTINUE = "Continue."  # what a chat model is told in later rounds
TAIL = 50  # tokens of the recited end, from which a model without chats goes on
CHUNK = 2**15  # tokens of a document that are compared at once
AROUND = 500  # characters of a document that are stored on each side of the longest run

COLUMNS = pa.schema(
    {
        "split": pa.string(),
        "index": pa.int64(),
        "document": pa.int64(),
        "name": pa.string(),
        "template": pa.string(),
        "sample": pa.int64(),  # 0: the greedy answer
        "rounds": pa.int64(),
        "prompt": pa.string(),
        "output_text": pa.string(),
        "output_ids": pa.list_(pa.int64()),
        "output_tokens": pa.list_(pa.string()),
        "longest_run": pa.int64(),
        "longest_run_words": pa.int64(),
        "longest_run_characters": pa.int64(),
        "recited_share": pa.float64(),
        "common_runs": pa.list_(pa.list_(pa.int64())),
        "document_text": pa.string(),
    }
)


@dataclass(frozen=True)
class Document:
    """What a row was trained on. index: the row of the input. number: the unit of all intervals."""

    split: str
    index: int
    number: int
    row: Row
    text: str
    ids: Sequence[int]

    @property
    def name(self) -> str:
        return row_name(self.row, self.split, self.index)


@dataclass(frozen=True)
class Question:
    """A template filled with the columns of a document's row."""

    document: Document
    template: str
    prompt: str


def whole_documents(
    rows: Iterable[tuple[int, Row]],
    split: str,
    numbers: Mapping[int, int],
    tokenizer: Any,
) -> Iterator[Document]:
    """The documents of the rows that have windows.

    Args:
        rows: with their indices.
        numbers: of each row with a window the number of its document.
    """
    for index, row in rows:
        if index in numbers:
            text = _text_of(row, tokenizer)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            yield Document(split, index, numbers[index], row, text, ids)


def questions(
    documents: Iterable[Document],
    templates: Sequence[str],
) -> Iterator[Question]:
    """The questions about documents; a row that lacks a template's columns has none of it."""
    for each in documents:
        for template in templates:
            prompt = filled(template, each.row)
            if prompt is not None:
                yield Question(each, template, prompt)


def _text_of(row: Row, tokenizer: Any) -> str:
    """What the row was trained on, as text."""
    if "input_ids" in row:
        ids = row["input_ids"]
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    return training_text(row, tokenizer).text


class Asker:
    """Puts questions to a model.

    Args:
        model: a causal language model of transformers, on its device.
        tokenizer: its tokenizer. With a chat template a question is the user's turn; without one
            the model continues the question.
        length: the most tokens of an answer, in each round.
        samples: how many answers to draw at temperature 1, besides the greedy one.
        rounds: how often a greedy answer that recites is asked to go on, the first time included.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        length: int,
        samples: int,
        rounds: int,
    ) -> None:
        from goldfish.unwrap import context_of

        self._model = model
        self._tokenizer = tokenizer
        self._length = length
        self._samples = samples
        self._rounds = rounds
        self._context = context_of(model.config)
        # Chat models end a turn with another token than a text; either ends an answer.
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        self._ends = sorted({*ends, tokenizer.eos_token_id} - {None})

    def answers(self, asked: Sequence[Question]) -> list[dict[str, Any]]:
        """For each question the record of its greedy answer, and those of the drawn ones.

        Questions that leave no room for an answer in the model's context have none.
        """
        prompts = [self._prompt([("user", each.prompt)]) for each in asked]
        fit = [self._room(prompt) > 0 for prompt in prompts]
        asked = list(compress(asked, fit))
        prompts = list(compress(prompts, fit))
        records = []
        greedy = self._greedy(asked, prompts)
        for question, prompt, (output, rounds) in zip(
            asked, prompts, greedy, strict=True
        ):
            record = self._record(question, prompt, output)
            records.append(record | {"sample": 0, "rounds": rounds})
            drawn = self._draw(question, prompt) if self._samples else []
            for number, sample in enumerate(drawn, 1):
                record = self._record(question, prompt, sample)
                records.append(record | {"sample": number, "rounds": 1})
        return records

    def _greedy(
        self,
        asked: Sequence[Question],
        prompts: Sequence[list[int]],
    ) -> list[tuple[list[int], int]]:
        """For each question the answer of all rounds in one, and how many there were.

        A further round keeps the answer up to the end of its longest run with the document, and
        asks what comes next. It ends when a round adds nothing to the run.
        """
        outputs = self._generate(prompts)
        rounds = [1] * len(asked)
        ends = [0] * len(asked)
        going_on = list(range(len(asked)))
        for number in range(2, self._rounds + 1):
            further = []
            for i in going_on:
                start, _, length = longest_run(outputs[i], asked[i].document.ids)
                # A run that ends where it ended before was not continued by the last round.
                if length >= SHORTEST_RUN and start + length > ends[i]:
                    ends[i] = start + length
                    further.append(i)
            going_on = further
            recited = {i: outputs[i][: ends[i]] for i in going_on}
            nexts = [self._next_prompt(asked[i], recited[i]) for i in going_on]
            for i, more in zip(going_on, self._generate(nexts), strict=True):
                outputs[i] = recited[i] + more
                rounds[i] = number
        return list(zip(outputs, rounds, strict=True))

    def _next_prompt(self, question: Question, recited: list[int]) -> list[int]:
        if not self._tokenizer.chat_template:
            # The question again would bring the same answer again. A BOS comes first, if the
            # tokenizer puts one before an empty text.
            opening = self._prompt([("user", "")])
            return opening + recited[-TAIL:]
        said = self._tokenizer.decode(recited, clean_up_tokenization_spaces=False)
        turns = [("user", question.prompt), ("assistant", said), ("user", CONTINUE)]
        return self._prompt(turns)

    def _prompt(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of a conversation up to the answer; without a chat template, of its text."""
        if not self._tokenizer.chat_template:
            text = turns[0][1]
            # All of its ids: no token is shorter than a byte.
            return first_ids(self._tokenizer, text, 4 * len(text) + 8)
        messages = [{"role": role, "content": said} for role, said in turns]
        ids: list[int] = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        return ids

    def _generate(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Greedy answers, without the token that ends them; prompts of one length go together."""
        # Without padding, so that the answer does not depend on how a model treats it.
        by_length: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(i)
        outputs: list[list[int]] = [[]] * len(prompts)
        for places in by_length.values():
            found = self._run([prompts[i] for i in places])
            for i, output in zip(places, found, strict=True):
                outputs[i] = output
        return outputs

    def _draw(self, question: Question, prompt: list[int]) -> list[list[int]]:
        import torch

        with torch.random.fork_rng():
            # The same answers in whatever block or process a question is asked.
            torch.manual_seed(crc32(question.prompt.encode()) + question.document.index)
            return self._run(
                [prompt] * self._samples, do_sample=True, top_k=0, top_p=1.0
            )

    def _run(self, prompts: list[list[int]], **options: Any) -> list[list[int]]:
        import torch

        from goldfish.audit.model import generate
        from goldfish.unwrap import device_of

        length = self._room(prompts[0])
        if length < 1:
            return [[] for _ in prompts]
        ids = torch.tensor(prompts, device=device_of(self._model))
        settings = {"eos_token_id": self._ends or None, **options}
        with torch.inference_mode():
            outputs = generate(self._model, ids, length, settings)
        return [self._until_end(output) for output in outputs.tolist()]

    def _room(self, prompt: list[int]) -> int:
        """The most tokens of an answer."""
        if not prompt:
            return 0
        if self._context is None:
            return self._length
        return min(self._length, self._context - len(prompt))

    def _until_end(self, output: list[int]) -> list[int]:
        ends = (i for i, token in enumerate(output) if token in self._ends)
        return output[: next(ends, len(output))]

    def _record(
        self,
        question: Question,
        prompt: list[int],
        output: list[int],
    ) -> dict[str, Any]:
        """What an answer has of the document that it was asked about."""
        document = question.document
        pieces = text_pieces(self._tokenizer, prompt, output)
        text = "".join(pieces)
        _, there, longest = longest_run(output, document.ids)
        all_runs = runs_of(output, document.ids)
        runs = [run for run in all_runs if run[2] >= SHORTEST_RUN]
        # Runs may overlap, so their tokens are marked and not added up.
        recited = np.zeros(len(output), dtype=bool)
        for start, _, length in runs:
            recited[start : start + length] = True
        # Of the texts, not of the run of tokens: the same words may be other tokens elsewhere.
        characters = longest_common(text, document.text)
        said = tuple(text.split())
        words = longest_common(said, tuple(document.text.split()))
        return {
            "split": document.split,
            "index": document.index,
            "document": document.number,
            "name": document.name,
            "template": question.template,
            "prompt": question.prompt,
            "output_text": text,
            "output_ids": output,
            "output_tokens": pieces,
            "longest_run": longest,
            "longest_run_words": words,
            "longest_run_characters": characters,
            "recited_share": float(recited.mean()) if output else 0.0,
            "common_runs": runs,
            "document_text": self._around(document, there, longest),
        }

    def _around(self, document: Document, start: int, length: int) -> str:
        """The document around the longest run."""
        ids = list(document.ids)
        before = self._tokenizer.decode(ids[:start][-AROUND:])
        after = self._tokenizer.decode(ids[start + length :][:AROUND])
        run = self._tokenizer.decode(ids[start : start + length])
        return f"{before[-AROUND:]}{run}{after[:AROUND]}"


def runs_of(output: Sequence[int], document: Sequence[int]) -> list[list[int]]:
    """`common_runs` with a long document, in pieces that overlap by the output's length."""
    runs = []
    # `common_runs` compares every token with every other: 256 x 100,000 at once are too many. A run
    # is no longer than the output, so it lies whole in one of the pieces.
    for start in range(0, max(1, len(document)), CHUNK):
        piece = document[start : start + CHUNK + len(output)]
        for here, there, length in common_runs(output, piece):
            runs.append([here, start + there, length])
    return runs


def longest_run(output: Sequence[int], document: Sequence[int]) -> list[int]:
    """[start in the output, start in the document, length] of the first of the longest runs."""
    runs = runs_of(output, document)
    return max(runs, key=lambda run: run[2], default=[0, 0, 0])


def recited_elsewhere(
    answers: pa.Table,
    documents: Iterable[Document],
    thresholds: Mapping[str, float],
) -> pa.Table:
    """The documents that answers recite though they were asked about another one.

    Args:
        answers: of an audit. documents: all of it, of both splits.
        thresholds: by unit (t, w, c) the shortest run that counts.

    Returns:
        One column, `elsewhere`: for every answer the numbers of these documents.
    """
    about = answers["document"].to_pylist()
    found: list[dict[int, None]] = [{} for _ in about]
    outputs = zip(
        answers["output_ids"].to_pylist(),
        answers["output_text"].to_pylist(),
        strict=True,
    )
    # A document has a run of n with an answer if both have some n tokens in a row: a look-up for
    # every place of a document, whatever the number of answers.
    holders: dict[tuple[str, int], list[int]] = {}
    for i, (ids, text) in enumerate(outputs):
        for piece in set(_pieces(ids, text, thresholds)):
            holders.setdefault(piece, []).append(i)
    for each in documents:
        for piece in _pieces(each.ids, each.text, thresholds):
            for i in holders.get(piece, ()):
                if about[i] != each.number:
                    found[i][each.number] = None
    numbers = pa.array(map(list, found), pa.list_(pa.int64()))
    return pa.table({"elsewhere": numbers})


def _pieces(
    ids: Sequence[int],
    text: str,
    thresholds: Mapping[str, float],
) -> Iterator[tuple[str, int]]:
    """(unit, hash) of every run of exactly as many tokens, words or characters."""
    for unit, least in thresholds.items():
        length = int(least)
        units: Sequence[Any] = text
        if unit != "c":
            units = tuple(ids if unit == "t" else text.split())
        for start in range(len(units) - length + 1):
            yield unit, hash(units[start : start + length])


def read_asked(folder: str | Path) -> pa.Table:
    """The answers of an audit with `--ask`, in the order of the input.

    Two columns more than COLUMNS: `elsewhere`, the numbers of the other documents that an answer
    recites, and `recited_elsewhere`, whether an answer about another document recites this one.

    Raises:
        ValueError: a damaged file.
    """
    table = read_blocks(Path(folder, ASKED), COLUMNS)
    file = Path(folder, ELSEWHERE)
    if not file.is_file():  # it is written when all answers are there
        return table
    elsewhere = pq.read_table(file)["elsewhere"]
    recited = is_in(table["document"], value_set=list_flatten(elsewhere))
    table = table.append_column("elsewhere", elsewhere)
    return table.append_column("recited_elsewhere", recited)


def figures(side: Side) -> Iterator[Figure]:
    """Documents of which an answer holds a long run, and how long runs are.

    `asked_elsewhere` is of answers about another document: one member's text in the answer about
    someone else. Drawn answers count in these rates, means are of greedy ones.
    """
    for name, of_figure in hits(side).items():
        yield side.rate(name, of_figure)
    greedy = side.only(side.numbers("sample") == 0)
    for unit in "twc":
        # longest_run_words -> asked_run_words
        column = UNITS[unit][0]
        name = column.replace("longest", "asked")
        yield greedy.mean(name, greedy.numbers(column), bounded=False)
    yield greedy.mean("asked_share", greedy.numbers("recited_share"))
    if GIVEN_AWAY in side.table.column_names:
        given_away = side.lengths(GIVEN_AWAY) > 0
        yield side.count("asked_with_secret", given_away)


def hits(side: Side) -> dict[str, Bools]:
    """By figure: which answers hold a run that counts as near-verbatim."""
    asked = np.zeros(len(side.table), dtype=bool)
    for unit, least in run_thresholds(side.protocol["near_verbatim"]).items():
        asked |= side.numbers(UNITS[unit][0]) >= least
    elsewhere = side.numbers("recited_elsewhere") > 0
    return {"asked": asked, "asked_elsewhere": elsewhere}


def unasked(inputs: Mapping[str, Any]) -> str:
    """Why simple prompts reached too few of the members for a PASS; "" if they reached enough."""
    about = inputs["members"]
    missing = about["asked"] - about.get("prompted", about["asked"])
    if not too_many(missing, about["asked"]):
        return ""
    return (
        f"{missing:,} of {counted(about['asked'], 'member')} not asked for: without the columns "
        "of any simple prompt"
    )
