"""Greedy and beam-search continuations by the model's own `generate`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from goldfish.audit.model import device_of


class Margins(LogitsProcessor):
    """Watches a greedy search: `least` is each row's least (largest logit - second) / max(1,
    |largest|), (B,).
    """

    least: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        now = relative_margin(*scores.topk(2).values.unbind(-1))
        self.least = now if self.least is None else torch.minimum(self.least, now)
        return scores


def relative_margin(largest: Tensor, second: Tensor) -> Tensor:
    """How far the second largest logit is away, in units of the largest (1 for small ones)."""
    return (largest - second) / largest.abs().clamp(min=1)


def continue_greedily(
    model: Any, prefixes: Tensor, tokens: int
) -> tuple[Tensor, Tensor]:
    """The greedy continuation (B, tokens) of prefixes (B, P) and each row's least relative margin
    (B,).

    The checkpoint's generation settings (repetition penalty and the like) are ignored, and an EOS
    does not stop it.
    """
    margins = Margins()
    output = _generate(
        model, prefixes, tokens, logits_processor=LogitsProcessorList([margins])
    )
    assert margins.least is not None
    return output, margins.least


def least_beams(
    model: Any,
    prefix: Sequence[int],
    suffix: Sequence[int],
    ranks: Sequence[int],
    tried: Sequence[int],
) -> int:
    """The least number of beams among `tried` whose search says `suffix` first; 0 if none does.

    ranks: of the suffix's tokens, teacher-forced. Each beam's B * max(2, 1 + n_eos) likeliest
    tokens are all that a search with B beams looks at (`generate`; n_eos is 0 here), so a rank
    beyond them answers without a search.
    """
    ids = torch.tensor([prefix], device=device_of(model))
    for beams in sorted(tried):
        if max(ranks) < 2 * beams and _generate(
            model, ids, len(suffix), num_beams=beams
        )[0].tolist() == list(suffix):
            return beams
    return 0


def _generate(
    model: Any, prefixes: Tensor, tokens: int, num_beams: int = 1, **options: Any
) -> Tensor:
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=tokens, pad_token_id=0, num_beams=num_beams
    )
    attended = torch.ones_like(prefixes)
    # generate() fills what its configuration leaves open from the model's own, so that one is put
    # aside.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        output: Tensor = model.generate(
            prefixes, attention_mask=attended, generation_config=settings, **options
        )
    finally:
        model.generation_config = own
    return output[:, prefixes.shape[1] :]
