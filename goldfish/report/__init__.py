"""Audits -> one self-contained HTML page, or a section for a model card.

Needs no torch and no network.

`write_report(["audit/standard", "audit/goldfish"], "report.html")`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["write_model_card", "write_report"]


def write_report(
    audits: Sequence[str | Path],
    output: str | Path,
    *,
    overwrite: bool = False,
    redact: bool = False,
    baseline: str | None = None,
) -> Path:
    """Write the report of one or more audits as one HTML file.

    It loads nothing from elsewhere and shows text from the data escaped. Audits of the same windows
    are also compared in pairs. The same audits give the same bytes.

    Args:
        audits: folders that `goldfish audit` wrote, in the order in which to show them.
        output: the HTML file to write; its folder is created if it is missing.
        overwrite: replace an existing file.
        redact: for sharing: blocks instead of texts and document names, numbers instead of the
            models' names, no paths. Hashes, lengths and figures stay, so a reader who already has a
            text can still recognise it.
        baseline: the name of the audit that the others are compared with; by default every pair is
            compared.

    Returns the path of the file.

    Raises:
        FileExistsError: `output` exists and `overwrite` is False, or it is a folder.
        FileNotFoundError: a folder that is no finished audit.
        TypeError: `audits` is a single path.
        ValueError: no audits, a damaged one or one of another schema, or a `baseline` that is the
            name of none.
    """
    # Imported here: a model card needs no templates and no plots.
    from goldfish.report.load import read_views
    from goldfish.report.page import render

    return _write(
        output,
        overwrite,
        lambda: render(read_views(audits), redact=redact, baseline=baseline),
    )


def write_model_card(
    audits: Sequence[str | Path], output: str | Path, *, overwrite: bool = False
) -> Path:
    """Write a section for a model card, as Markdown.

    The verdict, the figures behind it, what was not tested.
    It holds no training text and no paths. Arguments, result and errors as for `write_report`.
    """
    from goldfish.audit.render import describe, markdown
    from goldfish.audit.results import read

    def section(folder: str | Path) -> str:
        return markdown(describe(read(folder), share=True))

    return _write(output, overwrite, lambda: "\n".join(map(section, audits)))


def _write(output: str | Path, overwrite: bool, render: Callable[[], str]) -> Path:
    path = Path(output)
    if path.is_dir():
        raise FileExistsError(
            f"{path} is a folder; give the name of a file, such as {path / 'report.html'}"
        )
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} exists; give another name, or overwrite=True (--overwrite) to replace it"
        )
    # Rendered before anything is made: an audit that is refused leaves no empty file.
    text = render()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8"))
    return path
