"""Tokens of secrets in the text of a document: what an expression matches, or literal strings.

On the CPU: `re` needs the text, which is put together from the ids.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Span = tuple[int, int]  # where something begins and ends in a text, in characters
Find = Callable[[str], Iterable[Span]]
# Characters by which places of literals are looked up.
_PREFIX = 4


@cache
def compiled(pattern: str) -> re.Pattern[str]:
    """The expression; ValueError if it is none, or if it matches everywhere."""
    try:
        expression = re.compile(pattern)
    # Flags that exclude each other, a repetition beyond 2**32, a thousand open parentheses.
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"secrets={pattern!r} is not a regular expression: {error}"
        ) from error
    if expression.search("") is not None:
        raise ValueError(
            f"secrets={pattern!r} matches an empty text; "
            "give an expression that matches secrets only"
        )
    return expression


def spans(expression: re.Pattern[str], text: str) -> Iterator[Span]:
    r"""Where the secrets of a text begin and end.

    A secret is the first group that has a part in a match, or the whole match if none has.

    >>> list(spans(compiled(r"code is (\d+)|PIN: (\d+)|key \w+"), "code is 4711, PIN: 12, key a7"))
    [(8, 12), (19, 21), (23, 29)]
    """
    for match in expression.finditer(text):
        # regs[0] is the span of the match, regs[i] that of group i; (-1, -1) if it has no part.
        # The example's second match has ((14, 21), (-1, -1), (19, 21)).
        whole, *groups = match.regs
        begin, end = next((span for span in groups if span[0] >= 0), whole)
        if begin < end:
            yield begin, end


def any_of(literals: Iterable[str]) -> str:
    """An expression that matches each of some strings, and longer ones rather than shorter ones.

    Strings that begin alike share that beginning, so the cost of a search hardly depends on how
    many there are. It is made from a tree with a branch for each character.

    >>> any_of(["4711", "4712", "47", "x.y"])
    '(?:47(?:1(?:1|2))?|x\\\\.y)'
    """
    trie: dict[str, Any] = {}
    for literal in literals:
        node = trie
        for character in literal:
            node = node.setdefault(character, {})
        node[""] = {}  # a string ends here
    return _expression_of(trie)


def _expression_of(node: dict[str, Any]) -> str:
    prefix = ""
    # A loop where the tree does not branch: recursion would be as deep as the strings are long.
    while len(node) == 1:
        character, node = next(iter(node.items()))
        prefix += re.escape(character)
    branches = []
    for character, child in node.items():
        if character:
            branches.append(re.escape(character) + _expression_of(child))
    if not branches:
        return prefix
    alternatives = "|".join(branches)
    # A shorter string may end here; the longer ones are tried first.
    may_end = "?" if "" in node else ""
    return f"{prefix}(?:{alternatives}){may_end}"


class Literals:
    """Finds every place of many strings in a text, in time that hardly depends on their number.

    An expression finds the first four characters of any of them; what follows is looked up by its
    length. Places may overlap.

    >>> list(Literals(["ab12", "12cd"])("so ab12cd"))
    [(3, 7), (5, 9)]
    """

    def __init__(self, literals: Iterable[str]) -> None:
        self.literals = set(literals)
        # For each beginning, the lengths of the literals that have it.
        lengths: dict[str, set[int]] = {}
        for literal in self.literals:
            prefix = literal[:_PREFIX]
            lengths.setdefault(prefix, set()).add(len(literal))
        self._expression = re.compile(any_of(sorted(lengths)))
        # The expression matches the longest prefix there is. With "17" and "170052", a place of
        # "1700" may also be one of "17".
        self._lengths: dict[str, list[int]] = {}
        for prefix in lengths:
            every: set[int] = set()
            for size in range(1, len(prefix) + 1):
                shorter = prefix[:size]
                every |= lengths.get(shorter, set())
            self._lengths[prefix] = sorted(every)

    def __reduce__(self) -> Any:
        # In order: datasets names its cache by what is pickled, and a set has none.
        return Literals, (sorted(self.literals),)

    def __call__(self, text: str) -> Iterator[Span]:
        if not self.literals:
            return
        match = self._expression.search(text)
        while match:
            begin = match.start()
            for length in self._lengths[match.group()]:
                end = begin + length
                if text[begin:end] in self.literals:
                    yield begin, end
            # One character on, and not behind the match: places may overlap.
            match = self._expression.search(text, begin + 1)


def secret_tokens(
    find: Find, entries: list[bytes], starts: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Which tokens of a row overlap a secret of their document.

    Args:
        find: the places of secrets in the text of a document.
        entries: the bytes of each token of the row, without padding.
        starts: (T,), whether a token is the first of a document; the first token always is.

    Returns:
        bool (T,).
    """
    result = np.zeros(len(entries), dtype=bool)
    bounds = [*np.flatnonzero(starts).tolist(), len(entries)]
    for first, end in pairwise(bounds):
        document = entries[first:end]
        result[first:end] = _of_document(find, document)
    return result


def text_of(entries: list[bytes]) -> str:
    """The text of a document, given the bytes of each token.

    A byte that is part of no character is decoded as a character of its own (U+DC80 to U+DCFF), so
    places in the text can be counted in bytes again.
    """
    return b"".join(entries).decode("utf-8", "surrogateescape")


def _of_document(find: Find, entries: list[bytes]) -> NDArray[np.bool_]:
    """Which tokens of a document overlap a secret, given the bytes of each token."""
    result = np.zeros(len(entries), dtype=bool)
    text = text_of(entries)
    found = list(find(text))
    if not found:
        return result
    # From characters to bytes, and from bytes to tokens. Only for documents with a secret. For the
    # tokens b"PIN ", b"47", b"11" and the secret 4711: byte_of is the identity, token_ends are
    # [4, 6, 8], and the secret's bytes 4 to 8 are those of the tokens 1 and 2.
    byte_of = _byte_offsets(text)
    token_ends = np.cumsum([len(entry) for entry in entries])
    for begin, end in found:
        # From the token with the secret's first byte to the token with its last.
        first = np.searchsorted(token_ends, byte_of[begin], side="right")
        last = np.searchsorted(token_ends, byte_of[end], side="left")
        result[first : last + 1] = True
    return result


def _byte_offsets(text: str) -> NDArray[np.int64]:
    """The place of each character, and of the end, in UTF-8 bytes.

    >>> _byte_offsets("aé€").tolist()
    [0, 1, 3, 6]
    """
    code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    sizes = np.ones(len(text), dtype=np.int64)
    sizes += code_points >= 0x80
    sizes += code_points >= 0x800
    sizes += code_points >= 0x10000
    # A byte that is part of no character, see `text_of`.
    is_single_byte = (code_points >= 0xDC80) & (code_points <= 0xDCFF)
    sizes[is_single_byte] = 1
    return np.concatenate([[0], np.cumsum(sizes)])
