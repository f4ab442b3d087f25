r"""Canaries: random rows inserted into a training set, and others that stay out (references).

    # before training: add canaries/inserted.jsonl to the training set
    python recipes/canaries.py write canaries --tokenizer DIR
    goldfish audit CHECKPOINT --members canaries/canaries.jsonl \
        --heldout canaries/references.jsonl -o runs/audit
    python recipes/canaries.py exposure runs/audit

Exposure (Carlini et al. 2019, section 4) is log2(references + 1) - log2(rank), in bits: the rank of
a canary's loss among itself and the references, which were never trained on. A rank of 1 gives the
most, log2(references + 1) bits.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import runs

from goldfish.audit.records import read_records
from goldfish.checkpoint import load_tokenizer

# Exposure against the number of repeats: four canaries for each.
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128) * 4


def main(argv: list[str] | None = None) -> None:
    parser = runs.parser(__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    write = verbs.add_parser("write", help="make canaries and references")
    write.add_argument("folder", type=Path, help="new or empty")
    write.add_argument(
        "--tokenizer", required=True, help="that of the training: folder or name"
    )
    write.add_argument(
        "--counts",
        type=int,
        nargs="+",
        default=COUNTS,
        help="how often each canary is trained on",
    )
    write.add_argument("--references", type=int, default=1023, help="how many stay out")
    write.add_argument("--length", type=int, default=100, help="tokens per row")
    write.add_argument("--seed", type=int, default=0)
    verbs.add_parser("exposure", help="of an audit of them").add_argument(
        "folder", type=Path
    )
    args = parser.parse_args(argv)
    if args.verb == "exposure":
        print(exposure(args.folder).to_string(float_format="%.2f"))
    else:
        tokenizer = load_tokenizer(args.tokenizer)
        write_canaries(
            args.folder, tokenizer, args.counts, args.references, args.length, args.seed
        )
        print(f"Canaries: {args.folder}")


def write_canaries(
    folder: Path,
    tokenizer: Any,
    counts: Sequence[int],
    references: int,
    length: int,
    seed: int = 0,
) -> None:
    """Write inserted.jsonl, to train on, and for the audit canaries.jsonl and references.jsonl.

    Rows have `input_ids`, drawn uniformly from the tokenizer's ordinary ids: train on the ids, not
    on their text. Canary i appears counts[i] times in inserted.jsonl, shuffled, and once, with its
    count, in canaries.jsonl.
    """
    if min(counts) < 1 or references < 1 or length < 2:
        raise ValueError(
            "canaries need a count of at least 1 each, a reference and 2 tokens, got "
            f"counts={list(counts)}, references={references}, length={length}"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists and is not an empty folder; choose another one or remove it"
        )
    generator = np.random.default_rng(seed)
    # An id that the tokenizer never produces inside a text would be no fair canary.
    ordinary = np.setdiff1d(
        sorted(tokenizer.get_vocab().values()), tokenizer.all_special_ids
    )
    # Random rows: whatever a model predicts of them better than chance, it has memorized.
    ids = generator.choice(ordinary, size=(len(counts) + references, length)).tolist()
    canaries = [
        {"name": f"canary {i}", "input_ids": ids[i], "count": count}
        for i, count in enumerate(counts)
    ]
    outside = [
        {"name": f"reference {i}", "input_ids": row}
        for i, row in enumerate(ids[len(counts) :])
    ]
    copies = generator.permutation(np.repeat(np.arange(len(counts)), counts))
    folder.mkdir(parents=True, exist_ok=True)
    inserted = [canaries[i] for i in copies]
    files = {"inserted": inserted, "canaries": canaries, "references": outside}
    for name, rows in files.items():
        for row in rows:
            runs.append(folder / f"{name}.jsonl", row)


def exposure(folder: Path) -> pandas.DataFrame:
    """For each count: how many canaries, and the mean and greatest of their exposures, in bits."""
    records = read_records(folder, ["split", "count", "mia_loss"]).to_pandas()
    references = np.sort(records.loc[records["split"] == "heldout", "mia_loss"])
    canaries = records[records["split"] == "members"]
    # The most memorized has the greatest score. A tie counts against the canary.
    ranks = (
        len(references)
        - np.searchsorted(references, canaries["mia_loss"], side="left")
        + 1
    )
    ceiling = np.log2(len(references) + 1)
    bits = pandas.Series(ceiling - np.log2(ranks), canaries.index)
    table = bits.groupby(canaries["count"]).agg(
        canaries="size", mean="mean", greatest="max"
    )
    return table.assign(ceiling=ceiling)


if __name__ == "__main__":
    runs.command_line(main)
