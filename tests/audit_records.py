"""Records of audits that never ran: made-up scores of made-up windows, through make_record."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from goldfish.audit.records import COLUMNS, SCHEMA, make_record
from goldfish.audit.run import figure_columns, publish, summarize
from goldfish.audit.score import Score
from goldfish.audit.windows import Window, prefix_grid

PREFIX, SUFFIX = 10, 8
PROTOCOL = {
    "prefix_length": PREFIX,
    "suffix_length": SUFFIX,
    "offsets": [0],
    "beams": None,
    "near_verbatim": "25t,50%",
    "ask": None,
    "sampling": [{"temperature": 1.0, "top_k": None, "top_p": None}],
    "control": None,
    "complete": False,
    "secrets": None,
    "secret_column": None,
    "dtype": "float32",
    "device": "cpu",
    "ambiguous_margin": 0.0,
    "prefix_grid": prefix_grid(PREFIX),
    "vocabulary": 500,
}


class Words:
    """A tokenizer of which every id is a word."""

    def decode(self, ids, **options):
        return "".join(f" w{i}" for i in ids)


def made_up_score(window, right, generator, **changes):
    """A score whose teacher-forced argmax is right at `right`, (T-1,); the rest is noise."""
    ids = np.array(window.ids)
    right = np.asarray(right, dtype=bool)
    start = window.prefix_length - 1
    misses = np.flatnonzero(~right[start:])
    output = list(window.suffix)
    if len(misses):
        output[misses[0] :] = (ids[window.prefix_length + misses[0] :] + 1).tolist()
    nll = np.where(
        right,
        generator.exponential(0.05, len(right)),
        2 + generator.exponential(1.0, len(right)),
    )
    generator.exponential(
        1.0, len(right)
    )  # for the numbers that the tests were written with
    fields = {
        "greedy": np.where(right, ids[1:], ids[1:] + 1),
        "nll": nll.astype(np.float32),
        "rank": (~right).astype(np.int64),
        "entropy_mean": np.full(len(right), -2, dtype=np.float32),
        "entropy_std": np.ones(len(right), dtype=np.float32),
        "log_q": -nll[None, start:].astype(np.float32),
        "output": output,
    }
    return Score(**{**fields, **changes})


def made_up_records(
    split,
    n,
    recall,
    *,
    seed=0,
    rule=None,
    per_document=1,
    recall_dropped=None,
    vocabulary=500,
    **more,
):
    """n records; a token is right with probability `recall`, a dropped one `recall_dropped`."""
    generator = np.random.default_rng([seed, split == "members"])
    records = []
    for i in range(n):
        ids = generator.integers(vocabulary, size=PREFIX + SUFFIX).tolist()
        window = Window(split, i, f"{split} {i // per_document}", ids, PREFIX, **more)
        chance = np.full(len(ids) - 1, recall)
        if rule is not None and recall_dropped is not None:
            chance[rule.dropped(np.array(ids)).numpy()[1:]] = recall_dropped
        right = generator.random(len(ids) - 1) < chance
        document = i // per_document + (split == "heldout") * 10**6
        records.append(
            make_record(
                window, made_up_score(window, right, generator), rule, Words(), document
            )
        )
    return records


def made_up_run(records, protocol=PROTOCOL, **changes):
    """run.json of these records; `changes` go into it."""
    inputs = {}
    for split in dict.fromkeys(record["split"] for record in records):
        here = [record for record in records if record["split"] == split]
        rows = len({(record["index"], record["document"]) for record in here})
        secrets = {secret for record in here for secret in record["secrets"] or ()}
        inputs[split] = {
            "path": f"{split}.jsonl",
            "sha256": "",
            "rows": rows,
            "drawn": rows,
            "asked": rows,
            "windows": len(here),
            "completions": sum(bool(record["completion"]) for record in here),
            "documents": len({record["document"] for record in here}),
            "secrets": {"marked": len(secrets), "asked": len(secrets), "unasked": []},
            "skipped": [],
        }
    return {
        "schema": SCHEMA,
        "name": "model",
        "checkpoint": "runs/model",
        "date": "2026-01-01T00:00:00+00:00",
        "command": None,
        "protocol": protocol,
        "inputs": inputs,
        "unasked_secrets": [],
        "overlap": None,
        "sanity": None,
        "notes": [],
        "weights": [],
        "rule": None,
        "receipt": None,
        "versions": {},
        "block": 256,
        **changes,
    }


def write_run(folder, records, protocol=PROTOCOL, **changes):
    """run.json and the records as `goldfish audit` leaves them; `changes` go into run.json."""
    folder.mkdir(parents=True, exist_ok=True)
    run = made_up_run(records, protocol, **changes)
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    (folder / "records").mkdir(exist_ok=True)
    pq.write_table(
        pa.Table.from_pylist(records, COLUMNS), folder / "records" / "000000.parquet"
    )


def made_up_audit(records, limits=(), require=(), run=None, **protocol):
    """The audit of these records; `run`: changes of run.json."""
    found = made_up_run(records, {**PROTOCOL, **protocol}, **(run or {}))
    table = pa.Table.from_pylist(records, COLUMNS)
    # No more than a real audit reads, so that a figure of other columns fails here too.
    table = table.select(figure_columns(found))
    return summarize(found, table, limits, require)


def write_audit(folder, records, **changes):
    """An audit folder as `goldfish audit` leaves it; `changes` go into run.json."""
    write_run(folder, records, **changes)
    publish(folder)
    return folder
