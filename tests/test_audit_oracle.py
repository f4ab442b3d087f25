"""The rebuilt figures against an audit that the version before them summarized.

golden/audit_oracle.json: made-up records of 34 documents at two offsets with beams, two sampling
settings, texts and chats, and what version 0.2 (d20e252) estimated from them.
"""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from audit_records import PROTOCOL, made_up_run

from goldfish.audit.records import COLUMNS
from goldfish.audit.run import summarize

ORACLE = json.loads(
    (Path(__file__).parent / "golden" / "audit_oracle.json").read_text()
)
MEANS = (
    "accuracy",
    "share",
    "expected",
    "nll",
    "rouge",
    "edit",
    "run",
)


def audit():
    columns = dict(ORACLE["records"])
    columns["name"], columns["document"] = columns["document"], columns.pop("cluster")
    count = len(columns["index"])
    columns["prompt_kind"], columns["secrets"] = ["training"] * count, [[]] * count
    rows = [
        dict(zip(columns, values, strict=True))
        for values in zip(*columns.values(), strict=True)
    ]
    full = [{**dict.fromkeys(COLUMNS.names), **row} for row in rows]
    return summarize(
        made_up_run(full, PROTOCOL | ORACLE["protocol"]),
        pa.Table.from_pylist(full, COLUMNS),
    )


def same(new, old):
    return new is None if old is None else new == pytest.approx(old, rel=1e-5, abs=1e-9)


def keys(name):
    """Where an old name is in the table: split, figure, setting, x; None if it is there no more."""
    split, _, rest = name.partition(".")
    rest = rest.removeprefix("attribution.")
    if rest.startswith("hazard"):
        return None  # `rule_p` took their place
    figure, _, x = rest.partition("@")
    if split == "mia":
        return keys_of_membership(rest)
    if not x:
        return split, figure, "", None
    number, _, probability = x.partition(",")
    if figure not in ("extractable", "expected"):
        return split, figure, "", float(number)
    setting = "T=1"
    if ",T=" in f",{probability}" or ",T=" in x:
        setting = x[x.index("T=") :]
    if figure == "extractable" and not probability.startswith("0.5"):
        return None  # the curves of p = 0.9 and 0.999 were shown nowhere
    return split, figure, setting, float(number)


def keys_of_membership(rest):
    parts = rest.split(".")
    if "tpr" in rest:
        return None  # their percentages hold dots, and none could be estimated
    if parts[0] == "blind":
        return "both", "blind_auc", parts[1], None
    if len(parts) == 1:
        return "both", "membership_auc", ORACLE["headline"], None
    return "both", "attack_auc", parts[0], None


def test_every_rate_count_and_interval_agrees():
    rows = audit().rows
    compared = intervals = 0
    for name, old in ORACLE["estimates"].items():
        where = keys(name)
        if where is None:
            continue
        new = rows.get(*where)
        assert new is not None, name
        for field in ("value", "k", "n", "documents"):
            assert same(getattr(new, field), old[field]), (name, field)
        compared += 1
        # Means have simpler intervals now.
        of_mean = old["k"] is None or any(each in name for each in MEANS)
        if not of_mean or where[0] == "both":
            assert same(new.low, old["lower95"]), name
            assert same(new.high, old["upper95"]), name
            intervals += 1
    assert compared > 120
    assert intervals > 70
    for split, settled in ORACLE["settled"].items():
        assert rows.get(split, "settled").k == settled
