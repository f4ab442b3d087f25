"""The goldfish drop rule as a specification that runs: plain integers and loops.

`dropped(ids, ...)` decides for every token of one row whether it is *dropped*: seen as context,
never a target of the next-token loss. `goldfish.rule` computes the same thing fast; where the two
differ, this file is right.

All arithmetic is on unsigned 64-bit integers, ids included (modulo 2**64). Sources: Hans et al.
2024, "Be like a Goldfish, Don't Memorize!", section 3 (the method); Steele et al. 2014 (the
splitmix64 finaliser).
"""

import re

WORD = 2**64 - 1  # & WORD is "modulo 2**64"
# Odd, so it has an inverse modulo 2**64, which `hashing.prefix_hashes` needs. From Steele and Vigna
# 2021, "Computationally easy, spectrally good multipliers".
MULTIPLIER = 0xD1342543DE82EF95
TABLE_SIZE = 1_000_003  # of the reference implementation
LETTERS = 5  # letters that count as a word, for strategy "letters"


def mix(x: int) -> int:
    """splitmix64: a bijection in which every output bit depends on every input bit.

    >>> hex(mix(0))
    '0xe220a8397b1dcdaf'
    """
    z = (x + 0x9E3779B97F4A7C15) & WORD
    z = z ^ (z >> 30)
    z = (z * 0xBF58476D1CE4E5B9) & WORD
    z = z ^ (z >> 27)
    z = (z * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def threshold(k: float) -> int:
    """ceil(2**32 / k), with k taken exactly.

    A 32-bit number u is below it iff u * k < 2**32, which is true for one number in k.

    >>> threshold(4) == 2**30
    True
    """
    numerator, denominator = k.as_integer_ratio()
    # -(-a // b) is a / b, rounded up: // rounds down.
    return -(-(denominator << 32) // numerator)


def natural_threshold(k: float, max_kept: int) -> int:
    """The threshold of natural drops under `max_kept`.

    If natural drops have the rate q, and every (max_kept + 1)-th target after one is dropped too,
    then the mean distance from one drop to the next is (1 - (1 - q)**(max_kept + 1)) / q. This is
    the least u > 0 for which it is at most k, with q = u / 2**32, so that one token in k is
    dropped. Found by bisection in exact integers.

    >>> round(natural_threshold(4, 4) / 2**32, 4)  # instead of 1/4
    0.1118
    """
    numerator, denominator = k.as_integer_ratio()
    n = max_kept + 1
    one = 2 ** (32 * n)
    # With u = 2**32 every target is dropped, and the mean distance is 1, less than any k. The mean
    # distance falls as u rises, so there is one place to find.
    least, most = 1, 2**32
    while least < most:
        u = (least + most) // 2
        # k * q >= 1 - (1 - q)**n, with both sides times 2**(32 n) and the denominator of k.
        left = numerator * u * 2 ** (32 * max_kept)
        right = denominator * (one - (2**32 - u) ** n)
        if left >= right:
            most = u
        else:
            least = u + 1
    return least


def key(context: list[int], seed: int = 0) -> int:
    """The 64-bit key of a context (ids, oldest first): order, length and seed all count."""
    state = 0
    for token in context:
        state = (state * MULTIPLIER + mix(token & WORD)) & WORD
    # The length tells [0] from [0, 0]. The seed is mixed twice, because mixed once it would be
    # what a token of the same number adds.
    seed_term = mix(mix(seed))
    return mix((state + len(context) + seed_term) & WORD)


def hits(x: int, limit: int) -> bool:
    """Whether the top 32 bits of a key are below a threshold."""
    return x >> 32 < limit


def letters_of(tokens: list[bytes], fold: list[str]) -> str:
    """The letters and digits of a document that begins with these tokens.

    Args:
        tokens: the bytes of each token. A character that they cut counts once it is complete.
        fold: the normal form of each code point (`vocabulary.characters`).
    """
    text = b"".join(tokens).decode("utf-8", "ignore")
    return text.translate(fold)


def documents(
    ids: list[int],
    position_ids: list[int] | None,
    attention_mask: list[int] | None,
    document_end: int | None,
) -> list[list[int]]:
    """The places of each document's tokens. Tokens whose attention_mask is 0 are in none.

    >>> documents([7, 8, 9, 7, 8], [0, 1, 2, 0, 1], None, None)
    [[0, 1, 2], [3, 4]]
    >>> documents([7, 8, 9, 7, 8], None, [1, 1, 2, 2, 0], None)
    [[0, 1], [2, 3]]
    """
    if attention_mask is None:
        attention_mask = [1] * len(ids)
    if position_ids is None:
        position_ids = list(range(len(ids)))
    attended = [i for i in range(len(ids)) if attention_mask[i] != 0]
    # 0 as a rule, but some frameworks count from 1 or 2.
    least = min((position_ids[i] for i in attended), default=0)
    result: list[list[int]] = []
    for number, i in enumerate(attended):
        # The attended token before it. For the first one this is the last, and does not count.
        before = attended[number - 1]
        starts = (
            number == 0
            or ids[before] == document_end
            or attention_mask[i] != attention_mask[before]
            or position_ids[i] == least
            or position_ids[i] < position_ids[before]
        )
        if starts:
            result.append([])
        result[-1].append(i)
    return result


def most_uncertain(places: list[int], entropies: list[float], window: int) -> set[int]:
    """The places whose entropy is the largest of some `window` consecutive places.

    Of equal entropies the first is the largest. Fewer places than a window are one window.

    >>> sorted(most_uncertain([1, 2, 3, 5], [0, 3, 1, 2, 9, 5], window=3))
    [1, 5]
    """
    chosen: set[int] = set()
    if not places:
        return chosen
    width = min(window, len(places))
    for start in range(len(places) - width + 1):
        candidates = places[start : start + width]
        chosen.add(max(candidates, key=lambda i: entropies[i]))
    return chosen


def secret_tokens(tokens: list[bytes], secrets: str) -> list[bool]:
    r"""Which tokens of a document overlap a secret.

    A secret is the first group that has a part in a match, or the whole match if none has.

    >>> secret_tokens([b"the code", b" is", b" 47", b"11", b"!"], r"code is (\d+)")
    [False, False, True, True, False]
    """
    pattern = re.compile(secrets)
    text = b"".join(tokens).decode("utf-8", "surrogateescape")
    result = [False] * len(tokens)
    for match in pattern.finditer(text):
        group = 0  # the whole match
        for i in range(pattern.groups, 0, -1):
            if match.group(i) is not None:
                group = i
        begin, end = match.span(group)
        if begin == end:
            continue
        # Tokens are counted in bytes, so the places of the secret are too. For the tokens
        # b"a", b"\xc3", b"\xa9" and the secret "é", from character 1 to 2: first_byte is 1 and
        # last_byte 2, so the second and the third token overlap it.
        first_byte = len(text[:begin].encode("utf-8", "surrogateescape"))
        last_byte = len(text[:end].encode("utf-8", "surrogateescape")) - 1
        place = 0  # of the token's first byte
        for i, token in enumerate(tokens):
            end_of_token = place + len(token)
            if place <= last_byte and first_byte < end_of_token:
                result[i] = True
            place = end_of_token
    return result


def dropped(
    ids: list[int],
    position_ids: list[int] | None = None,
    attention_mask: list[int] | None = None,
    *,
    k: float = 4,
    h: int = 13,
    strategy: str = "hash",
    seed: int = 0,
    window: str = "preceding",
    opening: str = "short",
    exempt: tuple[int, ...] = (),
    document_end: int | None = None,
    max_kept: int | None = None,
    secrets: str | None = None,
    row: int = 0,
    draw: int = 0,
    table: list[bool] | None = None,
    vocabulary: list[bytes] | None = None,
    fold: list[str] | None = None,
    entropies: list[float] | None = None,
    targets: list[bool] | None = None,
) -> list[bool]:
    """True where ids[i] is dropped; one row, any length.

    Args:
        position_ids: a document starts where a position is the least of the row, or less than the
            one before.
        attention_mask: 0 removes a token before anything else happens; other numbers are those of
            documents, which start where the number changes.
        opening: "keep" never drops where the context is shorter than h ids or 5 h letters.
        exempt: ids that are never dropped.
        document_end: an id after which a document starts.
        max_kept: for "hash" and "letters", at most so many targets are kept in a row; exempt ids
            do not count.
        row, draw: for "random", the numbers of the row in its batch, and of the draw.
        table: for "reference", its decisions.
        secrets: a regular expression; every token that overlaps a match in the text of its document
            is dropped, whatever the other arguments.
        vocabulary, fold: for "letters" and secrets, the bytes of each id, and the normal form of
            each code point. An id outside the vocabulary is a space.
        entropies: for "entropy", of each token the entropy of the prediction that the guide makes
            from the tokens before it in its document. That of a document's first token is not read.
        targets: for "entropy", whether a token has a label; by default all have.
    """
    if strategy == "reference":
        return _reference(ids, h, table)

    limit = threshold(k) if max_kept is None else natural_threshold(k, max_kept)
    bytes_of = dict(enumerate(vocabulary or []))
    result = [False] * len(ids)
    attended = 0  # tokens of the row before the document
    for places in documents(ids, position_ids, attention_mask, document_end):
        document = [ids[i] for i in places]
        tokens = [bytes_of.get(token, b" ") for token in document]
        # Never a document's first token.
        offsets = [o for o in range(1, len(document)) if document[o] not in exempt]
        uncertain = _uncertain([places[o] for o in offsets], k, entropies, targets)
        since = 0  # targets since the last natural drop, or since the document's start
        for offset in offsets:
            if strategy == "static":
                # offset * limit / 2**32 passes a whole number.
                drop = (offset * limit) % 2**32 < limit
            elif strategy == "random":
                drawn = mix((draw + mix(seed)) & WORD)
                number = row * 2**32 + attended + offset
                drop = hits(mix((drawn + number) & WORD), limit)
            elif strategy == "entropy":
                drop = places[offset] in uncertain
            elif strategy == "letters":
                assert fold is not None
                letters = letters_of(tokens[:offset], fold)[-LETTERS * h :]
                drop = letters != "" and hits(key(list(map(ord, letters)), seed), limit)
                drop = drop and (len(letters) == LETTERS * h or opening == "short")
            else:
                n = min(h, offset)
                end = offset if window == "preceding" else offset + 1
                drop = hits(key(document[end - n : end], seed), limit)
                drop = drop and (n == h or opening == "short")

            if max_kept is not None:
                # What was decided so far is a natural drop. For max_kept = 2, with D for those:
                #     natural drops   .  .  D  .  .  .  .
                #     since           1  2  0  1  2  3  4
                #     dropped         .  .  D  .  .  D  .
                since = 0 if drop else since + 1
                drop = since % (max_kept + 1) == 0
            result[places[offset]] = drop

        if secrets is not None:
            # On top of the rule, and of its exceptions: a secret may be a document's first token.
            for place, overlap in zip(
                places, secret_tokens(tokens, secrets), strict=True
            ):
                result[place] = result[place] or overlap
        attended += len(document)
    return result


def _uncertain(
    places: list[int],
    k: float,
    entropies: list[float] | None,
    targets: list[bool] | None,
) -> set[int]:
    """Strategy "entropy": of a document's candidates, those that are dropped."""
    if entropies is None:
        return set()
    labelled = [i for i in places if targets is None or targets[i]]
    return most_uncertain(labelled, entropies, int(2 * k) - 1)


def _reference(ids: list[int], h: int, table: list[bool] | None) -> list[bool]:
    """Strategy "reference": the authors' code, defects included.

    It knows neither documents nor padding, and its window ends with the target itself.
    """
    assert table is not None
    result = [False] * len(ids)
    for i in range(h, len(ids)):
        result[i] = table[_reference_key(ids[i - h + 1 : i + 1])]
    return result


def _reference_key(window: list[int]) -> int:
    """The product of h ids as a signed 64-bit integer that wraps, modulo the table's size."""
    product = 1
    for token in window:
        product = (product * token) & WORD
    if product >= 2**63:  # as a signed number, whose remainder is another
        product -= 2**64
    return product % TABLE_SIZE
