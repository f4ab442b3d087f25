"""Questions that an audit may ask besides whether texts are recited. Each has a file of its own.

ask: does a text come out when it is asked for? secrets: did a marked secret come out?
membership: does the model show which texts it was trained on? proof: was the claimed rule used?
sanity: does the model work at all?

Each file makes the figures of its question from the records, and its answer from the figures.
"""

from typing import NamedTuple

from goldfish.text.printable import counted

PASS = "PASS"
FAIL = "FAIL"
INCONCLUSIVE = "INCONCLUSIVE"
MOST_UNASKED = (
    0.05  # of the members, or of their secrets; if more were not asked, nothing passes
)


class Answer(NamedTuple):
    """The answer to a question: PASS, FAIL or INCONCLUSIVE, why, and what would decide it."""

    outcome: str
    why: str
    needs: str | None = None


def needed(documents: int | None) -> str:
    """What would decide a question: so many documents, or None if no number would."""
    if documents is None:
        return "at this rate more documents would not decide it"
    count = counted(documents, "document")
    return f"at this rate about {count} would be needed to decide"


def withholds_pass(unasked: int, total: int) -> bool:
    """Whether so many were not asked, of the members or of their secrets, that nothing passes."""
    return unasked > MOST_UNASKED * total
