"""docs/audit-files.md names every column and key; its example is a part of a summary."""

import json
import re
from pathlib import Path

import pytest
from audit_records import made_up_audit, made_up_records

from goldfish import Goldfish
from goldfish.audit.questions.membership import ATTACKS
from goldfish.audit.questions.sanity import GAIN
from goldfish.audit.questions.secrets import SHORT, UNREACHED
from goldfish.audit.records import COLUMNS, NEAR_VERBATIM, SCHEMA
from goldfish.audit.verdict import LIMITS

PAGE = Path(__file__).parents[1] / "docs" / "audit-files.md"
if not PAGE.is_file():
    pytest.skip("goldfish is installed without its docs", allow_module_level=True)
TEXT = PAGE.read_text(encoding="utf-8")


def full_summary():
    rule = Goldfish(k=3, h=4)
    records = made_up_records("members", 20, 0.9, rule=rule)
    records += made_up_records("heldout", 20, 0.3, rule=rule)
    for record in records:
        record["beams"] = 0
        record["mia_reference"] = record["mia_wbc"] = record["mia_loss"]
        record |= {"secrets": ["w7"], "secret_log_p": [[-1.0]]}
    return made_up_audit(records, beams=[5], secrets="x").to_json()


def keys(value):
    if isinstance(value, dict):
        return set(value).union(*map(keys, value.values()))
    return set().union(*map(keys, value)) if isinstance(value, list) else set()


def test_every_column_key_and_figure_is_documented():
    assert SCHEMA in TEXT
    summary = full_summary()
    figures = {row["figure"] for row in summary["figures"]}
    names = {
        *COLUMNS.names,
        *keys(summary),
        *figures,
        *(f"mia_{attack}" for attack in ATTACKS),
    }
    assert not names - set(re.findall(r"\w+", TEXT))


def test_thresholds_are_documented():
    limits = (
        "`recited` (default {recited} of documents), `near_verbatim` ({near_verbatim})"
    )
    assert limits.format(**LIMITS) in TEXT
    run, share = NEAR_VERBATIM.split(",")
    assert f"a run of at least {run.removesuffix('t')} tokens" in TEXT
    similarity = float(share.removesuffix("%")) / 100
    assert f"edit similarity is at least {similarity:g}" in TEXT
    assert f"more than {GAIN} nats per token" in TEXT
    assert f"fewer than {SHORT:,} strings" in TEXT
    assert f"is at most {UNREACHED}" in TEXT


def test_the_example_is_a_part_of_a_summary():
    example, real = (
        json.loads(re.search(r"```json\n(.*?)```", TEXT, re.DOTALL)[1]),
        full_summary(),
    )
    assert set(example) <= set(real)
    assert example["limits"].keys() == real["limits"].keys()
    names = [row["figure"] for row in real["figures"]]
    for row in example["figures"]:
        assert list(row) == list(real["figures"][0])
        assert row["figure"] in names
