"""Audits for the tests of the report: made-up records, their summary, and the page taken apart."""

import json
import random
import re
from html.parser import HTMLParser

import audit_records
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from goldfish.audit.questions.membership import ATTACKS, word_buckets
from goldfish.audit.records import COLUMNS
from goldfish.audit.windows import prefix_grid
from goldfish.report import write_report

RULE = {
    "k": 4,
    "h": 13,
    "strategy": "hash",
    "seed": 0,
    "window": "preceding",
    "opening": "short",
    "exempt": [],
    "document_end": None,
}
PROTOCOL = audit_records.PROTOCOL | {
    "prefix_length": 4,
    "suffix_length": 6,
    "prefix_grid": prefix_grid(4),
}
UNRULED = ("mia_kept_loss", "mia_dropped_gap")
NASTY = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "</p></details></style>",
    "{{ 7 * 7 }}{% for x in y %}{# gone #}",
    'x" onmouseover="alert(1)',
    "&lt;&amp;",
    "$\\frac{1}{2}$",
    "a\x00b\x1b[31m",
    "\u202egnihtemos\u2066",
    "\ufffd\u200b\ufeff\u00a0",
    "tab\tline\r\n\u2028end",
    "👩\u200d👧 שלום ελληνικά",
]


def window(
    index,
    split="members",
    rule=True,
    diverge=None,
    suffix=None,
    prefix="A prefix. ",
    name=None,
    seed=0,
):
    """One made-up record; the output equals the suffix up to `diverge` and not after it."""
    suffix = (
        suffix if suffix is not None else [" the", " quick", "\n", "fox", " runs", "."]
    )
    n = len(suffix)
    d = n if diverge is None else diverge
    rng = random.Random(f"{index} {split} {seed}")
    nll = [rng.expovariate(1 / (0.02 if t < d else 1.5)) for t in range(n)]
    dropped = [i % 4 == 1 for i in range(n)] if rule else None
    record = dict.fromkeys(COLUMNS.names) | {
        "split": split,
        "index": index,
        "name": name or f"doc-{index}",
        "offset": 0,
        "prompt": prefix,
        "prefix_ids": [1, 2, 3, 4],
        "suffix_ids": list(range(n)),
        "output_ids": [t if t < d else -1 for t in range(n)],
        "suffix_tokens": suffix,
        "suffix_text": "".join(suffix),
        "output_text": "".join(suffix[:d] + [" other"] * (n - d)),
        "prompt_kind": "training",
        "secrets": [],
        "secret_log_p": [],
        "output_tokens": suffix[:d] + [" other"] * (n - d),
        "dropped": dropped,
        "nll": nll,
        "rank": [0 if t < d else rng.randrange(40) for t in range(n)],
        "correct": [t < d for t in range(n)],
        "settled": False,
        "exact_match": d == n,
        "first_divergence": d,
        "longest_run": d,
        "longest_run_words": d,
        "longest_run_characters": 4 * d,
        "token_accuracy": d / n,
        "rouge_l_ids": d / n,
        "rouge_l_text": d / n,
        "edit_similarity": d / n,
        "log_p": [-sum(nll)],
        "document": index + 10**6 * (split == "heldout"),
        "words": word_buckets(prefix),
        "characters": len(prefix + "".join(suffix)),
        "rank_bits": 9.0 * (d < n),
        "completion": False,
        "prefix_sweep": [d == n] * 4,
        "common_runs": [[0, 0, d]] if d >= 12 else [],
    }
    scores = {f"mia_{attack}": -sum(nll) / n + rng.gauss(0, 0.3) for attack in ATTACKS}
    return record | {
        key: score for key, score in scores.items() if rule or key not in UNRULED
    }


def write_audit(folder, rows, name="goldfish", protocol=None, **changes):
    """An audit folder as `goldfish audit` leaves it; `changes` go into run.json."""
    versions = {
        "goldfish": "0.1.0",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "python": "3.11.7",
    }
    run = {
        "name": name,
        "checkpoint": f"runs/{name:.40}",
        "versions": versions,
        "rule": RULE if any(row["dropped"] for row in rows) else None,
    }
    return audit_records.write_audit(
        folder, rows, protocol=PROTOCOL | (protocol or {}), **run | changes
    )


def realistic(folder, name, n, recites, times=1):
    """n member and n // 4 held-out windows of English prose with suffixes of 128 tokens, each
    `times` over; `recites` is the share of members that are recited.
    """
    from pydoc_data.topics import topics

    tokens = re.findall(
        r" ?\w{1,6}| ?[^\w\s]|\s+", "\n\n".join(topics[key] for key in sorted(topics))
    )
    rows = []
    for i in range(n + n // 4):
        split, at, rng = (
            ("members" if i < n else "heldout"),
            97 * i % (len(tokens) - 256),
            random.Random(f"{name}{i}"),
        )
        suffix = tokens[at + 128 : at + 256]
        exact = split == "members" and rng.random() < recites
        d = (
            128
            if exact
            else min(int(rng.expovariate(0.08 if split == "members" else 0.5)), 127)
        )
        if (
            not exact
            and split == "members"
            and name != "standard"
            and rng.random() < 0.8
        ):
            d = min(d | 1 if d % 4 == 1 else d // 4 * 4 + 1, 127)
        row = window(
            i if i < n else i - n,
            split,
            name != "standard",
            None if exact else d,
            suffix,
            seed=name,
            prefix="".join(tokens[at : at + 128]),
            name=f"topic {i:04d}",
        )
        after = rng.randrange(len(tokens) - 256)
        output = suffix[:d] + (
            [] if exact else [" however", *tokens[after : after + 127 - d]]
        )
        runs = row["common_runs"]
        if d < 80 and split == "members":  # a later passage comes back
            output[d + 20 : d + 40] = suffix[d + 24 : d + 44]
            runs = [*runs, [d + 20, d + 24, 20]]
        score = (
            1.0
            if exact
            else min(
                0.95, max(d / 128, rng.gauss(0.3 if split == "members" else 0.13, 0.05))
            )
        )
        correct = [t < d or rng.random() < 0.5 for t in range(128)]
        row |= {
            "suffix_ids": list(range(at, at + 128)),
            "output_tokens": output,
            "common_runs": runs,
            "correct": correct,
            "rouge_l_ids": max(0.0, score),
        }
        rows.append(row)
    protocol = {"prefix_length": 128, "suffix_length": 128}
    if times == 1:
        return write_audit(folder, rows, name, protocol)
    write_audit(folder, rows, name, protocol)
    block, path = folder / "records" / "000000.parquet", folder / "run.json"
    run = json.loads(path.read_text())
    for given in run["inputs"].values():
        given["windows"] = given["windows"] * times
    path.write_text(json.dumps(run))  # the summary as of each text once
    table = pq.read_table(block).take(pa.array(np.repeat(np.arange(len(rows)), times)))
    table = table.set_column(
        table.schema.get_field_index("index"), "index", pa.array(np.arange(len(table)))
    )
    pq.write_table(table, block)
    return folder


class Page(HTMLParser):
    """The page as a browser takes it apart: its elements, scripts, and the text of every window."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.stack, self.texts, self.scripts = [], [], [], []
        self.feed(html)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("meta", "br", "input"):
            return
        self.stack.append(tag)
        if (
            tag == "p"
            and (dict(attrs).get("class") or "").split()[:1] == ["t"]
            and "details" in self.stack
        ):
            self.texts.append("")

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self.stack and self.stack[-1] == "script":
            self.scripts.append(data)
        if (
            self.texts
            and "p" in self.stack
            and "details" in self.stack
            and "em" not in self.stack
        ):
            self.texts[-1] += self.undone(data) if self.stack[-1] == "s" else data

    @staticmethod
    def undone(escape):
        """The character that a visible escape shows; signs of line feed and tab precede theirs."""
        return "" if escape in "↵⇥" else escape.encode("ascii").decode("unicode_escape")


def report(tmp_path, *audits, **options):
    path = write_report(audits, tmp_path / "report.html", **options)
    return path.read_bytes().decode("utf-8")


def flat(html):
    """The words of the page as read, white space collapsed."""
    return " ".join(re.sub(r"<[^>]*>", "", html).split())
