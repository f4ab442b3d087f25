"""Reads audits for the page: their figures and verdicts, and their records as columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from goldfish.audit.intervals import SPLITS
from goldfish.audit.questions.secrets import search
from goldfish.audit.records import read_records
from goldfish.audit.results import Audit, read

# Not the columns of token ids and losses: they are most of the records, and the page shows none.
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

    Attributes:
        name: the name on the page, which no other view has.
        windows: COLUMNS of its records, and `given_away`: the members' secrets in each output.
    """

    name: str
    audit: Audit
    windows: pa.Table

    @property
    def splits(self) -> list[str]:
        """members, heldout or both, in this order."""
        return self.audit.splits

    @property
    def has_rule(self) -> bool:
        """Whether it is known of any window which tokens were dropped."""
        return bool(self.windows["dropped"].null_count < len(self.windows))

    @cached_property
    def of_split(self) -> dict[str, pa.Table]:
        """The windows of members and of heldout; empty if the audit has none."""
        column = pc.field("split")
        return {split: self.windows.filter(column == split) for split in SPLITS}


def read_views(folders: Sequence[str | Path]) -> list[View]:
    """Reads each audit folder; audits that share a name are numbered.

    Raises:
        FileNotFoundError: a folder that is no finished audit.
        TypeError: a single path instead of a list.
        ValueError: no folder, or an audit that is damaged.
    """
    if isinstance(folders, (str, Path)):
        raise TypeError(
            f"audits must be a list of audit folders, got the single path {str(folders)!r}; "
            "write [path]"
        )
    audits = [read(folder) for folder in folders]
    if not audits:
        raise ValueError("audits is empty: a report needs at least one audit folder")
    names = [audit.name for audit in audits]
    views = []
    for i, audit in enumerate(audits, 1):
        number = f" ({i})" if names.count(audit.name) > 1 else ""
        views.append(View(audit.name + number, audit, _windows(audit)))
    return views


def _windows(audit: Audit) -> pa.Table:
    table = read_records(audit.folder, COLUMNS).combine_chunks()
    given_away: list[list[str]] = [[] for _ in range(len(table))]
    # The records hold the outputs, not what was found in them, so they are searched again.
    if "secrets" in audit.counted:
        given_away = search(table, audit.run["unasked_secrets"]).found
    return table.append_column(
        "given_away", pa.array(given_away, pa.list_(pa.string()))
    )
