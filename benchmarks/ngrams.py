"""A trigram model: how well does a guide do that costs nothing next to a neural network?"""

from collections import Counter, defaultdict

import numpy as np
from numpy.typing import NDArray

LONGEST = 2  # tokens of a context


class NGrams:
    """Interpolated n-grams of token ids with Witten-Bell smoothing.

    The longer the context, the fewer places it was seen in. Each length leaves to the shorter one
    a share that grows with the number of different tokens that followed (Chen and Goodman 1999,
    section 2.4); what no context has seen is uniform.
    """

    def __init__(self, documents: list[list[int]], vocabulary: int) -> None:
        self.vocabulary = vocabulary
        # How often each token came after each context.
        self.followers: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for ids in documents:
            for place, token in enumerate(ids):
                for context in contexts(ids, place):
                    self.followers[context][token] += 1

    def distribution(self, ids: list[int], place: int) -> NDArray[np.float64]:
        """Probabilities of the token at that place, (vocabulary,)."""
        p = np.full(self.vocabulary, 1 / self.vocabulary)
        for context in contexts(ids, place):
            seen = self.followers.get(context)
            if not seen:
                break
            total = seen.total() + len(seen)
            counts = np.fromiter(seen.values(), float)
            p *= len(seen) / total
            p[list(seen)] += counts / total
        return p

    def entropies(self, ids: list[int]) -> list[float]:
        """At each position the entropy of the prediction of its token, nats; 0 for the first."""
        result = [0.0]
        for place in range(1, len(ids)):
            p = self.distribution(ids, place)
            surprisal = -np.log(p)
            result.append(float(p @ surprisal))
        return result


def contexts(ids: list[int], place: int) -> list[tuple[int, ...]]:
    """The tokens before a place: none, the last, the last two.

    >>> contexts([5, 6, 7], 2)
    [(), (6,), (5, 6)]
    """
    longest = min(place, LONGEST)
    return [tuple(ids[place - length : place]) for length in range(longest + 1)]
