"""Memorization audits: can this checkpoint be made to recite these texts?

rows -> windows (prefix and suffix) -> score (what a model makes of them) -> records
records -> figures (and their intervals) -> verdict -> results, render, compare

What an audit may ask besides recitation is in `questions`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from goldfish.audit.intervals import Figure
    from goldfish.audit.results import Audit, judge, read
    from goldfish.audit.run import audit
    from goldfish.integrations.audit_callback import AuditCallback

__all__ = ["Audit", "AuditCallback", "Figure", "audit", "judge", "read"]
_MODULES = {
    "Audit": "goldfish.audit.results",
    "AuditCallback": "goldfish.integrations.audit_callback",
    "Figure": "goldfish.audit.intervals",
    "audit": "goldfish.audit.run",
    "judge": "goldfish.audit.results",
    "read": "goldfish.audit.results",
}


def __getattr__(name: str) -> Any:
    """Loaded on first use: reading an audit needs no torch."""
    if name not in _MODULES:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    return getattr(import_module(_MODULES[name]), name)
