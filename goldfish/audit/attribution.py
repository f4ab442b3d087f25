"""Did the rule stop the recitation? First divergences and accuracy on dropped beside kept tokens."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow.compute import list_flatten, list_value_length

from goldfish.audit.estimate import Codes, Estimate, Floats, clopper_pearson, token_rate


def notes(receipt: Mapping[str, Any] | None) -> list[str]:
    """What in a checkpoint's goldfish.json speaks against every text having been trained on under one rule."""
    if receipt is None:
        return []
    entries = receipt.get("sources", {"": receipt})
    strategies = {entry["rule"]["strategy"] for entry in entries.values() if entry["rule"]}
    sentences = []
    if "before" in receipt:
        sentences.append(
            "trained before under another rule: every text may have been seen under both"
        )
    if "random" in strategies:
        sentences.append(
            'strategy "random" drops other tokens in every epoch: a text seen often was seen whole'
        )
    if strategies & {"static", "reference"}:
        sentences.append(
            '"static" and "reference" depend on where a training row starts: other tokens were dropped'
        )
    if len({str(entry["rule"]) for entry in entries.values()}) > 1:
        sentences.append(
            "rules differ between sources: a text that is in two of them was seen under both"
        )
    return sentences


def token_counts(table: pa.Table) -> Floats:
    """(windows, 8), from records with `dropped`: first divergences on dropped tokens, dropped tokens up to the first
    divergence (it included), the same for kept tokens; dropped tokens that are predicted teacher-forced, dropped
    tokens, the same for kept tokens."""
    lengths = list_value_length(table["dropped"]).to_numpy()
    windows = np.repeat(np.arange(len(table)), lengths)
    divergences = np.cumsum(lengths) - lengths + table["first_divergence"].to_numpy()
    behind = np.arange(len(windows)) - divergences[windows]  # tokens behind the first divergence
    dropped, correct = (list_flatten(table[name]).to_numpy() for name in ("dropped", "correct"))
    at, reached = behind == 0, behind <= 0
    counted = (
        at & dropped,
        reached & dropped,
        at & ~dropped,
        reached & ~dropped,
        correct & dropped,
        dropped,
        correct & ~dropped,
        ~dropped,
    )
    return np.stack([np.bincount(windows, tokens, len(table)) for tokens in counted], -1)


def attribution_figures(counts: Floats, documents: Codes) -> dict[str, Any]:
    """A split's `attribution`, without `notes`; see docs/audit-files.md. counts: of `token_counts`."""
    hazards, dropped, kept = counts[:, :4], counts[:, 5], counts[:, 7]
    return {
        "dropped_share": token_rate(dropped, dropped + kept, documents),
        "hazard_ratio": hazard_ratio(hazards, documents),
        "hazard_dropped": token_rate(hazards[:, 0], hazards[:, 1], documents),
        "hazard_kept": token_rate(hazards[:, 2], hazards[:, 3], documents),
    }


def hazard_ratio(hazards: Floats, documents: Codes) -> Estimate:
    """Hazard of a first divergence on dropped tokens over that on kept ones; hazards: (windows, 4), the first columns
    of `token_counts`.

    The interval is the exact one given how many tokens of each kind were reached: of all events, those on dropped
    tokens are binomial with odds ratio * reached dropped / reached kept. The windows of a document count as one, as
    if they agreed, the worst case.
    """
    on_dropped, dropped, on_kept, kept = hazards.sum(0)
    events = on_dropped + on_kept
    about: dict[str, Any] = {"n": int(events), "documents": len(np.unique(documents))}
    if not (events and dropped and kept):
        missing = "no window diverges" if not events else "only one kind of token was reached"
        return Estimate(None, reason=missing, **about)
    share = about["documents"] / len(documents)
    low, high = clopper_pearson(on_dropped * share, events * share)
    lower = float(low / (1 - low) * kept / dropped)
    if on_kept == 0:
        reason = "no first divergence on a kept token: the ratio has no upper bound"
        return Estimate(None, lower95=lower, reason=reason, **about)
    value, upper = (on_dropped / dropped) / (on_kept / kept), high / (1 - high) * kept / dropped
    return Estimate(float(value), lower95=lower, upper95=float(upper), **about)
