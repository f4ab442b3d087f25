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
        self.followers: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for ids in documents:
            for place, token in enumerate(ids):
                for length in range(min(place, LONGEST) + 1):
                    self.followers[tuple(ids[place - length : place])][token] += 1

    def distribution(self, context: list[int]) -> NDArray[np.float64]:
        """Probabilities of the next token, (vocabulary,)."""
        p = np.full(self.vocabulary, 1 / self.vocabulary)
        for length in range(min(len(context), LONGEST) + 1):
            seen = self.followers.get(tuple(context[len(context) - length :]))
            if not seen:
                break
            total = seen.total() + len(seen)
            p *= len(seen) / total
            p[list(seen)] += np.fromiter(seen.values(), float) / total
        return p

    def entropies(self, ids: list[int]) -> list[float]:
        """At each position the entropy of the prediction of its token, nats; 0 for the first."""
        result = [0.0]
        for place in range(1, len(ids)):
            p = self.distribution(ids[max(0, place - LONGEST) : place])
            result.append(float(-(p * np.log(p)).sum()))
        return result
