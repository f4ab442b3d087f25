"""Did the rule do its work? First divergences and accuracy on dropped beside kept tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from goldfish.audit.stats import Codes, Estimate, Floats, clopper_pearson, effective_size, token_rate, value
from goldfish.rule import Goldfish

FEWEST_EVENTS = 10  # divergences on either kind of token below which the bootstrap gives way to the exact interval


def decisions(rule: Goldfish | None, ids: Sequence[int], offset: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which tokens the training dropped, and where that can be known; bool (T,) both.

    Known nowhere without a rule and under "random", which drew anew in every epoch. At an offset, a decision that
    depends on tokens before the window is not known.
    """
    length = len(ids)
    nothing = np.zeros(length, dtype=bool)
    if rule is None or rule.strategy == "random":
        return nothing, nothing
    row = torch.tensor(ids)
    if offset == 0:
        return rule.dropped(row).numpy(), ~nothing
    if rule.strategy == "static":  # counts positions, whatever stands there
        filler = torch.full((offset,), 0 if rule.document_end != 0 else 1)
        return rule.dropped(torch.cat([filler, row])).numpy()[offset:], ~nothing
    if rule.strategy == "reference":
        return rule.dropped(row).numpy(), np.arange(length) >= rule.h
    # A rule that drops every token with a full context says which tokens have one.
    everything = replace(rule, k=1 + 2**-40, head="keep", exempt=())
    return rule.dropped(row).numpy(), everything.dropped(row).numpy()


def notes(receipt: Mapping[str, Any] | None) -> list[str]:
    """What a checkpoint's receipt says against its texts having been trained on under one set of decisions."""
    if receipt is None:
        return []
    entries = receipt.get("sources", {"": receipt})
    strategies = {entry["rule"]["strategy"] for entry in entries.values() if entry["rule"]}
    found = []
    if "before" in receipt:
        found.append("trained before under other rules: every text may have been seen under both sets of decisions")
    if "random" in strategies:
        found.append('strategy "random" draws anew each time: a text seen often was seen whole')
    if strategies & {"static", "reference"}:
        found.append('"static" and "reference" decide from where a training row starts: another cut, other holes')
    if len({str(entry["rule"]) for entry in entries.values()}) > 1:
        found.append("rules differ between sources: a text that is in two of them was seen under both")
    return found


class Repeats:
    """Suffixes that occur in several windows, and those of them under differing decisions."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, bool, bool]] = {}  # hash of ids: of its decisions, seen again, they differed

    def add(self, suffix_ids: Sequence[int], dropped: Sequence[bool]) -> None:
        key, decided = hash(tuple(suffix_ids)), hash(tuple(dropped))
        before = self._seen.get(key)
        if before is None:
            self._seen[key] = (decided, False, False)
        else:
            self._seen[key] = (before[0], True, before[2] or before[0] != decided)

    def counts(self) -> dict[str, int]:
        seen = self._seen.values()
        return {
            "suffixes": len(seen),
            "repeated": sum(again for _, again, _ in seen),
            "several": sum(differed for _, _, differed in seen),
        }


def reached(dropped: Sequence[bool], first_divergence: int) -> tuple[int, int, int, int]:
    """One window's share in the hazards: events and tokens reached on dropped, events and tokens reached on kept.

    Tokens are reached up to the first divergence, it included; it is the event.
    """
    until = dropped[: first_divergence + 1]
    gone = sum(until)
    event = first_divergence < len(dropped)
    on_dropped = event and dropped[first_divergence]
    return int(on_dropped), gone, int(event and not on_dropped), len(until) - gone


def accuracies(correct: NDArray[np.bool_], dropped: Sequence[bool] | None) -> tuple[int, int, int, int]:
    """One window's correct dropped, dropped, correct kept and kept tokens; nothing where the rule is not known."""
    if dropped is None:
        return 0, 0, 0, 0
    gone = np.array(dropped, dtype=bool)
    return int((correct & gone).sum()), int(gone.sum()), int((correct & ~gone).sum()), int((~gone).sum())


def attribution_figures(hazards: Floats, tokens: Floats, documents: Codes) -> dict[str, Any]:
    """A split's `attribution`, without `decisions` and `notes`; see docs/audit.md.

    Args:
        hazards: (windows, 4), from `reached`.
        tokens: (windows, 4), from `accuracies`.
    """
    right_dropped, dropped, right_kept, kept = tokens.T
    return {
        "dropped_share": token_rate(dropped, dropped + kept, documents),
        "hazard_ratio": hazard_ratio(hazards, documents),
        "hazard_dropped": token_rate(hazards[:, 0], hazards[:, 1], documents),
        "hazard_kept": token_rate(hazards[:, 2], hazards[:, 3], documents),
        "accuracy_gap": value(
            lambda total: total[..., 2] / total[..., 3] - total[..., 0] / total[..., 1],
            [right_dropped, dropped, right_kept, kept], int((dropped + kept).sum()), documents,
        ),
    }  # fmt: skip


def hazard_ratio(hazards: Floats, documents: Codes) -> Estimate:
    """Hazard of a first divergence on dropped over that on kept tokens reached.

    With few events of a kind the interval is the exact one given how many tokens of each kind were reached: of all
    events, those on dropped tokens are binomial with odds ratio * reached dropped / reached kept.
    """
    on_dropped, dropped, on_kept, kept = hazards.sum(0)
    events = on_dropped + on_kept
    found = value(
        lambda total: (total[..., 0] / total[..., 1]) / (total[..., 2] / total[..., 3]),
        list(hazards.T), int(events), documents,
    )  # fmt: skip
    if not (events and dropped and kept):
        missing = "no window diverges" if not events else "only one kind of token was reached"
        return found | {"value": None, "lower95": None, "upper95": None, "reason": missing}
    if min(on_dropped, on_kept) >= FEWEST_EVENTS:
        return found
    share = effective_size(documents) / len(documents)
    low, high = clopper_pearson(on_dropped * share, events * share)
    found |= {"lower95": low / (1 - low) * kept / dropped, "upper95": None}
    found.pop("reason", None)
    if high < 1:
        return found | {"upper95": high / (1 - high) * kept / dropped}
    return found | {"reason": "no first divergence on a kept token: the ratio has no upper bound"}
