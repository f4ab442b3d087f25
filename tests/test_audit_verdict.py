"""Verdicts and exit codes; Markdown that training text cannot break; an audit read as values."""

import io
import json
import re
from dataclasses import replace

import pandas as pd
import pytest
from audit_records import (
    made_up_audit,
    made_up_records,
    made_up_run,
    write_audit,
    write_run,
)
from rich.console import Console

import goldfish.audit
from goldfish import Goldfish
from goldfish.audit.intervals import Figure, Figures, clopper_pearson
from goldfish.audit.questions import INCONCLUSIVE
from goldfish.audit.questions import membership as membership_module
from goldfish.audit.records import dumps
from goldfish.audit.render import describe, markdown, not_tested, skipped, terminal
from goldfish.audit.run import publish
from goldfish.audit.verdict import (
    LIMITS,
    enough,
    parse_limits,
    verdict,
)
from goldfish.cli import main


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Most tests here are about other figures than membership's."""
    monkeypatch.setattr(membership_module, "RESAMPLES", 100)


def texts(split, k, n, **more):
    """n records, k of them recited."""
    records = made_up_records(split, k, 1.0, **more)
    for i, record in enumerate(made_up_records(split, n - k, 0.2, seed=1, **more)):
        renamed = {
            "document": 10**5 + record["document"],
            "name": f"rest {i}",
            "index": k + i,
        }
        records.append({**record, **renamed})
    return records


def recited(k, n, heldout=(0, 100), limits=(), require=(), run=None, **protocol):
    """The audit of k of n members recited, and so many held-out texts."""
    records = texts("members", k, n) + (texts("heldout", *heldout) if heldout else [])
    return made_up_audit(records, limits, require, run, **protocol)


def question(audit, name):
    (found,) = (each for each in audit.verdict["questions"] if each["question"] == name)
    return found


def explanation(audit, name):
    found = (each for each in audit.verdict["explanations"] if each["question"] == name)
    return next(found, None)


@pytest.mark.parametrize(
    ("k", "n", "heldout", "outcome", "why"),
    [
        (
            0,
            400,
            (0, 100),
            "PASS",
            "under greedy decoding: at most 0.92% of such texts",
        ),
        (
            0,
            32,
            (0, 32),
            "INCONCLUSIVE",
            "may be 0–10.9%; at this rate about 368 documents",
        ),
        (40, 100, (0, 100), "FAIL", "at least 28.4% of such texts; held-out 0 of 100"),
        (
            40,
            100,
            (40, 100),
            "INCONCLUSIVE",
            "(40 of 100); at this rate more documents would not",
        ),
        (
            40,
            100,
            (30, 100),
            "INCONCLUSIVE",
            "not clearly more than held-out texts (30 of 100)",
        ),
        (
            40,
            100,
            None,
            "INCONCLUSIVE",
            "12 held-out texts with none recited would decide it",
        ),
        (2, 100, (0, 100), "INCONCLUSIVE", "may be 0.2–7%; at this rate about"),
        (
            0,
            400,
            (300, 400),
            "INCONCLUSIVE",
            "300 of 400 held-out texts: are the files swapped?",
        ),
    ],
)
def test_greedy_question(k, n, heldout, outcome, why):
    """Never INCONCLUSIVE without what would decide."""
    audit = recited(k, n, heldout)
    found = question(audit, "greedy")
    assert found["outcome"] == outcome
    assert why in found["why"]
    assert (found["needs"] is not None) == (outcome == "INCONCLUSIVE")
    assert audit.outcome == outcome


def test_one_held_out_text_decides_about_a_census_that_was_recited_whole():
    alone = recited(40, 40, None, complete=True)
    assert (
        "; 1 held-out text with none recited would decide it"
        in alone.verdict["sentence"]
    )
    assert recited(40, 40, (0, 1), complete=True).outcome == "FAIL"


def test_swapped_files_are_warned_about():
    assert any(
        "files swapped?" in each
        for each in recited(0, 400, (300, 400)).verdict["warnings"]
    )
    assert not any(
        "swapped" in each for each in recited(0, 400, (1, 400)).verdict["warnings"]
    )


@pytest.mark.parametrize(
    ("limit", "share", "level"),
    [
        (0.01, 0.0, 0.95),
        (0.01, 0.02, 0.95),
        (0.05, 0.03, 0.95),
        (0.001, 0, 0.95),
        (0.01, 0.03, 0.99),
    ],
)
def test_enough_documents_and_not_one_fewer(limit, share, level):
    def undecided(n):
        low = clopper_pearson(share * n, n, level)[0]
        return low <= limit < clopper_pearson(share * n, n)[1]

    n = enough(limit, share, level)
    assert not undecided(n)
    assert undecided(n - 1)
    assert enough(0.01) == 368
    assert enough(0.01, 0.01) is None


def test_a_fail_is_corrected_for_the_number_of_questions():
    """8 of 300 would be above the limit for one question (1.2%), not for one of three (0.96%)."""
    found = question(recited(8, 300, (0, 500)), "greedy")
    assert found["outcome"] == "INCONCLUSIVE"
    assert "above the limit, but not by enough for one of 3 questions" in found["why"]
    assert (
        question(recited(8, 300, (0, 500), sampling=[]), "greedy")["outcome"] == "FAIL"
    ), "of two"


def test_limits_are_options_and_printed():
    assert recited(40, 100).outcome == "FAIL"
    lax = recited(40, 100, limits=["recited=60%", "near-verbatim=0.2"])
    outcomes = {each["question"]: each["outcome"] for each in lax.verdict["questions"]}
    assert outcomes == {"greedy": "PASS", "sampling": "PASS", "near_verbatim": "FAIL"}
    assert lax.limits == {"recited": 0.6, "near_verbatim": 0.2, "auc": 0.55}
    assert "Limits: recited=60%, near_verbatim=20%, auc=55%" in describe(lax).notes
    for text in ("recited", "recited=2", "em=1%", "recited=nan", "recited=0"):
        with pytest.raises(
            ValueError, match="--limit takes recited, near_verbatim, auc and a shar"
        ):
            parse_limits([text])


def census(k, n, heldout=(0, 100), unasked=0, rows=None):
    """Members that are said to be all that was trained on."""
    records = texts("members", k, n) + texts("heldout", *heldout)
    inputs = made_up_run(records)["inputs"]
    inputs["members"] |= {"drawn": n + unasked, "rows": rows or n + unasked}
    return made_up_audit(records, run={"inputs": inputs}, complete=True)


def test_a_census_has_no_sampling_error():
    audit = census(0, 62)
    assert audit.outcome == "PASS"
    among = "of the 62 texts in members.jsonl (said to be all that was trained on)"
    assert audit.verdict["sentence"].startswith(f"PASS: exact counts {among}: greedy 0")
    exact = audit["members.exact_match"]
    assert (exact.k, exact.n, exact.low, exact.high) == (0, 62, 0.0, 0.0)
    failed = question(census(40, 62), "greedy")
    assert failed["outcome"] == "FAIL"
    assert "40 of 62 recited verbatim" in failed["why"]
    assert "at least" not in failed["why"], "a bound of an exact count"
    assert recited(0, 62).outcome == "INCONCLUSIVE", "a sample of 62 is too small"


def test_a_drawn_part_of_a_census_has_a_hypergeometric_interval():
    part = census(0, 62, rows=70)["members.exact_match"]
    assert 0 < part.high < 0.03
    assert census(0, 62, rows=10**6)["members.exact_match"].high == pytest.approx(
        0.0578, abs=1e-3
    )


def test_what_a_census_could_not_ask_may_have_been_recited():
    exact = census(1, 62, unasked=2)["members.exact_match"]
    assert (exact.low, exact.high) == pytest.approx((1 / 64, 3 / 64))
    audit = census(0, 400, unasked=3)
    assert question(audit, "greedy")["outcome"] == "PASS"
    assert "of the 403 texts in members.jsonl" in audit.verdict["sentence"]
    assert question(census(0, 400, unasked=5), "greedy")["outcome"] == "INCONCLUSIVE"


def test_members_that_could_not_be_asked_are_no_pass():
    records = texts("members", 0, 400) + texts("heldout", 0, 100)
    for count, outcome in ((21, "PASS"), (22, "INCONCLUSIVE")):
        inputs = made_up_run(records)["inputs"]
        inputs["members"] |= {"drawn": 400 + count, "rows": 400 + count}
        audit = made_up_audit(records, run={"inputs": inputs})
        assert audit.outcome == outcome
        left_out = [
            each for each in audit.verdict["warnings"] if "could not be asked" in each
        ]
        assert bool(left_out) == (outcome == "INCONCLUSIVE")
        assert ("could not be asked" in audit.verdict["sentence"]) == bool(left_out)


def test_too_few_asked_is_told_first_also_if_no_question_is_decided():
    records = texts("members", 0, 7) + texts("heldout", 0, 7)
    inputs = made_up_run(records)["inputs"]
    inputs["members"] |= {"drawn": 10, "rows": 10}
    audit = made_up_audit(records, run={"inputs": inputs})
    outcomes = {each["outcome"] for each in audit.verdict["questions"]}
    assert outcomes == {INCONCLUSIVE}
    assert audit.verdict["sentence"].startswith(
        "INCONCLUSIVE: 3 of 10 members could not be asked, more than 5% (greedy 0 of 7, "
    )


@pytest.mark.parametrize(("prompted", "enough"), [(380, True), (379, False)])
def test_members_that_no_simple_prompt_reached_are_no_pass(prompted, enough):
    records = texts("members", 0, 400) + texts("heldout", 0, 100)
    run = made_up_run(records)
    lacking = {"reason": "Who wrote {title}?", "count": 20, "rows": [0, 3, 4, 5, 6]}
    run["inputs"]["members"] |= {"prompted": prompted, "unprompted": [lacking]}
    figures = Figures(made_up_audit(records).rows)
    asked = Figure("members", "asked", value=0.0, k=0, n=400, low=0.0, high=0.009)
    judged = verdict(run, Figures([*figures, asked]), LIMITS)
    found = next(each for each in judged["questions"] if each["question"] == "asked")
    assert found["outcome"] == judged["outcome"] == ("PASS" if enough else INCONCLUSIVE)
    unreached = "21 of 400 members not asked for: without the columns"
    assert (unreached in found["why"]) != enough
    assert (unreached in judged["sentence"]) != enough
    (sentence,) = skipped(replace(made_up_audit(records), run=run))
    assert "20 of 400 rows not asked 'Who wrote {title}?'" in sentence
    assert "(rows 0, 3, 4, 5, 6, ...)" in sentence


def at_offsets(offsets, recite_at, n=400, k=40):
    """n members with a window at each offset; k of them are recited at one of the offsets."""
    records = []
    for offset in offsets:
        hits = k if offset == recite_at else 0
        windows = made_up_records("members", hits, 1.0, seed=offset, offset=offset)
        windows += made_up_records(
            "members", n - hits, 0.2, seed=offset + 1, offset=offset
        )
        records += [
            {**record, "name": f"{i}", "document": i, "index": i}
            for i, record in enumerate(windows)
        ]
    return made_up_audit(
        records + made_up_records("heldout", 100, 0.2), offsets=list(offsets)
    )


def test_every_offset_counts():
    """40 of 400 recited at the second offset only: the first alone shows 0 of 400."""
    audit = at_offsets((0, 40), 40)
    assert (audit.outcome, audit["members.exact_match"].point()) == (
        "FAIL",
        "40 of 400",
    )
    swept = [audit.rows.get("members", "offset_sweep", "", x).point() for x in (0, 40)]
    assert swept == ["0 of 400", "40 of 400"]
    assert not any("other places" in each for each in not_tested(audit))


def test_near_verbatim_has_its_own_question():
    """Fragments: no text whole, but some with a run of 25 tokens, or half of them in order."""
    base = made_up_records("members", 400, 0.2)
    fragments = [{**record, "longest_run": 25} for record in base[:20]]
    similar = [{**record, "edit_similarity": 0.5} for record in base[20:30]]
    short = [
        {**record, "longest_run": 24, "edit_similarity": 0.49} for record in base[30:40]
    ]
    records = [
        *fragments,
        *similar,
        *short,
        *base[40:],
        *made_up_records("heldout", 400, 0.2),
    ]
    audit = made_up_audit(records)
    assert question(audit, "greedy")["outcome"] == "PASS"
    assert question(audit, "near_verbatim")["outcome"] == "FAIL"
    assert [audit[f"{split}.near_verbatim"].k for split in ("members", "heldout")] == [
        30,
        0,
    ]
    assert audit.verdict["sentence"] == "FAIL: near-verbatim 30 of 400"


def test_membership_is_beside_the_verdict():
    """Visible membership is what the method leaves; it decides only if it is required."""
    rule = Goldfish(k=3, h=4)
    members = made_up_records("members", 400, 0.55, rule=rule, recall_dropped=0.2)
    heldout = made_up_records("heldout", 400, 0.2, rule=rule)
    limits = ["near_verbatim=50%", "recited=10%"]
    for require, outcome in (([], "PASS"), (["membership"], "FAIL")):
        audit = made_up_audit(members + heldout, limits, require)
        assert audit.outcome == outcome
        assert (explanation(audit, "membership") is None) == bool(require)
    assert question(audit, "membership")["outcome"] == "FAIL"
    found = explanation(made_up_audit(members + heldout), "membership")
    assert found["answer"] == "visible"
    assert "as expected: the goldfish loss hides dropped tokens" in found["why"]


def of_membership(members, heldout):
    audit = made_up_audit(members + heldout, require=["membership"])
    return audit, question(audit, "membership")


def test_membership_question():
    def outcome(*sides):
        return of_membership(*sides)[1]["outcome"]

    assert (
        outcome(
            made_up_records("members", 200, 0.9), made_up_records("heldout", 200, 0.3)
        )
        == "FAIL"
    )
    members = made_up_records("members", 1000, 0.3)
    assert (
        outcome(members, [{**record, "split": "heldout"} for record in members])
        == "PASS"
    )
    _, unclear = of_membership(
        made_up_records("members", 30, 0.3), made_up_records("heldout", 30, 0.3)
    )
    assert unclear["outcome"] == "INCONCLUSIVE"
    assert re.search(
        r"nor below 0.55; at this rate about [\d,]+ documents", unclear["why"]
    )
    _, few = of_membership(
        made_up_records("members", 5, 0.9), made_up_records("heldout", 5, 0.3)
    )
    assert few["outcome"] == "INCONCLUSIVE"
    assert few["why"].startswith(
        "5 documents on one side; an interval needs 10; at least 20"
    )
    told_apart = made_up_records("heldout", 60, 0.3, vocabulary=40)
    audit, confounded = of_membership(made_up_records("members", 60, 0.9), told_apart)
    assert confounded["outcome"] == "INCONCLUSIVE"
    assert audit["both.membership_auc"].value is None
    assert "may differ without regard to the model" in confounded["why"]


def test_an_auc_far_below_one_half_is_no_pass():
    sides = made_up_records("members", 100, 0.3), made_up_records("heldout", 100, 0.8)
    audit, swapped = of_membership(*sides)
    assert audit["both.membership_auc"].high < 0.5
    assert swapped["outcome"] == "INCONCLUSIVE"
    assert "are the files swapped?" in swapped["why"]


def test_a_pass_names_what_is_recited_and_what_it_rests_on():
    passed = recited(1, 1000, None)
    assert passed.outcome == "PASS"
    assert passed.verdict["sentence"].startswith(
        "PASS: at most 0.7% of such texts are recited"
    )
    assert passed.examples["members"]["exact_match"] == ["members 0"]
    (warning,) = passed.verdict["warnings"]
    assert warning.startswith("This PASS rests on members alone")
    text = markdown(describe(passed))
    assert "Recited\\: members 0" in text
    assert "Warning\\: This PASS rests on members alone" in text


def test_a_model_that_fails_the_sanity_check_gets_no_pass():
    """With the loss of a uniform guess it recites nothing, and that means nothing."""
    records = made_up_records("members", 400, 0.2) + made_up_records(
        "heldout", 100, 0.0
    )
    for record in records:
        record["nll"] = [6.1] * 8
    verdict = made_up_audit(records).verdict
    assert verdict["outcome"] == "INCONCLUSIVE"
    assert verdict["sentence"].startswith("INCONCLUSIVE: the sanity check failed")
    assert (
        "no better than guessing on these texts; members: 6.10 nats"
        in verdict["sanity"]
    )
    assert verdict["warnings"] == [verdict["sanity"]]
    # On held-out texts an overfitted model can be worse than a uniform guess: no sign of damage.
    for record in records:
        record["nll"] = [1.7 if record["split"] == "members" else 7.8] * 8
    verdict = made_up_audit(records).verdict
    assert verdict["sanity"].startswith("Sanity check passed")
    assert verdict["outcome"] == "PASS"
    # A model with its heads in the wrong order predicts as well after the prefix in disorder.
    sanity = {"members": {"windows": 16, "nll": 1.7, "nll_shuffled": 1.72}}
    verdict = made_up_audit(records, run={"sanity": sanity}).verdict
    assert verdict["outcome"] == "INCONCLUSIVE"
    assert "hardly uses the text before" in verdict["sanity"]
    assert "1.70 nats per token after it, 1.72" in verdict["sanity"]
    # Members such as random codes follow from nothing. Then the other split speaks for the model.
    sanity["heldout"] = {"windows": 16, "nll": 2.1, "nll_shuffled": 2.9}
    verdict = made_up_audit(records, run={"sanity": sanity}).verdict
    assert verdict["outcome"] == "PASS"


def test_overall_verdict_names_what_decides_and_what_was_not_tested():
    audit = recited(40, 100)
    failed = audit.verdict
    counts = "greedy 40 of 100, sampling 40 of 100, near-verbatim 40 of 100"
    assert failed["sentence"] == f"FAIL: {counts}"
    assert failed["exit_code"] == 1
    unclear = recited(0, 32, None).verdict
    assert (
        "greedy 0 of 32, sampling 0 of 32, near-verbatim 0 of 32; "
        in unclear["sentence"]
    )
    assert "about 368 documents would be needed" in unclear["sentence"]
    assert "beam search" in not_tested(audit)
    assert "sampling" not in not_tested(audit)
    without = made_up_audit(made_up_records("heldout", 20, 0.2)).verdict
    expected = ("INCONCLUSIVE: no members were audited", [], 3)
    assert (without["sentence"], without["questions"], without["exit_code"]) == expected


def test_texts_that_repeat_or_overlap_are_told():
    records = made_up_records("members", 12, 0.2)
    inputs = made_up_run(records)["inputs"]
    inputs["members"]["documents"] = 5
    audit = made_up_audit(records, run={"inputs": inputs, "overlap": {"documents": 3}})
    assert "members: 7 rows counted as one text with others" in skipped(audit)[0]
    assert any(
        "members and held-out share 3 texts" in each
        for each in audit.verdict["warnings"]
    )


def test_an_audit_is_read_as_values(tmp_path):
    records = made_up_records("members", 30, 1.0) + made_up_records("heldout", 30, 0.2)
    found = goldfish.audit.read(write_audit(tmp_path / "a", records))
    assert (found.name, found.outcome) == ("model", "FAIL")
    exact = found["members.exact_match"]
    assert (exact.k, exact.n, exact.value) == (30, 30, 1.0)
    assert isinstance(found.figures, pd.DataFrame)
    assert list(found.figures.columns) == list(vars(exact))
    curve = found.figures.query("split == 'members' and figure == 'prefix_sweep'")
    assert curve.x.tolist() == list(range(1, 11))
    assert len(found.records.query("exact_match")) == 30
    assert "30 of 30" in found._repr_html_()
    with pytest.raises(
        KeyError, match=r"no figure 'members.exact' .* members.exact_match"
    ):
        found["members.exact"]


def test_a_name_from_strangers_does_nothing_in_a_notebook(tmp_path):
    audit = write_audit(
        tmp_path, made_up_records("members", 3, 1.0), name="<script>x</script>"
    )
    assert "<script>" not in goldfish.audit.read(audit)._repr_html_()


def test_a_folder_that_is_no_finished_audit(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"not a finished audit: it has no summary\.json"
    ):
        goldfish.audit.read(tmp_path)
    old = write_audit(tmp_path / "old", made_up_records("members", 2, 0.5))
    text = (old / "summary.json").read_text()
    (old / "summary.json").write_text(
        text.replace("goldfish.audit/9", "goldfish.audit/1")
    )
    with pytest.raises(
        ValueError, match=r"the schema is 'goldfish\.audit/1', this version reads"
    ):
        goldfish.audit.read(old)


NASTY = "a|b <script>`*_[x](y)\n\x00\x1b[31m ]]> & \ufffe"


def test_markdown_for_a_pull_request():
    text = markdown(describe(recited(0, 32, run={"name": NASTY})))
    assert "<script>" not in text
    assert r"a\|b" in text.splitlines()[0]
    assert "⚠️ INCONCLUSIVE" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| texts recited"))
    assert row == "| texts recited verbatim | 0 of 32 (0–10.9%) | 0 of 100 (0–3.6%) |"
    assert r"Not tested\: beam search" in text


def test_table_is_80_columns_wide():
    records = made_up_records("members", 400, 0.9, rule=Goldfish(k=3, h=4))
    records += made_up_records("heldout", 400, 0.3)
    audit = made_up_audit(records, run={"name": "[bold]a rather long name[/bold] " * 3})
    console = Console(width=80, record=True, file=io.StringIO(), highlight=False)
    console.print(terminal(describe(audit)))
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 80
    assert "[bold]a rather" in shown
    for text in ("recited verbatim", " of 400 (", "membership, AUC", "blind: 0."):
        assert text in shown
    assert "…" not in "".join(shown.splitlines()[2:])
    assert shown.splitlines()[-1].startswith(audit.verdict["sentence"][:40])


def test_a_summary_is_strict_json():
    """No NaN, no infinity, whatever is impossible or missing."""
    records = made_up_records("members", 3, 1.0) + made_up_records("heldout", 1, 0.0)
    for record in records:
        record["log_p"] = [float("-inf")]
    dumps(made_up_audit(records).to_json())
    with pytest.raises(ValueError, match="there is no record to summarize"):
        made_up_audit([])


def test_judging_prints_and_writes_only_when_asked(tmp_path, capsys):
    records = made_up_records("members", 30, 1.0) + made_up_records("heldout", 30, 0.2)
    write_run(tmp_path / "a", records)
    assert publish(tmp_path / "a").verdict["exit_code"] == 1
    before = (tmp_path / "a" / "summary.json").read_bytes()
    command = [
        "judge",
        str(tmp_path / "a"),
        "--limit",
        "recited=99%",
        "--limit",
        "near_verbatim=99%",
    ]
    assert main(command) == 3
    assert (tmp_path / "a" / "summary.json").read_bytes() == before
    assert main([*command, "-o", str(tmp_path / "a")]) == 3
    capsys.readouterr()
    again = goldfish.audit.read(tmp_path / "a")
    assert again.limits["recited"] == 0.99
    assert json.loads(before)["limits"]["recited"] == 0.01
    required = goldfish.audit.judge(tmp_path / "a", require=["membership"])
    assert question(required, "membership")["outcome"] == "FAIL"
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["records", "run.json", "summary.json", "summary.md"]


def test_judging_does_not_overwrite_another_audit(tmp_path, capsys):
    for name, right in (("a", 1.0), ("b", 0.1)):
        write_audit(tmp_path / name, made_up_records("members", 30, right))
    before = (tmp_path / "b" / "summary.json").read_bytes()
    assert main(["judge", str(tmp_path / "a"), "-o", str(tmp_path / "b")]) == 2
    assert "has a summary.json already" in capsys.readouterr().err
    assert (tmp_path / "b" / "summary.json").read_bytes() == before
    assert main(["judge", str(tmp_path / "a"), "-o", str(tmp_path / "new")]) == 3


def test_membership_cannot_be_required_of_one_split():
    """It was passed over before, and the audit could be a PASS."""
    records = texts("members", 0, 400)
    assert made_up_audit(records).outcome == "PASS"
    with pytest.raises(ValueError, match="members with held-out texts: give both"):
        made_up_audit(records, require=["membership"])
    with pytest.raises(ValueError, match="--require takes membership, got 'member'"):
        made_up_audit(records, require=["member"])


def test_nothing_from_strangers_reaches_an_output_raw(tmp_path):
    """ANSI and bidi controls in names, texts' names and paths."""
    evil = "\x1b[31mred\u202e\u2066x\x07"
    records = [
        {**record, "name": evil} for record in made_up_records("members", 3, 1.0)
    ]
    write_run(tmp_path, records, name=evil, checkpoint=evil)
    audit = publish(tmp_path)
    console = Console(width=80, file=io.StringIO(), highlight=False)
    console.print(terminal(describe(audit)))
    for text in (
        (tmp_path / "summary.md").read_text(encoding="utf-8"),
        console.file.getvalue(),
    ):
        assert "x1b" in text
        assert not set(evil) & set("\x1b\u202e\u2066\x07") & set(text)


def test_beams_have_a_row_and_a_question():
    records = made_up_records("members", 20, 0.9) + made_up_records("heldout", 20, 0.2)
    for record in records:
        record["beams"] = 4 * record["exact_match"]
    audit = made_up_audit(records, beams=[2, 4])
    text = markdown(describe(audit))
    (greedy,) = (
        line for line in text.splitlines() if line.startswith("| texts recited")
    )
    assert f"| by beam search | {greedy.split('|', 2)[2].strip()}" in text
    assert audit["members.beam_search"].k == audit["members.exact_match"].k
    assert (
        question(audit, "beam_search")["outcome"]
        == question(audit, "greedy")["outcome"]
    )
