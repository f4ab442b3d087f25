"""Trainers and models for which masked labels would be wrong: refused when the rule is attached."""

from functools import partial
from typing import Any

from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from goldfish.loss import smoothed_loss
from goldfish.masking import premasked
from goldfish.rule import Goldfish
from goldfish.unwrap import bare_model

SHARDED = (
    "the batch has shift_labels and no labels: rows were sharded (DeepSpeed Ulysses?) before the "
    "rule saw them, but a decision needs the h tokens before. Write the labels first, with "
    "premask(dataset, rule) or `goldfish premask`, and train on them with the plain Trainer"
)
# TRL's trainers that learn the tokens of given documents; GKD does with lmbda=0.
_LEARN_TEXT = ("SFTTrainer", "GKDTrainer", "BaseTrainer")
# Where a class that computes a loss from `labels` may come from; Unsloth's modules are UnslothX.
_KNOWN = ("transformers.", "trl.", "Unsloth", "goldfish.")


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
    earlier = premasked(getattr(trainer, "train_dataset", None))
    if earlier:
        return (
            f"the train_dataset has {earlier}. A second rule would drop other tokens too, and the "
            "receipt would count only those: train with the plain Trainer, and copy the receipt of "
            "premask beside the weights"
        )
    # With DeepSpeed Ulysses a process gets a part of each row. Its first h tokens would be decided
    # without the tokens before them.
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    return SHARDED if getattr(parallel, "sp_enabled", False) else ""


def why_not_entropy(trainer: Any, rule: Goldfish) -> str:
    """Empty if the trainer's model can read the data before its first step, as the rule needs."""
    if rule.strategy != "entropy":
        return ""
    dataset = trainer.train_dataset
    is_stream = isinstance(dataset, IterableDataset)
    tensor_parallel = getattr(bare_model(trainer.model), "tp_size", None) or 1
    if dataset is not None and (is_stream or not hasattr(dataset, "__getitem__")):
        problem = "the train_dataset is streaming"
    elif trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or tensor_parallel > 1:
        problem = "the model is sharded (FSDP, DeepSpeed or tensor parallelism)"
    else:
        return ""
    return (
        'strategy="entropy" reads all rows with the whole model before the first step, but '
        f"{problem}. Write the labels first, with premask(dataset, rule, guide=model) or `goldfish "
        "premask --guide`, and train on them with the plain Trainer"
    )


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
    elif (
        type(model).__module__.startswith("transformers.") and not model.can_generate()
    ):
        # BertForPreTraining and the like, which compute their loss without their loss_function.
        problem = f"{name} generates no text"
    if not problem:
        return ""
    return (
        f"{problem}: its labels are not the next tokens of its input_ids. The goldfish loss is for "
        "causal language models; pass a compute_loss_func if this one trains like them"
    )


def labels_are_targets(trainer: Any) -> bool:
    """Whether a trainer is known to take its targets from `labels`, by where its classes come from.

    A trainer or a model of someone else may take them elsewhere, and then masked labels have no
    effect: such a trainer is tried in its first step.
    """
    names = trainer.args.label_names
    if names is not None and "labels" not in names:
        return False
    # Our own label smoothing reads the labels; another function may not.
    loss = trainer.compute_loss_func
    is_ours = isinstance(loss, partial) and loss.func is smoothed_loss
    if loss is not None and not is_ours:
        return False
    # Every class that overrides compute_loss may take its targets elsewhere, and so may the model.
    computes = [each for each in type(trainer).__mro__ if "compute_loss" in vars(each)]
    # FSDP puts a class of torch in front.
    model = type(bare_model(trainer.model))
    models = [
        each for each in model.__mro__ if not each.__module__.startswith("torch.")
    ]
    classes = [*computes, models[0]]
    return all(each.__module__.startswith(_KNOWN) for each in classes)


def predicts_the_first_token(model: Any) -> bool:
    """Whether PEFT puts virtual tokens in front of a row; the last one predicts the first token.

    Prefix tuning and cartridges put theirs into the cache, where they predict nothing.
    """
    while not hasattr(model, "active_peft_config") and hasattr(model, "module"):
        model = model.module
    config: Any = getattr(model, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False):
        return False
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    return kind not in ("PREFIX_TUNING", "CARTRIDGE")
