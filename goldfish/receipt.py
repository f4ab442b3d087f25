"""goldfish.json, the receipt: a file beside a checkpoint's weights, of what was dropped."""

import contextlib
import hashlib
import json
import os
import platform
import unicodedata
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from goldfish import __version__, spec
from goldfish.hashing import mix, signed
from goldfish.masking import Masked, check_rule
from goldfish.rule import Goldfish

FILE_NAME = "goldfish.json"
SCHEMA = "goldfish.receipt/2"


def bind_rule(rule: Goldfish, tokenizer: Any) -> Goldfish:
    """The same rule; one that reads text is bound to the tokenizer, if there is one."""
    return rule if tokenizer is None else rule.bind(tokenizer)


def count_drops(masked: Masked) -> Tensor:
    """For every row of a masked batch: targets, dropped targets, and the sum of its decisions.

    A target's decision is the number mix(key of its context + (1 if dropped else 0)); the key is
    that of the last h tokens (`spec.key` with seed 0, whatever the strategy).

    Returns:
        int64 (B, 3), or (3,) for one row (T,).
    """
    # Of booleans and of wrapping int64 alike: no float, so no order of summation matters.
    decisions = mix(masked.keys + masked.dropped) * masked.targets
    numbers = (masked.targets, masked.dropped, decisions)
    return torch.stack([number.sum(-1) for number in numbers], -1)


class DropCounts:
    """The sums of `count_drops` over a training.

    The sum of all decisions, modulo 2**64, does not depend on the order of batches, their padding
    or the number of processes; runs with equal sums dropped the same tokens. Counting does not
    make the device wait. Trainers do all of this; in a training loop of your own:

        counts = DropCounts(rule)
        for input_ids in batches:
            labels = mask_labels(rule, input_ids, counts=counts)
            ...
        counts.save("runs/model", tokenizer)  # goldfish.json, beside the weights

    With several processes, call `end_step` and `sync` in all of them before one of them saves.

    Args:
        rule: the rule of the training.
        device: where to count; that of the labels, so that no batch is copied.
    """

    def __init__(self, rule: Goldfish, device: torch.device | str = "cpu") -> None:
        check_rule(rule)
        self.rule = rule
        # Of all processes, as of the last `sync`: targets, dropped targets, decisions.
        self.total = torch.zeros(3, dtype=torch.int64)
        # Of this process since then, in steps that the optimizer has taken. int64 wraps around,
        # which is the sum modulo 2**64 that the decisions need.
        self._taken = torch.zeros(3, dtype=torch.int64, device=device)
        # In the step that comes.
        self._step = self._taken.clone()

    def add(self, counts: Tensor) -> None:
        """Add the counts of rows, int64 (B, 3) or (3,), to the step that comes."""
        batch = counts.reshape(-1, 3).sum(0)
        self._step += batch.to(self._step.device)

    def add_masked(self, masked: Masked) -> None:
        """Add the counts of a batch to the step that comes."""
        self.add(count_drops(masked))

    def end_step(self) -> None:
        """The optimizer has taken the step."""
        self._taken += self._step
        self.forget_step()

    def forget_step(self) -> None:
        """The step is not taken: training begins, perhaps after an interruption."""
        self._step.zero_()

    def sync(self, reduce: Callable[[Tensor], Tensor] = lambda counts: counts) -> None:
        """Bring `total` up to date.

        `reduce` adds a tensor up over all processes, so all of them must call this.
        """
        self.total += reduce(self._taken).cpu()
        self._taken.zero_()

    def save(self, folder: str | Path, tokenizer: Any = None) -> Path:
        """Write goldfish.json with all that was counted; returns its path."""
        self.end_step()
        self.sync()
        return write_receipt(folder, self, tokenizer)

    def sum(self) -> tuple[int, int]:
        """Targets and dropped targets."""
        targets, dropped, _ = self.total.tolist()
        return targets, dropped

    def to_dict(self) -> dict[str, Any]:
        """The main part of the receipt: the rule and its counts."""
        targets, dropped, decisions = self.total.tolist()
        return {
            "rule": self.rule.to_dict(),
            "targets": targets,
            "dropped": dropped,
            "decisions": f"{decisions & spec.WORD:016x}",
        }

    def restore(self, receipt: Mapping[str, Any]) -> None:
        """Continue the counts of a receipt of the same rule."""
        self.total = _total(receipt)
        self._taken.zero_()


def _total(receipt: Mapping[str, Any]) -> Tensor:
    decisions = signed(int(receipt["decisions"], 16))
    return torch.tensor([receipt["targets"], receipt["dropped"], decisions])


def versions() -> dict[str, str]:
    """Of the software that a receipt or an audit was made with."""
    found = {"goldfish": __version__, "torch": torch.__version__}
    with contextlib.suppress(PackageNotFoundError):  # a loop without transformers
        found["transformers"] = version("transformers")
    return {**found, "python": platform.python_version()}


def write_receipt(
    folder: str | Path,
    counts: DropCounts,
    tokenizer: Any,
    before: Mapping[str, Any] | None = None,
    secret_column: str | None = None,
) -> Path:
    """Write goldfish.json into a folder.

    Args:
        before: the receipt of earlier training under another rule.
        secret_column: the column of secrets that were dropped too, see `premask`.
    """
    receipt = {
        "schema": SCHEMA,
        **counts.to_dict(),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        # Strategy "letters" depends on the version of Unicode.
        "versions": {**versions(), "unicode": unicodedata.unidata_version},
    }
    if before:
        receipt["before"] = before
    if secret_column:
        receipt["secret_column"] = secret_column
    return _write(folder, receipt)


def _write(folder: str | Path, receipt: Mapping[str, Any]) -> Path:
    """Atomically: a reader sees the old file or the new one."""
    path = Path(folder) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".json.tmp")
    unfinished.write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return path


def merge_receipts(folders: Mapping[str, str | Path], output: str | Path) -> Path:
    """Add up the receipts of premasked data sets that are trained on together.

        merge_receipts({"books": "data/books", "web": "data/web"}, "runs/model")

    Counts under one rule are added. Under different rules the merged receipt has `sources`: the
    rule and the counts of each; an audit then takes the rule of a text from its column `source`.

    Args:
        folders: for each name of a source, the folder with its goldfish.json.
        output: the folder for the merged goldfish.json, such as that of the weights.

    Raises:
        FileNotFoundError: a folder without a receipt.
        ValueError: receipts of different tokenizers, or that are merged already.
    """
    receipts = {}
    for name, folder in folders.items():
        receipt = read_receipt(folder)
        if receipt is None:
            raise FileNotFoundError(f"{folder} has no {FILE_NAME}")
        if "rule" not in receipt or "before" in receipt:
            raise ValueError(
                f"{folder} has a receipt of several rules; merge those of single ones"
            )
        receipts[name] = receipt
    tokenizers = {receipt["tokenizer"] for receipt in receipts.values()}
    if len(tokenizers) != 1:
        names = ", ".join(map(str, folders.values()))
        raise ValueError(
            f"expected receipts of one tokenizer, got {len(tokenizers)}: {names}"
        )

    first = next(iter(receipts.values()))
    merged = {name: first[name] for name in ("schema", "tokenizer", "versions")}
    settings = [
        (receipt["rule"], receipt.get("secret_column")) for receipt in receipts.values()
    ]
    if any(each != settings[0] for each in settings):
        # The name of a source must lead to its rule, so nothing is added up.
        merged["sources"] = {
            name: {key: receipt[key] for key in receipt if key not in merged}
            for name, receipt in receipts.items()
        }
        return _write(output, merged)
    counts = DropCounts(Goldfish(**first["rule"]))
    for receipt in receipts.values():
        counts.total += _total(receipt)
    merged |= counts.to_dict()
    if "secret_column" in first:
        merged["secret_column"] = first["secret_column"]
    return _write(output, merged)


def card_section(counts: DropCounts) -> str:
    """The section of a model card: the rule and what it dropped."""
    targets, dropped = counts.sum()
    return (
        "\n## Goldfish loss\n\n"
        "Trained with the [goldfish loss](https://arxiv.org/abs/2406.10209).\n"
        f"{FILE_NAME} has the exact rule and a fingerprint of all decisions.\n\n"
        f"- `{counts.rule}` dropped {dropped:,} of {targets:,} targets.\n"
    )


def read_receipt(folder: str | Path) -> dict[str, Any] | None:
    """The receipt of a checkpoint folder, or None if it has none. See `rules_of`.

    Raises:
        ValueError: a goldfish.json that is not a receipt.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return None
    try:
        receipt: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if receipt["schema"] != SCHEMA:
            raise ValueError(
                f"its schema is {receipt['schema']!r}, this version reads {SCHEMA!r}"
            )
        rules_of(receipt)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a goldfish receipt: {error!r}") from error
    return receipt


def rules_of(receipt: Mapping[str, Any]) -> Goldfish | dict[str, Goldfish]:
    """The rule of a receipt, or the rule of each source of a merged one. None is bound yet."""
    if "sources" not in receipt:
        return Goldfish(**receipt["rule"])
    return {
        name: Goldfish(**entry["rule"]) for name, entry in receipt["sources"].items()
    }


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """SHA-256 of what a tokenizer does to text, without its settings for padding and truncation."""
    if hasattr(tokenizer, "backend_tokenizer"):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # A call such as tokenizer(text, truncation=True) leaves these behind.
        state.pop("padding", None)
        state.pop("truncation", None)
    elif hasattr(tokenizer, "get_vocab"):
        state = tokenizer.get_vocab()
    else:
        return None
    description = json.dumps(state, sort_keys=True)
    return hashlib.sha256(description.encode()).hexdigest()
