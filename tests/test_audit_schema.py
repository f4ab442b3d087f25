"""docs/audit-files.md is the published schema: it names every column and key; its example is a part of a summary."""

import re
from pathlib import Path

import pytest
from audit_records import made_up_records, made_up_summary

from goldfish import Goldfish
from goldfish.audit.estimate import SCHEMA, Estimate, loads
from goldfish.audit.records import ATTACKS, COLUMNS
from goldfish.audit.verdict import LIMITS, RUN, SIMILARITY

PAGE = Path(__file__).parents[1] / "docs" / "audit-files.md"
if not PAGE.is_file():
    pytest.skip("goldfish is installed without its docs", allow_module_level=True)
TEXT = PAGE.read_text(encoding="utf-8")


def full_summary():
    rule = Goldfish(k=3, h=4)
    records = made_up_records("members", 20, 0.9, rule=rule) + made_up_records(
        "heldout", 20, 0.3, rule=rule
    )
    for record in records:
        record["beams"] = 0
        record["mia_reference"] = record["mia_wbc"] = record["mia_loss"]
    return made_up_summary(records, beams=[5])


def keys(value):
    if isinstance(value, Estimate):
        return set(vars(value))
    if isinstance(value, dict):
        return set(value).union(*map(keys, value.values()))
    return set().union(*map(keys, value)) if isinstance(value, list) else set()


def test_every_column_and_key_is_documented():
    assert SCHEMA in TEXT
    names = {*COLUMNS.names, *keys(full_summary()), *(f"mia_{attack}" for attack in ATTACKS)}
    documented = set(re.findall(r"\w+", TEXT))
    assert not {name for name in names if name.partition("@")[0] not in documented}


def test_thresholds_are_documented():
    assert (
        "`recited` (default {recited} of documents), `near_verbatim` ({near_verbatim}), `auc` ({auc})".format(
            **LIMITS
        )
        in TEXT
    )
    assert f"a run of at least {RUN} tokens" in TEXT
    assert f"edit similarity is at least {SIMILARITY}" in TEXT


def test_the_example_is_a_part_of_a_summary():
    def check(example, real, where="summary"):
        assert type(example) is type(real), where
        if isinstance(example, dict):
            for key in example:
                check(example[key], real[key], f"{where}.{key}")

    check(loads(re.search(r"```json\n(.*?)```", TEXT, re.DOTALL)[1]), full_summary())
