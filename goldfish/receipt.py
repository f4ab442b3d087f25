"""goldfish.json, the receipt: a file beside a checkpoint's weights that says what was dropped in training."""

import hashlib
import json
import os
import platform
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from goldfish import __version__, spec
from goldfish.hashing import mix, signed
from goldfish.masking import IGNORE_INDEX, Rules
from goldfish.rule import Goldfish

FILE_NAME = "goldfish.json"
SCHEMA = "goldfish.receipt/1"
ALL = ""  # the name of the only source of a run with one rule


def bind(rules: Rules, tokenizer: Any) -> Rules:
    """The same rules; those that read words are bound to the tokenizer, if there is one."""
    if isinstance(rules, Mapping):
        return {
            name: rule and cast(Goldfish, bind(rule, tokenizer)) for name, rule in rules.items()
        }
    return rules if tokenizer is None or rules.vocabulary is not None else rules.bind(tokenizer)


def count(batch: Mapping[str, Any], dropped: Tensor, keys: Tensor) -> Tensor:
    """Of every row of a batch its targets, dropped targets, and the sum of its decisions; int64 (B, 3).

    The batch has labels that are not masked yet; `labels.decide` says the rest. A target's decision is the number
    mix(key of its context + (1 if dropped else 0)), where the key is that of the last h tokens (`spec.key` with seed 0,
    whatever the strategy).
    """
    targets = batch["labels"][..., 1:] != IGNORE_INDEX
    dropped = dropped[..., 1:] & targets
    decisions = mix(keys[..., 1:] + dropped) * targets
    return torch.stack([number.sum(-1) for number in (targets, dropped, decisions)], -1)


class Tally:
    """The sums of `count` for each source.

    The sum of all decisions, modulo 2**64, does not depend on the order of batches, their padding or the number of
    processes; runs with equal sums dropped the same tokens. Counting makes no device wait.
    """

    def __init__(self, rules: Rules, device: torch.device) -> None:
        self.given = rules
        self.rules = (
            {ALL: rules}
            if isinstance(rules, Goldfish)
            else {name: rules[name] for name in sorted(rules)}
        )
        self.totals = torch.zeros(
            (len(self.rules), 3), dtype=torch.int64
        )  # of all processes, as of the last `sync`
        self._taken = self.totals.to(
            device, copy=True
        )  # by this process since then, in steps of the optimizer
        self._step = self._taken.clone()  # in the step that comes

    def add(self, counts: Tensor, sources: Tensor | None = None) -> None:
        """Add the counts of rows to the step that comes; sources: int64 (B,), their places in `rules` of several."""
        places = (
            torch.zeros(len(counts), dtype=torch.int64)
            if sources is None or len(self.rules) == 1
            else sources
        )
        self._step.index_add_(0, places.to(self._step.device), counts.to(self._step.device))

    def end_step(self) -> None:
        """The optimizer has taken the step."""
        self._taken += self._step
        self.forget_step()

    def forget_step(self) -> None:
        """The step is not taken: training begins, perhaps after an interruption."""
        self._step.zero_()

    def sync(self, reduce: Callable[[Tensor], Tensor] = lambda counts: counts) -> None:
        """Bring `totals` up to date; `reduce` adds a tensor up over all processes, so all of them must call this."""
        self.totals += reduce(self._taken).cpu()
        self._taken.zero_()

    def sum(self) -> tuple[int, int]:
        """Targets and dropped targets of all sources."""
        targets, dropped, _ = self.totals.sum(0).tolist()
        return targets, dropped

    def entries(self) -> dict[str, Any]:
        """The receipt's main part: the one rule and its counts, or the same for each source."""
        entries = {}
        for (name, rule), (targets, dropped, decisions) in zip(
            self.rules.items(), self.totals.tolist(), strict=True
        ):
            counts = {
                "targets": targets,
                "dropped": dropped,
                "decisions": f"{decisions & spec.WORD:016x}",
            }
            entries[name] = {"rule": rule and rule.to_dict(), **counts}
        return entries.get(ALL, {"sources": entries})

    def restore(self, receipt: Mapping[str, Any]) -> None:
        """Continue the counts of a receipt of the same rules."""
        entries = receipt.get("sources", {ALL: receipt})
        for name, total in zip(self.rules, self.totals, strict=True):
            entry = entries[name]
            total[:] = torch.tensor(
                [entry["targets"], entry["dropped"], signed(int(entry["decisions"], 16))]
            )
        self._taken.zero_()


def versions() -> dict[str, str]:
    """Of the software that a receipt or an audit was made with."""
    import transformers

    return {
        "goldfish": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def write_receipt(
    folder: str | Path, tally: Tally, tokenizer: Any, before: Mapping[str, Any] | None = None
) -> Path:
    """Write goldfish.json into a folder, atomically; `before` is the receipt of earlier training under other rules."""
    receipt = {
        "schema": SCHEMA,
        **tally.entries(),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        # "letters" and "text" read characters as this version of Unicode knows them
        "versions": {**versions(), "unicode": unicodedata.unidata_version},
        **({"before": before} if before else {}),
    }
    path = Path(folder) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".json.tmp")
    unfinished.write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return path


def card_section(tally: Tally) -> str:
    """The section of a model card: the rules and what they dropped."""
    lines = [
        "\n## Goldfish loss\n",
        "Trained with the [goldfish loss](https://arxiv.org/abs/2406.10209).",
    ]
    lines += [f"{FILE_NAME} has the exact rule and a fingerprint of all decisions.\n"]
    for (name, rule), (targets, dropped, _) in zip(
        tally.rules.items(), tally.totals.tolist(), strict=True
    ):
        lines.append(
            f"- {name}{': ' if name else ''}`{rule}` dropped {dropped:,} of {targets:,} targets."
        )
    return "\n".join(lines) + "\n"


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
            raise ValueError(f"its schema is {receipt['schema']!r}, this version reads {SCHEMA!r}")
        rules_of(receipt)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a goldfish receipt: {error!r}") from error
    return receipt


def rules_of(receipt: Mapping[str, Any]) -> Rules:
    """The rules of a receipt; "letters" and "text" are not bound to a tokenizer."""
    if "sources" not in receipt:
        return Goldfish(**receipt["rule"])
    return {
        name: entry["rule"] and Goldfish(**entry["rule"])
        for name, entry in receipt["sources"].items()
    }


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """SHA-256 of what a tokenizer does to text, without its settings for padding and truncation."""
    if hasattr(tokenizer, "backend_tokenizer"):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state.pop("padding", None)
        state.pop("truncation", None)
    elif hasattr(tokenizer, "get_vocab"):
        state = tokenizer.get_vocab()
    else:
        return None
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
