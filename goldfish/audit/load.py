"""Checkpoints -> tokenizer, model, receipt. Code and pickles of others run only where the caller says so."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from goldfish.receipt import FILE_NAME, read_receipt

_log = logging.getLogger(__name__)
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ENDS = 2**20  # bytes at each end of a file that its fingerprint reads


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


def fingerprint(checkpoint: str | Path) -> str | None:
    """SHA-256 over names, sizes and both ends of a folder's files that an audit reads; None for a hub name.

    Whole weights are not read: it tells apart the checkpoints of a training, not forgeries.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return None
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt", ".py", *(p[1:] for p in _PICKLED)):
            size = path.stat().st_size
            with path.open("rb") as data:
                ends = data.read(_ENDS)
                data.seek(max(_ENDS, size - _ENDS))
                ends += data.read()
            total.update(f"{path.name} {size} {hashlib.sha256(ends).hexdigest()}\n".encode())
    return total.hexdigest()


def _options(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """A folder never asks the network."""
    return {"trust_remote_code": trust_remote_code, "local_files_only": folder.is_dir()}
