"""Goldfish loss: train language models that do not recite their training data.

`import goldfish` needs only torch; each public name loads its module on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOMES = {
    "DropCounts": "receipt",
    "Goldfish": "rule",
    "GoldfishCollator": "masking",
    "GoldfishLoss": "loss",
    "GoldfishMixin": "trainer",
    "GoldfishTrainer": "trainer",
    "attach": "trainer",
    "fuse_head": "fused",
    "linear_cross_entropy": "linear",
    "mask_labels": "masking",
    "premask": "premasking",
}
__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from goldfish.fused import fuse_head as fuse_head
    from goldfish.linear import linear_cross_entropy as linear_cross_entropy
    from goldfish.loss import GoldfishLoss as GoldfishLoss
    from goldfish.masking import GoldfishCollator as GoldfishCollator
    from goldfish.masking import mask_labels as mask_labels
    from goldfish.premasking import premask as premask
    from goldfish.receipt import DropCounts as DropCounts
    from goldfish.rule import Goldfish as Goldfish
    from goldfish.trainer import GoldfishMixin as GoldfishMixin
    from goldfish.trainer import GoldfishTrainer as GoldfishTrainer
    from goldfish.trainer import attach as attach


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(
            f"module 'goldfish' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}"
        )
    return getattr(import_module(f"goldfish.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
