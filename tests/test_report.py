"""The report: what it refuses, what it shows, and that training text can do nothing in it."""

import base64
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import binomtest

from goldfish.report import write_report

RULE = {"k": 4, "h": 13, "strategy": "hash", "seed": 0, "window": "preceding", "head": "short", "exempt": [],
        "document_end": None}  # fmt: skip
NASTY = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "</p></details></style>",
    "{{ 7 * 7 }}{% for x in y %}{# gone #}",
    'x" onmouseover="alert(1)',
    "&lt;&amp;",
    "$\\frac{1}{2}$",
    "a\x00b\x1b[31m",
    "\u202egnihtemos\u2066",
    "\ufffd\u200b\ufeff\u00a0",
    "tab\tline\r\n\u2028end",
    "👩\u200d👧 שלום ελληνικά",
]


def window(index, split="members", rule=True, diverge=None, suffix=None, prefix="A prefix. ", name=None, seed=0):
    """One synthetic row; the output matches the suffix up to `diverge` and is something else after it."""
    suffix = suffix if suffix is not None else [" the", " quick", "\n", "fox", " runs", "."]
    d = len(suffix) if diverge is None else diverge
    rng = random.Random(f"{index} {split} {seed}")
    return {
        "split": split,
        "index": index,
        "document": name or f"doc-{index}",
        "prefix_text": prefix,
        "suffix_tokens": suffix,
        "output_tokens": suffix[:d] + [" other"] * (len(suffix) - d),
        "dropped": [i % 4 == 1 for i in range(len(suffix))] if rule else None,
        "nll": [rng.expovariate(1 / (0.02 if d == len(suffix) else 1.5)) for _ in suffix],
        "correct": [i < d for i in range(len(suffix))],
        "exact_match": d == len(suffix),
        "first_divergence": d,
        "rouge_l_ids": d / len(suffix) if suffix else 1.0,
        "prefix_ids": [1, 2, 3],
    }


def share(k, n, interval=True):
    bounds = binomtest(k, n).proportion_ci(0.95, "exact") if n and interval else None
    ends = {"lower95": float(bounds.low), "upper95": float(bounds.high)} if bounds else {}
    return {"k": k, "n": n, "rate": k / n if n else None, **ends}


def write_audit(folder, rows, name="goldfish", **changes):
    """Writes an audit as `goldfish audit` would, its summary counted from the rows; `changes` go into the summary."""
    splits = {}
    for split in ("members", "heldout"):
        of = [row for row in rows if row["split"] == split]
        if not of:
            continue
        n, tokens = len(of), sum(len(row["suffix_tokens"]) for row in of)
        pairs = [pair for row in of if row["dropped"] for pair in zip(row["dropped"], row["correct"], strict=True)]
        diverged = [row for row in of if not row["exact_match"] and row["dropped"]]
        ruled = bool(pairs)
        rouge = sum(row["rouge_l_ids"] for row in of) / n
        splits[split] = {
            "n": n,
            "skipped": 0,
            "exact_match": share(sum(row["exact_match"] for row in of), n),
            "teacher_forced_accuracy": share(sum(sum(row["correct"]) for row in of), tokens, False),
            "teacher_forced_accuracy_dropped": share(sum(c for d, c in pairs if d), sum(d for d, _ in pairs), False)
            if ruled
            else None,
            "teacher_forced_accuracy_kept": share(
                sum(c for d, c in pairs if not d), sum(not d for d, _ in pairs), False
            )
            if ruled
            else None,
            "rouge_l_ids": {"mean": rouge, "lower95": max(0, rouge - 0.02), "upper95": min(1, rouge + 0.02), "n": n},
            "nll": {"mean": sum(sum(row["nll"]) for row in of) / max(tokens, 1), "n": tokens},
            "first_divergence_dropped": share(sum(r["dropped"][r["first_divergence"]] for r in diverged), len(diverged))
            if diverged
            else None,
        }
    summary = {
        "schema": "goldfish.audit/2",
        "name": name,
        "checkpoint": f"runs/{name}",
        "rule": RULE if any(row["dropped"] for row in rows) else None,
        "protocol": {
            "prefix_length": 128,
            "suffix_length": 128,
            "decoding": "greedy",
            "dtype": "float32",
            "device": "cpu",
        },
        "versions": {"goldfish": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7"},
        "splits": splits,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary | changes), encoding="utf-8")
    kinds = {"dropped": pa.list_(pa.bool_()), "suffix_tokens": pa.list_(pa.string()),
             "output_tokens": pa.list_(pa.string()), "nll": pa.list_(pa.float64())}  # fmt: skip
    columns = {key: pa.array([row[key] for row in rows], kinds.get(key)) for key in rows[0]}
    pq.write_table(pa.table(columns), folder / "records.parquet")
    return folder


def realistic(folder, name, n, recites):
    """n member and n // 4 held-out windows of English prose with 128-token suffixes; `recites`: share verbatim."""
    from pydoc_data.topics import topics

    tokens = re.findall(r" ?\w{1,6}| ?[^\w\s]|\s+", "\n\n".join(topics[key] for key in sorted(topics)))
    rows = []
    for i in range(n + n // 4):
        split, at, rng = ("members" if i < n else "heldout"), 97 * i % (len(tokens) - 256), random.Random(f"{name}{i}")
        suffix = tokens[at + 128 : at + 256]
        exact = split == "members" and rng.random() < recites
        d = 128 if exact else min(int(rng.expovariate(0.08 if split == "members" else 0.5)), 127)
        if not exact and split == "members" and name != "standard" and rng.random() < 0.8:
            d = min(d | 1 if d % 4 == 1 else d // 4 * 4 + 1, 127)
        row = window(i if i < n else i - n, split, name != "standard", None if exact else d, suffix, seed=name,
                     prefix="".join(tokens[at : at + 128]), name=f"topic {i:04d}")  # fmt: skip
        after = rng.randrange(len(tokens) - 256)
        score = 1.0 if exact else min(0.95, max(d / 128, rng.gauss(0.3 if split == "members" else 0.13, 0.05)))
        row |= {
            "output_tokens": suffix[:d] + ([] if exact else [" however", *tokens[after : after + 127 - d]]),
            "correct": [t < d or rng.random() < 0.5 for t in range(128)],
            "exact_match": exact,
            "first_divergence": d,
            "rouge_l_ids": max(0.0, score),
        }
        rows.append(row)
    return write_audit(folder, rows, name)


class Page(HTMLParser):
    """The page as a browser would take it apart: its elements, its scripts, and the text of every window."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.stack, self.texts, self.scripts, self.inside = [], [], [], [], False
        self.feed(html)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("meta", "br"):
            return
        self.stack.append(tag)
        if tag == "p" and "details" in self.stack:
            self.texts.append("")

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self.stack and self.stack[-1] == "script":
            self.scripts.append(data)
        if "p" in self.stack and "details" in self.stack and "em" not in self.stack:
            self.texts[-1] += self.undone(data) if self.stack[-1] == "s" else data

    @staticmethod
    def undone(escape):
        """What a visible escape stands for; the signs for line feed and tab stand before the character itself."""
        return "" if escape in "↵⇥" else escape.encode("ascii").decode("unicode_escape")


def report(tmp_path, *audits, **options):
    path = write_report(audits, tmp_path / "report.html", **options)
    return path.read_bytes().decode("utf-8")


def flat(html):
    """The words of the page as read, white space collapsed."""
    return " ".join(re.sub(r"<[^>]*>", "", html).split())


@pytest.fixture
def pair(tmp_path):
    rows = [(i, "members", None) for i in range(3)] + [(0, "heldout", 2)]
    standard = [window(i, split, rule=False, diverge=d) for i, split, d in rows]
    goldfish = [window(i, split, diverge=1 if split == "members" else d) for i, split, d in rows]
    return write_audit(tmp_path / "a", standard, "standard"), write_audit(tmp_path / "b", goldfish)


def test_verdicts_and_table_say_k_of_n_with_intervals(tmp_path, pair):
    words = flat(report(tmp_path, *pair))
    low = binomtest(3, 3).proportion_ci(0.95, "exact").low
    assert (
        f"standard: 3 of 3 member windows come out verbatim (95% interval {100 * low:.1f}–100%); held-out 0 of 1"
        in words
    )
    assert "goldfish: 0 of 3 member windows come out verbatim (95% interval 0–70.8%); held-out 0 of 1" in words
    assert "None of 3 is not never: rates up to 70.8% fit these figures" in words
    assert "3 of 3" in words  # first divergence on a dropped token, of goldfish's members
    assert "dropped of all tokens: 33.3%" in words  # tokens 1 and 5 of 6
    for sentence in ("Sampling and beam search.", "Membership inference.", "one prefix length (128 tokens)"):
        assert sentence in words


def test_percent_never_rounds_to_certainty():
    from goldfish.report.page import percent

    shares = [0, 1, 0.00001, 0.99999, 0.109, 0.5, 0.001, 0.999]
    assert [percent(x) for x in shares] == ["0%", "100%", "<0.1%", ">99.9%", "10.9%", "50%", "0.1%", "99.9%"]


def test_colours_of_the_drill_down(tmp_path):
    rows = [window(0, diverge=4, suffix=["a", "b", "c", "d", "e", "f"])]
    rows[0] |= {"output_tokens": list("abcdXf"), "dropped": [False, True, False, False, True, True], "nll": [0.25] * 6}
    page = report(tmp_path, write_audit(tmp_path / "a", rows))
    assert "<i class=m>a</i><u class=m>b</u><i class=m>cd</i><u class=x>X</u>f</p>" in page
    kept, hole = '<i title="nll 0.2">', '<u title="nll 0.2, dropped">'
    assert f"{kept}a</i>{hole}b</u>{kept}cd</i>{hole}ef</u></p>" in page
    assert "4 of 6, then <u>dropped</u>" in page


def test_audits_of_one_text_stand_side_by_side_and_other_texts_apart(tmp_path, pair):
    page = report(tmp_path, *pair)
    assert page.count("<details") == 4
    assert page.count("<h4>Truth") == 4
    other = [window(0, rule=True, suffix=["else"], name="elsewhere")]
    page = report(tmp_path, *pair, write_audit(tmp_path / "c", other, "third"), overwrite=True)
    assert page.count("<details") == 5
    rows = [window(0) | {"dropped": [True] * 6}]
    page = report(tmp_path, pair[1], write_audit(tmp_path / "d", rows, "k=1"), overwrite=True)
    assert flat(page).count("Truth as goldfish dropped it") == 1  # two rules, two sets of holes
    assert flat(page).count("Truth as k=1 dropped it") == 1


@pytest.mark.parametrize("prefix_end", ["", "\n", "\x00"])
def test_training_text_does_nothing_and_is_all_there(tmp_path, prefix_end):
    prefix = "|".join(NASTY) + prefix_end
    rows = [window(0, suffix=NASTY, prefix=prefix, name="".join(NASTY)), window(1, suffix=NASTY, diverge=3)]
    rows[1]["output_tokens"] = NASTY[:3] + NASTY[::-1]
    changes = {"checkpoint": prefix, "versions": {NASTY[0]: NASTY[3] + "\ud800"}, "protocol": {NASTY[4]: [NASTY]}}
    html = report(tmp_path, write_audit(tmp_path / "a", rows, NASTY[1] + NASTY[4] + NASTY[7] + "\udfff", **changes))
    assert not [c for c in html if c not in "\n\t" and not c.isprintable() and c != "\u200d"]
    page, plain = Page(html), tmp_path / "plain"
    innocent = [window(0, suffix=["a"] * len(NASTY)), window(1, suffix=["a"] * len(NASTY), diverge=3)]
    allowed = Page(report(tmp_path, write_audit(plain, innocent), overwrite=True))
    text = "".join(NASTY)
    assert page.texts == [prefix, text, text, "A prefix. ", text, "".join(rows[1]["output_tokens"])]
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
    html = report(tmp_path, audit, redact=True)
    for word in ("zeb", "ra\n", "quag", "okapi", "gnu", "eland", "kudu", "oryx", "⇥"):
        assert word not in html, word
    assert Page(html).texts == ["█" * len(text) for text in ("okapi gnu", "zebra\n quagga", "zebra\n kudu\toryx")]
    assert "<i class=m>███</i><u class=m>███</u><i class=x>█████</i>█████</p>" in html
    assert "Redacted for sharing" in html


def test_a_missing_split_a_missing_rule_and_nothing_that_diverges(tmp_path):
    members = write_audit(tmp_path / "a", [window(0, rule=False), window(1, rule=False)], "only members")
    words = flat(report(tmp_path, members))
    assert "Does this model recite its training data?" in words
    assert "no held-out windows were audited" in words
    assert "only members has no held-out windows" in words
    assert "verbatim, without a control" in words
    heldout = write_audit(tmp_path / "b", [window(0, "heldout")], "only heldout")
    words = flat(report(tmp_path, heldout, overwrite=True))
    assert "no member windows were audited; 1 of 1 held-out window comes out verbatim" in words
    assert "only heldout has no member windows" in words


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
    shown = page.count("<details")
    assert ("the first" in page and f"holds the first {shown}" in page) or shown == 1000
    assert redact or shown == 1000
    assert re.search(r"the first [\d,]+ texts of [\d,]+ carry the nll of each token", page)


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
        (lambda s: s.update(schema="goldfish.audit/9"), r"schema is 'goldfish.audit/9', this version reads 'goldfish"),
        (lambda s: s.pop("schema"), r"'schema' is missing; it has 'name'"),
        (lambda s: s.update(splits={}), r"splits must hold members, heldout or both, got \[\]"),
        (lambda s: s["splits"].update(test={}), r"splits must hold members, heldout or both"),
        (lambda s: s.update(name=3), r"'name' must be str, got 3"),
        (lambda s: s.update(rule="k=4"), r"'rule' must be dict or null, got 'k=4'"),
        (lambda s: members(s).pop("nll"), r"splits: members: 'nll' is missing"),
        (lambda s: members(s)["nll"].update(mean=True), r"members: nll: 'mean' must be int or float, got True"),
        (lambda s: members(s)["nll"].update(mean=float("nan")), r"NaN, which is no JSON number"),
        (lambda s: members(s)["exact_match"].update(k=9), r"expected 0 <= k <= n, got k=9, n=3"),
        (lambda s: members(s)["exact_match"].update(lower95=2), r"expected 0 <= lower95 <= upper95 <= 1"),
        (lambda s: members(s).update(n=4), r"summary.json speaks of 4 members windows, 0 of them exact"),
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
        ({"nll": [float("nan")] * 6}, "row 0: nll holds NaN"),
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
    table = pq.read_table(audit / "records.parquet")
    row = table.to_pylist()[0] | change
    columns = {field.name: pa.array([row[field.name]], field.type) for field in table.schema}
    pq.write_table(pa.table(columns), audit / "records.parquet")
    with pytest.raises(ValueError, match=message):
        report(tmp_path, audit)


def test_missing_and_broken_files_are_named(tmp_path, pair):
    with pytest.raises(FileNotFoundError, match=r"nowhere is no audit folder: it has no summary\.json"):
        report(tmp_path, tmp_path / "nowhere")
    pq.write_table(pq.read_table(pair[0] / "records.parquet").drop_columns(["nll"]), pair[0] / "records.parquet")
    with pytest.raises(ValueError, match=r"records\.parquet: .* lacks the columns nll"):
        report(tmp_path, pair[0])
    (pair[0] / "records.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"records\.parquet: not readable as records"):
        report(tmp_path, pair[0])
    (pair[0] / "records.parquet").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"it has no records\.parquet; give the folder that `goldfish audit -o`"
    ):
        report(tmp_path, pair[0])
    for text in (b'{"schema": ', b"\xff\xfe", b""):
        (pair[1] / "summary.json").write_bytes(text)
        with pytest.raises(ValueError, match=r"summary\.json: not readable as JSON"):
            report(tmp_path, pair[1])
    (pair[1] / "summary.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
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


def test_equal_names_are_numbered(tmp_path, pair):
    words = flat(report(tmp_path, pair[1], pair[1]))
    assert "goldfish (1): 0 of 3" in words
    assert "goldfish (2): 0 of 3" in words


def test_a_report_needs_no_torch(tmp_path, pair):
    code = (
        "import sys; from goldfish.report import write_report; write_report(sys.argv[2:], sys.argv[1]); "
        "print(sorted({'torch', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "report.html"), *map(str, pair)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def browse(tmp_path, page, *flags):
    quiet = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--hide-scrollbars"]  # fmt: skip
    command = [BROWSER, "--headless", "--no-sandbox", *quiet, f"--user-data-dir={tmp_path / 'profile'}", *flags]
    return subprocess.run([*command, page.as_uri()], capture_output=True, timeout=120, check=True).stdout.decode()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_in_a_browser_the_page_works_and_the_training_text_does_not(tmp_path):
    pwn = ["<script>document.title='pwned'</script>", "<img src=x onerror=\"document.title='pwned'\">"]
    rows = [window(0, suffix=NASTY + pwn, prefix=pwn[0], name=pwn[1]), window(1, "heldout", diverge=1)]
    path = write_report([write_audit(tmp_path / "a", rows, pwn[0])], tmp_path / "report.html")
    dom = browse(tmp_path, path, "--dump-dom")
    assert "2 of 2 shown" in dom  # written by the page's own script, so its hash in the policy is right
    assert "<title>Memorization audit: " in dom
    assert 'id="tools">' in dom
    assert "<img" not in dom
    sizes = []
    for scheme, mode in (("light", 1), ("dark", 0)):
        picture = tmp_path / f"{scheme}.png"
        browse(tmp_path, path, "--window-size=1280,1600", f"--screenshot={picture}",
               f"--blink-settings=preferredColorScheme={mode}")  # fmt: skip
        from matplotlib.image import imread

        pixels = imread(picture)[..., :3]
        sizes.append((pixels.shape, float(pixels[2, 2].mean()), float(pixels.std())))
    assert sizes[0][0] == sizes[1][0] == (1600, 1280, 3)
    assert sizes[0][1] > 0.9 > 0.2 > sizes[1][1]  # the paper is light, then dark
    assert min(size[2] for size in sizes) > 0.03  # and something is written on it
