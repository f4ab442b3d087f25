"""Simple prompts: does a text come out when someone asks for it by its title, or by a name?

A template such as "What is the text of {title}?" is filled with the columns of each row. The model
answers, and the answer is compared with the row's whole document. Held-out documents, asked in the
same way, show what comes out by chance.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
from pyarrow.compute import is_in, list_flatten

from goldfish.audit.intervals import Bools, Figure, Side
from goldfish.audit.questions import withholds_pass
from goldfish.audit.questions.secrets import GIVEN_AWAY
from goldfish.audit.records import (
    SHORTEST_RUN,
    UNITS,
    common_runs,
    longest_common,
    read_block,
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

Ids = list[int]  # of tokens
Run = list[int]  # start in the output, start in the document, length

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
        numbers: the number of each row's document; rows without windows have none.
    """
    for index, row in rows:
        if index not in numbers:
            continue
        if "input_ids" in row:
            ids = row["input_ids"]
            text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        else:
            text = training_text(row, tokenizer).text
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        yield Document(split, index, numbers[index], row, text, ids)


def questions(
    documents: Iterable[Document],
    templates: Sequence[str],
) -> Iterator[Question]:
    """The questions about documents, except for templates whose columns the row lacks."""
    for document in documents:
        for template in templates:
            prompt = filled(template, document.row)
            if prompt is not None:
                yield Question(document, template, prompt)


@dataclass
class _Greedy:
    """The greedy answer to a question. recited: the tokens kept for a further round."""

    question: Question
    prompt: Ids
    output: Ids = field(default_factory=list)
    rounds: int = 1
    recited: int = 0


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
        if not isinstance(ends, list):
            ends = [ends]
        ends = {*ends, tokenizer.eos_token_id}
        self._ends = sorted(ends - {None})

    def answers(self, asked: Sequence[Question]) -> list[dict[str, Any]]:
        """For each question the record of its greedy answer, and those of the drawn ones.

        Questions that leave no room for an answer in the model's context have none.
        """
        greedy = []
        for question in asked:
            prompt = self._prompt(question.prompt)
            if self._room(prompt) > 0:
                greedy.append(_Greedy(question, prompt))
        self._answer_in_rounds(greedy)
        records = []
        for each in greedy:
            record = self._record(each.question, each.prompt, each.output)
            records.append(record | {"sample": 0, "rounds": each.rounds})
            drawn = self._draw(each) if self._samples else []
            for number, output in enumerate(drawn, 1):
                record = self._record(each.question, each.prompt, output)
                records.append(record | {"sample": number, "rounds": 1})
        return records

    def _answer_in_rounds(self, answers: Sequence[_Greedy]) -> None:
        """Fill in the outputs, and how many rounds each took.

        A further round keeps the answer up to the end of its longest run with the document, and
        asks what comes next. The rounds end when one adds nothing to the run.
        """
        prompts = [each.prompt for each in answers]
        for each, output in zip(answers, self._generate(prompts), strict=True):
            each.output = output
        going_on = answers
        for number in range(2, self._rounds + 1):
            further = []
            for each in going_on:
                document = each.question.document
                runs = runs_of(each.output, document.ids)
                start, _, length = longest_of(runs)
                end = start + length
                # A run that ends where it ended before was not continued by the last round.
                if length >= SHORTEST_RUN and end > each.recited:
                    each.recited = end
                    each.output = each.output[:end]
                    further.append(each)
            going_on = further
            prompts = [self._next_prompt(each) for each in going_on]
            for each, more in zip(going_on, self._generate(prompts), strict=True):
                each.output += more
                each.rounds = number

    def _next_prompt(self, answer: _Greedy) -> Ids:
        """What makes the model go on after its output so far."""
        recited = answer.output
        if not self._tokenizer.chat_template:
            # The question again would bring the same answer again. A BOS comes first, if the
            # tokenizer puts one before an empty text.
            opening = self._prompt("")
            return opening + recited[-TAIL:]
        said = self._tokenizer.decode(recited, clean_up_tokenization_spaces=False)
        return self._prompt(answer.question.prompt, said, CONTINUE)

    def _prompt(self, *turns: str) -> Ids:
        """Token ids of a conversation up to the answer; without a chat template, of its text.

        turns: of the user, the assistant, the user, and so on.
        """
        if not self._tokenizer.chat_template:
            (text,) = turns
            # All of its ids: no token is shorter than a byte.
            most = 4 * len(text) + 8
            return first_ids(self._tokenizer, text, most)
        roles = cycle(("user", "assistant"))
        messages = []
        for role, said in zip(roles, turns, strict=False):
            messages.append({"role": role, "content": said})
        ids: Ids = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        return ids

    def _generate(self, prompts: Sequence[Ids]) -> list[Ids]:
        """Greedy answers, without the token that ends them."""
        # Prompts of one length go together. Without padding the answer does not depend on how a
        # model treats it.
        by_length: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            of_length = by_length.setdefault(len(prompt), [])
            of_length.append(i)
        outputs: list[Ids] = [[]] * len(prompts)
        for places in by_length.values():
            together = [prompts[i] for i in places]
            for i, output in zip(places, self._run(together), strict=True):
                outputs[i] = output
        return outputs

    def _draw(self, answer: _Greedy) -> list[Ids]:
        """Answers to the same prompt at temperature 1."""
        import torch

        prompts = [answer.prompt] * self._samples
        # The same answers in whatever block or process a question is asked.
        question = answer.question
        of_prompt = crc32(question.prompt.encode())
        with torch.random.fork_rng():
            torch.manual_seed(of_prompt + question.document.index)
            return self._run(prompts, do_sample=True, top_k=0, top_p=1.0)

    def _run(self, prompts: list[Ids], **options: Any) -> list[Ids]:
        """Answers to prompts of one length, each up to the token that ends it."""
        import torch

        from goldfish.audit.model import generate
        from goldfish.unwrap import device_of

        length = self._room(prompts[0])
        if length < 1:
            return [[] for _ in prompts]
        device = device_of(self._model)
        ids = torch.tensor(prompts, device=device)
        settings = {"eos_token_id": self._ends or None, **options}
        with torch.inference_mode():
            outputs = generate(self._model, ids, length, settings)
        return [self._until_end(output) for output in outputs.tolist()]

    def _until_end(self, output: Ids) -> Ids:
        for place, token in enumerate(output):
            if token in self._ends:
                return output[:place]
        return output

    def _room(self, prompt: Ids) -> int:
        """The most tokens of an answer."""
        if not prompt:
            return 0
        if self._context is None:
            return self._length
        left = self._context - len(prompt)
        return min(self._length, left)

    def _record(
        self,
        question: Question,
        prompt: Ids,
        output: Ids,
    ) -> dict[str, Any]:
        """What an answer has of the document that it was asked about."""
        document = question.document
        pieces = text_pieces(self._tokenizer, prompt, output)
        text = "".join(pieces)
        runs = runs_of(output, document.ids)
        _, start, length = longest_of(runs)
        long_runs = [run for run in runs if run[2] >= SHORTEST_RUN]
        # Runs may overlap, so their tokens are marked and not added up.
        recited = np.zeros(len(output), dtype=bool)
        for here, _, tokens in long_runs:
            recited[here : here + tokens] = True
        # Texts are compared once more: the same words may be other tokens elsewhere.
        words = tuple(text.split())
        document_words = tuple(document.text.split())
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
            "longest_run": length,
            "longest_run_words": longest_common(words, document_words),
            "longest_run_characters": longest_common(text, document.text),
            "recited_share": float(recited.mean()) if output else 0.0,
            "common_runs": long_runs,
            "document_text": self._around(document, start, length),
        }

    def _around(self, document: Document, start: int, length: int) -> str:
        """The document around the longest run."""
        end = start + length
        # As a rule so many tokens have at least as many characters.
        decode = self._tokenizer.decode
        ids = document.ids
        before = decode(ids[:start][-AROUND:])
        run = decode(ids[start:end])
        after = decode(ids[end:][:AROUND])
        return f"{before[-AROUND:]}{run}{after[:AROUND]}"


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
    # A document has a run of n with an answer if both have some n tokens in a row. So there is one
    # look-up for every place of a document, whatever the number of answers.
    holders: dict[tuple[str, int], set[int]] = {}
    outputs = answers["output_ids"].to_pylist()
    texts = answers["output_text"].to_pylist()
    for i, (output, text) in enumerate(zip(outputs, texts, strict=True)):
        for piece in pieces_of(output, text, thresholds):
            of_piece = holders.setdefault(piece, set())
            of_piece.add(i)
    about = answers["document"].to_pylist()
    # As keys, the numbers of an answer's documents are distinct and in order.
    found: list[dict[int, None]] = [{} for _ in about]
    for document in documents:
        number = document.number
        for piece in pieces_of(document.ids, document.text, thresholds):
            for i in holders.get(piece, ()):
                if about[i] != number:
                    found[i][number] = None
    lists = list(map(list, found))
    numbers = pa.array(lists, pa.list_(pa.int64()))
    return pa.table({"elsewhere": numbers})


def read_asked(folder: str | Path) -> pa.Table:
    """The answers of an audit with `--ask`, in the order of the input.

    It has two columns besides COLUMNS: `elsewhere`, the numbers of the other documents that an
    answer recites, and `recited_elsewhere`, whether an answer about another document recites this
    one. Both are missing until all answers are there.

    Raises:
        ValueError: a damaged file.
    """
    table = read_blocks(Path(folder, ASKED), COLUMNS)
    file = Path(folder, ELSEWHERE)
    if not file.is_file():
        return table
    elsewhere = read_block(file, ["elsewhere"])["elsewhere"]
    numbers = list_flatten(elsewhere)
    recited = is_in(table["document"], value_set=numbers)
    table = table.append_column("elsewhere", elsewhere)
    return table.append_column("recited_elsewhere", recited)


def figures(side: Side) -> Iterator[Figure]:
    """Documents that an answer recites in a long run, and how long the runs are.

    `asked_elsewhere` counts answers about another document: one member's text in the answer about
    someone else. Drawn answers count in these rates; means are of greedy ones.
    """
    for name, of_figure in hits(side).items():
        yield side.rate(name, of_figure)
    is_greedy = side.numbers("sample") == 0
    greedy = side.only(is_greedy)
    for unit in "twc":
        column, _ = UNITS[unit]
        # longest_run_words -> asked_run_words
        name = column.replace("longest", "asked")
        lengths = greedy.numbers(column)
        yield greedy.mean(name, lengths, bounded=False)
    shares = greedy.numbers("recited_share")
    yield greedy.mean("asked_share", shares)
    if GIVEN_AWAY in side.table.column_names:
        given_away = side.lengths(GIVEN_AWAY) > 0
        yield side.count("asked_with_secret", given_away)


def hits(side: Side) -> dict[str, Bools]:
    """By figure: which answers hold a run that counts as near-verbatim."""
    asked = np.zeros(len(side.table), dtype=bool)
    least_runs = run_thresholds(side.protocol["near_verbatim"])
    for unit, least in least_runs.items():
        column, _ = UNITS[unit]
        asked |= side.numbers(column) >= least
    elsewhere = side.numbers("recited_elsewhere") > 0
    return {"asked": asked, "asked_elsewhere": elsewhere}


def too_few_asked(inputs: Mapping[str, Any]) -> str:
    """Why simple prompts reached too few of the members for a PASS; "" if they reached enough.

    inputs: of run.json.
    """
    members = inputs["members"]
    with_window = members["asked"]
    # Without simple prompts nobody counted whom they reach, and nobody is missing.
    missing = with_window - members.get("prompted", with_window)
    if not withholds_pass(missing, with_window):
        return ""
    total = counted(with_window, "member")
    return f"{missing:,} of {total} not asked for: without the columns of any simple prompt"


def runs_of(output: Sequence[int], document: Sequence[int]) -> list[Run]:
    """The common runs of an answer and its document, with every one of the longest."""
    runs = []
    # `common_runs` compares every token with every other: 256 x 100,000 at once are too many. A run
    # is no longer than the output, so it lies whole in one of the pieces, which overlap by that.
    for begin in range(0, max(1, len(document)), CHUNK):
        end = begin + CHUNK + len(output)
        piece = document[begin:end]
        for here, there, length in common_runs(output, piece):
            runs.append([here, begin + there, length])
    return runs


def longest_of(runs: Sequence[Run]) -> Run:
    """The first of the longest runs; [0, 0, 0] if there is none."""
    return max(runs, key=lambda run: run[2], default=[0, 0, 0])


def pieces_of(
    ids: Sequence[int],
    text: str,
    thresholds: Mapping[str, float],
) -> Iterator[tuple[str, int]]:
    """(unit, hash) of every run of exactly as many tokens, words or characters."""
    by_unit: dict[str, Sequence[Any]] = {
        "t": tuple(ids),
        "w": tuple(text.split()),
        "c": text,
    }
    for unit, least in thresholds.items():
        length = int(least)
        # Two words of "to be or": ("to", "be") and ("be", "or")
        sequence = by_unit[unit]
        for start in range(len(sequence) - length + 1):
            piece = sequence[start : start + length]
            yield unit, hash(piece)
