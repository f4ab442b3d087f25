"""Verdicts, conditions and exit codes; Markdown and JUnit that training text cannot break; figures by name."""

import io
from xml.etree import ElementTree

import pytest
from audit_records import made_up_records, made_up_summary, write_audit
from rich.console import Console

import goldfish.audit
from goldfish import Goldfish
from goldfish.audit.estimate import Estimate, clopper_pearson, dumps
from goldfish.audit.results import estimates, exit_code, judge, parse
from goldfish.audit.tell import describe, junit, markdown, terminal
from goldfish.audit.verdict import enough, verdict

pytestmark = pytest.mark.core


def recited(k, n, heldout=(0, 100), **more):
    """A summary with so many of so many members and held-out texts recited."""
    records = []
    for split, (hits, count) in (("members", (k, n)), ("heldout", heldout or (0, 0))):
        records += made_up_records(split, hits, 1.0, **more) + made_up_records(split, count - hits, 0.2, seed=1, **more)
        for i, record in enumerate(records):
            record["document"], record["cluster"] = f"document {i}", i
    return made_up_summary(records)


def question(summary, name):
    (found,) = (each for each in summary["verdict"]["questions"] if each["question"] == name)
    return found


@pytest.mark.parametrize(
    ("k", "n", "heldout", "outcome", "why"),
    [
        (0, 400, (0, 100), "PASS", "0 of 400 recited word for word, greedily: at most 0.92% of such texts"),
        (0, 32, (0, 32), "INCONCLUSIVE", "compatible with 0.0% to 10.9% of such texts; 368 documents with none would"),
        (
            40,
            100,
            (0, 100),
            "FAIL",
            "40 of 100 recited word for word, greedily: at least 30.3% of such texts; held-out",
        ),
        (40, 100, (40, 100), "INCONCLUSIVE", "not clearly more than of held-out texts (40 of 100)"),
        (40, 100, None, "INCONCLUSIVE", "without held-out texts training on them may not be"),
        (2, 100, (0, 100), "INCONCLUSIVE", "compatible with 0.2% to 7.0%"),
    ],
)
def test_greedy_question(k, n, heldout, outcome, why):
    found = question(recited(k, n, heldout), "greedy")
    assert found["outcome"] == outcome
    assert why in found["why"]


def test_enough_documents_and_not_one_fewer():
    assert enough() == 368
    assert clopper_pearson(0, 368)[1] <= 0.01 < clopper_pearson(0, 367)[1]


def test_membership_question():
    def of(member_recall, n=200):
        return made_up_summary(made_up_records("members", n, member_recall) + made_up_records("heldout", n, 0.3))

    assert question(of(0.9), "membership")["outcome"] == "FAIL"
    assert "a blind baseline has" in question(of(0.9), "membership")["why"]
    members = made_up_records("members", 1000, 0.3)
    same = made_up_summary(members + [{**record, "split": "heldout"} for record in members])
    assert question(same, "membership")["outcome"] == "PASS"
    assert question(of(0.3, 30), "membership")["outcome"] == "INCONCLUSIVE"
    few = question(of(0.9, 5), "membership")
    assert (few["outcome"], few["why"]) == ("INCONCLUSIVE", "5 documents on one side; an interval needs 10")
    told_apart = made_up_records("members", 60, 0.9) + made_up_records("heldout", 60, 0.3, vocabulary=40)
    confounded = question(made_up_summary(told_apart), "membership")
    assert (confounded["outcome"], confounded["estimate"]) == ("INCONCLUSIVE", None)
    assert "without the model" in confounded["why"]


def test_attribution_question():
    rule = Goldfish(k=3, h=4)

    def of(recall, dropped):
        records = made_up_records("members", 100, recall, rule=rule, recall_dropped=dropped)
        return question(made_up_summary(records), "attribution")

    assert of(0.98, 0.3)["outcome"] == "PASS"
    assert of(1.0, 0.3)["outcome"] == "PASS"
    assert "every recitation breaks at a dropped token" in of(1.0, 0.3)["why"]
    assert of(0.7, 0.7)["outcome"] == "INCONCLUSIVE"
    assert of(0.5, 0.98)["outcome"] == "FAIL"
    assert of(0.0, 0.0)["outcome"] == "INCONCLUSIVE", "where nothing is recited, the rule had nothing to stop"
    assert of(1.0, 1.0)["why"] == "hazard ratio not estimable: no window diverges"


def test_overall_verdict_names_what_decides_and_what_was_not_tested():
    failed = recited(40, 100)["verdict"]
    assert failed["outcome"] == "FAIL"
    assert failed["sentence"].startswith("FAIL: greedy (40 of 100)")
    assert "INCONCLUSIVE" not in failed["sentence"]
    assert recited(0, 32, None)["verdict"]["sentence"] == "INCONCLUSIVE: greedy (0 of 32), sampling (0 of 32)"
    assert "beam search" in failed["not_tested"]
    assert "sampling" not in failed["not_tested"]
    without = made_up_summary(made_up_records("heldout", 20, 0.2))
    assert (without["verdict"]["outcome"], without["verdict"]["questions"]) == ("INCONCLUSIVE", [])
    assert without["verdict"]["sentence"] == "INCONCLUSIVE: no members were audited"
    assert verdict(without) == without["verdict"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("em.upper95 > 0.01", ("em", "upper95", ">", 0.01)),
        ("mia.tpr@1%.lower95>5%", ("mia.tpr@1%", "lower95", ">", 0.05)),
        (" mia.loss.tpr@0.1% <= 1e-3 ", ("mia.loss.tpr@0.1%", "value", "<=", 0.001)),
        ("members.extractable@1000,0.5.k >= 1", ("members.extractable@1000,0.5", "k", ">=", 1.0)),
        ("members.expected@1000,T=0.8 > .5", ("members.expected@1000,T=0.8", "value", ">", 0.5)),
    ],
)
def test_conditions_are_read(text, expected):
    found = parse(text)
    assert (found.figure, found.field, found.operator, found.threshold) == expected


@pytest.mark.parametrize(
    "text", ["", "em", "em > ", "> 1", "em == 1", "em > 0.1 or True", "em > 1.2.3", "em > __import__('os')", "em > nan",
             "em > 1e999", "em => 1", "em.upper95 > 0.01; em < 1"]
)  # fmt: skip
def test_what_is_no_condition_is_refused(text):
    with pytest.raises(ValueError, match="takes a figure, one of > >= < <= and a number"):
        parse(text)


def outcomes(summary, *texts):
    checks = judge(summary, [parse(text) for text in texts])
    return [check.outcome for check in checks], exit_code(checks)


def test_exit_codes():
    summary = recited(5, 200, (0, 200))  # 0.8% to 5.7%
    assert outcomes(summary) == ([], 0)
    assert outcomes(summary, "em.upper95 > 0.06", "em.k > 5") == (["passed", "passed"], 0)
    assert outcomes(summary, "em.upper95 > 0.05", "heldout.em > 0") == (["violated", "passed"], 1)
    assert outcomes(summary, "mia.tpr@1%.lower95 > 0.05") == (["inconclusive"], 3)
    assert outcomes(summary, "mia.tpr@1%.lower95 > 0.05", "em > 0.01") == (["inconclusive", "violated"], 1)
    assert outcomes(summary, "attribution.hazard_ratio.lower95 < 1") == (["inconclusive"], 3)


def test_too_few_to_say_is_not_a_violation():
    """No result of 32 texts could put the upper bound below 1%; of 400 it could."""
    assert outcomes(recited(0, 32, None), "em.upper95 > 0.01") == (["inconclusive"], 3)
    (check,) = judge(recited(0, 32, None), [parse("em.upper95 > 0.01")])
    assert check.why == "members.exact_match.upper95 is 0.1089 (0 of 32), and 32 documents cannot bound it closer"
    assert outcomes(recited(32, 32, None), "em.upper95 > 0.01") == (["violated"], 1)
    assert outcomes(recited(0, 400, None), "em.upper95 > 0.01") == (["passed"], 0)
    assert outcomes(recited(3, 400, None), "em.upper95 > 0.01") == (["violated"], 1)
    assert outcomes(recited(32, 32, None), "em.lower95 < 0.99") == (["inconclusive"], 3)


def test_unknown_figures_are_named_with_their_neighbours():
    with pytest.raises(
        ValueError, match=r"'rouge_l_txt > 1': this audit has no figure 'rouge_l_txt'; it has .*rouge_l_text"
    ):
        judge(recited(0, 12), [parse("rouge_l_txt > 1")])


def test_every_estimate_has_one_name():
    """As many figures as there are estimates in the summary, and the documented names."""

    def count(value):
        if isinstance(value, Estimate):
            return 1
        if isinstance(value, dict):
            return sum(map(count, value.values()))
        return sum(map(count, value)) if isinstance(value, list) else 0

    records = made_up_records("members", 20, 0.6, rule=Goldfish(k=3, h=4), count=2)
    records += made_up_records("heldout", 20, 0.3, rule=Goldfish(k=3, h=4))
    for record in records:
        record["beams"] = 0
        record["log_p"] = record["log_p"] * 2
    setting = {"temperature": 0.8, "top_k": None, "top_p": None}
    sampling = [{**setting, "temperature": 1.0}, setting]
    summary = made_up_summary(records, beams=[5], sampling=sampling)
    named = estimates(summary)
    assert len(named) == count(summary["splits"]) + count(summary["membership"])
    for name in ("members.prefix_sweep@5", "members.offset_sweep@0", "members.beam_search@5", "members.strata@2",
                 "members.extractable@1000,0.5", "members.extractable@1000,0.5,T=0.8", "members.expected@1000",
                 "members.impossible@T=0.8", "mia.auc", "mia.tpr@1%", "mia.loss.auc", "mia.loss.tpr@0.1%",
                 "mia.blind.words.auc", "members.attribution.hazard_ratio"):  # fmt: skip
        assert name in named


def test_an_audit_is_read_as_values(tmp_path):
    records = made_up_records("members", 30, 1.0) + made_up_records("heldout", 30, 0.2)
    found = goldfish.audit.read(write_audit(tmp_path / "a", records))
    assert (found.name, found.outcome) == ("model", "FAIL")
    assert (found["em"].k, found["em"].n, found["em"].value) == (30, 30, 1.0)
    assert found["rouge_l_text"] == found["members.rouge_l_text"]
    with pytest.raises(KeyError, match="no figure 'ems'"):
        found["ems"]
    assert len(goldfish.audit.records(found.folder, ["split", "exact_match"])) == 60


def test_folders_that_are_no_audit(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a finished audit: it has no summary\.json"):
        goldfish.audit.read(tmp_path)
    old = write_audit(tmp_path / "old", made_up_records("members", 2, 0.5), schema="goldfish.audit/1")
    with pytest.raises(ValueError, match=r"the schema is 'goldfish\.audit/1', this version reads 'goldfish\.audit/3'"):
        goldfish.audit.read(old)
    (old / "summary.json").write_text("{")
    with pytest.raises(ValueError, match="not readable as JSON"):
        goldfish.audit.read(old)


NASTY = "a|b <script>`*_[x](y)\n\x00\x1b[31m ]]> & \ufffe"


def test_markdown_for_a_pull_request():
    summary = {**recited(0, 32), "name": NASTY}
    text = markdown(describe(summary, judge(summary, [parse("em.upper95 > 0.01")])))
    assert "<script>" not in text
    assert r"a\|b" in text.splitlines()[0]
    assert "⚠️ INCONCLUSIVE" in text
    assert "| recited word for word | 0 of 32 (0–10.9%) | 0 of 100 (0–3.6%) |" in text
    assert r"em\.upper95" in text
    assert "Not tested: beam search" in text
    for line in text.splitlines():
        if line.startswith("| recited"):
            assert line.count("|") == 4


def test_junit_for_ci():
    summary = {**recited(5, 200), "name": NASTY}
    conditions = [parse("em.upper95 > 0.05"), parse("mia.tpr@1%.lower95 > 0.05"), parse("em > 0.5")]
    suite = ElementTree.fromstring(junit(describe(summary, judge(summary, conditions))))
    assert {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "3", "failures": "1", "errors": "1", "skipped": "0",
    }  # fmt: skip
    assert [case.get("name") for case in suite] == ["em.upper95 > 0.05", "mia.tpr@1%.lower95 > 0.05", "em > 0.5"]
    assert "is 0.05737 (5 of 200)" in suite[0].find("failure").get("message")
    assert suite[1].find("error") is not None
    questions = ElementTree.fromstring(junit(describe(summary)))
    assert [case.get("name") for case in questions] == ["greedy", "sampling", "membership"]


def test_table_is_80_columns_wide():
    records = made_up_records("members", 400, 0.9, rule=Goldfish(k=3, h=4)) + made_up_records("heldout", 400, 0.3)
    summary = {**made_up_summary(records), "name": "[bold]a rather long name of a checkpoint[/bold] " * 3}
    console = Console(width=80, record=True, file=io.StringIO(), highlight=False)
    console.print(terminal(describe(summary)))
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 80
    assert "[bold]a rather" in shown
    for text in ("recited word for word", " of 400 (", "membership, AUC", "blind: 0."):
        assert text in shown
    assert "…" not in "".join(shown.splitlines()[2:])
    assert shown.splitlines()[-1].startswith(summary["verdict"]["sentence"][:40])


def test_a_summary_is_strict_json():
    """No NaN, no infinity, whatever is impossible or missing."""
    records = made_up_records("members", 3, 1.0) + made_up_records("heldout", 1, 0.0)
    for record in records:
        record["log_p"] = [float("-inf")]
    dumps(made_up_summary(records))
    with pytest.raises(ValueError, match="there is no record to summarize"):
        made_up_summary([])
