"""Reads audits for the page: what they say, and their records as columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from goldfish.audit.records import read_records
from goldfish.audit.results import Audit, read

SPLITS = {"members": "members", "heldout": "held-out"}  # key in the files: name on the page
COLUMNS = (
    "split",
    "index",
    "offset",
    "name",
    "prompt",
    "suffix_tokens",
    "output_tokens",
    "dropped",
    "exact_match",
    "first_divergence",
    "rouge_l_ids",
    "log_p",
    "common_runs",
)


@dataclass(frozen=True)
class View:
    """One audit on the page: its name there, which no other view has; what it says; COLUMNS of its records."""

    name: str
    audit: Audit
    windows: pa.Table

    @property
    def splits(self) -> list[str]:
        """members, heldout or both, in this order."""
        return [split for split in SPLITS if split in self.audit.summary["splits"]]

    @cached_property
    def of_split(self) -> dict[str, pa.Table]:
        """The windows of members and of heldout; empty where there are none."""
        return {split: self.windows.filter(pc.field("split") == split) for split in SPLITS}


def read_views(folders: Sequence[str | Path]) -> list[View]:
    """Reads each audit folder; audits that share a name are numbered.

    Raises:
        FileNotFoundError: a folder that is no finished audit.
        TypeError: a single path instead of a list. ValueError: no folder, or an audit that is damaged.
    """
    if isinstance(folders, (str, Path)):
        raise TypeError(
            f"audits must be a list of audit folders, got the single path {str(folders)!r}; write [path]"
        )
    audits = [read(folder) for folder in folders]
    if not audits:
        raise ValueError("audits is empty: a report needs at least one audit folder")
    names = [audit.name for audit in audits]
    numbers = [f" ({i + 1})" if names.count(name) > 1 else "" for i, name in enumerate(names)]
    return [
        View(audit.name + number, audit, read_records(audit.folder, COLUMNS).combine_chunks())
        for audit, number in zip(audits, numbers, strict=True)
    ]
