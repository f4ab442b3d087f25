"""Two audits, paired: hand-made counts, the power of pairing, and refusals."""

import json

import numpy as np
import pytest
from audit_records import made_up_records, write_audit
from rich.console import Console

from goldfish.audit.compare import MEANS, compare, markdown, mcnemar, table, write
from goldfish.audit.records import dumps
from goldfish.cli import main


def pair(tmp_path, first, second, **changes):
    return [
        write_audit(tmp_path / name, records, **{"name": name, **changes})
        for name, records in (("standard", first), ("goldfish", second))
    ]


def same_windows(n=40):
    """Two models on the same items; the second recites only the first 10 of the first's 30."""
    base = made_up_records("members", n, 1.0)
    missed = [
        {
            **record,
            "exact_match": False,
            "first_divergence": 3,
            "rouge_l_text": 0.5,
            "nll": [1.0] * 8,
        }
        for record in base
    ]
    return base[:30] + missed[30:], base[:10] + missed[10:]


def test_paired_by_hand(tmp_path):
    first, second = same_windows()
    found = compare(
        *pair(tmp_path, first, second[::-1])
    )  # the order of the rows does not matter
    match = found["splits"]["members"]["exact_match"]
    assert {
        key: match[key] for key in ("n", "first", "second", "only_first", "only_second")
    } == {
        "n": 40,
        "first": 30,
        "second": 10,
        "only_first": 20,
        "only_second": 0,
    }
    assert match["p"] == mcnemar(20, 0)
    assert match["difference"].value == -0.5
    assert match["difference"].low < -0.5 < match["difference"].high < 0
    rouge = found["splits"]["members"]["rouge_l_text"]
    assert (rouge["first"], rouge["second"]) == (0.875, 0.625)
    assert rouge["difference"].value == -0.25
    assert found["sentence"] == (
        "standard recites 30, goldfish 10 of 40 member texts: goldfish recites fewer "
        "(McNemar p = 1.9e-06)"
    )


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(6, 0) == pytest.approx(2 / 2**6)
    assert mcnemar(1, 5) == pytest.approx(2 * (1 + 6) / 2**6)


def test_pairing_sees_what_two_samples_would_not(tmp_path):
    """Texts differ much, models little: the paired interval is narrower than the texts' spread."""
    base = made_up_records("members", 60, 0.5)
    spread = np.random.default_rng(0).random(60)
    first = [
        {**record, "rouge_l_text": float(x)}
        for record, x in zip(base, spread, strict=True)
    ]
    second = [
        {**record, "rouge_l_text": float(x) - 0.02 + 0.001 * (i % 3)}
        for i, (record, x) in enumerate(zip(base, spread, strict=True))
    ]
    difference = compare(*pair(tmp_path, first, second))["splits"]["members"][
        "rouge_l_text"
    ]["difference"]
    assert difference.value == pytest.approx(-0.019)
    assert -0.0195 < difference.low < difference.high < -0.0185


def test_windows_of_one_document_are_one_event(tmp_path):
    base = made_up_records("members", 40, 1.0, per_document=20)
    missed = [{**record, "exact_match": False} for record in base]
    match = compare(*pair(tmp_path, base, missed))["splits"]["members"]["exact_match"]
    assert (match["n"], match["first"], match["only_first"], match["p"]) == (
        2,
        2,
        2,
        0.5,
    )


def test_the_sentence_counts_what_it_compares(tmp_path):
    """One window of each of 12 documents, and all of four: fewer documents, more windows."""
    base = made_up_records("members", 84, 0.0, per_document=7)
    one = [{**record, "exact_match": i % 7 == 0} for i, record in enumerate(base)]
    four = [{**record, "exact_match": i < 28} for i, record in enumerate(base)]
    assert compare(*pair(tmp_path, one, four))["sentence"] == (
        "standard recites 12, goldfish 4 of 12 member texts: goldfish recites fewer "
        "(McNemar p = 0.0078)"
    )


def test_equal_models_do_not_differ(tmp_path):
    records = made_up_records("members", 12, 0.9)
    found = compare(*pair(tmp_path, records, records, name="model"))
    assert found["splits"]["members"]["exact_match"]["p"] == 1.0
    assert [found[which]["name"] for which in ("first", "second")] == [
        "model (1)",
        "model (2)",
    ]
    assert "the difference may be chance" in found["sentence"]
    difference = found["splits"]["members"]["nll"]["difference"]
    assert (difference.value, difference.high) == (0.0, None)


def test_other_items_are_refused(tmp_path):
    records = made_up_records("members", 12, 0.9)
    other = made_up_records("members", 12, 0.9, seed=1)
    a, b = pair(tmp_path, records[:10], [*records[:5], *other[5:12]])
    with pytest.raises(
        ValueError,
        match=(
            r"are audits of different windows: 7 windows in one of them only or with other tokens, "
            r"the first at members row 5, offset 0; only the same windows can be paired: "
            r"audit both checkpoints with the same files"
        ),
    ):
        compare(a, b)
    (b / "records" / "000000.parquet").unlink()
    with pytest.raises(ValueError, match="holds 0 records, expected 12"):
        compare(a, b)


def test_each_turn_of_a_chat_is_compared(tmp_path):
    """Its windows have one place: another first turn is another question."""
    records = made_up_records("members", 4, 0.9)
    for record in records[1:]:
        record |= {"index": 0, "completion": True}
    changed = [record | {} for record in records]
    changed[1]["suffix_ids"] = [7, *records[1]["suffix_ids"][1:]]
    a, b = pair(tmp_path, records, changed)
    with pytest.raises(ValueError, match="1 window in one of them only or with other"):
        compare(a, b)


def test_the_command_writes_once_and_shows_a_table(tmp_path, capsys):
    first, second = same_windows()
    folders = [str(folder) for folder in pair(tmp_path, first, second)]
    command = ["compare", *folders, "-o", str(tmp_path / "out")]
    assert main(command) == 0
    assert "goldfish recites fewer" in capsys.readouterr().out.replace("\n", " ")
    result = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert result == json.loads(dumps(compare(*folders)))
    assert set(result["splits"]["members"]) == {"n", "documents", "exact_match", *MEANS}
    assert (
        "| members | exact match | 30 of 40 | 10 of 40 |"
        in (tmp_path / "out" / "compare.md").read_text()
    )
    assert main(command) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert (
        main(
            [
                "compare",
                folders[0],
                str(tmp_path / "nowhere"),
                "-o",
                str(tmp_path / "other"),
            ]
        )
        == 2
    )


def test_shown_in_80_columns_and_harmless(tmp_path):
    first, second = same_windows()
    found = compare(*pair(tmp_path, first, second))
    found["first"]["name"] = "[red]x|<script>"
    console = Console(width=80, record=True, highlight=False)
    console.print(table(found))
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 80
    assert "[red]x" in shown
    assert "<script>" not in markdown(found)
    with pytest.raises(FileExistsError):
        write(found, tmp_path)
