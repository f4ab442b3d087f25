"""Memorization audits: can this checkpoint be made to recite these texts?

windows (prefix and suffix) -> score (the only file that runs a model) -> records
records -> figures (intervals, secrets, membership) -> verdict -> results, render, compare
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from goldfish.audit.callback import AuditCallback
    from goldfish.audit.intervals import Figure
    from goldfish.audit.results import Audit, judge, read
    from goldfish.audit.run import audit

__all__ = ["Audit", "AuditCallback", "Figure", "audit", "judge", "read"]
_MODULES = {
    "Audit": "results",
    "AuditCallback": "callback",
    "Figure": "intervals",
    "audit": "run",
    "judge": "results",
    "read": "results",
}


def __getattr__(name: str) -> Any:
    """Loaded on first use: reading an audit needs no torch."""
    if name not in _MODULES:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
