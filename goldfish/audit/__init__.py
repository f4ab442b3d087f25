"""Memorization audits: can this checkpoint be made to recite these texts?

windows (prefix/suffix) -> score (the only file that runs a model) -> extraction, attacks -> records
records -> summary (sampling, membership, attribution, stats; verdict) -> results, gate, table, formats, compare
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from goldfish.audit.results import Audit, Figure, read
    from goldfish.audit.run import audit

__all__ = ["Audit", "Figure", "audit", "read"]
_HOMES = {
    "Audit": "results",
    "Figure": "results",
    "audit": "run",
    "read": "results",
}


def __getattr__(name: str) -> Any:
    """Loaded on first use: reading an audit needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
