"""The transformers model inside the wrappers that training puts around it."""

from typing import Any


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
