"""The goldfish drop rule, as a specification that runs: plain integers and loops, no imports.

`dropped(ids, ...)` says for every token of one row whether it is *dropped*: seen as context, never a target of the
next-token loss. `goldfish.rule` computes the same thing fast; where the two differ, this file is right.

All arithmetic is on unsigned 64-bit integers, ids too (modulo 2**64). Sources: Hans et al. 2024, "Be like a Goldfish,
Don't Memorize!", section 3 (the method); Steele et al. 2014 (the splitmix64 finaliser).
"""

WORD = 2**64 - 1  # & WORD is "modulo 2**64"
MULTIPLIER = 0xD1342543DE82EF95  # odd, so it has an inverse modulo 2**64
TABLE_SIZE = 1_000_003  # of the reference implementation
LETTERS = 5  # that count as a word, in strategies "letters" and "text"


def mix(x: int) -> int:
    """splitmix64: a bijection of 64-bit integers whose every output bit depends on every input bit."""
    z = (x + 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def threshold(k: float) -> int:
    """ceil(2**32 / k), k taken exactly: a 32-bit number u is below it iff u * k < 2**32, which is one time in k."""
    numerator, denominator = k.as_integer_ratio()
    return -((-(denominator << 32)) // numerator)


def natural_threshold(k: float, max_kept: int) -> int:
    """The least u > 0 with q / (1 - (1 - q)**(max_kept + 1)) >= 1 / k for q = u / 2**32, exactly: where natural drops
    have the rate q, and every (max_kept + 1)-th target after one is dropped too, one token in k is dropped."""
    (numerator, denominator), n = k.as_integer_ratio(), max_kept + 1
    least, most = 1, 2**32
    while least < most:
        u = (least + most) // 2
        enough = (u * numerator) << 32 * max_kept >= denominator * (
            (1 << 32 * n) - (2**32 - u) ** n
        )
        least, most = (least, u) if enough else (u + 1, most)
    return least


def key(context: list[int], seed: int = 0) -> int:
    """The 64-bit key of a context (a list of ids, oldest first): order, length and seed all count."""
    state = 0
    for token in context:
        state = (state * MULTIPLIER + mix(token & WORD)) & WORD
    return mix(
        (state + len(context) + mix(mix(seed))) & WORD
    )  # mixed twice: no token's number is a seed's


def letters_before(tokens: list[bytes], fold: list[str], whole_words: bool) -> str:
    """The letters before the last token, or before its word; `tokens`: the bytes of a document's tokens up to it.
    The normal form of a text is that of its characters; words end at its spaces. A token adds the normal forms of the
    characters that it completes. It belongs to the word open before it, or to the next if it begins with a space.
    """
    before, after = (
        b"".join(part).decode("utf-8", "ignore").translate(fold) for part in (tokens[:-1], tokens)
    )
    if whole_words and not after[len(before) :].startswith(" "):
        before = before[: before.rfind(" ") + 1]  # without the open word
    return before.replace(" ", "")


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
    head: str = "short",
    exempt: tuple[int, ...] = (),
    document_end: int | None = None,
    row: int = 0,
    draw: int = 0,
    table: list[bool] | None = None,
    vocabulary: list[bytes] | None = None,
    fold: list[str] | None = None,
    max_kept: int | None = None,
) -> list[bool]:
    """True where ids[i] is dropped; one row, any length.

    position_ids: 0 starts a document. attention_mask: 0 removes a token before anything else happens.
    head: "keep" never drops where the context is shorter than h ids or 5 h letters (`Goldfish(opening=...)`).
    row, draw: for "random", the number of the row in its batch and of the draw. table: for "reference", its decisions.
    vocabulary, fold: for "letters" and "text", the bytes of each id and the normal form of each code point.
    max_kept: for "hash" and "letters", at most so many targets are kept in a row; exempt ids do not count.
    """
    if strategy == "reference":  # the original, defects included: no documents, no padding
        return [i >= h and table[_reference_key(ids[i - h + 1 : i + 1])] for i in range(len(ids))]  # type: ignore[index]

    if attention_mask is not None:  # decide as if unattended tokens were not there
        attended = [i for i, m in enumerate(attention_mask) if m]
        positions = None if position_ids is None else [position_ids[i] for i in attended]
        decided = dropped(
            [ids[i] for i in attended],
            positions,
            k=k,
            h=h,
            strategy=strategy,
            seed=seed,
            window=window,
            head=head,
            exempt=exempt,
            document_end=document_end,
            row=row,
            draw=draw,
            vocabulary=vocabulary,
            fold=fold,
            max_kept=max_kept,
        )
        by_place = dict(zip(attended, decided, strict=True))
        return [by_place.get(i, False) for i in range(len(ids))]

    result, start, since = (
        [],
        0,
        0,
    )  # since: targets since the last natural drop or the document's start
    limit = threshold(k) if max_kept is None else natural_threshold(k, max_kept)
    entry = dict(enumerate(vocabulary or []))  # an id outside the vocabulary is a space
    for i, token in enumerate(ids):
        if (position_ids is not None and position_ids[i] == 0) or (
            i > 0 and ids[i - 1] == document_end
        ):
            start = (
                i  # of the document that token i belongs to; a row's first token always starts one
            )
        offset, n = i - start, min(h, i - start)  # n: the length of the context
        if strategy == "static":
            drop = (offset * limit) % 2**32 < limit
        elif strategy == "random":
            drop = mix((mix((draw + mix(seed)) & WORD) + row * 2**32 + i) & WORD) >> 32 < limit
        elif strategy in ("letters", "text"):  # the context is 5 letters for each of h words
            tokens = [entry.get(token, b" ") for token in ids[start : i + 1]]
            letters = letters_before(tokens, fold, strategy == "text")[-LETTERS * h :]  # type: ignore[arg-type]
            drop = key(list(map(ord, letters)), seed) >> 32 < limit and letters != ""
            drop = drop and (len(letters) == LETTERS * h or head == "short")
        else:
            context = ids[i - n : i] if window == "preceding" else ids[i - n + 1 : i + 1]
            drop = key(context, seed) >> 32 < limit and (n == h or head == "short")
        target = offset > 0 and token not in exempt
        since = 0 if offset == 0 or (drop and target) else since + target
        result.append(target and (drop if max_kept is None else since % (max_kept + 1) == 0))
    return result


def _reference_key(targets: list[int]) -> int:
    """The product of h ids as a signed 64-bit integer that wraps, modulo the size of the table."""
    product = 1
    for token in targets:
        product = (product * token) & WORD
    return (product - 2**64 if product >= 2**63 else product) % TABLE_SIZE
