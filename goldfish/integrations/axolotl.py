"""Axolotl. In its configuration file:

plugins: [goldfish.integrations.axolotl.GoldfishPlugin]
goldfish: {k: 4, h: 13, max_kept: 4}
"""

from typing import Any

try:
    from axolotl.integrations.base import BasePlugin  # type: ignore[import-not-found, unused-ignore]
    from pydantic import BaseModel

    from goldfish.rule import Goldfish
    from goldfish.trainer import attach
except ImportError as error:
    # Axolotl only logs an ImportError, and trains without the rule.
    raise RuntimeError(f"the goldfish plugin cannot be loaded: {error}") from error


class GoldfishArgs(BaseModel):  # type: ignore[misc, unused-ignore]
    """The keys that the plugin adds to the configuration; it is refused without them."""

    goldfish: dict[str, Any]


class GoldfishPlugin(BasePlugin):  # type: ignore[misc, unused-ignore]
    """Attaches the rule to Axolotl's trainer and writes the receipt beside the model."""

    def get_input_args(self) -> str:
        return f"{__name__}.GoldfishArgs"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        self.trainer = attach(trainer, Goldfish(**cfg.goldfish))

    def post_train(self, cfg: Any, model: Any) -> None:
        # Axolotl saves the last model itself, without Trainer.save_model.
        self.trainer.save_receipt(cfg.output_dir)
