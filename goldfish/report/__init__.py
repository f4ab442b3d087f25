"""Audits -> one self-contained HTML page: what came out, how surely, and every document to look at.

`write_report(["audit/standard", "audit/goldfish"], "report.html")`. Needs no torch and no network.
"""

from collections.abc import Sequence
from pathlib import Path

__all__ = ["write_report"]


def write_report(
    audits: Sequence[str | Path], output: str | Path, *, overwrite: bool = False, redact: bool = False
) -> Path:
    """Writes the report of one or more audits as one HTML file and returns its path.

    Verdicts for who decides, figures and plots for engineers, every document to look at. Audits of the same windows
    are also compared in pairs, each with the first.

    The file holds everything it needs: no network, no external font or script. What comes from the data is escaped,
    and the page forbids itself every script but its own sorting. The same audits give the same bytes.

    Args:
        audits: folders that hold summary.json and records.parquet, in the order in which to show them.
        output: the HTML file to write; its folder is made where it is missing.
        overwrite: replace an existing file.
        redact: for sharing: block characters in place of texts and document names. Lengths, colours and figures
            stay, so whoever holds a text already can still recognise it; p and rank of single tokens are left out.

    Raises:
        FileExistsError: `output` exists and `overwrite` is False, or it is a folder.
        FileNotFoundError: an audit folder that lacks one of its two files.
        TypeError: `audits` is a single path.
        ValueError: no audits, or one whose files are broken, of another schema, or contradict each other.
    """
    from goldfish.report.load import read_views
    from goldfish.report.page import render

    output = Path(output)
    if output.is_dir():
        raise FileExistsError(f"{output} is a folder; give the name of a file, such as {output / 'report.html'}")
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists; give another name, or overwrite=True to replace it")
    page = render(read_views(audits), redact=redact).encode("utf-8")
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "wb" if overwrite else "xb") as file:
        file.write(page)
    return output
