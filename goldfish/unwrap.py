"""What a model is and takes, whatever training has wrapped around it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Names that configurations have for the length of the context.
_CONTEXTS = (
    "max_position_embeddings",
    "max_seq_len",
    "max_sequence_length",
    "max_seq_length",
    "n_positions",
    "n_ctx",
)


def bare_model(model: Any) -> Any:
    """The model inside torch.compile, DDP, FSDP, DeepSpeed and PEFT; `model` itself if it is bare.

    >>> import torch
    >>> inner = torch.nn.Linear(2, 2)
    >>> outer = torch.nn.DataParallel(inner)
    >>> bare_model(outer) is bare_model(inner) is inner
    True
    """
    while True:
        submodules = getattr(model, "_modules", {})
        # DeepSpeed's engine passes on the attributes of its module, so its class is asked.
        is_language_model = hasattr(type(model), "get_output_embeddings")
        if "_orig_mod" in submodules:  # torch.compile
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
        elif "module" in submodules and not is_language_model:  # DDP, FSDP, DeepSpeed
            model = model.module
        else:
            return model


def context_of(config: Any) -> int | None:
    """How many tokens a model takes at most, where its configuration says so."""
    config = config.get_text_config()
    for name in _CONTEXTS:
        if length := getattr(config, name, None):
            return int(length)
    return None


def require_vocabulary(model: Any, ids: Tensor) -> None:
    """ValueError if a model has no entry for an id: its tokenizer is another one."""
    size = bare_model(model).config.get_text_config().vocab_size
    highest = int(ids.max())
    if highest >= size:
        raise ValueError(
            f"the data has the id {highest}, but the vocabulary of the model has {size} entries: "
            "take a model with the tokenizer of the data"
        )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout and the like; afterwards every part is in the mode in which it was.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())
    >>> with evaluation_mode(model):
    ...     print(model.training)
    False
    >>> [part.training for part in model]
    [True, False]
    """
    was_training = model.training
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # A part may do more than set its flag, such as take merged weights apart.
        model.train(was_training)
        for part, mode in modes:
            part.training = mode


def adapters_of(model: nn.Module) -> set[str]:
    """The names of the adapters of PEFT, such as "default"; parts of the names of their weights."""
    return set(getattr(_adapted(model), "peft_config", ()))


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The base model alone; afterwards the adapters are on, as trainable as before."""
    adapted = _adapted(model)
    trainable = [(each, each.requires_grad) for each in model.parameters()]
    try:
        with _adapters_off(adapted):
            yield
    finally:
        # To switch an adapter on makes it trainable.
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


@contextmanager
def _adapters_off(adapted: Any) -> Iterator[None]:
    if hasattr(adapted, "disable_adapter"):  # a PeftModel
        with adapted.disable_adapter():
            yield
        return
    adapted.disable_adapters()
    try:
        yield
    finally:
        adapted.enable_adapters()


def _adapted(model: nn.Module) -> Any:
    """What has the adapters: a PeftModel, or a model of transformers after add_adapter."""
    parts = (part for part in model.modules() if getattr(part, "peft_config", None))
    return next(parts, None)


def device_of(model: Any) -> torch.device:
    """Where a model's inputs go. Of a model that is spread over several places, the first weights
    may be elsewhere.
    """
    hook = getattr(model, "_hf_hook", None)
    return torch.device(model.device if hook is None else hook.execution_device)


def vocabulary_of(model: Any) -> int:
    """Entries of the model's output."""
    head = bare_model(model).get_output_embeddings()
    if head is None:
        return int(model.config.get_text_config().vocab_size)
    return int(head.weight.shape[0])


def rotary_switch(config: Any) -> int | None:
    """After how many tokens a model with LongRoPE uses other rotary factors for all positions."""
    config = config.get_text_config()
    # transformers 5 has rope_parameters, earlier versions rope_scaling.
    parameters = getattr(config, "rope_parameters", None)
    parameters = parameters or getattr(config, "rope_scaling", None) or {}
    # Models with several kinds of layers have parameters for each.
    nested = [each for each in parameters.values() if isinstance(each, dict)]
    for kind in (parameters, *nested):
        if kind.get("rope_type", kind.get("type")) == "longrope":
            trained = kind.get("original_max_position_embeddings")
            return int(trained or config.original_max_position_embeddings)
    return None
