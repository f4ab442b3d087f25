"""What the report refuses: files that are missing, broken, of another schema, or that contradict each other."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from report_audits import report, window, write_audit

from goldfish.report import write_report


@pytest.fixture
def pair(tmp_path):
    rows = [window(i, diverge=1) for i in range(3)] + [window(0, "heldout", diverge=2)]
    return write_audit(tmp_path / "a", rows, "standard"), write_audit(tmp_path / "b", rows)


def break_summary(audit, change):
    path = audit / "summary.json"
    summary = json.loads(path.read_text())
    change(summary)
    path.write_text(json.dumps(summary))


def members(summary):
    return summary["splits"]["members"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(schema="goldfish.audit/1"), r"schema is 'goldfish.audit/1', this version reads 'goldfish"),
        (lambda s: s.pop("schema"), r"summary: 'schema' is missing; it has 'name'"),
        (lambda s: s.update(splits={}), r"splits must hold members, heldout or both, got \[\]"),
        (lambda s: s["splits"].update(test={}), r"splits must hold members, heldout or both"),
        (lambda s: s.update(name=3), r"summary\.name must be str, got 3"),
        (lambda s: s.update(rule="k=4"), r"summary\.rule must be dict or null, got 'k=4'"),
        (lambda s: s["protocol"].update(offsets=[]), r"protocol\.offsets is empty"),
        (lambda s: members(s).pop("nll"), r"splits\.members: 'nll' is missing"),
        (lambda s: members(s)["nll"].update(mean=True), r"members\.nll\.mean must be float, got True"),
        (lambda s: members(s)["nll"].update(mean=float("nan")), r"NaN, which is no JSON number"),
        (lambda s: members(s)["nll"].pop("mean"), r"members\.nll: expected one of rate, mean and value, got none"),
        (lambda s: members(s)["prefix_sweep"][0].pop("exact_match"), r"prefix_sweep\[0\]: 'exact_match' is missing"),
        (lambda s: members(s)["exact_match"].update(k=9), r"expected 0 <= k <= n, got k=9, n=3"),
        (lambda s: members(s)["exact_match"].update(lower95=2), r"expected lower95 <= upper95, got 2"),
        (lambda s: members(s)["exact_match"].update(upper95=2), r"expected 0 <= lower95 <= upper95 <= 1"),
        (lambda s: members(s).update(n=4), r"summary.json speaks of 4 members windows, 0 of them exact"),
        (lambda s: s["verdict"].update(outcome="MAYBE"), r"must be one of PASS, FAIL, INCONCLUSIVE, got 'MAYBE'"),
        (lambda s: s["membership"].update(headline=None), r"membership: 'reason' is missing"),
        (lambda s: s["membership"].update(attacks={}), r"membership\.attacks is empty"),
        (lambda s: s["membership"]["blind"]["length"].update(roc=[[0, 2]]), r"roc must be points of two shares each"),
    ],
)  # fmt: skip
def test_a_summary_that_does_not_fit_is_refused(tmp_path, pair, change, message):
    break_summary(pair[1], change)
    with pytest.raises(ValueError, match=message):
        report(tmp_path, *pair)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "test"}, "row 0: split must be one of members, heldout, got 'test'"),
        ({"nll": [0.1]}, "row 0: nll has 1 entries for a suffix of 6 tokens"),
        ({"nll": [float("nan")] * 6}, "row 0: nll or log_p holds NaN"),
        ({"rank": [1]}, "row 0: rank has 1 entries for a suffix of 6 tokens"),
        ({"log_p": []}, "row 0: log_p has 0 entries for 1 sampling settings"),
        ({"dropped": [True]}, "row 0: dropped has 1 entries for a suffix of 6 tokens"),
        ({"first_divergence": 7}, "row 0: first_divergence 7 does not fit a suffix of 6 tokens"),
        ({"first_divergence": 3}, "row 0: first_divergence 3 does not fit .* with exact_match True"),
        ({"rouge_l_ids": 1.5}, "row 0: rouge_l_ids must lie between 0 and 1, got 1.5"),
        ({"prefix_text": None}, "row 0: prefix_text holds a null"),
        ({"suffix_tokens": [None] * 6}, "row 0: suffix_tokens holds a null"),
    ],
)
def test_records_that_do_not_fit_are_refused(tmp_path, change, message):
    audit = write_audit(tmp_path / "a", [window(0)])
    table = pq.read_table(audit / "records" / "000000.parquet")
    row = table.to_pylist()[0] | change
    columns = {field.name: pa.array([row[field.name]], field.type) for field in table.schema}
    pq.write_table(pa.table(columns), audit / "records" / "000000.parquet")
    with pytest.raises(ValueError, match=message):
        report(tmp_path, audit)


def test_missing_and_broken_files_are_named(tmp_path, pair):
    with pytest.raises(FileNotFoundError, match=r"nowhere is no audit folder: it has no summary\.json"):
        report(tmp_path, tmp_path / "nowhere")
    block = pair[0] / "records" / "000000.parquet"
    pq.write_table(pq.read_table(block).drop_columns(["nll"]), block)
    with pytest.raises(ValueError, match=r"the records in .* are damaged .*; audit again"):
        report(tmp_path, pair[0])
    block.unlink()
    block.parent.rmdir()
    with pytest.raises(FileNotFoundError, match="it has no records; give the folder that `goldfish audit -o`"):
        report(tmp_path, pair[0])
    for text in (b'{"schema": ', b"\xff\xfe", b""):
        (pair[1] / "summary.json").write_bytes(text)
        with pytest.raises(ValueError, match=r"summary\.json: not readable as JSON"):
            report(tmp_path, pair[1])
    (pair[1] / "summary.json").write_text("[]")
    with pytest.raises(ValueError, match=r"summary must be dict, got \[\]"):
        report(tmp_path, pair[1])
    with pytest.raises(ValueError, match="audits is empty"):
        report(tmp_path)
    with pytest.raises(TypeError, match="got the single path"):
        write_report(str(pair[0]), tmp_path / "report.html")


def test_nothing_is_overwritten_unasked(tmp_path, pair):
    path = tmp_path / "deep" / "report.html"
    assert write_report(pair, path) == path
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_report(pair, path)
    assert path.read_text() == "mine"
    write_report(pair, path, overwrite=True)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(FileExistsError, match="is a folder"):
        write_report(pair, path.parent, overwrite=True)
