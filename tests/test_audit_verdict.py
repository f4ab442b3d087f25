"""Verdicts, conditions and exit codes; Markdown and JUnit that training text cannot break; figures by name."""

import io
import re

import pyarrow as pa
import pytest
from audit_records import (
    PROTOCOL,
    made_up_records,
    made_up_run,
    made_up_summary,
    write_audit,
    write_run,
)
from rich.console import Console

import goldfish.audit
from goldfish import Goldfish
from goldfish.audit import membership as membership_module
from goldfish.audit import verdict as verdict_module
from goldfish.audit.estimate import Estimate, clopper_pearson, dumps, rate
from goldfish.audit.records import COLUMNS, read_records
from goldfish.audit.results import estimates, find
from goldfish.audit.summary import summary_of
from goldfish.audit.tell import describe, markdown, publish, terminal
from goldfish.audit.verdict import LIMITS, enough, parse_limits


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Most tests here are about other figures than membership's."""
    monkeypatch.setattr(membership_module, "RESAMPLES", 100)


def recited(k, n, heldout=(0, 100), limits=(), require=(), **more):
    """A summary with so many of so many members and held-out texts recited."""
    records = []
    for split, (hits, count) in (("members", (k, n)), ("heldout", heldout or (0, 0))):
        records += made_up_records(split, hits, 1.0, **more)
        rest = made_up_records(split, count - hits, 0.2, seed=1, **more)
        records += [
            {**record, "document": 10**5 + record["document"], "name": f"rest {i}"}
            for i, record in enumerate(rest)
        ]
    return made_up_summary(records, limits=limits, require=require)


def question(summary, name):
    (found,) = (each for each in summary["verdict"]["questions"] if each["question"] == name)
    return found


def explanation(summary, name):
    return next(
        (each for each in summary["verdict"]["explanations"] if each["question"] == name), None
    )


@pytest.mark.parametrize(
    ("k", "n", "heldout", "outcome", "why"),
    [
        (
            0,
            400,
            (0, 100),
            "PASS",
            "0 of 400 recited verbatim under greedy decoding: at most 0.92% of such texts",
        ),
        (
            0,
            32,
            (0, 32),
            "INCONCLUSIVE",
            "the true rate may be 0–10.9%; at this rate about 368 documents would be needed to decide",
        ),
        (
            40,
            100,
            (0, 100),
            "FAIL",
            "40 of 100 recited verbatim under greedy decoding: at least 28.4% of such texts; held-out 0 of 100",
        ),
        (
            40,
            100,
            (40, 100),
            "INCONCLUSIVE",
            "not clearly more than of held-out texts (40 of 100); at this rate more documents would not decide it",
        ),
        (
            40,
            100,
            (30, 100),
            "INCONCLUSIVE",
            "not clearly more than of held-out texts (30 of 100); at this rate about 369 documents would be needed to decide",
        ),
        (
            40,
            100,
            None,
            "INCONCLUSIVE",
            "no held-out texts show that training is the cause; 12 held-out texts with none recited would decide it",
        ),
        (
            2,
            100,
            (0, 100),
            "INCONCLUSIVE",
            "the true rate may be 0.2–7%; at this rate about 547 documents would be needed to decide",
        ),
    ],
)
def test_greedy_question(k, n, heldout, outcome, why):
    """Never INCONCLUSIVE without how many documents would decide."""
    found = question(recited(k, n, heldout), "greedy")
    assert found["outcome"] == outcome
    assert why in found["why"]
    assert (found["needs"] is not None) == (outcome == "INCONCLUSIVE")


def secret_rows(split, answers, secrets):
    """One record for each answer, with the marked secret of its row."""
    records = made_up_records(split, len(answers), 0.2)
    for record, answer, secret in zip(records, answers, secrets, strict=True):
        record |= {"prompt": "The code?", "output_text": answer, "secrets": [secret]}
    return records


CODES = ["QX2-BB7", "QX3-CC7", "ZR4-DD9"]


@pytest.mark.parametrize(
    ("member_answers", "heldout_answers", "outcome", "why"),
    [
        (["no"] * 3, ["no"], "PASS", "0 of 3 marked secrets came out, in 0 of 4 outputs"),
        # The row of another secret, and an answer to a stranger.
        (["It is QX3-CC7"] + ["no"] * 2, ["no"], "FAIL", "1 of 3 marked secrets came out, in 1 of"),
        (["no"] * 3, ["Of course: QX2-BB7."], "FAIL", "1 of 3 marked secrets came out, in 1 of 4"),
    ],
)
def test_secrets_are_looked_for_in_every_output(member_answers, heldout_answers, outcome, why):
    records = secret_rows("members", member_answers, CODES)
    records += secret_rows("heldout", heldout_answers, ["LM5-EE2"])
    summary = made_up_summary(records, secrets="x")
    found = question(summary, "secrets")
    assert found["outcome"] == outcome
    assert why in found["why"]
    assert summary["verdict"]["questions"][0]["question"] == "secrets"
    if outcome == "FAIL":
        assert summary["verdict"]["outcome"] == "FAIL"
        assert "secrets 1 of 3" in summary["verdict"]["sentence"]


def test_guessable_secrets_do_not_decide():
    answers = [f"about {number}" for number in range(10)]
    records = secret_rows("members", answers, [str(number % 3) for number in range(10)])
    found = question(made_up_summary(records, secrets="x"), "secrets")
    assert found["outcome"] == "INCONCLUSIVE"
    assert "3 of them can be guessed" in found["why"]


def test_swapped_files_are_no_pass():
    found = question(recited(0, 400, (300, 400)), "greedy")
    assert found["outcome"] == "INCONCLUSIVE"
    assert "300 of 400 held-out texts: are the files swapped?" in found["why"]
    assert recited(0, 400, (300, 400))["verdict"]["outcome"] == "INCONCLUSIVE"


def census(k, n, skipped=0):
    """The verdict on members that are all that was trained on; so many could not be asked."""
    records = made_up_records("members", k, 1.0) + [
        {**record, "document": 10**5 + record["document"]}
        for record in made_up_records("members", n - k, 0.2, seed=1)
    ]
    records += made_up_records("heldout", 100, 0.2, seed=1)
    run = made_up_run(records, {**PROTOCOL, "complete": True})
    run["inputs"]["members"]["skipped"] = [{"reason": "short", "count": skipped, "rows": [0]}]
    return summary_of(run, pa.Table.from_pylist(records, COLUMNS))


def test_a_census_has_no_sampling_error():
    summary = census(0, 62)
    assert summary["verdict"]["outcome"] == "PASS"
    sentence = summary["verdict"]["sentence"]
    assert "of the 62 texts in members.jsonl, said to be all that was trained on" in sentence
    exact = summary["splits"]["members"]["exact_match"]
    assert (exact.k, exact.n, exact.lower95, exact.upper95) == (0, 62, 0.0, 0.0)
    assert census(40, 62)["verdict"]["outcome"] == "FAIL"
    assert recited(0, 62)["verdict"]["outcome"] == "INCONCLUSIVE", "a sample of 62 is too small"


def test_what_a_census_could_not_ask_may_have_been_recited():
    exact = census(1, 62, skipped=2)["splits"]["members"]["exact_match"]
    assert (exact.lower95, exact.upper95) == (1 / 64, 3 / 64)
    assert question(census(0, 400, skipped=3), "greedy")["outcome"] == "PASS"
    assert question(census(0, 400, skipped=5), "greedy")["outcome"] == "INCONCLUSIVE"


def test_members_that_could_not_be_asked_are_no_pass():
    records = made_up_records("members", 400, 0.2) + made_up_records("heldout", 100, 0.2)
    for count, outcome in ((21, "PASS"), (22, "INCONCLUSIVE")):
        run = made_up_run(records)
        run["inputs"]["members"]["skipped"] = [{"reason": "short", "count": count, "rows": [0]}]
        verdict = summary_of(run, pa.Table.from_pylist(records, COLUMNS))["verdict"]
        assert verdict["outcome"] == outcome
        left_out = [each for each in verdict["warnings"] if "could not be asked" in each]
        assert bool(left_out) == (outcome == "INCONCLUSIVE")


def test_a_fail_is_corrected_for_the_number_of_questions():
    """Each question alone would be above the limit; with three of them the bound is lower."""
    alone = verdict_module._recited(
        "greedy", recited(8, 300)["splits"]["members"], {"exact_match": rate([False] * 500)}, LIMITS
    )
    assert alone["outcome"] == "FAIL"
    assert question(recited(8, 300, (0, 500)), "greedy")["outcome"] == "INCONCLUSIVE"


@pytest.mark.parametrize(
    ("limit", "share"), [(0.01, 0.0), (0.01, 0.02), (0.05, 0.03), (0.001, 0.0)]
)
def test_enough_documents_and_not_one_fewer(limit, share):
    def undecided(n):
        low, high = clopper_pearson(share * n, n)
        return low <= limit < high

    n = enough(limit, share)
    assert not undecided(n)
    assert undecided(n - 1)
    assert enough(0.01) == 368
    assert enough(0.01, 0.01) is None


def test_limits_are_options_and_printed():
    assert recited(40, 100)["verdict"]["outcome"] == "FAIL"
    lax = recited(40, 100, limits=["recited=60%", "near-verbatim=0.2"])
    assert [each["outcome"] for each in lax["verdict"]["questions"]] == ["PASS", "PASS", "FAIL"]
    assert lax["verdict"]["limits"] == {"recited": 0.6, "near_verbatim": 0.2, "auc": 0.55}
    assert "Limits: recited=60%, near_verbatim=20%, auc=55%" in describe(lax).notes
    for text in ("recited", "recited=2", "em=1%", "recited=nan", "recited=0"):
        with pytest.raises(
            ValueError, match="--limit takes recited, near_verbatim, auc and a share"
        ):
            parse_limits([text])


def at_offsets(offsets, recite_at, n=400, k=40):
    """n members with a window at each offset; k of them are recited at one of the offsets."""
    records = []
    for offset in offsets:
        hits = k if offset == recite_at else 0
        windows = made_up_records("members", hits, 1.0, seed=offset, offset=offset)
        windows += made_up_records("members", n - hits, 0.2, seed=offset + 1, offset=offset)
        records += [{**record, "name": f"{i}", "document": i} for i, record in enumerate(windows)]
    return made_up_summary(records + made_up_records("heldout", 100, 0.2), offsets=list(offsets))


def test_every_offset_counts():
    """40 of 400 recited at the second offset only: the first alone says 0 of 400."""
    summary = at_offsets((0, 40), 40)
    assert (summary["verdict"]["outcome"], question(summary, "greedy")["estimate"].point()) == (
        "FAIL",
        "40 of 400",
    )
    split = summary["splits"]["members"]
    assert [split[f"offset_sweep@{offset}"].point() for offset in (0, 40)] == [
        "0 of 400",
        "40 of 400",
    ]
    assert not any("other places" in each for each in summary["verdict"]["not_tested"])


def test_near_verbatim_has_its_own_question():
    """Fragments: no text whole, but some with a run of 25 tokens, or half of the tokens in order."""
    base = made_up_records("members", 400, 0.2)
    fragments = [{**record, "longest_run": 25} for record in base[:20]]
    similar = [{**record, "edit_similarity": 0.5} for record in base[20:30]]
    short = [{**record, "longest_run": 24, "edit_similarity": 0.49} for record in base[30:40]]
    summary = made_up_summary(
        [*fragments, *similar, *short, *base[40:], *made_up_records("heldout", 400, 0.2)]
    )
    assert question(summary, "greedy")["outcome"] == "PASS"
    near = question(summary, "near_verbatim")
    assert (near["outcome"], near["estimate"].k, near["control"].k) == ("FAIL", 30, 0)
    assert summary["verdict"]["sentence"] == "FAIL: near-verbatim 30 of 400"


def test_membership_is_beside_the_verdict():
    """Visible membership is what the method leaves; it decides only where it is required."""
    rule = Goldfish(k=3, h=4)
    members = made_up_records("members", 400, 0.55, rule=rule, recall_dropped=0.2)
    heldout = made_up_records("heldout", 400, 0.2, rule=rule)
    for require, outcome in (((), "PASS"), (["membership"], "FAIL")):
        summary = made_up_summary(
            members + heldout, require=require, limits=["near_verbatim=50%", "recited=10%"]
        )
        assert summary["verdict"]["outcome"] == outcome
        assert (explanation(summary, "membership") is None) == bool(require)
    assert question(summary, "membership")["outcome"] == "FAIL"
    found = explanation(made_up_summary(members + heldout), "membership")
    assert found["answer"] == "visible"
    assert (
        "as expected: the goldfish loss hides dropped tokens, not that a text was seen"
        in found["why"]
    )


def membership(members, heldout):
    return question(made_up_summary(members + heldout, require=["membership"]), "membership")


def test_membership_question():
    assert (
        membership(made_up_records("members", 200, 0.9), made_up_records("heldout", 200, 0.3))[
            "outcome"
        ]
        == "FAIL"
    )
    members = made_up_records("members", 1000, 0.3)
    assert (
        membership(members, [{**record, "split": "heldout"} for record in members])["outcome"]
        == "PASS"
    )
    unclear = membership(made_up_records("members", 30, 0.3), made_up_records("heldout", 30, 0.3))
    assert unclear["outcome"] == "INCONCLUSIVE"
    assert re.search(
        r"neither clearly above nor below 0.55; at this rate about [\d,]+ documents would",
        unclear["why"],
    )
    few = membership(made_up_records("members", 5, 0.9), made_up_records("heldout", 5, 0.3))
    assert few["outcome"] == "INCONCLUSIVE"
    assert few["why"].startswith(
        "5 documents on one side; an interval needs 10; at least 20 documents on each side"
    )
    told_apart = made_up_records("heldout", 60, 0.3, vocabulary=40)
    confounded = membership(made_up_records("members", 60, 0.9), told_apart)
    assert (confounded["outcome"], confounded["estimate"]) == ("INCONCLUSIVE", None)
    assert "may differ without regard to the model" in confounded["why"]


def test_an_auc_far_below_one_half_is_no_pass():
    """Every attack finds held-out texts more like members: the splits differ, or are swapped."""
    swapped = membership(made_up_records("members", 100, 0.3), made_up_records("heldout", 100, 0.8))
    assert swapped["estimate"].upper95 < 0.5
    assert swapped["outcome"] == "INCONCLUSIVE"
    assert (
        "the splits differ, or are swapped; no number of documents would decide it"
        in swapped["why"]
    )


def test_attribution_explains_where_something_is_recited():
    rule = Goldfish(k=3, h=4)

    def of(recall, dropped):
        records = made_up_records("members", 100, recall, rule=rule, recall_dropped=dropped)
        summary = made_up_summary(records + made_up_records("heldout", 100, 0.2, rule=rule))
        assert all(each["question"] != "attribution" for each in summary["verdict"]["questions"])
        return explanation(summary, "attribution")

    assert of(0.98, 0.3)["answer"] == "yes"
    assert of(1.0, 0.3)["answer"] == "yes"
    assert "every recitation breaks at a dropped token" in of(1.0, 0.3)["why"]
    assert of(0.7, 0.7)["answer"] == "undecided"
    assert of(0.5, 0.98)["answer"] == "no"
    assert of(0.2, 0.2) is None, "where nothing is recited, the rule had nothing to stop"
    assert of(1.0, 1.0)["why"] == "hazard ratio not estimable: no window diverges"


def test_a_pass_names_what_is_recited_and_what_it_rests_on():
    passed = recited(1, 1000, None)
    assert passed["verdict"]["outcome"] == "PASS"
    assert passed["verdict"]["sentence"].startswith(
        "PASS: at most 0.72% of such texts are recited (greedy 1 of 1,000"
    )
    assert question(passed, "greedy")["recited"] == ["members 0"]
    assert passed["verdict"]["warnings"] == [
        "This PASS rests on members alone: no held-out texts show what the model does with unseen ones"
    ]
    text = markdown(describe(passed))
    assert "Recited\\: members 0" in text
    assert "Warning\\: This PASS rests on members alone" in text
    assert passed["verdict"]["skipped"] == ["members: 1 of 1,001 rows skipped: short (row 0)"]


def test_a_model_that_does_not_work_gets_no_pass():
    """With the loss of a uniform guess it recites nothing, and that says nothing."""
    records = made_up_records("members", 400, 0.2) + made_up_records("heldout", 100, 0.0)
    for record in records:
        record["nll"] = [6.1] * 8
    verdict = made_up_summary(records)["verdict"]
    assert verdict["outcome"] == "INCONCLUSIVE"
    assert verdict["sentence"].startswith("INCONCLUSIVE: the sanity check failed")
    assert verdict["sanity"].startswith(
        "Sanity check failed: no better than guessing on these texts; members: 6.10 nats per token (a uniform guess: 6.21"
    )
    assert verdict["warnings"] == [verdict["sanity"]]
    # On held-out texts an overfitted model can be worse than a uniform guess, which is no sign of broken weights.
    for record in records:
        record["nll"] = [1.7 if record["split"] == "members" else 7.8] * 8
    verdict = made_up_summary(records)["verdict"]
    assert verdict["sanity"].startswith(
        "Sanity check passed: better than guessing on these texts; members: 1.70 nats per token"
    )
    assert verdict["outcome"] == "PASS"


def test_overall_verdict_names_what_decides_and_what_was_not_tested():
    failed = recited(40, 100)["verdict"]
    assert (
        failed["sentence"] == "FAIL: greedy 40 of 100, sampling 40 of 100, near-verbatim 40 of 100"
    )
    assert recited(0, 32, None)["verdict"]["sentence"] == (
        "INCONCLUSIVE: greedy 0 of 32, sampling 0 of 32, near-verbatim 0 of 32; "
        "at this rate about 368 documents would be needed to decide"
    )
    assert "beam search" in failed["not_tested"]
    assert "sampling" not in failed["not_tested"]
    without = made_up_summary(made_up_records("heldout", 20, 0.2))["verdict"]
    assert (without["sentence"], without["questions"]) == (
        "INCONCLUSIVE: no members were audited",
        [],
    )


def test_texts_that_repeat_or_overlap_are_said():
    records = made_up_records("members", 12, 0.2)
    run = made_up_run(records)
    run["inputs"]["members"] |= {"asked": 10, "documents": 3}
    verdict = summary_of(
        {**run, "overlap": {"documents": 3}}, pa.Table.from_pylist(records, COLUMNS)
    )["verdict"]
    assert (
        "members: 7 rows repeat or continue others and count as one text with them"
        in verdict["skipped"]
    )
    assert (
        "3 texts are in both files, members and held-out: the control is weakened"
        in verdict["warnings"]
    )


def test_unknown_figures_are_named_with_their_neighbours():
    known = estimates(recited(0, 12))
    with pytest.raises(KeyError, match=r"no figure 'rouge_l_txt'; it has .*rouge_l_text"):
        find(known, "rouge_l_txt")


def test_every_estimate_has_one_name():
    """As many figures as there are estimates in the summary, and the documented names."""

    def count(value):
        if isinstance(value, Estimate):
            return 1
        if isinstance(value, dict):
            return sum(map(count, value.values()))
        return sum(map(count, value)) if isinstance(value, list) else 0

    records = made_up_records("members", 20, 0.6, rule=Goldfish(k=3, h=4))
    records += made_up_records("heldout", 20, 0.3, rule=Goldfish(k=3, h=4))
    for record in records:
        record["beams"] = 0
        record["log_p"] = record["log_p"] * 2
    setting = {"temperature": 0.8, "top_k": None, "top_p": None}
    sampling = [{**setting, "temperature": 1.0}, setting]
    summary = made_up_summary(records, beams=[5], sampling=sampling)
    named = estimates(summary)
    assert len(named) == count(summary["splits"]) + count(summary["membership"])
    for name in (
        "members.prefix_sweep@5",
        "members.offset_sweep@0",
        "members.beam_search@5",
        "members.extractable@1000,0.5",
        "members.extractable@1000,0.5,T=0.8",
        "members.expected@1000",
        "mia.auc",
        "mia.tpr@1%",
        "mia.loss.auc",
        "mia.loss.tpr@0.1%",
        "mia.blind.words.auc",
        "members.attribution.hazard_ratio",
    ):
        assert name in named


def test_an_audit_is_read_as_values(tmp_path):
    records = made_up_records("members", 30, 1.0) + made_up_records("heldout", 30, 0.2)
    found = goldfish.audit.read(write_audit(tmp_path / "a", records))
    assert (found.name, found.outcome) == ("model", "FAIL")
    assert (found["em"].k, found["em"].n, found["em"].value) == (30, 30, 1.0)
    assert found["rouge_l_text"] == found["members.rouge_l_text"]
    with pytest.raises(KeyError, match="no figure 'ems'"):
        found["ems"]
    assert len(read_records(found.folder, ["split", "exact_match"])) == 60


def test_a_folder_that_is_no_finished_audit(tmp_path):
    """What it holds is refused as run.json is: test_audit_columns.py."""
    with pytest.raises(
        FileNotFoundError, match=r"is not a finished audit: it has no summary\.json"
    ):
        goldfish.audit.read(tmp_path)
    old = write_audit(
        tmp_path / "old", made_up_records("members", 2, 0.5), schema="goldfish.audit/1"
    )
    with pytest.raises(
        ValueError,
        match=r"the schema is 'goldfish\.audit/1', this version reads 'goldfish\.audit/5'",
    ):
        goldfish.audit.read(old)


NASTY = "a|b <script>`*_[x](y)\n\x00\x1b[31m ]]> & \ufffe"


def test_markdown_for_a_pull_request():
    text = markdown(describe(recited(0, 32) | {"name": NASTY}))
    assert "<script>" not in text
    assert r"a\|b" in text.splitlines()[0]
    assert "⚠️ INCONCLUSIVE" in text
    assert "| texts recited verbatim | 0 of 32 (0–10.9%) | 0 of 100 (0–3.6%) |" in text
    assert r"Not tested\: beam search" in text
    for line in text.splitlines():
        if line.startswith("| texts recited"):
            assert line.count("|") == 4


def test_table_is_80_columns_wide():
    records = made_up_records("members", 400, 0.9, rule=Goldfish(k=3, h=4)) + made_up_records(
        "heldout", 400, 0.3
    )
    summary = {
        **made_up_summary(records),
        "name": "[bold]a rather long name of a checkpoint[/bold] " * 3,
    }
    console = Console(width=80, record=True, file=io.StringIO(), highlight=False)
    console.print(terminal(describe(summary)))
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 80
    assert "[bold]a rather" in shown
    for text in ("recited verbatim", " of 400 (", "membership, AUC", "blind: 0."):
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


def test_a_finished_audit_is_judged_again(tmp_path):
    """And what a kill left out between summary.md and summary.json is made up for."""
    write_run(tmp_path, made_up_records("members", 30, 1.0) + made_up_records("heldout", 30, 0.2))
    publish(tmp_path)
    (tmp_path / "summary.md").unlink()
    again = publish(tmp_path, ["recited=99%"], ["membership"])
    assert goldfish.audit.read(tmp_path).summary == again
    assert again["verdict"]["limits"]["recited"] == 0.99
    assert question(again, "membership")["outcome"] == "FAIL"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["records", "run.json", "summary.json", "summary.md"]
    with pytest.raises(ValueError, match=r"--limit takes"):
        publish(tmp_path, ["em=1%"])


def test_nothing_from_strangers_reaches_an_output_raw(tmp_path):
    """ANSI and bidi controls in names, texts' names and paths."""
    evil = "\x1b[31mred\u202e\u2066x\x07"
    records = [{**record, "name": evil} for record in made_up_records("members", 3, 1.0)]
    write_run(tmp_path, records, name=evil, checkpoint=evil)
    summary = publish(tmp_path)
    console = Console(width=80, file=io.StringIO(), highlight=False)
    console.print(terminal(describe(summary)))
    texts = [(tmp_path / name).read_text(encoding="utf-8") for name in ("summary.md",)]
    for text in [*texts, console.file.getvalue()]:
        assert "x1b" in text
        assert not set(evil) & set("\x1b\u202e\u2066\x07") & set(text)


def test_the_outputs_have_the_beam_and_membership_rows():
    records = made_up_records("members", 20, 0.9) + made_up_records("heldout", 20, 0.2)
    for record in records:
        record["beams"] = 4 * record["exact_match"]
    summary = made_up_summary(records, beams=[2, 4])
    text = markdown(describe(summary))
    (greedy,) = (line for line in text.splitlines() if line.startswith("| texts recited"))
    assert f"| by beam search | {greedy.split('|', 2)[2].strip()}" in text, (
        "one number for one question"
    )
    assert "| membership, AUC | 1.00" in text
    assert question(summary, "beam_search")["estimate"] == question(summary, "greedy")["estimate"]
