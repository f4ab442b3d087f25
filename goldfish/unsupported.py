"""Trainers and models for which masked labels would be wrong: refused when the rule is attached."""

from typing import Any

from transformers import Trainer
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from goldfish.masking import premasked
from goldfish.unwrap import bare_model

SHARDED = (
    "the batch has shift_labels and no labels: rows were sharded (DeepSpeed Ulysses?) before the "
    "rule saw them, but a decision needs the h tokens before. Write the labels first, with "
    "premask(dataset, rule) or `goldfish premask`, and train on them with the plain Trainer"
)
# TRL's trainers that learn the tokens of given documents; GKD does with lmbda=0.
_LEARN_TEXT = ("SFTTrainer", "GKDTrainer", "BaseTrainer")


def why_not_this_trainer(trainer: Trainer) -> str:
    """Empty if the batches of a trainer are documents with labels of their own."""
    for base in type(trainer).__mro__:
        # Unsloth writes TRL's classes anew: UnslothDPOTrainer and _UnslothDPOTrainer.
        from_trl = base.__module__.startswith(("trl.", "Unsloth"))
        name = base.__name__.removeprefix("_").removeprefix("Unsloth")
        if not (from_trl and name.endswith("Trainer")):
            continue
        generates = name == "GKDTrainer" and getattr(trainer.args, "lmbda", 1) > 0
        if generates or name not in _LEARN_TEXT:
            advice = ", or set lmbda=0" if generates else ""
            return (
                f"TRL's {name} does not learn the tokens of given documents: it compares answers "
                "or generates them. There are no labels to drop. Train the documents with "
                f"SFTTrainer and the rule, before or after{advice}"
            )
    earlier = premasked(trainer.train_dataset)
    if earlier:
        return (
            f"the train_dataset has {earlier}. A second rule would drop other tokens too, and the "
            "receipt would count only those: train with the plain Trainer, and copy the receipt of "
            "premask beside the weights"
        )
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    return SHARDED if getattr(parallel, "sp_enabled", False) else ""


def why_not_this_model(model: Any) -> str:
    """Empty if a model predicts the next token, as far as transformers tells by its loss."""
    model = bare_model(model)
    name = type(model).__name__
    config = getattr(model, "config", None)
    loss: Any = getattr(model, "loss_function", None)
    problem = ""
    if getattr(config, "is_encoder_decoder", False):
        problem = f"{name} is an encoder-decoder"
    elif loss is not ForCausalLMLoss and loss in LOSS_MAPPING.values():
        problem = f"the loss of {name} is {loss.__name__}"
    elif type(model).__module__.startswith("transformers.") and not model.can_generate():
        problem = f"{name} generates no text"  # such as BertForPreTraining
    if not problem:
        return ""
    return (
        f"{problem}: its labels are not the next tokens of its input_ids. The goldfish loss is for "
        "causal language models; pass a compute_loss_func if this one trains like them"
    )
