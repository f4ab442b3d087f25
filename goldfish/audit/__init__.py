"""Memorization audits: can this checkpoint be made to recite these texts?

windows (prefix/suffix) -> score (the only file that runs a model) -> extraction -> stats -> run
"""

from goldfish.audit.run import audit

__all__ = ["audit"]
