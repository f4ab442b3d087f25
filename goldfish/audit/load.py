"""Checkpoints -> tokenizer, model, receipt. Code and pickles of others run only where the caller says so."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from goldfish.audit.windows import sha256
from goldfish.receipt import FILE_NAME, read_receipt

_log = logging.getLogger(__name__)
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_READ = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py", *(pattern[1:] for pattern in _PICKLED))


def load_tokenizer(checkpoint: str | Path, *, trust_remote_code: bool = False) -> Any:
    """AutoTokenizer's, from a folder or hub name; FileNotFoundError, ValueError in words where there is none."""
    folder = Path(checkpoint)
    # transformers makes an empty tokenizer for a folder that has none, so look before asking.
    if folder.is_dir() and not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        raise ValueError(
            f"{checkpoint} holds no tokenizer; save it there with tokenizer.save_pretrained({str(checkpoint)!r}), "
            "or pass it to Trainer as processing_class so that checkpoints include it"
        )
    if not folder.is_dir() and (folder.is_absolute() or folder.exists() or len(folder.parts) > 2):
        raise FileNotFoundError(f"no checkpoint folder {checkpoint}")
    try:
        return AutoTokenizer.from_pretrained(checkpoint, **_options(folder, trust_remote_code))
    except OSError as error:
        if folder.is_dir():
            raise
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"no folder {checkpoint} here, and no model of that name on the hub: {reason}"
        ) from error


def load_model(
    checkpoint: str | Path,
    device: torch.device,
    *,
    dtype: str = "float32",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """The causal language model of a folder or hub name, for evaluation.

    Raises:
        ValueError: weights that exist only as pickle, which can run code when they are loaded.
    """
    folder = Path(checkpoint)
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern)) if folder.is_dir() else []
    try:
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            dtype=getattr(torch, dtype),
            use_safetensors=None if allow_pickle else True,
            **_options(folder, trust_remote_code),
        )
    except OSError as error:
        if allow_pickle or "safetensors" not in str(error) or (folder.is_dir() and not pickled):
            raise
        has = f"{checkpoint} has no safetensors weights" + (f" but {', '.join(pickled)}" if pickled else "")
        raise ValueError(
            f"{has}: pickles can run code when they are loaded. Save it again with model.save_pretrained(...), or, if "
            f"you trust its author, allow them: --allow_pickle ({str(error).splitlines()[0]})"
        ) from error
    return model.to(device).eval()


def load_receipt(checkpoint: str | Path) -> dict[str, Any] | None:
    """goldfish.json of a folder or hub name; None where there is none. See `goldfish.receipt.read_receipt`."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        try:
            found = cached_file(str(checkpoint), FILE_NAME, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            _log.warning(
                "Could not ask the hub for the %s of %s, so no rule is known: %s", FILE_NAME, checkpoint, error
            )
            found = None
        if found is None:
            return None
        folder = Path(found).parent
    return read_receipt(folder)


def file_hashes(checkpoint: str | Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint that an audit may read, whole, by name; empty for a hub name."""
    folder = Path(checkpoint)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {path.name: sha256(path) for path in files if path.suffix in _READ and path.is_file()}


def _options(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """A folder never asks the network."""
    return {"trust_remote_code": trust_remote_code, "local_files_only": folder.is_dir()}
