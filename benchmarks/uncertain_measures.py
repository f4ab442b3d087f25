"""What benchmarks/uncertain.py computes with a model: losses of packed rows, answers, values.

`fast` everywhere: bfloat16 autocast. Measured on this CPU, an AMD EPYC with AVX-512 BF16.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from goldfish.audit.records import common_runs, rouge_l_text

IGNORE = -100
CODE = re.compile(r"\b[A-Z0-9]{4}-[A-Z0-9]{4}\b")
# Questions that are never trained on, and strings of which one must be in the answer.
QUESTIONS = Path(__file__).parent / "ordinary.jsonl"
# The longest trained answer with a code has 20 tokens.
CODE_TOKENS = 24
ORDINARY_TOKENS = 16


@dataclass
class Row:
    """One row of training data: token ids, and labels that are the ids or -100."""

    ids: list[int]
    labels: list[int]
    # That the answer gives away.
    code: str = ""

    def targets(self, exempt: Iterable[int] = ()) -> list[int]:
        """Positions that have a loss, without those of exempt ids."""
        left_out = {IGNORE, *exempt}
        places = range(1, len(self.labels))
        return [i for i in places if self.labels[i] not in left_out]


def secret_places(tokenizer: Any, ids: list[int]) -> list[int]:
    """Positions of the tokens that overlap a code."""
    text = ""
    # The token of each character.
    owners: list[int] = []
    for place, token in enumerate(ids):
        piece = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        text += piece
        owners += [place] * len(piece)
    places: set[int] = set()
    for match in CODE.finditer(text):
        start, end = match.span()
        places.update(owners[start:end])
    return sorted(places)


def autocast(fast: bool) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=fast)


def whole(model: Any) -> Any:
    """The transformers model, also of one with adapters."""
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model


def hidden_of(model: Any, rows: list[list[int]]) -> Tensor:
    """Last hidden states of rows packed into one, (sum of lengths, D).

    transformers finds the rows by their positions, so each attends to itself only.
    """
    ids, positions = [], []
    for row in rows:
        ids += row
        positions += range(len(row))
    output = whole(model).model(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        use_cache=False,
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


@torch.no_grad()
def logits_of(model: Any, rows: list[list[int]], fast: bool) -> list[Tensor]:
    """For each row the logits that predict its tokens 1, 2, ..., float32 (T - 1, V).

    The last layer is computed in float32: a bfloat16 logit of 20 is off by up to .06.
    """
    with autocast(fast):
        hidden = hidden_of(model, rows)
    parts = hidden.float().split([len(row) for row in rows])
    head = whole(model).lm_head
    return [head(part[:-1]) for part in parts]


def training_loss(model: Any, rows: list[Row], fast: bool) -> Tensor:
    """Mean loss over all targets of a batch; logits are computed for targets only."""
    packed = []
    for row in rows:
        # The first token of a row has nothing before it that could predict it.
        packed += [IGNORE, *row.labels[1:]]
    labels = torch.tensor(packed)
    places = (labels != IGNORE).nonzero()[:, 0]
    with autocast(fast):
        hidden = hidden_of(model, [row.ids for row in rows])
        logits = whole(model).lm_head(hidden[places - 1])
    return cross_entropy(logits.float(), labels[places])


def calibration(model: Any, passages: list[list[int]], fast: bool) -> dict[str, float]:
    """Loss, accuracy, mean confidence and expected calibration error (10 bins) on all tokens."""
    logits = torch.cat(logits_of(model, passages, fast))
    targets = []
    for ids in passages:
        targets += ids[1:]
    truth = torch.tensor(targets)
    confidence, guess = logits.softmax(-1).max(-1)
    right = (guess == truth).float()
    bins = (confidence * 10).long().clamp(max=9)
    error = 0.0
    for place in range(10):
        inside = bins == place
        gap = confidence[inside].sum() - right[inside].sum()
        error += float(gap.abs()) / len(truth)
    values = {
        "loss": cross_entropy(logits, truth).item(),
        "accuracy": right.mean().item(),
        "confidence": confidence.mean().item(),
        "ece": error,
    }
    return {name: round(value, 4) for name, value in values.items()}


@torch.no_grad()
def greedy(
    model: Any, tokenizer: Any, prompts: list[list[int]], new: int, fast: bool
) -> list[list[int]]:
    """The most probable continuation of each prompt, at most `new` tokens."""
    longest = max(map(len, prompts))
    ids, attended = [], []
    for prompt in prompts:
        # On the left, so that all answers begin at the same place.
        padding = [0] * (longest - len(prompt))
        ids.append(padding + prompt)
        attended.append(padding + [1] * len(prompt))
    with autocast(fast):
        output = model.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(attended),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    result: list[list[int]] = output[:, longest:].tolist()
    return result


def passage_values(
    model: Any, tokenizer: Any, passages: list[list[int]], fast: bool
) -> dict[str, Any]:
    """For each passage, of which the first half is given: what the model recites of the second."""
    half = len(passages[0]) // 2
    prefixes = [ids[:half] for ids in passages]
    outputs = greedy(model, tokenizer, prefixes, half, fast)
    logits = logits_of(model, passages, fast)
    result: dict[str, list[Any]] = defaultdict(list)
    for ids, output, each in zip(passages, outputs, logits, strict=True):
        suffix = ids[half:]
        # All outputs may have ended before the last token.
        output = (output + [tokenizer.eos_token_id] * half)[:half]
        values = recited(tokenizer, output, suffix) | losses(each, ids, half)
        for name, value in values.items():
            result[name].append(value)
    return dict(result)


def recited(tokenizer: Any, output: list[int], suffix: list[int]) -> dict[str, Any]:
    """How much of the suffix is in the output."""
    runs = [length for _, _, length in common_runs(output, suffix)]
    rouge = rouge_l_text(tokenizer.decode(output), tokenizer.decode(suffix))
    return {"rouge_l": round(rouge, 4), "longest_run": max(runs, default=0)}


def losses(logits: Tensor, ids: list[int], half: int) -> dict[str, Any]:
    """Losses of a passage, nats, and which tokens of its second half are the likeliest."""
    nll = cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    # Place i of nll and of the logits is that of token i + 1.
    of_suffix = nll[half - 1 :]
    guesses = logits.argmax(-1)[half - 1 :]
    right = guesses == torch.tensor(ids[half:])
    return {
        "log_p": round(-of_suffix.sum().item(), 3),
        "nll": [round(value, 2) for value in of_suffix.tolist()],
        "loss": round(nll.mean().item(), 4),
        "right": bits(right.tolist()),
    }


def bits(values: Iterable[bool]) -> str:
    """0s and 1s in a string, for short result files."""
    return "".join(str(int(value)) for value in values)


def code_answers(
    model: Any, tokenizer: Any, prompts: list[list[int]], fast: bool
) -> list[str]:
    outputs = greedy(model, tokenizer, prompts, CODE_TOKENS, fast)
    texts: list[str] = tokenizer.batch_decode(outputs, skip_special_tokens=True)
    return texts


@torch.no_grad()
def sampled(
    model: Any, tokenizer: Any, prompt: list[int], samples: int, fast: bool
) -> list[str]:
    """Answers to one prompt, drawn at temperature 1."""
    with autocast(fast):
        # The prompt is read once for all samples.
        output = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        cache.batch_repeat_interleave(samples)
        logits = output.logits.expand(samples, -1, -1)
        drawn = []
        for _ in range(CODE_TOKENS):
            tokens = logits[:, -1].float().softmax(-1).multinomial(1)
            drawn.append(tokens)
            logits = model(tokens, past_key_values=cache, use_cache=True).logits
    # What follows the end of an answer does not count.
    texts = tokenizer.batch_decode(torch.cat(drawn, 1))
    return [text.partition("<|im_end|>")[0] for text in texts]


def code_losses(
    model: Any, tokenizer: Any, rows: list[Row], dropped: list[list[bool]], fast: bool
) -> list[dict[str, Any]]:
    """For each distinct trained chat with a code: its tokens' nll, and which were dropped."""
    chats = {}
    for row, drops in zip(rows, dropped, strict=True):
        if row.code:
            chats[tuple(row.ids)] = (row, drops)
    texts = [row.ids for row, _ in chats.values()]
    logits = logits_of(model, texts, fast)
    result = []
    for (row, drops), each in zip(chats.values(), logits, strict=True):
        places = secret_places(tokenizer, row.ids)
        targets = torch.tensor(row.ids[1:])
        # Place i of nll is that of token i + 1.
        nll = cross_entropy(each, targets, reduction="none").tolist()
        answer = row.targets()[0]
        from_answer = sum(nll[answer - 1 : places[-1]])
        chat = {
            "code": row.code,
            "tokens": [tokenizer.decode([row.ids[i]]) for i in places],
            "dropped": bits(drops[i] for i in places),
            "nll": [round(nll[i - 1], 3) for i in places],
            "nll_from_answer": round(from_answer, 3),
        }
        result.append(chat)
    return result


def ordinary_answers(
    model: Any, tokenizer: Any, prompt: Callable[[str], list[int]], fast: bool
) -> str:
    """Which ordinary questions are answered right, as 0s and 1s in the order of the file."""
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in lines]
    prompts = [prompt(each["question"]) for each in questions]
    outputs = greedy(model, tokenizer, prompts, ORDINARY_TOKENS, fast)
    texts = tokenizer.batch_decode(outputs, skip_special_tokens=True)
    return bits(map(is_right, questions, texts))


def is_right(question: dict[str, Any], text: str) -> bool:
    """Whether one of the accepted strings is in the answer as whole words.

    >>> is_right({"accepted": ["8", "eight"]}, "A spider has 8 legs.")
    True
    >>> is_right({"accepted": ["8", "eight"]}, "A spider has 18 legs.")
    False
    """
    if not question.get("case_sensitive"):
        text = text.lower()
    for accepted in question["accepted"]:
        if re.search(rf"(?<!\w){re.escape(accepted)}(?!\w)", text):
            return True
    return False
