"""What `goldfish check` found, and how it is said in a terminal."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from shlex import quote

from goldfish.rule import Goldfish
from goldfish.text.exposure import SHOWN_ROWS, Secret, informative_characters
from goldfish.text.passages import SHOWN, Passages
from goldfish.text.printable import counted, plain


@dataclass
class Check:
    """What `check` found. Rows count from 0.

    marked: whether the user marked secrets; if not, `secrets` are words that look like some.
    full: there are more such words than are remembered.
    targets, dropped: tokens. more: tokens that `suggested` drops besides.
    longest: the most targets that are kept one after the other, and the number of the row.
    missing: (row, value) of marked values that do not occur in the text of their row, the first
        SHOWN of missing_count.
    suggested: the rule with the secrets' expression; None if that is no help.
    """

    rule: Goldfish
    marked: bool
    column: str = ""
    suggested: Goldfish | None = None
    documents: int = 0
    targets: int = 0
    dropped: int = 0
    more: int = 0
    longest: tuple[int, int] = (0, 0)
    missing: list[tuple[int, str]] = field(default_factory=list)
    missing_count: int = 0
    full: bool = False
    secrets: dict[str, Secret] = field(default_factory=dict)
    passages: Passages = field(default_factory=Passages)

    def exposed(self, tokens: int = 0, rule: int = 0) -> list[str]:
        """The secrets with exactly so many informative tokens that are dropped in every place.

        Args:
            rule: 0, the rule itself; 1, with the secrets' tokens dropped as `suggested`.
        """
        names = []
        for name, secret in self.secrets.items():
            protected = secret.protected(self._informative[name], rule)
            if len(protected) == tokens:
                names.append(name)
        return names

    @cached_property
    def _informative(self) -> dict[str, int]:
        """Needs all secrets: asked for after the last batch only."""
        return informative_characters(self.secrets)

    def exit_code(self) -> int:
        """1: a marked secret can be learned whole; 3: none of the marked secrets occurs; else 0."""
        if not self.marked:
            return 0
        if not self.secrets:
            return 3
        return 1 if self.exposed() else 0

    def lines(self) -> Iterator[str]:
        """The result for a terminal; the last line is the conclusion."""
        share = self.dropped / max(1, self.targets)
        documents = counted(self.documents, "document")
        targets = counted(self.targets, "target")
        rule = self.rule.short()
        yield f"{documents}, {targets}, {share:.1%} dropped ({rule})"
        run, row = self.longest
        yield f"longest run of kept tokens: {run:,} (row {row})"
        yield from self._lines_on_passages()
        yield from self._lines_on_secrets()
        yield self.conclusion()

    def _lines_on_passages(self) -> Iterator[str]:
        found = self.passages
        if found.one_in > 1:
            yield f"one in {found.one_in:,} passages is compared:"
        recurring = found.recurring / max(1, found.total)
        differing = found.differing / max(1, found.recurring)
        yield (
            f"{recurring:.1%} of passages occur in an earlier row, "
            f"{differing:.1%} of these with other dropped words"
        )
        repeated = f"{found.repeated_count:,}"
        yield f"rows with at least half of their passages in one earlier row: {repeated}"
        for row, first, share in found.repeated:
            yield f"    row {row}: {share:.0%} in row {first}"

    def _lines_on_secrets(self) -> Iterator[str]:
        found = counted(len(self.secrets), "secret")
        if not self.marked:
            likely = counted(len(self.secrets), "likely secret")
            found = f"{likely} (none are marked)"
            if self.full:
                found = f"the first {likely}; there are more (none are marked)"
        yield f"{found}; a token is informative if it differs between secrets"
        yield from self._listed(
            "no informative token dropped in every place", self.exposed()
        )
        yield from self._listed("only one", self.exposed(tokens=1))
        bits = self.bits()
        if bits:
            yield (
                "  bits of the dropped tokens, by the model before training "
                "(an estimate, not a lower bound):"
            )
            weakest_first = sorted(bits, key=bits.__getitem__)
            for name in weakest_first[:SHOWN]:
                yield f"    {plain(name)}: {bits[name]:.1f}"
        if self.missing:
            yield f"{self._missing_values()}:"
            for row, value in self.missing:
                yield f"    {plain(value)} (row {row})"

    def _listed(self, what: str, names: list[str]) -> Iterator[str]:
        """How many secrets they are, and where the first of them occur."""
        yield f"  {what}: {len(names):,}"
        for name in names[:SHOWN]:
            secret = self.secrets[name]
            numbers = [str(row) for row in secret.rows]
            rows = ", ".join(numbers)
            if secret.count > SHOWN_ROWS:
                rows += ", ..."
            # Not all rows of a secret are remembered, and it may have several places in one.
            noun = "rows"
            if len(secret.rows) == 1:
                noun = "row"
            yield f"    {plain(name)} ({noun} {rows})"
        rest = len(names) - SHOWN
        if rest > 0:
            yield f"    and {rest:,} more"

    def _missing_values(self) -> str:
        values = counted(self.missing_count, "marked value")
        if self.missing_count == 1:
            return f"{values} does not occur in the text of its row"
        return f"{values} do not occur in the text of their rows"

    def bits(self) -> dict[str, float]:
        """-log2 p under the given model of what is dropped of each secret; empty without a model.

        An estimate of what somebody must guess who knows the rest of the secret. It is no lower
        bound: the trained model has learned from other secrets what a secret looks like (measured:
        docs/results-log.md, "Uncertain tokens and marked secrets"). The place where guessing is
        easiest counts, of the first 8 places.
        """
        result = {}
        for name, secret in self.secrets.items():
            bits = secret.bits_to_guess(self._informative[name])
            if bits is not None:
                result[name] = bits
        return result

    def conclusion(self) -> str:
        """One sentence and one rule to copy; another sentence if marked values were not found."""
        conclusion = self._conclusion_on_secrets()
        if self.missing_count:
            conclusion += f" {self._missing_values()}: look for other spellings."
        return conclusion

    def _conclusion_on_secrets(self) -> str:
        if not self.secrets:
            if self.marked:
                return (
                    "No secret was found in the targets: check the regular expression, or the "
                    "column's name."
                )
            return "Nothing looks like a secret. Mark secrets with --secrets or --secret-column."
        total = counted(len(self.secrets), "secret" if self.marked else "likely secret")
        exposed = f"{len(self.exposed()):,} of {total} can be learned whole."
        if not self.marked:
            return f"{exposed} Mark the real ones with --secrets or --secret-column."
        if not self.exposed():
            return f"{exposed} Each has an informative token that is dropped in every place."
        return f"{exposed} {self._advice()}"

    def _advice(self) -> str:
        """What drops the secrets that can be learned, with its cost."""
        left = len(self.exposed(rule=1))
        remaining = "none left"
        if left:
            # Such as those of another wording, which the expression does not reach.
            remaining = f"{left:,} left"
        targets = max(1, self.targets)
        share = self.more / targets
        cost = f"{share:.1%} more tokens dropped, {remaining}."
        if self.suggested is not None:
            return f"Train with {self.suggested}: {cost}"
        if self.column:
            command = f"goldfish premask --secret-column {quote(self.column)}"
            return f"Write the labels with: {command}: {cost}"
        return "Replace them in the data, or give them in a --secret-column."
