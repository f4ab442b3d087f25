"""Test vectors of the drop rule for ports to other languages, made by `goldfish/spec.py` alone.

    python tests/golden/make_rule_vectors.py     # writes rule_vectors.json beside this file

docs/specification.md says how to read them.
"""

import hashlib
import json
import random
import unicodedata
from itertools import product
from pathlib import Path

from goldfish import spec
from goldfish.vocabulary import characters, fold

PATH = Path(__file__).with_name("rule_vectors.json")
KS = (2, 3, 4, 8, 50, 2.5)
HS = (1, 4, 13, 50)
SEEDS = (0, 1, 2**31, 2**63, 2**64 - 1)
EDGES = (0, 1, 2, 2**31 - 1)

TEXT = (
    "The quick brown fox, THE QUICK BROWN FOX: jumps\u00a0over\u00a0the lazy dog!"
    "\r\n\r\n\tStraße ÉCOLE "
    "e\u0301cole naïve ﬁne x² ½ don’t co\u00adop zero\u200bwidth snake_case(a,b)->c 3.14 "
    "𝒜lpha １２３ "
    "吾輩は猫である。名前はまだ無い。"
    "我们在北京大学学习，今天天气很好。iPhone手机 ｶﾞｷﾞ 한국어 문장 "
    "हिन्दी ภาษาไทย 🙂👍🏽 one two three four five sixteen seventeen nine twenty; "
    "ΟΔΟΣ οδός Ωμέγα — the end."
)
# Parts of characters beside their neighbours, words with and without the space before them.
ENTRIES = (
    "The| the| quick|qu|ick| brown| br|own|fox| fox|,| jumps|over|the| lazy|y dog|!\r\n|\r\n|\t|"
    "Stra|e É|COL|na|ve | don|t co|op |zero|width|snake|_case(|,b)->|3.14|"
    "吾輩|は猫で|ある。|名前|。我们|在|北京大学|iPhone手|한국어"
    "| one two| three four five| s|ix|teen| seven| eight| nin|e| twenty; |Δ|ΟΣ οδ|the end.|.|  |, t"
)
PARTIAL = (
    "20c2",
    "a06f",
    "c39f65",
    "cc81",
    "efac",
    "81 6e",
    "e290",
    "80",
    "e7",
    "8c",
    "abe3",
    "81a7",
    "f09f",
    "9982",
    "f0",
    "9f918d",
    "f09d92",
    "9c6c",
    "efbc",
    "b2efbc",
    "e0a4",
    "b9e0a4bf",
    "e3808220",
    "e5909be3",
)
SPECIAL = 256  # the id of an entry that is one space, as special tokens are
VOCABULARY = [
    *(bytes([b]) for b in range(256)),
    b" ",
    *sorted(
        {e.encode() for e in ENTRIES.split("|")} | {bytes.fromhex(p) for p in PARTIAL}
    ),
]

# Blocks of Unicode that have not changed since version 13 and are not expected to.
BLOCKS = (
    (0x0000, 0x0377),
    (0x0391, 0x03A1),
    (0x03A3, 0x052F),
    (0x0900, 0x0977),
    (0x0E01, 0x0E3A),
    (0x2000, 0x2064),
    (0x3041, 0x3096),
    (0x3099, 0x30FF),
    (0x4E00, 0x9FA5),
    (0xAC00, 0xD7A3),
    (0xD800, 0xDFFF),
    (0xF900, 0xFA6D),
    (0xFB00, 0xFB06),
    (0xFF01, 0xFFBE),
    (0x1D400, 0x1D454),
    (0x1F600, 0x1F64F),
    (0x20000, 0x2A6D6),
)


def hexadecimal(x: int) -> str:
    """64-bit numbers are strings: many readers of JSON round integers beyond 2**53."""
    return f"0x{x:016x}"


def bits(dropped: list[bool]) -> str:
    return "".join("01"[drop] for drop in dropped)


def id_rows() -> dict[str, dict]:
    """Rows for the strategies that see ids: plain, edge ids, documents, padding, degenerate."""
    pick = random.Random(0)

    def draw(n, top=131072):
        return [
            pick.choice(EDGES) if pick.random() < 0.2 else pick.randrange(top)
            for _ in range(n)
        ]

    passage = draw(60)
    holes = [int(pick.random() < 0.7) for _ in range(72)]
    positions = [*range(31), *range(1), *range(2), *range(38)]
    return {
        "empty": {"ids": []},
        "one token": {"ids": [7]},
        "two tokens": {"ids": [2**31 - 1, 0]},
        "plain": {"ids": passage},
        "shifted by two": {"ids": [5, 6, *passage]},
        "zeros": {"ids": [0] * 56},
        "edge ids": {"ids": [pick.choice(EDGES) for _ in range(72)]},
        "packed": {"ids": draw(72), "position_ids": positions},
        "document_end": {
            "ids": [*passage[:20], 2, 2, *passage[:40], 2],
            "document_end": 2,
        },
        "left padding": {
            "ids": [0] * 9 + passage,
            "attention_mask": [0] * 9 + [1] * 60,
        },
        "right padding": {
            "ids": passage + [0] * 9,
            "attention_mask": [1] * 60 + [0] * 9,
        },
        "padding between": {
            "ids": draw(72),
            "attention_mask": holes,
            "position_ids": positions,
            "document_end": 1,
        },
        "nothing attended": {"ids": [1, 2, 3], "attention_mask": [0, 0, 0]},
        "exempt": {"ids": draw(72, 6), "exempt": [0, 3, 2**31 - 1]},
        "positions from one": {
            "ids": draw(72),
            "position_ids": [*range(1, 32), 1, *range(1, 3), *range(2, 40)],
        },
        "numbered documents": {
            "ids": draw(72),
            "attention_mask": [0] * 5 + [1] * 30 + [2] + [3] * 20 + [1] * 10 + [0] * 6,
        },
    }


def cut(text: str, seed: int) -> list[int]:
    """A tokenization of a text: at each place one of the entries that fit, long ones more often."""
    pick, data, ids = random.Random(seed), text.encode(), []
    at = 0
    while at < len(data):
        fitting = [
            i
            for i, e in enumerate(VOCABULARY)
            if i != SPECIAL and data.startswith(e, at)
        ]
        ids.append(pick.choices(fitting, [len(VOCABULARY[i]) ** 2 for i in fitting])[0])
        at += len(VOCABULARY[ids[-1]])
    return ids


def text_rows() -> dict[str, dict]:
    """Rows for "letters": one text cut in three ways, documents, padding, broken characters."""
    one, other = cut(TEXT, 1), cut(TEXT, 2)
    n = len(one)
    half = TEXT[: len(TEXT) // 2]
    return {
        "empty": {"ids": []},
        "cut one way": {"ids": one},
        "cut another way": {"ids": other},
        "bytes": {"ids": list(TEXT[90:150].encode())},
        "upper case": {"ids": cut(half.upper(), 3)},
        "re-wrapped": {"ids": cut(half.replace(" ", "\n    "), 4)},
        "special tokens": {
            "ids": [SPECIAL, *one[:40], SPECIAL, SPECIAL, *one[40:70]],
            "exempt": [SPECIAL],
        },
        "packed": {"ids": one, "position_ids": [i % 53 for i in range(n)]},
        "document_end": {
            "ids": [*one[20:80], SPECIAL, *one[20:80]],
            "document_end": SPECIAL,
        },
        "left padding": {
            "ids": [SPECIAL] * 7 + one,
            "attention_mask": [0] * 7 + [1] * n,
        },
        "padding between": {
            "ids": other,
            "attention_mask": [int(i % 5 != 2) for i in range(len(other))],
        },
        "broken characters": {
            "ids": list(
                bytes.fromhex(
                    "78206bc18120c3a97ae082817aeda08062f4908080c3c3a920ffe28220e282c3a9f09d6162208020e380"
                )
            )
        },
    }


SPREAD = ((4, 13, 4), (3, 4, 3), (2.5, 1, 6), (8, 13, 20), (2, 50, 2))  # k, h, max_kept


def spread_rules(strategy: str) -> list[dict]:
    return [
        {"strategy": strategy, "k": k, "h": h, "seed": SEEDS[i], "max_kept": max_kept}
        for i, (k, h, max_kept) in enumerate(SPREAD)
    ]


# Words, a group in a context, matches with and without a group, and characters of several
# bytes (broken ones included); the last matches nothing.
SECRETS = (
    r"o\w+",
    r"(?i)quick\s+(\w+ f)",
    r"the|(n\w)",
    r"[^\x00-\x7f]+",
    r"code is (\d+)",
)


def secret_rules() -> list[dict]:
    rules = (
        {"strategy": "hash", "k": 4, "h": 13, "seed": 0, "max_kept": 4},
        {"strategy": "hash", "k": 50, "h": 4, "seed": 1, "opening": "keep"},
        {"strategy": "letters", "k": 3, "h": 4, "seed": 2**63},
        {"strategy": "static", "k": 2.5, "h": 13, "seed": 0},
        {"strategy": "hash", "k": 4, "h": 13, "seed": 0},
    )
    return [
        {**rule, "secrets": secret} for rule, secret in zip(rules, SECRETS, strict=True)
    ]


def entropy_rows() -> dict[str, dict]:
    """Rows for "entropy": eighths of a nat, so that many are equal; prompts without labels."""
    pick, rows = random.Random(1), {}
    for name, row in id_rows().items():
        length = len(row["ids"])
        entropies = [pick.randrange(24) / 8 for _ in range(length)]
        targets = [int(pick.random() < 0.8) for _ in range(length)]
        rows[name] = {**row, "entropies": entropies, "targets": targets}
    rows["zeros"]["entropies"] = [0] * len(rows["zeros"]["ids"])
    rows["plain"]["targets"] = [0] * 25 + [1] * 35
    return rows


def receipt(row: dict, rule: dict) -> dict:
    """The receipt of a row in which every token from the second on is a target."""
    ids, start, targets, decisions = row["ids"], 0, 0, 0
    dropped = spec.dropped(**row, **rule)
    for i in range(1, len(ids)):
        start = i if row.get("position_ids", [1] * len(ids))[i] == 0 else start
        context = ids[max(start, i - rule["h"]) : i]
        targets, decisions = (
            targets + 1,
            (decisions + spec.mix(spec.key(context) + dropped[i])) & spec.WORD,
        )
    return {
        "targets": targets,
        "dropped": sum(dropped[1:]),
        "decisions": hexadecimal(decisions),
    }


def decisions(rows: dict[str, dict], rule: dict, **extra) -> dict:
    """A rule beside its decisions; exempt and document_end of a row are arguments of the rule."""
    answers = {
        name: bits(
            spec.dropped(
                **{**row, "exempt": tuple(row.get("exempt", ()))}, **rule, **extra
            )
        )
        for name, row in rows.items()
    }
    return {**rule, "seed": hexadecimal(rule["seed"]), "dropped": answers}


def vectors() -> dict:
    ids, texts, seeds = id_rows(), text_rows(), len(SEEDS)
    uncertain = entropy_rows()
    rules = [
        {
            "strategy": "hash",
            "k": k,
            "h": h,
            "seed": SEEDS[i % seeds],
            "window": window,
            "opening": opening,
        }
        for i, (k, h, window, opening) in enumerate(
            product(KS, HS, ("preceding", "inclusive"), ("short", "keep"))
        )
    ]
    rules += [{"strategy": "static", "k": k, "seed": 0} for k in KS]
    rules += [
        {
            "strategy": "random",
            "k": k,
            "seed": SEEDS[i % seeds],
            "row": i % 3,
            "draw": i // 2,
        }
        for i, k in enumerate(KS)
    ]
    text_rules = [
        {
            "strategy": "letters",
            "k": k,
            "h": h,
            "seed": SEEDS[i % seeds],
            "opening": "short",
        }
        for i, (k, h) in enumerate(product(KS, HS))
    ]
    table = characters()
    contexts = [
        [],
        [0],
        [1],
        [0, 0],
        [2**31 - 1],
        [1, 2, 3],
        [3, 2, 1],
        list(range(50)),
        [-1],
    ]
    return {
        "format": "goldfish rule vectors, version 1; see docs/specification.md",
        "mix": [
            [hexadecimal(x), hexadecimal(spec.mix(x))]
            for x in (0, 1, 2**31 - 1, 2**63, 2**64 - 1)
        ],
        "threshold": [[k, spec.threshold(k)] for k in (*KS, 1.1, 128, 2**40)],
        "key": [
            [c, hexadecimal(s), hexadecimal(spec.key(c, s))]
            for c in contexts
            for s in (0, 2**64 - 1)
        ],
        "receipt": [
            {"row": row, "rule": {"k": 3, "h": h, "strategy": strategy, "seed": 7}}
            | receipt(ids[row], {"k": 3, "h": h, "strategy": strategy, "seed": 7})
            for row, h, strategy in (
                ("plain", 13, "hash"),
                ("plain", 4, "static"),
                ("packed", 4, "hash"),
            )
        ],
        "ids": {
            "rows": ids,
            "rules": [decisions(ids, rule) for rule in rules],
            "max_kept": [decisions(ids, rule) for rule in spread_rules("hash")],
        },
        "text": {
            "vocabulary": [entry.hex() for entry in VOCABULARY],
            "fold": [
                [c, fold(c)] for c in sorted(set(TEXT + TEXT.upper() + TEXT.lower()))
            ],
            "fold_blocks": [
                [
                    first,
                    last,
                    hashlib.sha256(
                        "\n".join(table[first : last + 1]).encode()
                    ).hexdigest(),
                ]
                for first, last in BLOCKS
            ],
            "letters": {
                name: spec.letters_of([VOCABULARY[i] for i in row["ids"]], table)
                for name, row in texts.items()
                if len(row) == 1
            },
            "rows": texts,
            "rules": [
                decisions(texts, rule, vocabulary=VOCABULARY, fold=table)
                for rule in text_rules
            ],
            "max_kept": [
                decisions(texts, rule, vocabulary=VOCABULARY, fold=table)
                for rule in spread_rules("letters")
            ],
            "secrets": [
                decisions(texts, rule, vocabulary=VOCABULARY, fold=table)
                for rule in secret_rules()
            ],
        },
        "entropy": {
            "rows": uncertain,
            "rules": [
                decisions(uncertain, {"strategy": "entropy", "k": k, "seed": 0})
                for k in (1.5, 2, 2.5, 4, 50)
            ],
        },
        "natural_threshold": [
            [k, n, spec.natural_threshold(k, n)]
            for k, n in ((4, 4), (2, 2), (2.5, 6), (1.1, 2), (128, 128), (3, 1000))
        ],
    }


def as_json(value: object, depth: int = 0) -> str:
    """Compact, with a line for each row and rule, so that diffs can be read."""
    if depth < 3 and isinstance(value, dict):
        return (
            "{\n"
            + ",\n".join(
                f"{json.dumps(name)}:{as_json(v, depth + 1)}"
                for name, v in value.items()
            )
            + "}"
        )
    if depth < 3 and isinstance(value, list) and isinstance(value[0], dict):
        return "[\n" + ",\n".join(as_json(v, depth + 1) for v in value) + "]"
    return json.dumps(value, separators=(",", ":"))


if __name__ == "__main__":
    PATH.write_text(as_json(vectors()) + "\n", encoding="ascii")
    print(
        f"{PATH.name}: {PATH.stat().st_size:,} bytes, Unicode {unicodedata.unidata_version}"
    )
