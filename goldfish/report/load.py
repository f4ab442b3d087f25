"""Reads audits for the page: their figures and verdicts, and their records as columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from goldfish.audit.records import read_records
from goldfish.audit.results import Audit, read
from goldfish.audit.secrets import search

SPLITS = {
    "members": "members",
    "heldout": "held-out",
}  # key in the files: name on the page
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
    "secrets",
    "output_text",
)


@dataclass(frozen=True)
class View:
    """One audit on the page.

    name: there, which no other view has. windows: COLUMNS of its records, and `given_away`, the
    members' secrets in each output.
    """

    name: str
    audit: Audit
    windows: pa.Table

    @property
    def splits(self) -> list[str]:
        """members, heldout or both, in this order."""
        return self.audit.splits

    @cached_property
    def of_split(self) -> dict[str, pa.Table]:
        """The windows of members and of heldout; empty where there are none."""
        return {
            split: self.windows.filter(pc.field("split") == split) for split in SPLITS
        }


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
    numbers = [
        f" ({i + 1})" if names.count(name) > 1 else "" for i, name in enumerate(names)
    ]
    return [
        View(audit.name + number, audit, _windows(audit))
        for audit, number in zip(audits, numbers, strict=True)
    ]


def _windows(audit: Audit) -> pa.Table:
    table = read_records(audit.folder, COLUMNS).combine_chunks()
    found = (
        search(table).found
        if "secrets" in audit.counted
        else [[] for _ in range(len(table))]
    )
    return table.append_column("given_away", pa.array(found, pa.list_(pa.string())))
