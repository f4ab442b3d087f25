"""Checkpoints -> tokenizer, model, receipt; and a model's logits, a few rows at a time.

Code and pickles of others run only where the caller allows it.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from goldfish.fused import bare_model
from goldfish.receipt import FILE_NAME, read_receipt
from goldfish.rows import first_line, sha256

_log = logging.getLogger(__name__)
LOGITS_BUDGET = {"cpu": 2**26, "other": 2**31}  # bytes of float32 logits alive at a time
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_READ = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt", ".py", *_PICKLES)
_WRAPPERS = re.compile(r"(?<![^.])(?:(?:_orig_mod|module)\.)+")  # put before names by torch.compile and by DDP
_CONTEXTS = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "max_seq_length", "n_positions", "n_ctx")
_ADAPTER = "adapter_config.json"


def load_tokenizer(checkpoint: str | Path, *, revision: str | None = None, **trust: bool) -> Any:
    """AutoTokenizer's, from a folder, hub name or GGUF file; an adapter without one has its base's.

    Raises:
        FileNotFoundError: no such folder or hub name. ValueError: there is no tokenizer, or one that does not load.
    """
    name, options = _place(checkpoint, revision, **trust)
    folder = Path(name)
    try:
        base = adapter_base(checkpoint, revision)
        # transformers makes an empty tokenizer where there is none, so look before asking.
        if "gguf_file" in options or (base is None and not folder.is_dir()):
            own = True
        elif folder.is_dir():
            own = any(folder.glob("*token*")) or any(folder.glob("vocab*"))
        else:
            own = _file(checkpoint, "tokenizer_config.json", revision) is not None
        if own:
            return AutoTokenizer.from_pretrained(name, **options)
    except OSError as error:
        if folder.is_dir():
            raise
        raise FileNotFoundError(
            f"no folder {checkpoint} here, and no model of that name on the hub: {first_line(error)}"
        ) from error
    except Exception as error:  # the tokenizers package raises plain Exceptions
        if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
            raise  # already in words
        raise ValueError(
            f"the tokenizer of {checkpoint} cannot be loaded ({first_line(error)}); save it again"
        ) from error
    if base is not None:
        return load_tokenizer(base[0], revision=base[1], **trust)
    raise ValueError(
        f"{checkpoint} holds no tokenizer; save it there with tokenizer.save_pretrained({str(checkpoint)!r}), "
        "or pass it to Trainer as processing_class so that checkpoints include it"
    )


def load_config(checkpoint: str | Path, *, revision: str | None = None, **trust: bool) -> Any:
    """The configuration of a causal model; an adapter's is its base's.

    Raises:
        ValueError: an encoder-decoder model; a missing package.
    """
    base = adapter_base(checkpoint, revision)
    if base is not None:
        return load_config(base[0], revision=base[1], **trust)
    name, options = _place(checkpoint, revision, **trust)
    config = _loaded(checkpoint, lambda: AutoConfig.from_pretrained(name, **options))
    if config.is_encoder_decoder:
        raise ValueError(
            f"{checkpoint} is an encoder-decoder model ({config.model_type}); the audit is of causal language models, "
            "which continue a text from its prefix"
        )
    return config


def load_model(
    checkpoint: str | Path,
    device: torch.device,
    *,
    dtype: str = "float32",
    allow_pickle: bool = False,
    revision: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    **trust: bool,
) -> Any:
    """The causal language model of a folder, hub name or GGUF file, for evaluation; an adapter with its base.

    trust: `trust_remote_code`, as in the functions above. device_map: of accelerate, such as "auto": spreads the model
    over the GPUs, the memory and the disk, instead of `device`.

    Raises:
        ValueError: weights that exist only as pickle, which can run code when they are loaded; weights that do not
            fit the model; a model that is not causal; a missing package.
    """
    base = adapter_base(checkpoint, revision)
    name, options = _place(checkpoint, revision, **trust)
    if base is not None:
        same: Any = {"dtype": dtype, "allow_pickle": allow_pickle, "device_map": device_map, **trust}
        model = load_model(base[0], device, revision=base[1], **same)
        if not allow_pickle and Path(name).is_dir() and not any(Path(name).glob("*.safetensors")):
            raise ValueError(_only_pickles(checkpoint, ""))
        more = {} if revision is None else {"revision": revision}
        info = _loaded(checkpoint, lambda: model.load_adapter(name, **more))
        if info is None:
            raise ValueError(
                f"{checkpoint} is an adapter, and this version of transformers does not say whether its weights fit; "
                "update to transformers 5, or save the merged model: model.merge_and_unload().save_pretrained(...)"
            )
        _require_all_loaded(checkpoint, vars(info))
        return model.eval()
    load_config(checkpoint, revision=revision, **trust)
    if device_map is not None:
        offloaded = TemporaryDirectory()
        options["offload_folder"] = offloaded.name

    def load(**more: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            name,
            dtype=getattr(torch, dtype),
            use_safetensors=None if allow_pickle else True,
            ignore_mismatched_sizes=True,  # reported with the rest, instead of raised
            output_loading_info=True,
            device_map=device_map or device,
            **options,
            **more,
        )

    try:
        model, info = _loaded(checkpoint, load)
        bare = {_WRAPPERS.sub("", key) for key in info["unexpected_keys"]}
        if bare != set(info["unexpected_keys"]) and bare & set(info["missing_keys"]):
            model, info = load(key_mapping={_WRAPPERS.pattern: ""})
    except OSError as error:
        folder = Path(name)
        has_pickles = folder.is_dir() and any(path.suffix in _PICKLES for path in folder.iterdir())
        if allow_pickle or "safetensors" not in str(error) or (folder.is_dir() and not has_pickles):
            raise
        raise ValueError(_only_pickles(checkpoint, f" ({first_line(error)})")) from error
    if device_map is not None:
        model.offloaded = offloaded  # or it would be deleted now
    _require_all_loaded(checkpoint, info)
    require_causal(model, checkpoint)
    return model.eval()


def _only_pickles(checkpoint: str | Path, reason: str) -> str:
    folder = Path(checkpoint)
    names = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES) if folder.is_dir() else []
    has = f"{checkpoint} has no safetensors weights" + (f" but {', '.join(names)}" if names else "")
    return (
        f"{has}: pickles can run code when they are loaded. Save it again with model.save_pretrained(...), or, if you "
        f"trust its author, allow them: --allow-pickle{reason}"
    )


def _loaded(checkpoint: str | Path, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except ImportError as error:
        raise ValueError(f"{checkpoint} needs a package that is not installed: {first_line(error)}") from error
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{checkpoint} does not fit in memory, try --dtype bf16: {first_line(error)}") from error
    except RuntimeError as error:  # sizes that differ, in an adapter and in older versions of transformers
        raise ValueError(f"the weights of {checkpoint} do not fit its configuration: {error}") from error


def _require_all_loaded(checkpoint: str | Path, info: Mapping[str, Any]) -> None:
    """ValueError unless every weight of the model was in the files, and the other way round."""
    kinds = {
        "the model has no place for": sorted(info["unexpected_keys"]),
        "are not in the files": sorted(info["missing_keys"]),
        "have another shape": sorted(each if isinstance(each, str) else each[0] for each in info["mismatched_keys"]),
    }
    problems = [
        f"{len(names)} weights {text} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for text, names in kinds.items()
        if names
    ]
    if problems:
        raise ValueError(
            f"the weights of {checkpoint} do not fit its configuration: {'; '.join(problems)}. An audit of such a "
            "model would say nothing about the trained one; save it again with model.save_pretrained(...)"
        )


@torch.inference_mode()
def require_causal(model: Any, checkpoint: str | Path) -> None:
    """ValueError where the last token changes the logits before it: such a model sees what it should predict."""
    ids = torch.arange(16, device=device_of(model)).repeat(4, 1) % model.get_input_embeddings().num_embeddings
    ids[:, -1] = torch.arange(4, device=ids.device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    moved, scale = (logits - logits[:1]).abs().max().item(), logits.abs().max().item()
    if moved > 16 * torch.finfo(model.dtype).eps * max(scale, 1e-3):
        raise ValueError(
            f"{checkpoint} is not a causal language model: changing the last token moves the logits before it by "
            f"{moved:.2g}. It sees the tokens that it should predict, so every text would count as recited"
        )


def adapter_base(checkpoint: str | Path, revision: str | None = None) -> tuple[str, str | None] | None:
    """The name or folder of an adapter's base model, and its revision; None for a whole model."""
    path = _file(checkpoint, _ADAPTER, revision)
    if path is None or _file(checkpoint, "config.json", revision) is not None:
        return None
    adapter = json.loads(path.read_text(encoding="utf-8"))
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{path} does not name its base model; set base_model_name_or_path there")
    return str(base), adapter.get("revision")


def device_of(model: Any) -> torch.device:
    """Where a model's inputs go. Of a model that is spread over several places, the first weights may be elsewhere."""
    hook = getattr(model, "_hf_hook", None)
    return torch.device(model.device if hook is None else hook.execution_device)


def context_of(config: Any) -> int | None:
    """How many tokens a model takes at most, where its configuration says so."""
    config = config.get_text_config()
    return next((int(getattr(config, name)) for name in _CONTEXTS if getattr(config, name, None)), None)


def vocabulary_of(model: Any) -> int:
    """Entries of the model's output."""
    head = bare_model(model).get_output_embeddings()
    return int(model.config.get_text_config().vocab_size if head is None else head.weight.shape[0])


def load_receipt(checkpoint: str | Path, revision: str | None = None) -> dict[str, Any] | None:
    """goldfish.json of a folder or hub name; None where there is none. See `goldfish.receipt.read_receipt`."""
    try:
        path = _file(checkpoint, FILE_NAME, revision)
    except OSError as error:
        _log.warning("Could not ask the hub for the %s of %s, so no rule is known: %s", FILE_NAME, checkpoint, error)
        path = None
    return None if path is None else read_receipt(path.parent)


def file_hashes(checkpoint: str | Path, revision: str | None = None) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint that an audit may read, by name; an adapter's base included."""
    base = adapter_base(checkpoint, revision)
    of_gguf = _place(checkpoint, revision)[1].get("gguf_file")
    some = _file(checkpoint, of_gguf or ("config.json" if base is None else _ADAPTER), revision)
    files = [] if some is None else [some] if of_gguf else sorted(some.parent.iterdir())
    hashes = {path.name: sha256(path) for path in files if path.is_file() and path.suffix in _READ}
    if base is not None:
        hashes |= {f"base/{name}": digest for name, digest in file_hashes(*base).items()}
    return hashes


def _file(checkpoint: str | Path, name: str, revision: str | None) -> Path | None:
    """The path of a file in a folder, or of a hub name; None where there is none."""
    cached = cached_file(
        _place(checkpoint, revision)[0], name, revision=revision, _raise_exceptions_for_missing_entries=False
    )
    return None if cached is None else Path(cached)


def _place(checkpoint: str | Path, revision: str | None, trust_remote_code: bool = False) -> tuple[str, dict[str, Any]]:
    """A folder or hub name, and what from_pretrained is to know of it; a folder never asks the network."""
    path = Path(checkpoint)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if path.suffix == ".gguf":
        options["gguf_file"], path = path.name, path.parent
    if not path.is_dir() and (path.is_absolute() or path.exists() or len(path.parts) > 2):
        raise FileNotFoundError(f"no checkpoint folder {path}")
    options["local_files_only"] = path.is_dir()
    if revision is not None:
        if path.is_dir():
            raise ValueError(f"{path} is a folder, which has no revisions; a revision is of a hub name")
        options["revision"] = revision
    return str(path), options


def logits_of(model: Any, ids: Tensor, attention_mask: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """The logits of a model's own forward, a few rows at a time, so that (B, T, V) is never held.

    Args:
        ids: int64 (B, T); the logits are of positions 0 ... T - 2, which predict ids[:, 1:].
        attention_mask: int64 (B, T), 0 for padding on the right; None where there is none.

    Yields:
        which of the B * (T - 1) positions come, and their logits, float32 (positions, V).
    """
    budget = LOGITS_BUDGET["cpu" if ids.device.type == "cpu" else "other"] // (4 * vocabulary_of(model))
    length = ids.shape[1] - 1
    rows = max(1, budget // (length + 1))
    for first in range(0, len(ids), rows):
        mask = None if attention_mask is None else attention_mask[first : first + rows]
        logits = model(input_ids=ids[first : first + rows], attention_mask=mask, use_cache=False).logits
        logits = logits[:, :-1].flatten(0, 1)
        for start in range(0, len(logits), step := max(1, budget // 4)):  # what is done with them fits in the caches
            part = logits[start : start + step].float()
            yield slice(first * length + start, first * length + start + len(part)), part
