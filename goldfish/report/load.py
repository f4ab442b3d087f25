"""Reads audits for the page: what they say, and their records as columns."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from goldfish.audit.columns import records
from goldfish.audit.results import Audit, read

SPLITS = {"members": "members", "heldout": "held-out"}  # key in the files: name on the page
COLUMNS = ("split", "index", "offset", "document", "prefix_text", "suffix_tokens", "output_tokens", "dropped", "nll",
           "rank", "exact_match", "first_divergence", "rouge_l_ids", "log_p", "common_runs")  # fmt: skip


@dataclass(frozen=True)
class View:
    """One audit on the page.

    Attributes:
        name: what the page calls it; no two views share a name.
        audit: what it says.
        windows: COLUMNS of its records, one row a window.
        first: split -> the windows at the first offset, of which most figures and all plots speak.
    """

    name: str
    audit: Audit
    windows: pa.Table
    first: Mapping[str, pa.Table]

    @property
    def splits(self) -> list[str]:
        """members, heldout or both, in this order."""
        return [split for split in SPLITS if split in self.audit.summary["splits"]]


def read_views(folders: Sequence[str | Path]) -> list[View]:
    """Reads each audit folder; audits that share a name are numbered in the order given.

    Raises:
        FileNotFoundError: a folder that is no finished audit.
        TypeError: a single path instead of a list. ValueError: no folder, or an audit that is damaged.
    """
    if isinstance(folders, (str, Path)):
        raise TypeError(f"audits must be a list of audit folders, got the single path {str(folders)!r}; write [path]")
    audits = [read(folder) for folder in folders]
    if not audits:
        raise ValueError("audits is empty: a report needs at least one audit folder")
    counts, seen, views = Counter(audit.name for audit in audits), Counter[str](), []
    for audit in audits:
        seen[audit.name] += 1
        number = f" ({seen[audit.name]})" if counts[audit.name] > 1 else ""
        views.append(_view(audit.name + number, audit))
    return views


def _view(name: str, audit: Audit) -> View:
    windows = records(audit.folder, COLUMNS).combine_chunks()
    begin = audit.summary["protocol"]["offsets"][0]
    first = {split: windows.filter((pc.field("split") == split) & (pc.field("offset") == begin)) for split in SPLITS}
    for split in SPLITS:
        expected = audit.summary["splits"].get(split, {"n": 0})["n"]
        if len(first[split]) != expected:
            raise ValueError(
                f"{audit.folder}: this audit is damaged: its summary counts {expected} {split} windows, its records "
                f"hold {len(first[split])}; audit again"
            )
    return View(name, audit, windows, first)
