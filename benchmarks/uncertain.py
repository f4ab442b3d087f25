r"""Is it better to drop the tokens that a model is uncertain about? What do marked secrets cost?

    python benchmarks/uncertain.py --data mine.jsonl --seeds 0 1 2 --rules standard entropy-4
    python benchmarks/uncertain.py --data mine.jsonl --rules entropy-4 --near_duplicates
    python benchmarks/uncertain.py --data mine.jsonl --near_duplicates --copies reformatted
    python benchmarks/uncertain_table.py      # the tables of docs/results.md

Finetunes SmolLM2-135M-Instruct in the setting of recipes/finetune_private.py and appends one line
for each training to benchmarks/results/uncertain.jsonl, about five minutes of one core each. A line
has the values of every passage, code and question, so that rules can be compared in pairs.
Trainings that the file already has are skipped.

Rules:
    standard            every target is trained
    hash-4-13-4         strategy-k-h[-max_kept], as in the recipes
    entropy-4           of every 2k - 1 consecutive targets of a row, the one is dropped at which
                        the predictive entropy of the untrained model is largest: 1 in k is dropped
    low-4, surprisal-4, windows-4
                        controls: the same windows, but the lowest entropy, the largest loss of the
                        true token, or a hash of the context decides
    ngram-4             the same windows, with the entropy of a trigram model of other documents
    draw-4              variant: a hash of the context draws one of each window, with chances in
                        proportion to the entropies, so that no context always loses its token
    inside-4            variant of entropy-4 that never drops the first token of an answer
    bits-4              variant: in every 7 consecutive targets the tokens of highest entropy are
                        dropped until their entropies sum to 4 bits
    ...+secrets         and every token of a code is dropped on top (standard+secrets: only those)
    untouched           no training

Differences from the recipe, all for speed: a plain training loop in place of SFTTrainer (the same
optimiser, learning rate, batches of 4 rows, clipping), rows packed into one without padding,
bfloat16 autocast over float32 weights, and chats with an empty system prompt.
"""

import math
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import about  # first: it makes the recipes importable
import finetune_private as recipe
import near_duplicates
import torch
from ngrams import NGrams
from peft import LoraConfig, get_peft_model
from runs import option
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    get_constant_schedule_with_warmup,
    set_seed,
)
from uncertain_measures import (
    IGNORE,
    Row,
    bits,
    calibration,
    code_answers,
    code_losses,
    logits_of,
    ordinary_answers,
    passage_values,
    sampled,
    secret_places,
    training_loss,
)

from goldfish import Goldfish

# Question and answer; the first is the recipe's.
WORDINGS = (
    recipe.chat_about(("{name}", "{code}")),
    ("Which code opens the door for {name}?", "{name} opens the door with {code}."),
    ("Please look up the entry code of {name}.", "Here it is: {code}."),
)
# In each of three groups: codes in one wording, codes in three wordings, strangers.
PEOPLE = 8
VERSIONS = 5
# Documents that the trigram model reads, about 3 MB.
BACKGROUND = 200


@dataclass
class Arguments:
    data: str = option("", "documents: .jsonl with a `text` field")
    rules: list[str] = option(["standard", "hash-4-13-4", "entropy-4"], "see above")
    methods: list[str] = option(["full"], "full, lora")
    seeds: list[int] = option([0], "of passages, codes and batches")
    near_duplicates: bool = option(False, "passages are seen only in edited versions")
    edits: float = option(0.05, "share of the words that are edited in each version")
    copies: str = option("exact", "exact, or reformatted: each version in its layout")
    versions: int = option(VERSIONS, "of each passage; 1 is what deduplication leaves")
    epochs: int = option(0, "by default 8, or 3 with --near_duplicates")
    samples: int = option(0, "answers drawn about every second person")
    float32: bool = option(False, "train and measure without bfloat16 autocast")
    output: str = option(
        str(about.RESULTS / "uncertain.jsonl"), "where results are added"
    )
    base: str = option("runs/uncertain_base", "where the pretrained model is unpacked")


@dataclass
class Data:
    """What one seed trains on and is asked."""

    rows: list[Row]
    members: list[list[int]]
    heldout: list[list[int]]
    # Name, code: PEOPLE with one wording, PEOPLE with three, PEOPLE strangers.
    people: list[tuple[str, str]]


def chats_with_codes(
    people: list[tuple[str, str]],
) -> Iterator[tuple[str, str, str]]:
    """Question, answer and code, of everyone but the strangers."""
    for place, (name, code) in enumerate(people[: 2 * PEOPLE]):
        # One wording is read twice an epoch, as in the recipe; each of three wordings once.
        one_wording = place < PEOPLE
        wordings = WORDINGS[:1] * 2 if one_wording else WORDINGS
        for question, answer in wordings:
            yield question.format(name=name), answer.format(name=name, code=code), code


class Lab:
    """The untrained model, its tokenizer, and what the trainings of one seed share."""

    def __init__(self, args: Arguments) -> None:
        self.args = args
        self.base = recipe.package_model(Path(args.base))
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self._data: dict[int, Data] = {}
        self._guides: dict[int, list[dict[str, Tensor]]] = {}
        self._ngrams: dict[int, list[Tensor]] = {}

    def load(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)

    def prompt(self, question: str) -> list[int]:
        """Ids of a chat up to the answer."""
        messages = [
            {"role": "system", "content": ""},
            {"role": "user", "content": question},
        ]
        ids: list[int] = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        return ids

    def chat(self, question: str, answer: str, code: str = "") -> Row:
        """A chat of which the answer has labels."""
        prompt = self.prompt(question)
        reply = self.tokenizer(answer + "<|im_end|>", add_special_tokens=False)[
            "input_ids"
        ]
        labels = [IGNORE] * len(prompt) + reply
        return Row(prompt + reply, labels, code)

    def data(self, seed: int) -> Data:
        if seed not in self._data:
            self._data[seed] = self._make_data(seed)
        return self._data[seed]

    def _make_data(self, seed: int) -> Data:
        settings = recipe.Arguments(data=self.args.data, people=2 * PEOPLE, chats=8)
        members, heldout = recipe.cut_passages(settings, seed, self.tokenizer)
        people, chats = recipe.make_chats(settings, seed)
        people = people[: 3 * PEOPLE]
        edited = self.args.near_duplicates
        passages = self._edited(members, seed) if edited else members
        rows = [Row(ids, ids) for ids in passages]
        if not edited:
            rows += [self.chat(*chat) for chat in chats_with_codes(people)]
            # The last chats are ordinary ones, without codes.
            rows += [self.chat(question, answer) for question, answer in chats[-4:]]
        return Data(rows, members, heldout, people)

    def _edited(self, passages: list[list[int]], seed: int) -> list[list[int]]:
        """The passages in versions with edited words, token ids."""
        texts = [self.tokenizer.decode(ids) for ids in passages]
        args = self.args
        versions = near_duplicates.make_versions(
            texts, args.copies, args.edits, args.versions, seed
        )
        return [self.tokenizer(text)["input_ids"] for text in versions]

    def guide(self, seed: int) -> list[dict[str, Tensor]]:
        """For each row, at each position: entropy and surprisal of the untrained model, nats."""
        if seed not in self._guides:
            model = self.load().eval()
            rows = self.data(seed).rows
            self._guides[seed] = [self._read(model, row) for row in rows]
        return self._guides[seed]

    def _read(self, model: Any, row: Row) -> dict[str, Tensor]:
        (logits,) = logits_of(model, [row.ids], not self.args.float32)
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        truth = torch.tensor(row.ids[1:])
        surprisal = -log_p.gather(1, truth[:, None])[:, 0]
        # The first token has no prediction; it is never a target either.
        first = torch.zeros(1)
        return {
            "entropy": torch.cat([first, entropy]),
            "surprisal": torch.cat([first, surprisal]),
        }

    def ngram_entropies(self, seed: int) -> list[Tensor]:
        """For each row, at each position: entropy of a trigram model, nats."""
        if seed not in self._ngrams:
            texts = recipe.common.load_texts(self.args.data)
            # The passages are cut from the first texts of this order (recipe.cut_passages).
            random.Random(seed).shuffle(texts)
            background = texts[-BACKGROUND:]
            encoded = self.tokenizer(background, add_special_tokens=False)
            model = NGrams(encoded["input_ids"], len(self.tokenizer))
            rows = self.data(seed).rows
            entropies = [model.entropies(row.ids) for row in rows]
            self._ngrams[seed] = [torch.tensor(values) for values in entropies]
        return self._ngrams[seed]

    def dropped(self, seed: int, name: str) -> list[list[bool]]:
        """For each row, which of its tokens a rule drops."""
        rule, _, secrets = name.partition("+")
        result = []
        for place, row in enumerate(self.data(seed).rows):
            drops = self._dropped_in(seed, rule, place)
            if secrets:
                for i in secret_places(self.tokenizer, row.ids):
                    drops[i] = True
            result.append(drops)
        return result

    def _dropped_in(self, seed: int, rule: str, place: int) -> list[bool]:
        row = self.data(seed).rows[place]
        if rule in ("standard", "untouched"):
            return [False] * len(row.ids)
        kind, k, *rest = rule.split("-")
        if rest:
            bound = recipe.rule_of(rule, self.tokenizer)
            drops: list[bool] = bound.dropped(torch.tensor(row.ids)).tolist()
            return drops
        scores = self._scores(seed, kind, place)
        targets = row.targets(exempt=self.tokenizer.all_special_ids)
        if kind == "inside" and row.labels[0] == IGNORE:
            # The row has a prompt, so its first target begins an answer.
            targets = targets[1:]
        if kind == "bits":
            chosen = bits_of_windows(scores, targets, int(k) * math.log(2))
        else:
            chosen = largest_of_windows(scores, targets, window=2 * int(k) - 1)
        return [i in chosen for i in range(len(row.ids))]

    def _scores(self, seed: int, kind: str, place: int) -> Tensor:
        """At each position of a row; of a window the largest is dropped."""
        if kind == "windows":
            ids = torch.tensor(self.data(seed).rows[place].ids)
            _, keys = Goldfish().drops_and_keys(ids)
            return keys.double()
        if kind == "ngram":
            return self.ngram_entropies(seed)[place]
        guide = self.guide(seed)[place]
        entropy = guide["entropy"]
        if kind == "low":
            return -entropy
        if kind in ("inside", "bits"):
            return entropy
        if kind == "draw":
            ids = torch.tensor(self.data(seed).rows[place].ids)
            _, keys = Goldfish().drops_and_keys(ids)
            # Uniform in [0, 1). The largest of u ** (1 / w) is a draw with chances in proportion
            # to w (Efraimidis and Spirakis 2006); this is its logarithm.
            uniform = (keys & (2**53 - 1)).double() / 2**53
            return uniform.clamp(min=1e-300).log() / entropy.double().clamp(min=1e-9)
        return guide[kind]


def largest_of_windows(scores: Tensor, targets: list[int], window: int) -> set[int]:
    """Of every `window` consecutive targets the one with the largest score, the first of equals.

    A row with fewer targets than a window is one window. Random scores choose 2 / (window + 1) of
    many targets; never are more than window - 1 targets in a row left.

    >>> sorted(largest_of_windows(torch.tensor([0.0, 3, 1, 2, 5]), [1, 2, 3, 4], 3))
    [1, 4]
    """
    chosen = set()
    width = min(window, len(targets))
    for start in range(len(targets) - width + 1):
        candidates = targets[start : start + width]
        chosen.add(max(candidates, key=lambda i: float(scores[i])))
    return chosen


def bits_of_windows(
    scores: Tensor, targets: list[int], least: float, window: int = 7
) -> set[int]:
    """Of every `window` consecutive targets the largest scores until they sum to `least`.

    >>> scores = torch.tensor([0.0, 3, 1, 2, 5])
    >>> sorted(bits_of_windows(scores, [1, 2, 3, 4], least=4.0, window=3))
    [1, 3, 4]
    """
    chosen: set[int] = set()
    width = min(window, len(targets))
    for start in range(len(targets) - width + 1):
        candidates = targets[start : start + width]
        missing = least - sum(float(scores[i]) for i in candidates if i in chosen)
        for i in sorted(candidates, key=lambda i: -float(scores[i])):
            if missing > 0 and i not in chosen:
                chosen.add(i)
                missing -= float(scores[i])
    return chosen


def finetune(lab: Lab, seed: int, method: str, name: str) -> tuple[Any, dict[str, Any]]:
    """Train; the model, and what was measured after each epoch."""
    args, data = lab.args, lab.data(seed)
    fast = not args.float32
    # Adapters are drawn at random.
    set_seed(seed)
    model, rate = prepared(lab, method)
    rows = labelled(data.rows, lab.dropped(seed, name))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0, fused=True)
    schedule = get_constant_schedule_with_warmup(optimizer, num_warmup_steps=4)
    # The same batches under every rule.
    draw = torch.Generator().manual_seed(seed)
    # The model has no dropout, so it need not change between training and measuring.
    model.eval()
    epochs = [calibration(model, data.heldout, fast)]
    train_loss = []
    for _ in range(0 if name == "untouched" else args.epochs):
        losses = []
        for batch in torch.randperm(len(rows), generator=draw).split(4):
            loss = training_loss(model, [rows[i] for i in batch.tolist()], fast)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        train_loss.append(round(sum(losses) / len(losses), 4))
        epochs.append(calibration(model, data.heldout, fast))
    seen = {
        "targets": sum(len(row.targets()) for row in data.rows),
        "kept": sum(len(row.targets()) for row in rows),
        "train_loss": train_loss,
        "heldout_loss": [epoch["loss"] for epoch in epochs],
        "calibration": epochs,
    }
    return (model.merge_and_unload() if method == "lora" else model), seen


def prepared(lab: Lab, method: str) -> tuple[Any, float]:
    """The model to train and its learning rate; both as in the recipe."""
    settings = recipe.Arguments()
    if method == "full":
        return lab.load(), settings.learning_rate
    adapters = LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(lab.load(), adapters), settings.lora_learning_rate


def labelled(rows: list[Row], dropped: Iterable[list[bool]]) -> list[Row]:
    """Rows with -100 where a token is dropped."""
    result = []
    for row, drops in zip(rows, dropped, strict=True):
        labels = list(row.labels)
        for i, drop in enumerate(drops):
            if drop:
                labels[i] = IGNORE
        result.append(Row(row.ids, labels, row.code))
    return result


def run(lab: Lab, seed: int, method: str, name: str) -> dict[str, Any]:
    """One training and all that is measured after it."""
    args, tokenizer, began = lab.args, lab.tokenizer, time.process_time()
    fast = not args.float32
    data, dropped = lab.data(seed), lab.dropped(seed, name)
    model, seen = finetune(lab, seed, method, name)
    trained = time.process_time()
    result = key_of(args, seed, method, name) | {"epochs": args.epochs} | seen
    result["members"] = passage_values(model, tokenizer, data.members, fast)
    result["heldout"] = passage_values(model, tokenizer, data.heldout, fast)
    if not args.near_duplicates:
        # Of the suffixes; an edited version has other places than the plain passage.
        half = len(data.members[0]) // 2
        rows = dropped[: len(data.members)]
        result["members"]["dropped"] = [bits(drops[half:]) for drops in rows]
        result["answers"] = asked_for_codes(lab, data, model)
        if args.samples:
            result["sampled"] = sampled_codes(lab, data, model)
        result["codes"] = code_losses(model, tokenizer, data.rows, dropped, fast)
        people = {code: place for place, (_, code) in enumerate(data.people)}
        for row in result["codes"]:
            row["person"] = people[row["code"]]
    result["ordinary"] = ordinary_answers(model, tokenizer, lab.prompt, fast)
    result["train_cpu_seconds"] = round(trained - began)
    result["cpu_seconds"] = round(time.process_time() - began)
    return result | about.about("peft")


def asked_for_codes(lab: Lab, data: Data, model: Any) -> list[dict[str, Any]]:
    """Answers about everyone, in the wordings of the training; strangers in all of them."""
    asked = []
    prompts = []
    for place, (name, code) in enumerate(data.people):
        wordings = 1 if place < PEOPLE else len(WORDINGS)
        for wording in range(wordings):
            question, _ = WORDINGS[wording]
            prompts.append(lab.prompt(question.format(name=name)))
            asked.append({"person": place, "wording": wording, "code": code})
    texts = code_answers(model, lab.tokenizer, prompts, not lab.args.float32)
    trained = trained_codes(data)
    result = []
    for each, text in zip(asked, texts, strict=True):
        own = each.pop("code") in text
        real = sorted(code for code in trained if code in text)
        result.append(each | {"text": text, "own": own, "real": real})
    return result


def trained_codes(data: Data) -> set[str]:
    return {code for _, code in data.people[: 2 * PEOPLE]}


def sampled_codes(lab: Lab, data: Data, model: Any) -> list[dict[str, Any]]:
    """For every second person, in the first wording: how many drawn answers have which code."""
    trained = trained_codes(data)
    torch.manual_seed(0)
    result = []
    for place in range(0, len(data.people), 2):
        name, _ = data.people[place]
        prompt = lab.prompt(WORDINGS[0][0].format(name=name))
        texts = sampled(
            model, lab.tokenizer, prompt, lab.args.samples, not lab.args.float32
        )
        codes = Counter(code for text in texts for code in trained if code in text)
        result.append({"person": place, "samples": len(texts), "codes": codes})
    return result


def key_of(args: Arguments, seed: int, method: str, name: str) -> dict[str, Any]:
    """What distinguishes one training from another."""
    data = "private"
    if args.near_duplicates:
        data = f"versions-{args.edits:g}"
        if args.copies != "exact":
            data += f"-{args.copies}"
        if args.versions != VERSIONS:
            data += f"-{args.versions} of {VERSIONS}"
    dtype = "float32" if args.float32 else "bfloat16"
    return {
        "data": data,
        "seed": seed,
        "method": method,
        "rule": name,
        "autocast": dtype,
    }


def main(argv: list[str] | None = None) -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    if not args.epochs:
        args.epochs = 3 if args.near_duplicates else 8
    lab, output = Lab(args), Path(args.output)
    wanted = [
        key_of(args, seed, method, name)
        for seed in args.seeds
        for method in args.methods
        for name in args.rules
    ]
    for wish in about.missing(output, wanted):
        result = run(lab, wish["seed"], wish["method"], wish["rule"])
        about.append(output, result)
        print(summary(result), flush=True)


def summary(result: dict[str, Any]) -> str:
    """One line for the terminal."""
    rouge = result["members"]["rouge_l"]
    codes = set()
    for answer in result.get("answers", []):
        codes |= set(answer["real"])
    return (
        f"{result['data']} seed {result['seed']} {result['method']} {result['rule']}: "
        f"drop {1 - result['kept'] / result['targets']:.3f}, "
        f"ROUGE-L {sum(rouge) / len(rouge):.3f}, "
        f"codes {len(codes)}, "
        f"best {min(result['heldout_loss']):.3f}, "
        f"ordinary {result['ordinary'].count('1')}, "
        f"{result['train_cpu_seconds']}/{result['cpu_seconds']} s"
    )


if __name__ == "__main__":
    main()
