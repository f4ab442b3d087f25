"""Records of audits that never ran: made-up scores of made-up windows, through the real make_record."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from goldfish.audit.extraction import make_record
from goldfish.audit.schema import RECORDS
from goldfish.audit.score import Score
from goldfish.audit.summary import summarize
from goldfish.audit.windows import Window

PREFIX, SUFFIX = 10, 8
PROTOCOL = {
    "prefix_length": PREFIX, "suffix_length": SUFFIX, "offsets": [0], "decoding": "greedy", "beams": None,
    "sampling": [{"temperature": 1.0, "top_k": None, "top_p": None}], "lowercase": False, "control": None,
    "dtype": "float32", "device": "cpu", "ambiguous_margin": 0.0,
}  # fmt: skip


class Words:
    """A tokenizer of which every id is a word."""

    def decode(self, ids, **options):
        return "".join(f" w{i}" for i in ids)


def made_up_score(window, right, generator, **changes):
    """A score whose teacher-forced argmax is right where `right` says, (T-1,); the rest is noise that fits."""
    ids = np.array(window.ids)
    right = np.asarray(right, dtype=bool)
    start = window.prefix_length - 1
    misses = np.flatnonzero(~right[start:])
    output = list(window.suffix)
    if len(misses):
        output[misses[0] :] = (ids[window.prefix_length + misses[0] :] + 1).tolist()
    nll = np.where(right, generator.exponential(0.05, len(right)), 2 + generator.exponential(1.0, len(right)))
    fields = {
        "greedy": np.where(right, ids[1:], ids[1:] + 1),
        "nll": nll.astype(np.float32),
        "rank": (~right).astype(np.int64),
        "margin": generator.exponential(1.0, len(right)).astype(np.float32),
        "entropy_mean": np.full(len(right), -2, dtype=np.float32),
        "entropy_std": np.ones(len(right), dtype=np.float32),
        "log_q": -nll[None, start:].astype(np.float32),
        "output": output,
    }
    return Score(**{**fields, **changes})


def made_up_records(
    split, n, recall, *, seed=0, rule=None, per_document=1, recall_dropped=None, vocabulary=500, **more
):
    """n records; a token is right with probability `recall`, and a dropped one with `recall_dropped`."""
    generator = np.random.default_rng([seed, split == "members"])
    records = []
    for i in range(n):
        ids = generator.integers(vocabulary, size=PREFIX + SUFFIX).tolist()
        window = Window(split, i, f"{split} {i // per_document}", ids, PREFIX, **more)
        chance = np.full(len(ids) - 1, recall)
        if rule is not None and recall_dropped is not None:
            chance[rule.dropped(np.array(ids)).numpy()[1:]] = recall_dropped
        right = generator.random(len(ids) - 1) < chance
        records.append(make_record(window, made_up_score(window, right, generator), rule, Words()))
    return records


def made_up_summary(records, receipt=None, **changes):
    return summarize(
        records, protocol={**PROTOCOL, **changes}, skipped={"members": 1}, receipt=receipt,
        name="model", checkpoint="runs/model", rule=None, versions={},
    )  # fmt: skip


def write_audit(folder, records, **changes):
    """An audit folder as `goldfish audit` leaves it."""
    folder.mkdir(parents=True)
    summary = {**made_up_summary(records), **changes}
    pq.write_table(pa.Table.from_pylist(records, RECORDS), folder / "records.parquet")
    (folder / "summary.json").write_text(json.dumps(summary, allow_nan=False), encoding="utf-8")
    return folder
