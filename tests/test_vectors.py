"""rule_vectors.json is what the specification says, and two other implementations agree with it.

The second one, below, shares no line with `goldfish`: numpy for the hash, a window at a time, and a
document's whole text for letters and secrets. It is what a port would look like.
"""

import codecs
import functools
import hashlib
import importlib.util
import json
import re
import unicodedata
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import goldfish.spec
from goldfish import Goldfish
from goldfish.letters import Vocabulary
from goldfish.masking import mask_batch
from goldfish.receipt import DropCounts, count_drops

GOLDEN = Path(__file__).parent / "golden"
VECTORS = json.loads((GOLDEN / "rule_vectors.json").read_text(encoding="ascii"))
ENTRIES = [bytes.fromhex(entry) for entry in VECTORS["text"]["vocabulary"]]
CASES = [(group, rule) for group in ("ids", "text") for rule in VECTORS[group]["rules"]]
SECRETS = [("text", rule) for rule in VECTORS["text"]["secrets"]]
ENTROPY = [("entropy", rule) for rule in VECTORS["entropy"]["rules"]]
SPREAD = [
    (group, rule) for group in ("ids", "text") for rule in VECTORS[group]["max_kept"]
]


def name(case) -> str:
    _, rule = case
    return "-".join(str(v) for key, v in rule.items() if key != "dropped")


# --- the second implementation

M64 = 1 << 64
POWERS = [pow(0xD1342543DE82EF95, n, M64) for n in range(2000)]


def scramble(numbers) -> np.ndarray:
    """splitmix64 of an array of unsigned 64-bit integers."""
    x = np.asarray(numbers, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def window_key(window: list[int], seed: int) -> int:
    """Horner's rule written out: sum of scramble(t) * M**(tokens after t)."""
    n = len(window)
    symbols = scramble([t % M64 for t in window]).tolist() if window else []
    total = sum(s * POWERS[n - 1 - j] for j, s in enumerate(symbols))
    with np.errstate(over="ignore"):
        return int(
            scramble([(total + n + int(scramble(scramble([seed]))[0])) % M64])[0]
        )


def is_below(key: int, k: float) -> bool:
    """Whether key // 2**32 is below 2**32 / k, as fractions."""
    return (key >> 32) * Fraction(k) < 1 << 32


def is_natural(key: int, k: float, max_kept: int) -> bool:
    """Whether natural drops at the rate of this key would leave a mean distance above k."""
    kept = 1 - Fraction(
        key >> 32, 1 << 32
    )  # with that rate, the probability that a token is no natural drop
    return sum(kept**n for n in range(max_kept + 1)) > Fraction(k)


def documents(row: dict) -> list[list[int]]:
    """The places of each document's attended tokens."""
    ids, result, ended, number, last = row["ids"], [], True, None, 0
    mask = row.get("attention_mask", [1] * len(ids))
    positions = zip(row.get("position_ids", ()), mask, strict=False)
    least = min(
        (position for position, attended in positions if attended), default=None
    )
    for place, attended in enumerate(mask):
        if attended:
            position = row.get("position_ids", range(len(ids)))[place]
            if ended or attended != number or position in (least, *range(last)):
                result.append([])
            result[-1].append(place)
            number, last = attended, position
            ended = ids[place] == row.get("document_end")
    return result


def normal(character: str) -> str:
    """A character's normal form: what is a letter or a number of its folded decomposition."""
    form = unicodedata.normalize("NFKD", character).casefold()
    return re.sub(r"[^\w]|_", "", unicodedata.normalize("NFKD", form))


@functools.cache
def letter_contexts(tokens: tuple[bytes, ...]) -> list[str]:
    """For every token of a document the letters before it."""
    decoder, result = codecs.getincrementaldecoder("utf-8")("ignore"), [""]
    for token in tokens:
        result.append(result[-1] + "".join(map(normal, decoder.decode(token))))
    return result


def has_secret(tokens: list[bytes], secrets: str) -> list[bool]:
    """For every token of a document whether one of its bytes belongs to a secret, byte by byte."""
    data, characters = b"".join(tokens), []
    while sum(size for _, size in characters) < len(data):
        rest = data[sum(size for _, size in characters) :]
        for size in range(1, 5):
            try:
                characters.append((rest[:size].decode(), size))
                break
            except UnicodeDecodeError:
                continue
        else:
            characters.append((chr(0xDC00 + rest[0]), 1))
    secret = [False] * len(characters)
    for match in re.finditer(
        secrets, "".join(character for character, _ in characters)
    ):
        spans = [span for span in match.regs[1:] if span[0] >= 0] or match.regs
        for place in range(*spans[0]):
            secret[place] = True
    by_byte = [
        s for s, (_, size) in zip(secret, characters, strict=True) for _ in range(size)
    ]
    ends = np.cumsum([len(token) for token in tokens])
    return [
        any(by_byte[end - len(token) : end])
        for token, end in zip(tokens, ends, strict=True)
    ]


def most_uncertain(values: np.ndarray, window: int) -> set[int]:
    """For every value, whether a window fits between the larger ones on its left and right."""
    chosen, width = set(), min(window, len(values))
    for i, value in enumerate(values):
        # An equal value wins on the left and loses on the right.
        left = np.flatnonzero(values[:i] >= value)
        right = np.flatnonzero(values[i + 1 :] > value)
        begin = left[-1] + 1 if len(left) else 0
        end = i + 1 + right[0] if len(right) else len(values)
        if end - begin >= width:
            chosen.add(i)
    return chosen


def decide_by_entropy(row: dict, rule: dict) -> str:
    answer = np.zeros(len(row["ids"]), dtype=int)
    for document in documents(row):
        places = [
            place
            for place in document[1:]
            if row["targets"][place] and row["ids"][place] not in row.get("exempt", ())
        ]
        values = np.array([row["entropies"][place] for place in places])
        for i in most_uncertain(values, round(2 * rule["k"] - 1)):
            answer[places[i]] = 1
    return "".join(map(str, answer))


def decide(row: dict, rule: dict) -> str:
    if rule["strategy"] == "entropy":
        return decide_by_entropy(row, rule)
    answer = ["0"] * len(row["ids"])
    seed, k, h, max_kept = (
        int(rule["seed"], 16),
        rule["k"],
        rule.get("h"),
        rule.get("max_kept"),
    )
    opening, window = rule.get("opening", "short"), rule.get("window", "preceding")
    hits = (
        is_below
        if max_kept is None
        else functools.partial(is_natural, max_kept=max_kept)
    )
    for places in documents(row):
        ids = [row["ids"][p] for p in places]
        contexts = None
        if rule["strategy"] == "letters":
            contexts = letter_contexts(tuple(ENTRIES[i] for i in ids))
        if "secrets" in rule:
            for place, secret in zip(
                places,
                has_secret([ENTRIES[i] for i in ids], rule["secrets"]),
                strict=True,
            ):
                answer[place] = "01"[secret]
        left = max_kept  # how many targets may still be kept
        for i in range(1, len(ids)):
            if ids[i] in row.get("exempt", ()):
                continue
            if (
                rule["strategy"] == "static"
            ):  # drops where i / k passes a whole number, up to ceil(2**32 / k) / 2**32
                step = Fraction(-(-(1 << 32) // Fraction(k)), 1 << 32)
                drop = i * step // 1 > (i - 1) * step // 1
            elif rule["strategy"] == "random":
                number = [p for document in documents(row) for p in document].index(
                    places[i]
                )
                draw = int(
                    scramble([(rule["draw"] + int(scramble([seed])[0])) % M64])[0]
                )
                drop = is_below(
                    int(scramble([(draw + (rule["row"] << 32) + number) % M64])[0]), k
                )
            elif contexts is not None:
                letters = [ord(letter) for letter in contexts[i]][-5 * h :]
                drop = hits(window_key(letters, seed), k) and len(letters) > 0
                drop = drop and (opening == "short" or len(letters) == 5 * h)
            else:
                n, shift = min(h, i), window == "inclusive"
                drop = hits(window_key(ids[i - n + shift : i + shift], seed), k)
                drop = drop and (opening == "short" or n == h)
            if max_kept is not None:
                drop = drop or left == 0
                left = max_kept if drop else left - 1
            answer[places[i]] = "1" if drop else answer[places[i]]
    return "".join(answer)


# --- the tests


def test_the_file_is_what_its_script_makes(monkeypatch):
    """If this fails, the rule changed, for every port and every training under the old rule."""
    monkeypatch.setattr(
        goldfish.spec, "mix", functools.cache(goldfish.spec.mix)
    )  # of the same ids again and again
    spec = importlib.util.spec_from_file_location(
        "make_rule_vectors", GOLDEN / "make_rule_vectors.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.as_json(script.vectors()) + "\n" == (
        GOLDEN / "rule_vectors.json"
    ).read_text(encoding="ascii")


def test_the_vectors_cover_what_they_should():
    assert (GOLDEN / "rule_vectors.json").stat().st_size < 320_000
    for strategy in ("hash", "letters"):
        rules = [rule for _, rule in CASES if rule["strategy"] == strategy]
        assert {(rule["k"], rule["h"]) for rule in rules} == {
            (k, h) for k in (2, 3, 4, 8, 50, 2.5) for h in (1, 4, 13, 50)
        }
        assert strategy == "letters" or {rule["opening"] for rule in rules} == {
            "short",
            "keep",
        }
        assert {"0x0000000000000000", "0xffffffffffffffff"} <= {
            rule["seed"] for rule in rules
        }
        for rule in rules:  # none drops everything or, for a k this small, nothing
            drops = "".join(rule["dropped"].values())
            assert (
                0 < drops.count("1") < len(drops)
                or rule["k"] > 8
                or rule["opening"] == "keep"
            )
    assert {rule["window"] for _, rule in CASES if rule["strategy"] == "hash"} == {
        "preceding",
        "inclusive",
    }
    for _, rule in SECRETS:
        plain = {key: value for key, value in rule.items() if key != "secrets"}
        more = [
            label
            for label, row in VECTORS["text"]["rows"].items()
            if decide(row, plain) != rule["dropped"][label]
        ]
        assert len(more) >= (0 if "code" in rule["secrets"] else 6)
    for _, rule in SPREAD:
        longest = max(
            len(run) for drops in rule["dropped"].values() for run in drops.split("1")
        )
        assert longest >= rule["max_kept"], "some run is as long as it may be"
    assert {0, 1, 2**31 - 1} <= {
        i for row in VECTORS["ids"]["rows"].values() for i in row["ids"]
    }


@pytest.mark.parametrize("case", CASES + SPREAD + SECRETS + ENTROPY, ids=name)
def test_an_independent_implementation_agrees(case):
    group, rule = case
    for label, row in VECTORS[group]["rows"].items():
        assert decide(row, rule) == rule["dropped"][label], label


def test_the_parts_agree_with_an_independent_implementation():
    for x, y in VECTORS["mix"]:
        assert int(scramble([int(x, 16)])[0]) == int(y, 16)
    for k, limit in VECTORS["threshold"]:
        assert is_below((limit - 1) << 32, k)
        assert not is_below(limit << 32, k)
    for k, max_kept, limit in VECTORS["natural_threshold"]:
        assert is_natural((limit - 1) << 32, k, max_kept)
        assert not is_natural(limit << 32, k, max_kept)
    for context, seed, key in VECTORS["key"]:
        assert window_key(context, int(seed, 16)) == int(key, 16)
    for case in VECTORS["receipt"]:
        row, rule, total = VECTORS["ids"]["rows"][case["row"]], case["rule"], 0
        seeded = {
            "window": "preceding",
            "opening": "short",
            **rule,
            "seed": hex(rule["seed"]),
        }
        for places in documents(row):
            for i, place in enumerate(places):
                context = [row["ids"][p] for p in places[max(0, i - rule["h"]) : i]]
                drop = int(decide(row, seeded)[place])
                total += (
                    int(scramble([(window_key(context, 0) + drop) % M64])[0])
                    if place
                    else 0
                )
        assert total % M64 == int(case["decisions"], 16)
    for character, form in VECTORS["text"]["fold"]:
        assert normal(character) == form
    for first, last, digest in VECTORS["text"]["fold_blocks"]:
        forms = "\n".join(normal(chr(c)) for c in range(first, last + 1))
        assert hashlib.sha256(forms.encode()).hexdigest() == digest, f"U+{first:04X}"
    for label, letters in VECTORS["text"]["letters"].items():
        tokens = [ENTRIES[i] for i in VECTORS["text"]["rows"][label]["ids"]]
        assert letter_contexts(tuple(tokens))[-1] == letters


@pytest.mark.parametrize("case", VECTORS["receipt"], ids=lambda case: case["row"])
def test_the_receipt_agrees(case):
    row, rule = VECTORS["ids"]["rows"][case["row"]], Goldfish(**case["rule"])
    batch = {"input_ids": torch.tensor([row["ids"]])}
    if "position_ids" in row:
        batch["position_ids"] = torch.tensor([row["position_ids"]])
    counts = DropCounts(rule, torch.device("cpu"))
    counts.add(count_drops(mask_batch(rule, batch)))
    counts.end_step()
    counts.sync()
    entry = counts.to_dict()
    assert [entry["targets"], entry["dropped"]] == [case["targets"], case["dropped"]]
    assert "0x" + entry["decisions"] == case["decisions"]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(ENTRIES)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_fast_rule_agrees(vocabulary, device, dtype):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    for group, case in CASES + SPREAD + SECRETS:
        options = {
            key: v for key, v in case.items() if key not in ("dropped", "row", "draw")
        }
        for label, row in VECTORS[group]["rows"].items():
            own = {key: row[key] for key in ("exempt", "document_end") if key in row}
            rule = Goldfish(
                **{**options, "seed": int(case["seed"], 16)},
                **own,
                vocabulary=vocabulary,
            )
            ids, positions, attended = (
                # The row's number counts for "random" only.
                torch.tensor(
                    [row[key]] * (case.get("row", 0) + 1), dtype=dtype, device=device
                )
                if key in row
                else None
                for key in ("ids", "position_ids", "attention_mask")
            )
            dropped = rule.dropped(
                ids, positions, attention_mask=attended, draw=case.get("draw", 0)
            )
            assert (
                "".join("01"[d] for d in dropped[-1].tolist()) == case["dropped"][label]
            ), (
                label,
                case,
            )
