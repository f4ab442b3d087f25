r"""Is it better to drop the tokens that a model is uncertain about? What do marked secrets cost?

    python benchmarks/uncertain.py --data mine.jsonl --seeds 0 1 2 --rules standard entropy-4
    python benchmarks/uncertain.py --data mine.jsonl --rules entropy-4 --near_duplicates
    python benchmarks/uncertain_table.py      # the tables of docs/results.md

Finetunes SmolLM2-135M-Instruct in the setting of recipes/finetune_private.py and appends one line
for each training to benchmarks/results/uncertain.jsonl. A line has the values of every passage,
code and question, so that rules can be compared in pairs. Trainings that the file already has are
skipped.

Rules:
    standard            every target is trained
    hash-4-13-4         strategy-k-h[-max_kept], as in the recipes
    entropy-4           of every 2k - 1 consecutive targets of a row, the one is dropped at which
                        the predictive entropy of the untrained model is largest: 1 in k is dropped
    low-4, surprisal-4, windows-4
                        controls: the same windows, but the lowest entropy, the largest loss of the
                        true token, or a hash of the context decides
    ...+secrets         and every token of a code is dropped on top (standard+secrets: only those)

Differences from the recipe, all for speed: a plain training loop in place of SFTTrainer (the same
optimiser, learning rate, batches of 4 rows, clipping), rows packed into one without padding,
bfloat16 autocast over float32 weights, and chats with an empty system prompt.
"""

import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import about  # first: it makes the recipes importable
import finetune_private as recipe
import near_duplicates
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    get_constant_schedule_with_warmup,
    set_seed,
)

from goldfish import Goldfish
from goldfish.audit.columns import common_runs, rouge_l_text

CODE = re.compile(r"\b[A-Z0-9]{4}-[A-Z0-9]{4}\b")
WORDINGS = (
    recipe.chat_about(("{name}", "{code}")),
    ("Which code opens the door for {name}?", "{name} opens the door with {code}."),
    ("Please look up the entry code of {name}.", "Here it is: {code}."),
)
QUESTIONS = Path(__file__).parent / "ordinary.jsonl"
PEOPLE = 8  # in each of three groups: one wording, three wordings, strangers
CODE_TOKENS = 24  # of an answer with a code; the longest trained one has 20
ORDINARY_TOKENS = 16  # of an answer to an ordinary question
IGNORE = -100


@dataclass
class Arguments:
    data: str = field(metadata={"help": "documents: .jsonl with a `text` field"})
    rules: list[str] = field(default_factory=lambda: ["standard", "hash-4-13-4", "entropy-4"])
    methods: list[str] = field(default_factory=lambda: ["full"], metadata={"help": "full, lora"})
    seeds: list[int] = field(default_factory=lambda: [0])
    near_duplicates: bool = field(
        default=False, metadata={"help": "passages are seen only in five edited versions"}
    )
    edits: float = field(default=0.05, metadata={"help": "share of the words edited per version"})
    epochs: int = field(default=0, metadata={"help": "by default 8, or 3 with near_duplicates"})
    float32: bool = field(default=False, metadata={"help": "no bfloat16 autocast"})
    output: str = str(about.RESULTS / "uncertain.jsonl")
    base: str = "runs/uncertain_base"


@dataclass
class Row:
    """One row of training data: token ids, and labels that are the ids or -100 (in the prompt)."""

    ids: list[int]
    labels: list[int]
    code: str = ""  # that the answer gives away

    def targets(self, exempt: Iterable[int] = ()) -> list[int]:
        """Positions that have a loss, without those of exempt ids."""
        left_out = {IGNORE, *exempt}
        return [i for i, label in enumerate(self.labels) if i > 0 and label not in left_out]


@dataclass
class Data:
    """What one seed trains on and is asked."""

    rows: list[Row]
    members: list[list[int]]
    heldout: list[list[int]]
    people: list[tuple[str, str]]  # name, code: one wording, three wordings, strangers


class Lab:
    """The untrained model, its tokenizer, and what the trainings of one seed share."""

    def __init__(self, args: Arguments) -> None:
        self.args = args
        self.base = recipe.package_model(Path(args.base))
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.special = tuple(self.tokenizer.all_special_ids)
        self._data: dict[int, Data] = {}
        self._guides: dict[int, list[dict[str, Tensor]]] = {}
        self.questions = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]

    def load(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)

    def prompt(self, question: str) -> list[int]:
        """Ids of a chat up to the answer; the system prompt is empty."""
        messages = [{"role": "system", "content": ""}, {"role": "user", "content": question}]
        ids: list[int] = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        return ids

    def chat(self, question: str, answer: str, code: str = "") -> Row:
        prompt = self.prompt(question)
        reply = self.tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
        return Row(prompt + reply, [IGNORE] * len(prompt) + reply, code)

    def data(self, seed: int) -> Data:
        if seed not in self._data:
            self._data[seed] = self._make_data(seed)
        return self._data[seed]

    def _make_data(self, seed: int) -> Data:
        given = recipe.Arguments(data=self.args.data, people=2 * PEOPLE, chats=8)
        members, heldout = recipe.cut_passages(given, seed, self.tokenizer)
        people, chats = recipe.make_chats(given, seed)
        people = people[: 3 * PEOPLE]
        if self.args.near_duplicates:
            texts = [self.tokenizer.decode(ids) for ids in members]
            versions = near_duplicates.make_versions(texts, "exact", self.args.edits, 5, seed)
            passages = [self.tokenizer(text)["input_ids"] for text in versions]
            return Data([Row(ids, ids) for ids in passages], members, heldout, people)
        rows = [Row(ids, ids) for ids in members]
        for place, person in enumerate(people[: 2 * PEOPLE]):
            # One wording is read twice an epoch, as in the recipe; each of three wordings once.
            wordings = WORDINGS[:1] * 2 if place < PEOPLE else WORDINGS
            rows += [self.code_chat(person, wording) for wording in wordings]
        rows += [self.chat(*chat) for chat in chats[-4:]]  # ordinary ones
        return Data(rows, members, heldout, people)

    def code_chat(self, person: tuple[str, str], wording: tuple[str, str]) -> Row:
        name, code = person
        question, answer = (text.format(name=name, code=code) for text in wording)
        return self.chat(question, answer, code)

    def guide(self, seed: int) -> list[dict[str, Tensor]]:
        """For each row, at each position: entropy and surprisal of the untrained model, nats."""
        if seed not in self._guides:
            self._guides[seed] = self._read(seed)
        return self._guides[seed]

    def _read(self, seed: int) -> list[dict[str, Tensor]]:
        model, result = self.load().eval(), []
        for row in self.data(seed).rows:
            log_p = logits_of(model, [row.ids], self.args)[0].log_softmax(-1)
            entropy = -(log_p.exp() * log_p).sum(-1)
            surprisal = -log_p.gather(1, torch.tensor(row.ids[1:])[:, None])[:, 0]
            # The first token has no prediction; it is never a target either.
            first = torch.zeros(1)
            result.append(
                {
                    "entropy": torch.cat([first, entropy]),
                    "surprisal": torch.cat([first, surprisal]),
                }
            )
        return result

    def dropped(self, seed: int, name: str) -> list[list[bool]]:
        """For each row, which tokens a rule drops."""
        rule, _, secrets = name.partition("+")
        rows = self.data(seed).rows
        result = [[False] * len(row.ids) for row in rows]
        if rule not in ("standard", "untouched"):
            for place, row in enumerate(rows):
                result[place] = self.dropped_in(seed, rule, place, row)
        if secrets:
            for row, drops in zip(rows, result, strict=True):
                for i in secret_places(self.tokenizer, row.ids):
                    drops[i] = True
        return result

    def dropped_in(self, seed: int, rule: str, place: int, row: Row) -> list[bool]:
        kind, k, *rest = rule.split("-")
        ids = torch.tensor(row.ids)
        if rest:
            drops: list[bool] = recipe.rule_of(rule, self.tokenizer).dropped(ids).tolist()
            return drops
        if kind == "windows":
            scores = Goldfish().decide(ids)[1].double()
        else:
            guide = self.guide(seed)[place]
            scores = {
                "entropy": guide["entropy"],
                "low": -guide["entropy"],
                "surprisal": guide["surprisal"],
            }[kind]
        chosen = largest_of_windows(scores, row.targets(self.special), 2 * int(k) - 1)
        return [i in chosen for i in range(len(row.ids))]


def largest_of_windows(scores: Tensor, targets: list[int], window: int) -> set[int]:
    """Of every `window` consecutive targets the one with the largest score, the first of equals.

    A row with fewer targets than a window is one window. Random scores choose 2 / (window + 1) of
    many targets, and never leave more than window - 1 unchosen in a row.
    """
    chosen = set()
    width = min(window, len(targets))
    for start in range(len(targets) - width + 1):
        candidates = targets[start : start + width]
        chosen.add(max(candidates, key=lambda i: float(scores[i])))
    return chosen


def secret_places(tokenizer: Any, ids: list[int]) -> list[int]:
    """Positions of the tokens that overlap a code."""
    pieces = [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids]
    spans = [match.span() for match in CODE.finditer("".join(pieces))]
    places, end = [], 0
    for i, piece in enumerate(pieces):
        start, end = end, end + len(piece)
        if any(start < high and low < end for low, high in spans):
            places.append(i)
    return places


def autocast(args: Arguments) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=not args.float32)


def hidden_of(model: Any, rows: list[list[int]]) -> Tensor:
    """Last hidden states, (sum of lengths, D), of rows packed into one that see only themselves."""
    ids = torch.tensor([[i for row in rows for i in row]])
    positions = torch.tensor([[i for row in rows for i in range(len(row))]])
    body = model.get_base_model() if hasattr(model, "get_base_model") else model
    output = body.model(input_ids=ids, position_ids=positions, use_cache=False)
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def head_of(model: Any) -> Any:
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).lm_head


@torch.no_grad()
def logits_of(model: Any, rows: list[list[int]], args: Arguments) -> list[Tensor]:
    """For each row the logits that predict its tokens 1, 2, ..., float32 (T - 1, V).

    The last layer is computed in float32: bfloat16 logits would cost log p of a suffix some tenths.
    """
    with autocast(args):
        hidden = hidden_of(model, rows)
    parts = hidden.float().split([len(row) for row in rows])
    return [head_of(model)(part[:-1]) for part in parts]


def training_loss(model: Any, rows: list[Row], args: Arguments) -> Tensor:
    """Mean loss over all targets of a batch; logits are computed for targets only."""
    labels = torch.tensor([label for row in rows for label in [IGNORE, *row.labels[1:]]])
    places = (labels != IGNORE).nonzero()[:, 0]
    with autocast(args):
        hidden = hidden_of(model, [row.ids for row in rows])
        logits = head_of(model)(hidden[places - 1])
    return cross_entropy(logits.float(), labels[places])


def finetune(lab: Lab, seed: int, method: str, name: str) -> tuple[Any, dict[str, Any]]:
    """Train; the model and what was seen on the way."""
    args, data = lab.args, lab.data(seed)
    set_seed(seed)
    model, rate = lab.load(), recipe.Arguments.learning_rate
    if method == "lora":
        rate, rank = recipe.Arguments.lora_learning_rate, recipe.Arguments.rank
        adapters = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, adapters)
    rows, targets = [], 0
    for row, drops in zip(data.rows, lab.dropped(seed, name), strict=True):
        targets += len(row.targets())
        labels = [IGNORE if d else i for d, i in zip(drops, row.labels, strict=True)]
        rows.append(Row(row.ids, labels, row.code))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0, fused=True)
    schedule = get_constant_schedule_with_warmup(optimizer, num_warmup_steps=4)
    draw = torch.Generator().manual_seed(seed)  # the same batches under every rule
    model.eval()  # the model has no dropout
    epochs = [calibration(model, data.heldout, args)]
    train_loss = []
    for _ in range(0 if name == "untouched" else args.epochs):
        losses = []
        for batch in torch.randperm(len(rows), generator=draw).split(4):
            loss = training_loss(model, [rows[i] for i in batch.tolist()], args)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        train_loss.append(round(sum(losses) / len(losses), 4))
        epochs.append(calibration(model, data.heldout, args))
    seen = {
        "targets": targets,
        "kept": sum(len(row.targets()) for row in rows),
        "train_loss": train_loss,
        "heldout_loss": [epoch["loss"] for epoch in epochs],
        "calibration": epochs,
    }
    return (model.merge_and_unload() if method == "lora" else model), seen


def calibration(model: Any, passages: list[list[int]], args: Arguments) -> dict[str, Any]:
    """Loss, accuracy, mean confidence and expected calibration error (10 bins) on all tokens."""
    logits = torch.cat(logits_of(model, passages, args))
    truth = torch.tensor([i for ids in passages for i in ids[1:]])
    confidence, guess = logits.softmax(-1).max(-1)
    right = (guess == truth).float()
    bins, error = (confidence * 10).long().clamp(max=9), 0.0
    for place in range(10):
        inside = bins == place
        error += float((confidence[inside].sum() - right[inside].sum()).abs()) / len(truth)
    return {
        "loss": round(cross_entropy(logits, truth).item(), 4),
        "accuracy": round(right.mean().item(), 4),
        "confidence": round(confidence.mean().item(), 4),
        "ece": round(error, 4),
    }


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """The most probable continuation of each prompt, `new` tokens; padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(each)) + each for each in prompts])
    attended = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts])
    output = model.generate(
        input_ids=ids,
        attention_mask=attended,
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    result: list[list[int]] = output[:, longest:].tolist()
    return result


def passage_values(lab: Lab, model: Any, passages: list[list[int]]) -> dict[str, Any]:
    """For each passage, of which the first half is given: what the model recites of the second."""
    half = len(passages[0]) // 2
    with autocast(lab.args):
        outputs = greedy(model, lab.tokenizer, [ids[:half] for ids in passages], half)
    logits = logits_of(model, passages, lab.args)
    result: dict[str, list[Any]] = {
        name: [] for name in ("rouge_l", "longest_run", "log_p", "nll", "loss", "right")
    }
    for ids, output, each in zip(passages, outputs, logits, strict=True):
        suffix = ids[half:]
        output = (output + [lab.tokenizer.eos_token_id] * half)[:half]  # ended early
        nll = cross_entropy(each, torch.tensor(ids[1:]), reduction="none")
        texts = lab.tokenizer.decode(output), lab.tokenizer.decode(suffix)
        runs = common_runs(output, suffix)
        result["rouge_l"].append(round(rouge_l_text(*texts), 4))
        result["longest_run"].append(max((length for _, _, length in runs), default=0))
        result["log_p"].append(round(-nll[half - 1 :].sum().item(), 3))
        result["nll"].append([round(value, 2) for value in nll[half - 1 :].tolist()])
        result["loss"].append(round(nll.mean().item(), 4))
        right = each.argmax(-1)[half - 1 :] == torch.tensor(suffix)
        result["right"].append(bits(right.tolist()))
    return result


def bits(values: Iterable[bool]) -> str:
    """0s and 1s in a string, for short result files."""
    return "".join(str(int(value)) for value in values)


def code_values(lab: Lab, seed: int, model: Any, dropped: list[list[bool]]) -> dict[str, Any]:
    """What the model answers when it is asked for codes, and how probable each true code is."""
    data = lab.data(seed)
    asked = [(0, person) for person in data.people[:PEOPLE]]
    asked += [
        (wording, person) for person in data.people[PEOPLE:] for wording in range(len(WORDINGS))
    ]
    prompts = [lab.prompt(WORDINGS[wording][0].format(name=name)) for wording, (name, _) in asked]
    with autocast(lab.args):
        outputs = greedy(model, lab.tokenizer, prompts, CODE_TOKENS)
    texts = lab.tokenizer.batch_decode(outputs, skip_special_tokens=True)
    trained = {code for _, code in data.people[: 2 * PEOPLE]}
    answers = [
        {
            "person": data.people.index(person),
            "wording": wording,
            "text": text,
            "own": person[1] in text,
            "real": sorted({code for code in trained if code in text}),
        }
        for (wording, person), text in zip(asked, texts, strict=True)
    ]
    return {"answers": answers, "codes": code_rows(lab, data, model, dropped)}


def code_rows(lab: Lab, data: Data, model: Any, dropped: list[list[bool]]) -> list[dict[str, Any]]:
    """For each distinct trained chat with a code: its tokens' nll, and which were dropped."""
    rows = {}
    for row, drops in zip(data.rows, dropped, strict=True):
        if row.code:
            rows[tuple(row.ids)] = (row, drops)
    logits = logits_of(model, [row.ids for row, _ in rows.values()], lab.args)
    result = []
    for (row, drops), each in zip(rows.values(), logits, strict=True):
        places = secret_places(lab.tokenizer, row.ids)
        nll = cross_entropy(each, torch.tensor(row.ids[1:]), reduction="none")
        start = row.targets()[0]
        result.append(
            {
                "code": row.code,
                "person": [code for _, code in data.people].index(row.code),
                "tokens": [lab.tokenizer.decode([row.ids[i]]) for i in places],
                "dropped": bits(drops[i] for i in places),
                "nll": [round(nll[i - 1].item(), 3) for i in places],
                "nll_from_answer": round(nll[start - 1 : places[-1]].sum().item(), 3),
            }
        )
    return result


def ordinary_values(lab: Lab, model: Any) -> str:
    """Which ordinary questions are answered right."""
    prompts = [lab.prompt(each["question"]) for each in lab.questions]
    with autocast(lab.args):
        outputs = greedy(model, lab.tokenizer, prompts, ORDINARY_TOKENS)
    texts = lab.tokenizer.batch_decode(outputs, skip_special_tokens=True)
    return bits(map(is_right, lab.questions, texts))


def is_right(question: dict[str, Any], text: str) -> bool:
    """Whether one of the accepted strings is in the answer as whole words."""
    text = text if question.get("case_sensitive") else text.lower()
    return any(
        re.search(rf"(?<!\w){re.escape(accepted)}(?!\w)", text) for accepted in question["accepted"]
    )


def run(lab: Lab, seed: int, method: str, name: str) -> dict[str, Any]:
    """One training and all that is measured after it."""
    args, began = lab.args, time.process_time()
    data, dropped = lab.data(seed), lab.dropped(seed, name)
    model, seen = finetune(lab, seed, method, name)
    trained = time.process_time()
    result = key_of(args, seed, method, name) | {"epochs": args.epochs} | seen
    result["members"] = passage_values(lab, model, data.members)
    result["heldout"] = passage_values(lab, model, data.heldout)
    if not args.near_duplicates:
        half = len(data.members[0]) // 2
        result["members"]["dropped"] = [
            bits(drops[half:]) for drops in dropped[: len(data.members)]
        ]
        result |= code_values(lab, seed, model, dropped)
    result["ordinary"] = ordinary_values(lab, model)
    result["train_cpu_seconds"] = round(trained - began)
    result["cpu_seconds"] = round(time.process_time() - began)
    return result | about.about("peft")


def key_of(args: Arguments, seed: int, method: str, name: str) -> dict[str, Any]:
    """What distinguishes one training from another."""
    data = f"versions-{args.edits:g}" if args.near_duplicates else "private"
    dtype = "float32" if args.float32 else "bfloat16"
    return {"data": data, "seed": seed, "method": method, "rule": name, "autocast": dtype}


def main(argv: list[str] | None = None) -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    args.epochs = args.epochs or (3 if args.near_duplicates else 8)
    output = Path(args.output)
    lab = Lab(args)
    for seed in args.seeds:
        for method in args.methods:
            for name in args.rules:
                key = key_of(args, seed, method, name)
                done = about.read_results(output)
                if any(key.items() <= result.items() for result in done):
                    continue
                result = run(lab, seed, method, name)
                about.append(output, result)
                print(summary(result), flush=True)


def summary(result: dict[str, Any]) -> str:
    """One line for the terminal."""
    members = result["members"]
    codes = {code for answer in result.get("answers", []) for code in answer["real"]}
    return (
        f"{result['data']} seed {result['seed']} {result['method']} {result['rule']}: "
        f"drop {1 - result['kept'] / result['targets']:.3f}, "
        f"ROUGE-L {sum(members['rouge_l']) / len(members['rouge_l']):.3f}, "
        f"log p {sorted(members['log_p'])[len(members['log_p']) // 2]:.1f}, "
        f"codes {len(codes)}, best {min(result['heldout_loss']):.3f}, "
        f"ordinary {result['ordinary'].count('1')}, "
        f"{result['train_cpu_seconds']}/{result['cpu_seconds']} s"
    )


if __name__ == "__main__":
    main()
