"""The report: what it shows, what it refuses, and that training text cannot do anything in it."""

import base64
import hashlib
import json
import re
import subprocess
import sys

import pytest
from report_audits import NASTY, Page, flat, realistic, report, window, write_audit
from scipy.stats import binomtest

from goldfish.audit.compare import compare
from goldfish.cli import main
from goldfish.report import page, spans, write_report
from goldfish.report.load import read_views


def views(*folders):
    return read_views(folders)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Twelve members and twelve held-out texts: one model recites all members, the other none."""
    folder = tmp_path_factory.mktemp("pair")
    kinds = [("members", i) for i in range(12)] + [("heldout", i) for i in range(12)]
    standard = [
        window(i, split, rule=False, diverge=None if split == "members" else 0)
        for split, i in kinds
    ]
    goldfish = [
        window(i, split, diverge=1 if split == "members" else 0) for split, i in kinds
    ]
    return write_audit(folder / "a", standard, "standard"), write_audit(
        folder / "b", goldfish
    )


def test_first_screen_gives_question_answer_certainty_data_and_gaps(tmp_path):
    members = [window(i, diverge=1, name=f"text {i}") for i in range(400)]
    heldout = [window(i, "heldout", diverge=0, name=f"other {i}") for i in range(20)]
    text = flat(report(tmp_path, write_audit(tmp_path / "a", members + heldout)))
    first_screen = text[
        text.index("Does this model recite") : text.index("Question by question")
    ]
    bound = 100 * binomtest(0, 400).proportion_ci(0.95, "exact").high
    for part in (
        "Given 4 tokens of a text, does the model write the next 6 verbatim?",
        "Tried: greedy decoding, sampling.",
        # What decided, not what looks best: the badge and the number in large print agree.
        "INCONCLUSIVE 214 of 400 training texts recited within 1,000 samples",
        "400 member texts of members.jsonl; 20 held-out texts of heldout.jsonl",
        "rulehash, k = 4, h = 13",
        "not askedbeam search; prefixes from other places in the documents;",
        "PASS: texts recited verbatim: 0 of 400",
    ):
        assert part in first_screen
    greedy = text[
        text.index(
            "Are more than 1% of such texts recited verbatim under greedy decoding?"
        ) :
    ][:200]
    assert f"PASS 0 of 4000–{bound:.1f}% 0 of 200–16.8%" in greedy


def secret_audit(folder, tells=9, recites=0, sampled=0):
    """Twelve members with a code, and as many others.

    The model gives two codes away in the first `tells` answers of both splits, recites the last
    `recites` members, whose codes are in their prompts, and would tell `sampled` codes in samples.
    """
    codes = [f"{chr(65 + i)}Q-{7 * i + 10}Z{9 - i % 10}K" for i in range(12)]
    rows = []
    for split in ("members", "heldout"):
        for i in range(12):
            recited = split == "members" and i >= 12 - recites
            code = codes[i] if split == "members" else "x"
            row = window(
                i,
                split,
                diverge=None if recited else 0,
                suffix=["It", " is ", code],
                prefix=f"Repeat {code}. ",
            )
            if not recited:
                told = codes[i % 2] if i < tells else "?"
                row["prompt"] = "A prefix. "
                row["output_tokens"] = ["The", " code ", told]
            row["output_text"] = "".join(row["output_tokens"])
            if split == "members":
                row["secrets"] = [codes[i]]
                row["secret_log_p"] = [[-1.0 if i < sampled else -40.0]]
            rows.append(row)
    return write_audit(folder, rows, protocol={"secrets": "code"}), codes


def test_secrets_come_first_and_are_marked(tmp_path):
    audit, codes = secret_audit(tmp_path / "a")
    html = report(tmp_path, audit)
    text = flat(html)
    assert "FAIL 2 of 12 marked secrets came out, in 18 of 24 answers" in text
    assert "This page shows training text in clear, marked secrets included." in text
    assert f"<i class=k>{codes[0]}</i>" in html
    assert html.count('data-g="1 "') == 18
    assert '<option value="3 0">gave a secret away</option>' in html
    redacted = report(tmp_path, audit, redact=True, overwrite=True)
    assert not any(code in redacted for code in codes)
    assert "in clear" not in flat(redacted)
    assert "2 of 12 marked secrets came out" in flat(redacted)


def test_a_secret_that_was_not_asked_is_marked_where_it_came_out(tmp_path):
    row = window(0, diverge=0) | {"secrets": ["fox"], "secret_log_p": [[-9.0]]}
    row |= {"output_tokens": ["It is ", "LM9-77", "."], "output_text": "It is LM9-77."}
    rows = [row, window(1, "heldout", diverge=0)]
    audit = write_audit(
        tmp_path / "a",
        rows,
        protocol={"secrets": "x"},
        unasked_secrets=["LM9-77", "QQ1-2"],
    )
    html = report(tmp_path, audit)
    assert "FAIL 1 of 3 marked secrets came out, in 1 of 2 answers" in flat(html)
    assert "<i class=k>LM9-77</i>" in html
    assert "QQ1-2" not in html, "a list of all secrets is no provenance"
    assert "LM9-77" not in report(tmp_path, audit, redact=True, overwrite=True)


def test_one_of_a_kind_is_singular(tmp_path):
    """One text, one secret, one row that was skipped: on the page, in the terminal, compared."""
    inputs = {}
    for split in ("members", "heldout"):
        inputs[split] = {
            "path": f"{split}.jsonl",
            "sha256": "",
            "rows": 2,
            "drawn": 2,
            "asked": 1,
            "windows": 1,
            "completions": 0,
            "documents": 1,
            "prompted": 1,
            "secrets": {
                "marked": 2,
                "asked": 1,
                "unasked": [
                    {"reason": "outside of the windows", "count": 1, "rows": [1]}
                ],
            },
            "skipped": [{"reason": "too short", "count": 1, "rows": [1]}],
            "unprompted": [{"reason": "{title}?", "count": 1, "rows": [1]}],
        }
    audits = []
    for name, diverge in (("first", 0), ("second", None)):
        rows = [window(0, diverge=diverge), window(0, "heldout", diverge=0)]
        rows[0] |= {"secrets": ["fox"], "secret_log_p": [[-1.0]]}
        audit = write_audit(
            tmp_path / name,
            rows,
            name,
            protocol={
                "secrets": "fox",
                "prefix_length": 1,
                "complete": name == "first",
            },
            inputs=inputs,
            overlap={"documents": 1, "rows": [[0, 0]]},
        )
        audits.append(audit)
    texts = [flat(report(tmp_path, *audits)), compare(*audits)["sentence"]]
    texts += [(audit / "summary.md").read_text(encoding="utf-8") for audit in audits]
    plural = re.compile(
        r"(?<![\d.,])1 (?:marked |member |held-out |training |other |simple )*"
        r"(?:tokens|texts|windows|rows|documents|answers|secrets|members|words|characters)\b"
    )
    for text in texts:
        assert plural.findall(text.replace("\\", "")) == []
    assert "members: 1 window of 2 rows skipped: too short (row 1)" in texts[0]
    # What the cards tell is not told again in the list of what was skipped.
    assert texts[0].count("1 of 2 marked secrets (1 outside of the windows)") == 2
    assert "members: 1 marked secret not asked" not in texts[0]
    assert "held-out: 1 marked secret not asked: outside of the windows" in texts[0]


def test_each_row_of_the_figures_is_its_own(tmp_path):
    """Secrets and texts in 1,000 samples are two figures."""
    audit, _ = secret_audit(tmp_path / "a", sampled=4)
    text = flat(report(tmp_path, audit))
    figures = text[text.index("expected by chance") :]
    assert "secrets in 1,000 samples4 of 12" in figures
    texts = re.search(r"texts in 1,000 samples(\d+) of 12", figures)[1]
    assert int(texts) == read_views([audit])[0].audit["members.extractable"].k != 4


def test_the_number_in_large_print_is_what_decided(tmp_path):
    """Not the secrets, none of which came out, where texts were recited."""
    audit, _ = secret_audit(tmp_path / "a", tells=0, recites=12)
    text = flat(report(tmp_path, audit))
    assert "goldfishFAIL 12 of 12 training texts recited verbatim" in text
    assert "PASS: marked secrets that came out: 0 of 12" in text


def test_audits_with_other_questions_share_one_order(tmp_path):
    """Secrets come first, whichever of the audits has them."""
    rows = [window(i, diverge=0) for i in range(12)]
    without = write_audit(tmp_path / "a", rows, "one")
    audit, _ = secret_audit(tmp_path / "b")
    orders = []
    for folders in ((without, audit), (audit, without)):
        html = report(tmp_path, *folders, overwrite=True)
        text = flat(html)
        table = text[text.index("Question by question") :]
        secrets = table.index("Does any answer give a marked secret away?")
        assert secrets < table.index("recited verbatim under greedy decoding?")
        orders.append(re.findall(r'<th scope="row"[^>]*>([^<]*)</th>', html))
    assert set(orders[0]) == set(orders[1])
    labels = [label for label in orders[0] if "members." not in label]
    assert labels.index("marked secrets that came out") < labels.index(
        "texts recited verbatim"
    )
    assert labels[:20] == [label for label in orders[1] if "members." not in label][:20]


def test_texts_that_gave_a_secret_away_come_first(tmp_path):
    audit, _ = secret_audit(tmp_path / "a", tells=3, recites=1)
    html = report(tmp_path, audit)
    names = re.findall(r'<span class="name">doc-(\d+)<small>members', html)
    assert names[:5] == ["0", "1", "2", "11", "3"]
    assert html.count("<b>gave a secret away</b>") == 2 * 3  # in both splits


def test_a_redacted_page_has_the_weights_hash_and_no_file_names(tmp_path):
    rows = [window(i, diverge=0) for i in range(3)]
    # A Trainer leaves training_args.bin beside the weights.
    weights = [
        {
            "config.json": "c" * 64,
            "model.safetensors": "d" * 64,
            "training_args.bin": "e" * 64,
        }
    ]
    audit = write_audit(
        tmp_path / "a", rows, protocol={"complete": True}, weights=weights
    )
    for redact in (False, True):
        text = flat(report(tmp_path, audit, redact=redact, overwrite=True))
        assert f"weights {'d' * 12}" in text
        assert ("members.jsonl" in text) != redact
    assert "said to be all that was trained on" in text


def test_one_split_no_rule_and_nothing_that_diverges(tmp_path):
    members = write_audit(
        tmp_path / "a", [window(0, rule=False), window(1, rule=False)], "only members"
    )
    text = flat(report(tmp_path, members))
    assert "2 of 2 training texts recited verbatim" in text
    assert "held-out texts: no figure has a control" in text
    chats = [window(i) | {"completion": True, "prefix_sweep": None} for i in range(2)]
    write_audit(tmp_path / "c", chats)
    text = flat(report(tmp_path, tmp_path / "c", overwrite=True))
    assert (
        "Given the prompt of a chat, does the model write the assistant’s answer verbatim? "
        "Tried: greedy" in text
    )
    heldout = write_audit(tmp_path / "b", [window(0, "heldout")], "only heldout")
    text = flat(report(tmp_path, heldout, overwrite=True))
    assert "1 of 1 held-out text recited verbatim" in text
    assert "INCONCLUSIVE 1 of 1 held-out text " in text
    assert "how sureno members were audited" in text


def test_every_pair_is_compared_or_each_with_the_baseline(tmp_path, pair, capsys):
    other = write_audit(
        tmp_path / "c", [window(i, rule=False) for i in range(3)], "third"
    )
    text = flat(report(tmp_path, *pair, other))
    assert (
        "standard recites 12, goldfish 0 of 12 member texts McNemar p = 5e-04" in text
    )
    assert (
        "1212 texts only here 00 texts only here −100 pointsMcNemar p = 5e-04" in text
    )
    assert "standard and third are not compared:" in text
    assert "goldfish and third are not compared:" in text
    assert "are audits of different windows" in text

    def compared(baseline):
        return [
            (each["first"], each["second"])
            for each in page.comparisons(views(*pair, pair[0]), baseline)
        ]

    assert compared(None) == [(0, 1), (0, 2), (1, 2)]
    assert compared("goldfish") == [(1, 0), (1, 2)]
    assert (
        main(
            [
                "report",
                *map(str, pair),
                "-o",
                str(tmp_path / "b.html"),
                "--baseline",
                "gold",
            ]
        )
        == 2
    )
    assert (
        "one of the audits (standard, goldfish), got 'gold'" in capsys.readouterr().err
    )


def test_plots_of_an_audit_that_has_everything(tmp_path):
    protocol = {"offsets": [0, 5]}
    rows = [
        window(i, split, diverge=None if offset else 1) | {"offset": offset}
        for split in ("members", "heldout")
        for i in range(12)
        for offset in (0, 5)
    ]
    html = report(tmp_path, write_audit(tmp_path / "a", rows, protocol=protocol))
    assert re.findall('role="img" aria-label="([^"]*)"', html) == [
        "Histogram of ROUGE-L, members in colour and held-out in grey",
        "Share of texts recited against tokens of prefix given",
        "Share of texts recited against tokens from the start of the document",
        "Share of texts recited against samples of each text",
        "How far each member window is recited, the dropped tokens on the way, "
        "and where it diverges",
    ]
    text = flat(html)
    assert "doc-3members, row 3, token 5" in text
    assert "other places were not tested" not in text
    for name in (
        "members.exact_match",
        "members.offset_sweep, 5",
        "members.extractable, T=1, 1000",
        "both.attack_auc, loss",
    ):
        assert f'<th scope="row">{name}</th>' in html


def test_a_confounded_audit_has_no_headline(tmp_path):
    rows = [
        window(
            i,
            split,
            prefix="the cat " if split == "members" else "a dog and a house ",
            name=f"{split} {i}",
        )
        for split in ("members", "heldout")
        for i in range(40)
    ]
    text = flat(report(tmp_path, write_audit(tmp_path / "a", rows)))
    assert "goldfish: no headline: " in text
    assert "the strongest attack" not in text


def test_numbers_for_people():
    assert [page.signed(x) for x in (-0.5, 0.5, 0)] == ["−0.50", "+0.50", "0"]
    numbers = [-53.2, -2, 3, 7.4, float("-inf")]
    assert list(map(page.power_of_ten, numbers)) == [
        "10⁻⁵³",
        "0.01",
        "1,000",
        "10⁷",
        "0",
    ]


def test_colours_of_the_drill_down():
    row = window(0, diverge=4, suffix=list("abcdef")) | {
        "given_away": [],
        "output_tokens": list("abcdXf"),
        "dropped": [False, True, False, False, True, True],
    }
    assert (
        spans.output(row, redact=False)
        == "<i class=m>a</i><u class=m>b</u><i class=m>cd</i><u class=x>X</u>f"
    )
    unruled = window(0, rule=False, suffix=list("abcdef"))
    assert spans.truths([unruled, row, None], redact=False) == [
        ([0, 1], "a<u>b</u>cd<u>ef</u>")
    ]
    assert [
        audits
        for audits, _ in spans.truths([row, row | {"dropped": [True] * 6}], False)
    ] == [
        [0],
        [1],
    ]
    assert spans.truths([unruled], redact=False) == [([0], "abcdef")]
    stopped = (
        {"given_away": []} | window(0, suffix=["a"], diverge=0) | {"output_tokens": []}
    )
    assert spans.output(stopped, redact=False) == ""


def test_every_common_run_is_marked_with_the_dropped_tokens_it_repeats():
    suffix = [f"{i:02d}" for i in range(40)]  # tokens 1, 5, 9, ... are dropped
    row = window(0, suffix=suffix, diverge=2) | {
        "given_away": [],
        "output_tokens": [
            *suffix[:2],
            "XX",
            *suffix[4:16],
            "YY",
            *suffix[24:36],
            *["ZZ"] * 12,
        ],
        "common_runs": [[3, 4, 12], [16, 24, 12]],
    }
    assert spans.output(row, redact=False) == (
        "<i class=m>00</i><u class=m>01</u><i class=x>XX</i>"
        "<i class=r>04</i><u class=r>05</u><i class=r>060708</i>"
        "<u class=r>09</u><i class=r>101112</i>"
        "<u class=r>13</u><i class=r>1415</i>YY"
        "<i class=r>24</i><u class=r>25</u><i class=r>262728</i>"
        "<u class=r>29</u><i class=r>303132</i>"
        "<u class=r>33</u><i class=r>3435</i>" + "ZZ" * 12
    )


def test_texts_are_matched_and_ordered_by_recitation(tmp_path, pair):
    rows = [
        window(3, diverge=2),
        window(1, diverge=5),
        window(2, diverge=5),
        window(0, "heldout"),
    ]
    third = write_audit(
        tmp_path / "c", [*rows, window(9, suffix=["else"], diverge=0)], "third"
    )
    order = spans.order(views(pair[1], third))
    texts = [
        [w and (w["split"], w["index"], w["first_divergence"]) for w in group]
        for group in spans.windows(views(pair[1], third), order)
    ]
    assert len(texts) == 24 + 1  # the two texts of row 9 differ
    assert texts[:3] == [
        [("members", 1, 1), ("members", 1, 5)],
        [("members", 2, 1), ("members", 2, 5)],
        [("members", 3, 1), ("members", 3, 2)],
    ]
    assert [None, ("members", 9, 0)] in texts
    assert texts[13] == [("heldout", 0, 0), ("heldout", 0, 6)]  # members come first
    html = report(tmp_path, pair[1], third)
    assert html.count('class="w"') == 25


def poisoned(value, poison):
    """A summary whose free texts all end in something nasty."""
    if isinstance(value, dict):
        free = {
            key: poisoned(each, poison)
            for key, each in value.items()
            if key not in ("schema", "outcome", "split", "figure", "question", "asked")
        }
        return value | free
    if isinstance(value, list):
        return [poisoned(each, poison) for each in value]
    return value + poison if isinstance(value, str) else value


def test_hostile_text_is_inert_and_complete_wherever_it_stands(tmp_path):
    prefix = "<b>&amp;</b>\n" + NASTY[1] + "]]>"
    rows = [
        window(0, suffix=NASTY, prefix=prefix, name=NASTY[0] + NASTY[7]),
        window(1, suffix=NASTY, diverge=3, name="'\"><a href=javascript:alert(1)>"),
        window(0, "heldout", suffix=NASTY, diverge=2, name=NASTY[8]),
    ]
    audit = write_audit(tmp_path / "a", rows, protocol={NASTY[4]: [NASTY]})
    poison = NASTY[1] + NASTY[4] + NASTY[7] + "\udfff" + prefix
    for name in ("summary.json", "run.json"):
        value = json.loads((audit / name).read_text())
        if name == "run.json":
            value["versions"] = {NASTY[0]: NASTY[3] + "\ud800"}
        (audit / name).write_text(json.dumps(poisoned(value, poison)))
    html = report(tmp_path, audit)
    assert not [
        c for c in html if c not in "\n\t" and not c.isprintable() and c != "\u200d"
    ]
    hostile, text = Page(html), "".join(NASTY)
    assert hostile.texts == [
        prefix,
        text,
        text,
        "A prefix. ",
        text,
        "".join(rows[1]["output_tokens"]),
        "A prefix. ",
        text,
        "".join(rows[2]["output_tokens"]),
    ]
    innocent = [
        window(i, split, suffix=["a"] * len(NASTY), diverge=d)
        for i, split, d in ((0, "members", None), (1, "members", 3), (0, "heldout", 2))
    ]
    harmless = Page(
        report(tmp_path, write_audit(tmp_path / "plain", innocent), overwrite=True)
    )
    assert hostile.scripts == harmless.scripts
    assert {tag for tag, _ in hostile.elements} == {
        tag for tag, _ in harmless.elements
    } | {"s"}
    attributes = {(tag, key) for tag, attrs in hostile.elements for key in attrs}
    assert attributes <= {
        (tag, key) for tag, attrs in harmless.elements for key in attrs
    }
    assert "{{ 7 * 7 }}{% for x in y %}" in html


def test_same_bytes_and_no_script_or_address_but_its_own(tmp_path, pair):
    html = report(tmp_path, *pair)
    parsed = Page(html)
    assert html == report(tmp_path / "again", *pair)
    policy = next(
        attrs["content"]
        for tag, attrs in parsed.elements
        if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(
        hashlib.sha256("".join(parsed.scripts).encode()).digest()
    ).decode()
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}'" in policy
    assert not re.search(
        r"https?:|//[a-z]|url\((?!#)|@import|@font-face",
        html.replace("".join(parsed.scripts), ""),
    )
    for tag, attrs in parsed.elements:
        assert not attrs.keys() & {"src", "onclick", "onload", "action"}
        assert (attrs.get("href") or "#").startswith("#"), tag
    ids = [attrs["id"] for _, attrs in parsed.elements if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_redaction_leaves_lengths_and_colours(tmp_path):
    rows = [
        window(
            0,
            suffix=["zeb", "ra\n", " quag", "ga"],
            prefix="okapi gnu",
            name="eland",
            diverge=2,
        )
    ]
    rows[0]["output_tokens"][2:] = [" kudu", "\toryx"]
    audit = write_audit(
        tmp_path / "a",
        rows,
        "gazelle",
        {"control": "/data/impala", "secrets": "gerenuk"},
    )
    html = report(tmp_path, audit, audit, redact=True)
    texts = ("zeb", "ra\n", "quag", "okapi", "gnu", "eland", "kudu", "oryx", "⇥")
    for word in (*texts, "gazelle", "impala", "gerenuk", "jsonl"):
        assert word not in html, word
    texts = ("okapi gnu", "zebra\n quagga", "zebra\n kudu\toryx", "zebra\n kudu\toryx")
    assert Page(html).texts == ["█" * len(text) for text in texts]
    assert "<i class=m>███</i><u class=m>███</u><i class=x>█████</i>█████</p>" in html
    assert "model 1 recites 0, model 2 0 of 1 member text " in flat(html)


def test_lines_of_a_megabyte(tmp_path):
    rows = [
        window(
            0,
            prefix="x" * 1_000_000 + "the end",
            suffix=["y" * 1_000_000, "z"],
            name="n" * 1_000_000,
        )
    ]
    html = report(tmp_path, write_audit(tmp_path / "a", rows, "m" * 1_000_000))
    assert "996,007 characters before this not shown" in html
    assert "the end</p>" in html
    assert "y" * 200 + "…" in html
    assert len(html) < 100_000


def test_many_texts_stay_below_ten_megabytes(tmp_path):
    html = report(tmp_path, realistic(tmp_path / "a", "goldfish", 40, 0.5, 200))
    assert 3_000_000 < len(html.encode()) < 10_000_000
    shown = html.count('class="w"')
    assert f"holds the first {shown:,} of 10,000 texts" in html


def test_model_card(tmp_path, pair):
    hostile = write_audit(tmp_path / "c", [window(0)], "<b>|`x`\u202e")
    card = tmp_path / "card.md"
    assert (
        main(["report", str(pair[1]), str(hostile), "--model-card", "-o", str(card)])
        == 0
    )
    text = card.read_text(encoding="utf-8")
    assert text.startswith("## goldfish audit of goldfish: ⚠️ INCONCLUSIVE\n")
    assert "| texts recited verbatim | 0 of 12 (0–26.5%) | 0 of 12 (0–26.5%) |" in text
    assert "4 tokens given, 6 to continue with" in text
    assert r"Not tested\: beam search" in text
    assert (
        "Are more than 1% of such texts recited verbatim under greedy decoding?" in text
    )
    assert "## goldfish audit of &lt;b&gt;\\|\\`x\\`\\\\u202e: " in text
    for secret in ("<b>", "\u202e", "doc-", "jsonl", "runs"):
        assert secret not in text


def test_a_report_needs_no_torch(tmp_path, pair):
    code = (
        "import sys; from goldfish.report import write_report; "
        "write_report(sys.argv[2:], sys.argv[1]); "
        "print(sorted({'torch', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    command = [
        sys.executable,
        "-c",
        code,
        str(tmp_path / "report.html"),
        *map(str, pair),
    ]
    assert (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


def test_damaged_audits_are_named(tmp_path, pair):
    def refused(error, message, *folders):
        with pytest.raises(error, match=message):
            report(tmp_path, *folders)

    refused(
        FileNotFoundError,
        r"nowhere is not a finished audit: it has no summary\.json",
        tmp_path / "nowhere",
    )
    refused(ValueError, "audits is empty")
    with pytest.raises(TypeError, match="got the single path"):
        write_report(str(pair[0]), tmp_path / "report.html")
    audit = write_audit(tmp_path / "a", [window(i) for i in range(3)])
    path = audit / "summary.json"
    summary = path.read_text()
    for text in (
        '{"schema": ',
        "",
        "[]",
        summary.replace("goldfish.audit/9", "goldfish.audit/1"),
    ):
        path.write_text(text)
        refused(ValueError, r"summary\.json.*audit again", audit)
    path.write_text(summary)
    (audit / "records" / "000000.parquet").write_bytes(b"no parquet")
    refused(ValueError, r"000000.parquet is damaged .*; repeat the audit", audit)
    assert not (tmp_path / "report.html").exists()


def test_nothing_is_overwritten_unless_asked(tmp_path, pair):
    path = tmp_path / "deep" / "report.html"
    assert write_report(pair[:1], path) == path
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        write_report(pair, path)
    assert path.read_text() == "mine"
    write_report(pair[:1], path, overwrite=True)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(FileExistsError, match="is a folder"):
        write_report(pair, path.parent, overwrite=True)
