"""Trainers and models for which masked labels would be wrong: refused in words when the rule is attached."""

from typing import Any

from transformers import Trainer
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from goldfish.fused import bare_model

SHARDED = (
    "the batch has shift_labels and no labels: rows were sharded (DeepSpeed Ulysses?) before the rule saw "
    "them, but a decision needs the h tokens before. Write the labels first, with premask(dataset, rule) or "
    "`goldfish premask`, and train on them with the plain Trainer"
)


def why_not_this_trainer(trainer: Trainer) -> str:
    """Empty if its batches are documents with labels of their own."""
    for base in type(trainer).__mro__:
        trl = base.__module__.startswith(
            ("trl.", "Unsloth")
        )  # Unsloth writes TRL's classes anew: _UnslothDPOTrainer
        name = base.__name__.removeprefix("_").removeprefix("Unsloth")
        on_policy = name == "GKDTrainer" and getattr(trainer.args, "lmbda", 1) > 0
        text = name in ("SFTTrainer", "GKDTrainer", "BaseTrainer")
        if trl and name.endswith("Trainer") and (on_policy or not text):
            return (
                f"TRL's {name} does not learn the tokens of given documents: it compares answers or generates them. "
                "There are no labels to drop. Train the documents with SFTTrainer and the rule, before or after"
                + (", or set lmbda=0" if on_policy else "")
            )
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    return SHARDED if getattr(parallel, "sp_enabled", False) else ""


def why_not_this_model(model: Any) -> str:
    """Empty if it predicts the next token, as far as transformers knows its loss."""
    model = bare_model(model)
    name, config, loss = (
        type(model).__name__,
        getattr(model, "config", None),
        getattr(model, "loss_function", int),
    )
    advice = "The goldfish loss is for causal language models; pass a compute_loss_func if this one trains like them"
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder: its labels are not the next tokens of its input_ids. {advice}"
    if loss is not ForCausalLMLoss and loss in LOSS_MAPPING.values():
        return f"the loss of {name} is {loss.__name__}, its labels are not the next tokens of its input_ids. {advice}"
    if (
        type(model).__module__.startswith("transformers.") and not model.can_generate()
    ):  # such as BertForPreTraining
        return f"{name} generates no text, its labels are not the next tokens of its input_ids. {advice}"
    return ""
