"""The report in Chromium: its script, what training text cannot do, screen and paper."""

import re
import shutil
import subprocess
from html import escape

import pytest
from matplotlib.image import imread
from report_audits import NASTY, window, write_audit

from goldfish.report import write_report

BROWSER = next(
    filter(
        None,
        map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")),
    ),
    None,
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


def browse(tmp_path, page, *flags):
    quiet = [
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
    ]
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        *quiet,
        f"--user-data-dir={tmp_path / 'profile'}",
        *flags,
    ]
    return subprocess.run(
        [*command, page.as_uri()], capture_output=True, timeout=120, check=True
    ).stdout.decode()


def test_the_page_works_fits_every_screen_and_the_training_text_does_nothing(tmp_path):
    pwn = [
        "<script>document.title='pwned'</script>",
        "<img src=x onerror=\"document.title='pwned'\">",
    ]
    rows = [
        window(0, suffix=NASTY + pwn, prefix=pwn[0], name=pwn[1] * 9),
        window(1, "heldout", diverge=1),
    ]
    names = (
        pwn[0],
        "a-name-that-is-as-long-as-that-of-a-checkpoint-on-the-hub-can-be",
        "third",
    )
    audits = [
        write_audit(tmp_path / str(i), rows, name) for i, name in enumerate(names)
    ]
    path = write_report(audits, tmp_path / "report.html")
    dom = browse(tmp_path, path, "--dump-dom")
    assert (
        "2 of 2 shown" in dom
    )  # written by the page's own script, so its hash in the policy is right
    assert "<title>Memorization audit: " in dom
    assert 'id="tools">' in dom
    assert "<img" not in dom
    # In a frame, the page has the width of a desktop and of a phone. What is wide scrolls by
    # itself, inside .scroll.
    measure = """
    const blocks = "h1, h2, h3, summary, .why, .badge, figure, .t, .card";
    const outside = (page) => [...page.querySelectorAll(blocks)].filter(
      (e) => !e.closest(".scroll") && e.checkVisibility()
        && e.getBoundingClientRect().right > page.body.clientWidth);
    // Tables in open parts: visible, and with a hint if they are wider than their place.
    const hinted = (page) => [...page.querySelectorAll("details[open] .scroll, section > .scroll")]
      .every((e) => e.clientWidth > 0 && (e.scrollWidth > e.clientWidth + 1) ===
        (page.defaultView.getComputedStyle(e, "::before").content !== "none"));
    onload = () => document.title = [...document.querySelectorAll("iframe")].map((frame) => {
      const page = frame.contentDocument, why = [...page.querySelectorAll(".why")];
      return [page.documentElement.scrollWidth, outside(page).length, why.length > 5 && why.every(
        (e) => e.getBoundingClientRect().width > 150), hinted(page)].join();
    }).join(" ");"""
    page = escape(path.read_text(encoding="utf-8"))
    frames = "".join(
        f'<iframe width={width} height=900 srcdoc="{page}"></iframe>'
        for width in (1280, 390)
    )
    (tmp_path / "frames.html").write_text(
        f"<!doctype html><style>iframe {{ border: 0 }}</style>{frames}<script>{measure}</script>",
        encoding="utf-8",
    )
    dom = browse(tmp_path, tmp_path / "frames.html", "--dump-dom")
    assert (
        re.search("<title>(.*?)</title>", dom)[1] == "1280,0,true,true 390,0,true,true"
    )


def test_sorting_and_filtering(tmp_path):
    rows = [window(i, diverge=d) for i, d in enumerate([None, 1, 4])] + [
        window(0, "heldout", diverge=2, name="other")
    ]
    for row, log_p in zip(rows, (-7.61, -1.0, float("-inf"), -3.0), strict=True):
        row["log_p"] = [log_p]
    for row in rows:
        row["secrets"], row["secret_log_p"] = [], []
    code = "QX-7731-KV"
    rows[1] |= {
        "secrets": [code],
        "secret_log_p": [[-9.0]],
        "output_text": f"It is {code}.",
    }
    audit = write_audit(tmp_path / "a", rows, protocol={"secrets": "code"})
    path = write_report([audit], tmp_path / "report.html")
    act = """
    const say = [];
    const visible = ".w:not([hidden]) .name";
    const names = () => [...document.querySelectorAll(visible)]
      .map((n) => n.firstChild.data).join();
    const choose = (id, value, event = "change") => {
      const control = document.getElementById(id);
      control.value = value;
      control.dispatchEvent(new Event(event));
      say.push(names());
    };
    for (const order of ["d 0 1", "p 0 -1", "r 0 1"]) choose("sort", order);
    choose("split", "members"); choose("outcome", "0 0");
    choose("outcome", "2 0"); choose("outcome", "");
    choose("find", "DOC-2", "input"); choose("find", "", "input");
    choose("outcome", "3 0");
    document.title = say.join("|");
    """
    html = path.read_text(encoding="utf-8")
    path.write_text(
        re.sub(r"<meta http-equiv[^>]*>", "", html).replace(
            "</body>", f"<script>{act}</script></body>"
        )
    )
    title = re.search("<title>(.*?)</title>", browse(tmp_path, path, "--dump-dom"))[
        1
    ].replace("&gt;", ">")
    assert title.split("|") == [
        "doc-1,other,doc-2,doc-0",
        "doc-1,other,doc-0,doc-2",
        "doc-1,other,doc-2,doc-0",
        "doc-1,doc-2,doc-0",
        "doc-1,doc-2",
        "doc-1",
        "doc-1,doc-2,doc-0",
        "doc-2",
        "doc-1,doc-2,doc-0",
        "doc-1",
    ]


def test_light_dark_and_on_paper(tmp_path):
    rows = [
        window(i, split, diverge=i % 3)
        for split in ("members", "heldout")
        for i in range(12)
    ]
    path = write_report([write_audit(tmp_path / "a", rows)], tmp_path / "report.html")
    paper, written = [], []
    for scheme, mode in (("light", 1), ("dark", 0)):
        picture = tmp_path / f"{scheme}.png"
        browse(
            tmp_path,
            path,
            "--window-size=1280,1600",
            f"--screenshot={picture}",
            f"--blink-settings=preferredColorScheme={mode}",
        )
        pixels = imread(picture)[..., :3]
        assert pixels.shape == (1600, 1280, 3)
        paper.append(float(pixels[2, 2].mean()))
        written.append(float(pixels.std()))
    assert paper[0] > 0.9 > 0.2 > paper[1]
    assert min(written) > 0.03
    browse(
        tmp_path,
        path,
        f"--print-to-pdf={tmp_path / 'report.pdf'}",
        "--no-pdf-header-footer",
    )
    pages = re.findall(rb"/Type ?/Page\b", (tmp_path / "report.pdf").read_bytes())
    assert (
        4 <= len(pages) <= 12
    )  # verdict, figures, documents and method each begin a page
