"""Checkpoints -> tokenizer, model, receipt; and a model's logits, a few rows at a time.

Code and pickles of others run only where the caller allows it.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from goldfish.audit.windows import sha256
from goldfish.fused import bare_model, probe, read_probe
from goldfish.receipt import FILE_NAME, read_receipt

_log = logging.getLogger(__name__)
# Bytes of float32 logits alive at a time. On a CPU: large enough for the head's product, small enough for the caches.
LOGITS_BUDGET = {"cpu": 2**24, "other": 2**28}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_READ = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py", *_PICKLES)
_WRAPPERS = re.compile(r"(?<![^.])(?:(?:_orig_mod|module)\.)+")  # put before names by torch.compile and by DDP
_CONTEXTS = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "max_seq_length", "n_positions", "n_ctx")
_ADAPTER = "adapter_config.json"


def load_tokenizer(checkpoint: str | Path, *, trust_remote_code: bool = False) -> Any:
    """AutoTokenizer's, from a folder or hub name; an adapter without one has its base's.

    Raises:
        FileNotFoundError: no such folder or hub name. ValueError: there is no tokenizer, or one that does not load.
    """
    folder = Path(checkpoint)
    # transformers makes an empty tokenizer for a folder that has none, so look before asking.
    if folder.is_dir() and not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        base = adapter_base(checkpoint)
        if base is not None:
            return load_tokenizer(base, trust_remote_code=trust_remote_code)
        raise ValueError(
            f"{checkpoint} holds no tokenizer; save it there with tokenizer.save_pretrained({str(checkpoint)!r}), "
            "or pass it to Trainer as processing_class so that checkpoints include it"
        )
    if not folder.is_dir() and (folder.is_absolute() or folder.exists() or len(folder.parts) > 2):
        raise FileNotFoundError(f"no checkpoint folder {checkpoint}")
    try:
        return AutoTokenizer.from_pretrained(checkpoint, **_options(checkpoint, trust_remote_code))
    except OSError as error:
        if folder.is_dir():
            raise
        raise FileNotFoundError(
            f"no folder {checkpoint} here, and no model of that name on the hub: {_first_line(error)}"
        ) from error
    except Exception as error:  # the tokenizers package raises plain Exceptions
        if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
            raise  # already in words
        raise ValueError(
            f"the tokenizer of {checkpoint} cannot be loaded ({_first_line(error)}); save it again"
        ) from error


def load_model(
    checkpoint: str | Path,
    device: torch.device,
    *,
    dtype: str = "float32",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """The causal language model of a folder or hub name, for evaluation; an adapter with its base.

    Raises:
        ValueError: weights that exist only as pickle, which can run code when they are loaded; weights that do not
            fit the model; a model that is not causal; a missing package.
    """
    base = adapter_base(checkpoint)
    if base is not None:
        model = load_model(base, device, dtype=dtype, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
        if not allow_pickle and Path(checkpoint).is_dir() and not any(Path(checkpoint).glob("*.safetensors")):
            raise ValueError(_only_pickles(checkpoint, ""))
        info = _loaded(checkpoint, lambda: model.load_adapter(str(checkpoint)))
        if info is not None:  # transformers 4 returns nothing
            _require_all_loaded(checkpoint, vars(info))
        return model.eval()
    options = _options(checkpoint, trust_remote_code)
    config = _loaded(checkpoint, lambda: AutoConfig.from_pretrained(checkpoint, **options))
    if config.is_encoder_decoder:
        raise ValueError(
            f"{checkpoint} is an encoder-decoder model ({config.model_type}); the audit is of causal language models, "
            "which continue a text from its prefix"
        )

    def load(**more: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            checkpoint,
            dtype=getattr(torch, dtype),
            use_safetensors=None if allow_pickle else True,
            ignore_mismatched_sizes=True,  # reported with the rest, instead of raised
            output_loading_info=True,
            **options,
            **more,
        )

    try:
        model, info = _loaded(checkpoint, load)
        bare = {_WRAPPERS.sub("", key) for key in info["unexpected_keys"]}
        if bare != set(info["unexpected_keys"]) and bare & set(info["missing_keys"]):
            model, info = load(key_mapping={_WRAPPERS.pattern: ""})
    except OSError as error:
        folder = Path(checkpoint)
        has_pickles = folder.is_dir() and any(path.suffix in _PICKLES for path in folder.iterdir())
        if allow_pickle or "safetensors" not in str(error) or (folder.is_dir() and not has_pickles):
            raise
        raise ValueError(_only_pickles(checkpoint, f" ({_first_line(error)})")) from error
    _require_all_loaded(checkpoint, info)
    model = model.to(device).eval()
    require_causal(model, checkpoint)
    return model


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
        raise ValueError(f"{checkpoint} needs a package that is not installed: {_first_line(error)}") from error
    except RuntimeError as error:  # sizes that differ, in an adapter and in older versions of transformers
        raise ValueError(f"the weights of {checkpoint} do not fit its configuration: {error}") from error


def _require_all_loaded(checkpoint: str | Path, info: Mapping[str, Any]) -> None:
    """ValueError unless every weight of the model was in the files, and the other way round."""
    kinds = {
        "the model has no place for": sorted(info["unexpected_keys"]),
        "are not in the files": sorted(info["missing_keys"]),
        "have another shape": sorted(each[0] for each in info["mismatched_keys"]),
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
    ids = torch.arange(16, device=model.device).repeat(4, 1) % model.get_input_embeddings().num_embeddings
    ids[:, -1] = torch.arange(4, device=ids.device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    moved, scale = (logits - logits[:1]).abs().max().item(), logits.abs().max().item()
    # Rows that differ in the last token only; not `>`, which lets NaN pass to the check that names the window.
    if moved > 16 * torch.finfo(model.dtype).eps * max(scale, 1e-3):
        raise ValueError(
            f"{checkpoint} is not a causal language model: changing the last token moves the logits before it by "
            f"{moved:.2g}. It sees the tokens that it should predict, so every text would count as recited"
        )


def adapter_base(checkpoint: str | Path) -> str | None:
    """The name or folder of an adapter's base model; None for a whole model."""
    path = Path(checkpoint) / _ADAPTER
    if not path.is_file() or (Path(checkpoint) / "config.json").is_file():
        return None
    base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{path} does not name its base model; set base_model_name_or_path there")
    return str(base)


def context_of(model: Any) -> int | None:
    """How many tokens the model takes at most, where its configuration says so."""
    config = model.config.get_text_config()
    return next((int(getattr(config, name)) for name in _CONTEXTS if getattr(config, name, None)), None)


def vocabulary_of(model: Any) -> int:
    """Entries of the model's output."""
    head = bare_model(model).get_output_embeddings()
    return int(model.config.get_text_config().vocab_size if head is None else head.weight.shape[0])


def load_receipt(checkpoint: str | Path) -> dict[str, Any] | None:
    """goldfish.json of a folder or hub name; None where there is none. See `goldfish.receipt.read_receipt`."""
    try:
        path = Path(checkpoint) / FILE_NAME if Path(checkpoint).is_dir() else _cached(checkpoint, FILE_NAME)
    except OSError as error:
        _log.warning("Could not ask the hub for the %s of %s, so no rule is known: %s", FILE_NAME, checkpoint, error)
        path = None
    return None if path is None else read_receipt(path.parent)


def file_hashes(checkpoint: str | Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint that an audit may read, by name; an adapter's base included."""
    folder: Path | None = Path(checkpoint)
    if folder is not None and not folder.is_dir():
        config = _cached(checkpoint, "config.json")
        folder = None if config is None else config.parent
    files = [] if folder is None else sorted(path for path in folder.iterdir() if path.suffix in _READ)
    hashes = {path.name: sha256(path) for path in files if path.is_file()}
    base = adapter_base(checkpoint)
    if base is not None:
        hashes |= {f"base/{name}": digest for name, digest in file_hashes(base).items()}
    return hashes


def _cached(checkpoint: str | Path, name: str) -> Path | None:
    """A file of a hub name; None where there is none."""
    path = cached_file(str(checkpoint), name, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path)


def _options(checkpoint: str | Path, trust_remote_code: bool) -> dict[str, Any]:
    """A folder never asks the network."""
    return {"trust_remote_code": trust_remote_code, "local_files_only": Path(checkpoint).is_dir()}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


class RowsOfLogits:
    """The logits of a causal language model of transformers, in chunks of rows, never (B, T, V).

    While the model's own forward runs, its output embedding keeps the hidden states and returns a probe in place of
    the logits. What the forward then does to the probe (nothing, a scale, a soft cap) is done to the logits of every
    chunk. Whether that gives the model's own logits is tried once; where it does not, `reason` says why, once in the
    log too, and the logits come from the model's own forward, of as few rows at a time as the budget asks.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.reason: str | None = None  # None: not tried yet; "": it works
        self._head = bare_model(model).get_output_embeddings()
        self._width, self._scale, self._softcap = 0, 1.0, None  # type: int, float, float | None

    def chunks(self, ids: Tensor, attention_mask: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yields which of the (B * (T - 1)) positions come, and their logits, float32 (rows, V).

        Args:
            ids: int64 (B, T); the logits are of positions 0 ... T - 2, which speak of ids[:, 1:].
            attention_mask: int64 (B, T), 0 for padding on the right; None where there is none.
        """
        if self.reason is None:
            self.reason = self._why_not(ids[:1, :16])
            if self.reason:
                _log.warning(
                    "The logits of %s are made whole, not in chunks: %s.", type(self.model).__name__, self.reason
                )
        if self.reason:
            yield from self._own_forward(ids, attention_mask)
            return
        hidden = self._hidden(ids, attention_mask)[0][:, :-1].flatten(0, 1)
        rows = self._rows(ids.device)
        for first in range(0, len(hidden), rows):
            yield slice(first, first + rows), self._project(hidden[first : first + rows])

    def _rows(self, device: torch.device) -> int:
        return max(1, LOGITS_BUDGET["cpu" if device.type == "cpu" else "other"] // (4 * self._width))

    def _own_forward(self, ids: Tensor, attention_mask: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        length = ids.shape[1]
        at_once = max(1, self._rows(ids.device) // length)
        for first in range(0, len(ids), at_once):
            part = slice(first, first + at_once)
            logits = self._forward(ids[part], None if attention_mask is None else attention_mask[part])
            yield slice(first * (length - 1), (first + at_once) * (length - 1)), logits[:, :-1].flatten(0, 1).float()

    def _forward(self, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits
        return logits

    def _hidden(self, ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the head was given, (B, T, D), and what the forward made of the probe."""
        with _instead_of(self._head, lambda hidden: probe(self._width, hidden.device)) as given:
            seen = self._forward(ids, attention_mask)
        if len(given) != 1 or given[0].shape[:2] != ids.shape:
            raise RuntimeError(f"the forward called its head with {[tuple(hidden.shape) for hidden in given]}")
        return given[0], seen

    def _project(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._head(hidden).float()
        if self._scale != 1.0:
            logits = logits * self._scale
        if self._softcap is not None:
            logits = (logits / self._softcap).tanh_().mul_(self._softcap)
        return logits

    def _why_not(self, ids: Tensor) -> str:
        """Try it on a few tokens; empty if the chunks' logits are the model's own."""
        own = self._forward(ids, None)
        self._width = own.shape[-1]
        if self._head is None:
            return "it has no output embedding"
        try:
            hidden, seen = self._hidden(ids, None)
        except Exception as error:  # whatever its forward does to logits, it cannot do to the probe
            return f"its forward fails on what the head returned ({type(error).__name__}: {error})"
        found = read_probe(seen) if seen.shape[-1] == self._width else None
        if found is None:
            return "the model does something to its logits that is neither a scale nor a soft cap"
        self._scale, self._softcap = found
        ours = self._project(hidden)
        # Soft cap and scale are float32 here and may have been 16-bit there: a few of its rounding steps.
        tolerance = 8 * torch.finfo(own.dtype).eps * own.float().abs().max().item() + 1e-5
        difference = (ours - own.float()).abs().max().item() if ours.shape == own.shape else float("inf")
        return "" if difference <= tolerance else f"they would be off by {difference:.2g}"


@contextmanager
def _instead_of(module: Any, forward: Any) -> Iterator[list[Tensor]]:
    """Replace a module's forward; yields the list of what it was given."""
    given: list[Tensor] = []

    def keep(hidden: Tensor, *_: Any, **__: Any) -> Any:
        given.append(hidden)
        return forward(hidden)

    before = module.__dict__.get("forward")
    module.forward = keep
    try:
        yield given
    finally:
        del module.forward
        if before is not None:
            module.forward = before
