"""ms-swift: `swift sft --external_plugins rule.py --callbacks goldfish ...`, where rule.py is

from goldfish import Goldfish
from goldfish.integrations.ms_swift import register

register(Goldfish(k=4, h=13, max_kept=4))
"""

from typing import Any

from swift.callbacks import TrainerCallback, callbacks_map  # type: ignore[import-not-found, unused-ignore]

from goldfish.masking import check_rule
from goldfish.rule import Goldfish
from goldfish.trainer import attach


def register(rule: Goldfish, *, fused: bool = False) -> None:
    """Make ms-swift's callback "goldfish" attach a rule to its trainer.

    Arguments as for `goldfish.attach`.
    """
    check_rule(rule)

    # `attach` needs a finished trainer: on_init_end is called at the end of its __init__.
    class Attach(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_init_end(self, *_: Any, **__: Any) -> None:
            attach(self.trainer, rule, fused=fused)

    # The name behind --callbacks.
    callbacks_map["goldfish"] = Attach
