"""The report: what it shows, and that training text can do nothing in it."""

import base64
import hashlib
import json
import re
import subprocess
import sys

import pytest
from report_audits import NASTY, Page, flat, realistic, report, window, write_audit
from scipy.stats import binomtest

from goldfish.report import words


@pytest.fixture
def pair(tmp_path):
    rows = [(i, "members", None) for i in range(3)] + [(0, "heldout", 2)]
    standard = [window(i, split, rule=False, diverge=d) for i, split, d in rows]
    goldfish = [window(i, split, diverge=1 if split == "members" else d) for i, split, d in rows]
    return write_audit(tmp_path / "a", standard, "standard"), write_audit(tmp_path / "b", goldfish)


def test_every_question_has_verdict_k_of_n_bound_and_control(tmp_path):
    members = [window(i, diverge=1, name=f"text {i}") for i in range(400)]
    heldout = [window(i, "heldout", diverge=0, name=f"other {i}") for i in range(20)]
    page = report(tmp_path, write_audit(tmp_path / "a", members + heldout))
    told = flat(page)
    greedy = told[told.index("Are more than 1% of such texts recited word for word, greedily?") :][:200]
    bound = 100 * binomtest(0, 400).proportion_ci(0.95, "exact").high
    assert f"PASS 0 of 400at most {bound:.1f}% 0 of 20at most 16.8%held-out" in greedy
    assert "None of 400 is not never: rates up to 0.9% fit these figures" in told
    assert "Is it the rule that stops recitation?" in told
    for gap in ("beam search", "prefixes from other places in the documents", "prompts that are no prefix"):
        assert gap in told[told.index("What was not tested") : told.index("How much of each text")]


def test_two_audits_are_compared_window_by_window(tmp_path):
    kinds = [("members", i) for i in range(12)] + [("heldout", i) for i in range(12)]
    standard = [window(i, split, rule=False, diverge=None if split == "members" else 0) for split, i in kinds]
    goldfish = [window(i, split, diverge=1 if split == "members" else 0) for split, i in kinds]
    audits = [write_audit(tmp_path / "a", standard, "standard"), write_audit(tmp_path / "b", goldfish)]
    told = flat(report(tmp_path, *audits))
    assert "standard recites 12, goldfish 0 of 12 member windows: goldfish recites fewer" in told
    assert "1212 texts only here 00 texts only here −100 pointsMcNemar p = 5e-04" in told
    other = write_audit(tmp_path / "c", goldfish[1:], "third")
    told = flat(report(tmp_path, *audits, other, overwrite=True))
    assert "standard recites 12, goldfish 0 of 12" in told
    assert "standard and third are not compared:" in told
    assert "are audits of different items" in told


def test_plots_of_an_audit_that_has_everything(tmp_path):
    protocol = {"offsets": [0, 5]}
    rows = [
        window(i, split, diverge=None if offset else 1) | {"offset": offset}
        for split in ("members", "heldout")
        for i in range(12)
        for offset in (0, 5)
    ]
    page = report(tmp_path, write_audit(tmp_path / "a", rows, protocol=protocol))
    plots = re.findall('role="img" aria-label="([^"]*)"', page)
    assert plots == [
        "Histogram of ROUGE-L, members in colour and held-out in grey",
        "Share of windows still verbatim after t tokens",
        "Share of windows recited against tokens of prefix given",
        "Share of windows recited against tokens from the start of the document",
        "Share of windows that n samples hold, for odds of 0.5 and of 0.999",
        "How far each member window is recited, the dropped tokens on the way, and where it diverges",
        "Histogram of the loss of dropped and of kept tokens",
        "ROC of the membership attacks, both axes logarithmic",
    ]
    told = flat(page)
    assert "0 of 12 member windows recited word for word" in told  # those at the first offset
    assert "doc-3members, row 3, token 5" in told
    assert "whether other places give more away was not tested" not in told
    for name in ("members.exact_match", "members.offset_sweep@5", "members.extractable@1000,0.5", "mia.loss.auc"):
        assert f'<th scope="row">{name}</th>' in page
    assert "0.001</text>" in page  # shortened coordinates leave the labels whole


def test_a_confounded_audit_has_no_headline(tmp_path):
    rows = [
        window(i, split, prefix="the cat " if split == "members" else "a dog and a house ", name=f"{split} {i}")
        for split in ("members", "heldout")
        for i in range(40)
    ]
    told = flat(report(tmp_path, write_audit(tmp_path / "a", rows)))
    assert "No headline: members and held-out texts can be told apart without the model" in told
    assert "Headline, the thick line" not in told


def test_figures_never_round_to_certainty_and_say_why_they_are_missing():
    shares = [0, 1, 0.00001, 0.99999, 0.109, 0.5, 0.001, 0.999]
    assert list(map(words.percent, shares)) == ["0%", "100%", "<0.1%", ">99.9%", "10.9%", "50%", "0.1%", "99.9%"]
    assert list(map(words.decimals, [0, 0.0173, 0.5, 9.914, 22.66, 1234.5])) == [
        "0.00", "0.0173", "0.50", "9.91", "22.7", "1,234"]  # fmt: skip
    assert [words.signed(x) for x in (-0.5, 0.5, 0)] == ["−0.50", "+0.50", "0"]
    assert list(map(words.power_of_ten, [-53.2, -2, 3, 7.4, float("-inf")])) == ["10⁻⁵³", "0.01", "1,000", "10⁷", "0"]
    rate = words.of_estimate({"rate": 0.0, "k": 0, "n": 40, "documents": 40, "lower95": 0.0, "upper95": 0.088})
    ratio = words.of_estimate(
        {"value": None, "n": 40, "documents": 40, "lower95": 22.66, "upper95": None, "reason": "r"}
    )
    none = words.of_estimate(
        {"mean": None, "n": 0, "documents": 0, "lower95": None, "upper95": None, "reason": "too few"}
    )
    half = words.of_estimate({"mean": 0.5, "n": 9, "documents": 9, "lower95": 0.25, "upper95": None, "reason": "r"})
    said = [(words.point(each), words.bound(each)) for each in (rate, ratio, none, half)]
    assert said == [
        ("0 of 40", "at most 8.8%"),
        ("above 22.7", "no upper bound"),
        ("not estimable", "too few"),
        ("0.50", "at least 0.25"),
    ]
    assert words.interval(rate) == "0–8.8%"


def test_colours_of_the_drill_down(tmp_path):
    rows = [window(0, diverge=4, suffix=["a", "b", "c", "d", "e", "f"])]
    rows[0] |= {"output_tokens": list("abcdXf"), "dropped": [False, True, False, False, True, True],
                "nll": [0.25, 0, 3.6, float("inf"), 0.01, 40], "rank": [0, 0, 1, 50_000, 36, 7]}  # fmt: skip
    page = report(tmp_path, write_audit(tmp_path / "a", [*rows, window(1)]))
    assert "<i class=m>a</i><u class=m>b</u><i class=m>cd</i><u class=x>X</u>f</p>" in page
    assert "<i>a</i><u>b</u><i>c</i><i>d</i><u>e</u><u>f</u></p>" in page  # a token an element, for its p and rank
    assert 'data-a="0" data-v="p 0 a0.1 lfls.12kw 1.10 334.7"' in page
    assert "4 of 6, then <u>dropped</u>" in page


def test_audits_of_one_text_stand_side_by_side_and_other_texts_apart(tmp_path, pair):
    page = report(tmp_path, *pair)
    assert page.count('class="w"') == 4
    assert page.count("<h4>Truth") == 4
    assert page.count('data-a="0 1"') == 4
    other = [window(0, rule=True, suffix=["else"], name="elsewhere")]
    page = report(tmp_path, *pair, write_audit(tmp_path / "c", other, "third"), overwrite=True)
    assert page.count('class="w"') == 5
    rows = [window(0) | {"dropped": [True] * 6}]
    page = report(tmp_path, pair[1], write_audit(tmp_path / "d", rows, "k=1"), overwrite=True)
    assert flat(page).count("Truth as goldfish dropped it") == 1  # two rules, two sets of holes
    assert flat(page).count("Truth as k=1 dropped it") == 1


def poisoned(value, poison):
    """A summary whose every text, wherever it is free, ends in something nasty."""
    if isinstance(value, dict):
        free = {key: poisoned(each, poison) for key, each in value.items() if key not in ("schema", "outcome")}
        return value | free
    if isinstance(value, list):
        return [poisoned(each, poison) for each in value]
    return value + poison if isinstance(value, str) else value


@pytest.mark.parametrize("prefix_end", ["", "\n", "\x00"])
def test_training_text_does_nothing_and_is_all_there(tmp_path, prefix_end):
    prefix = "|".join(NASTY) + prefix_end
    rows = [window(0, suffix=NASTY, prefix=prefix, name="".join(NASTY)), window(1, suffix=NASTY, diverge=3),
            window(2, "heldout", suffix=["a"] * len(NASTY), prefix="", diverge=2)]  # fmt: skip
    rows[1]["output_tokens"] = NASTY[:3] + NASTY[::-1]
    audit = write_audit(tmp_path / "a", rows, protocol={NASTY[4]: [NASTY]}, versions={NASTY[0]: NASTY[3] + "\ud800"})
    summary = json.loads((audit / "summary.json").read_text())
    nasty = poisoned(summary, NASTY[1] + NASTY[4] + NASTY[7] + "\udfff" + prefix)
    (audit / "summary.json").write_text(json.dumps(nasty))
    html = report(tmp_path, audit)
    assert not [c for c in html if c not in "\n\t" and not c.isprintable() and c != "\u200d"]
    page, plain = Page(html), tmp_path / "plain"
    innocent = [window(i, split, suffix=["a"] * len(NASTY), diverge=d)
                for i, split, d in ((0, "members", None), (1, "members", 3), (2, "heldout", 2))]  # fmt: skip
    allowed = Page(report(tmp_path, write_audit(plain, innocent), overwrite=True))
    text = "".join(NASTY)
    assert page.texts[:6] == [prefix, text, text, "A prefix. ", text, "".join(rows[1]["output_tokens"])]
    assert page.scripts == allowed.scripts
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in allowed.elements} | {"s"}
    attributes = {(tag, key) for tag, attrs in page.elements for key in attrs}
    assert attributes <= {(tag, key) for tag, attrs in allowed.elements for key in attrs}
    assert "{{ 7 * 7 }}{% for x in y %}" in html


def test_the_page_forbids_every_script_but_its_own_and_every_address(tmp_path, pair):
    html = report(tmp_path, *pair)
    page = Page(html)
    policy = next(
        attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256("".join(page.scripts).encode()).digest()).decode()
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}'" in policy
    assert not re.search(r"https?:|//[a-z]|url\((?!#)|@import|@font-face", html.replace("".join(page.scripts), ""))
    for tag, attrs in page.elements:
        assert not attrs.keys() & {"src", "onclick", "onload", "action"}
        assert (attrs.get("href") or "#").startswith("#"), tag
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_same_audits_same_bytes(tmp_path, pair):
    assert report(tmp_path, *pair) == report(tmp_path / "again", *pair)


def test_redaction_shows_no_text_but_lengths_and_colours(tmp_path):
    rows = [window(0, suffix=["zeb", "ra\n", " quag", "ga"], prefix="okapi gnu", name="eland", diverge=2)]
    rows[0]["output_tokens"][2:] = [" kudu", "\toryx"]
    audit = write_audit(tmp_path / "a", rows)
    html = report(tmp_path, audit, audit, redact=True)
    assert 'data-v="' not in html  # with the model at hand, a token's rank says which it is
    for word in ("zeb", "ra\n", "quag", "okapi", "gnu", "eland", "kudu", "oryx", "⇥"):
        assert word not in html, word
    texts = ("okapi gnu", "zebra\n quagga", "zebra\n kudu\toryx", "zebra\n kudu\toryx")
    assert Page(html).texts == ["█" * len(text) for text in texts]
    assert "<i class=m>███</i><u class=m>███</u><i class=x>█████</i>█████</p>" in html
    assert "Redacted for sharing" in html


def test_a_missing_split_a_missing_rule_and_nothing_that_diverges(tmp_path):
    members = write_audit(tmp_path / "a", [window(0, rule=False), window(1, rule=False)], "only members")
    told = flat(report(tmp_path, members))
    assert "Does this model recite its training data?" in told
    assert "2 of 2 member windows recited word for word" in told
    assert "held-out texts: no figure has a control" in told
    assert "2 of 215.8–100% none" in told
    heldout = write_audit(tmp_path / "b", [window(0, "heldout")], "only heldout")
    told = flat(report(tmp_path, heldout, overwrite=True))
    assert "1 of 1 held-out windows recited word for word" in told
    assert "INCONCLUSIVE: no members were audited." in told


def test_unequal_lengths_and_outputs_that_stop(tmp_path):
    rows = [window(0, suffix=["a"] * 5), window(1, suffix=["a"] * 2, diverge=1), window(2, suffix=["b"], diverge=0)]
    rows[2]["output_tokens"] = []
    page = report(tmp_path, write_audit(tmp_path / "a", rows))
    assert page.count("[stops here]") == 1
    from goldfish.report.load import read_audit
    from goldfish.report.plots import verbatim_shares

    assert verbatim_shares(read_audit(tmp_path / "a").windows) == [1, 2 / 3, 1 / 2, 1, 1, 1]


def test_lines_of_a_megabyte(tmp_path):
    rows = [window(0, prefix="x" * 1_000_000 + "the end", suffix=["y" * 1_000_000, "z"], name="n" * 1_000_000)]
    page = report(tmp_path, write_audit(tmp_path / "a", rows, "m" * 1_000_000))
    assert "996,007 characters before this are not shown" in page
    assert "the end</p>" in page
    assert "y" * 200 + "…" in page
    assert len(page) < 100_000


@pytest.mark.parametrize("redact", [False, True])
def test_a_thousand_documents_of_two_audits_stay_below_five_megabytes(tmp_path, redact):
    audits = [realistic(tmp_path / name, name, 800, share) for name, share in (("standard", 0.97), ("goldfish", 0.05))]
    page = report(tmp_path, *audits, redact=redact)
    assert 4_000_000 < len(page.encode()) < 5_000_000
    shown = page.count('class="w"')
    assert ("the first" in page and f"holds the first {shown}" in page) or shown == 1000
    assert redact or shown == 1000
    assert redact or re.search(r"the first [\d,]+ texts of [\d,]+ carry p and rank of each token", page)


def test_equal_names_are_numbered(tmp_path, pair):
    told = flat(report(tmp_path, pair[1], pair[1]))
    assert "goldfish (1), members" in told
    assert "goldfish (2), members" in told


def test_a_report_needs_no_torch(tmp_path, pair):
    code = (
        "import sys; from goldfish.report import write_report; write_report(sys.argv[2:], sys.argv[1]); "
        "print(sorted({'torch', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "report.html"), *map(str, pair)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
