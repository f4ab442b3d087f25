"""Checkpoints -> tokenizer, model, receipt, hashes.

Code and pickles of others run only where the caller allows it.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import cached_file

from goldfish.receipt import FILE_NAME, read_receipt
from goldfish.text.printable import counted
from goldfish.text.rows import first_line, sha256
from goldfish.unwrap import device_of, evaluation_mode

_log = logging.getLogger(__name__)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_READ = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt", ".py", *_PICKLES)
# Put before the names of weights by torch.compile and by DDP: "module._orig_mod.lm_head".
_WRAPPERS = re.compile(r"(?<![^.])(?:(?:_orig_mod|module)\.)+")
# A folder with a tokenizer has at least one of these.
_TOKENIZERS = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
_ADAPTER = "adapter_config.json"
# Kinds of adapters that put tokens before a text instead of changing weights.
_VIRTUAL = (
    "PROMPT_TUNING",
    "PREFIX_TUNING",
    "P_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "CARTRIDGE",
)
# Values of LoRA's init_lora_weights with which the base's weights are changed too.
_REBUILT = ("pissa_niter", "corda", "lora_ga")
_WEIGHTS = tuple(
    name + index
    for name in ("model.safetensors", "pytorch_model.bin")
    for index in ("", ".index.json")
)


class Checkpoint:
    """A folder, hub name or GGUF file with a model; or an adapter, which is loaded over the model
    that it names.

    Args:
        name: the folder or hub name, or either with a file such as `model.gguf` behind it.
        revision: of a hub name: a branch, tag or commit.
        trust_remote_code: run the checkpoint's own code.

    Raises:
        FileNotFoundError: no such folder. ValueError: a revision of a folder.
    """

    def __init__(
        self,
        name: str | Path,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        path = Path(name)
        self.name = str(name)
        self.dtype: str | None = None  # it is loaded in any
        self._options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        if path.suffix == ".gguf":
            self._options["gguf_file"] = path.name
            path = path.parent
        self._place = str(path)
        self._is_folder = path.is_dir()
        # Names on the hub are NAME or OWNER/NAME.
        hub_name = not path.is_absolute() and len(path.parts) <= 2
        if not self._is_folder and (path.exists() or not hub_name):
            raise FileNotFoundError(f"no checkpoint folder {path}")
        self._options["local_files_only"] = self._is_folder  # never asks the network
        if revision is not None:
            if self._is_folder:
                raise ValueError(
                    f"{path} is a folder, which has no revisions; a revision is of a hub name"
                )
            self._options["revision"] = revision

    def file(self, name: str) -> Path | None:
        """The path of one of its files; None where there is none."""
        revision = self._options.get("revision")
        cached = cached_file(
            self._place,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
        )
        return None if cached is None else Path(cached)

    @cached_property
    def base(self) -> "Checkpoint | None":
        """The model that an adapter names; None for a whole model."""
        path = self.file(_ADAPTER)
        # Not by config.json: Axolotl saves that of the base beside an adapter.
        if path is None or any(map(self.file, _WEIGHTS)):
            return None
        adapter = json.loads(path.read_text(encoding="utf-8"))
        base = adapter.get("base_model_name_or_path")
        if not base:
            raise ValueError(
                f"{path} does not name its base model; set base_model_name_or_path there"
            )
        return Checkpoint(
            base, adapter.get("revision"), self._options["trust_remote_code"]
        )

    def tokenizer(self) -> Any:
        """AutoTokenizer's; an adapter without one has its base's.

        Raises:
            FileNotFoundError: no such hub name. ValueError: there is no tokenizer, or one that does
            not load.
        """
        try:
            base = self.base
            # In a folder transformers makes an empty tokenizer where there is none, so look before
            # asking.
            of_gguf = "gguf_file" in self._options  # it holds a tokenizer of its own
            look = not of_gguf and (self._is_folder or base is not None)
            if not look or any(map(self.file, _TOKENIZERS)):
                return AutoTokenizer.from_pretrained(self._place, **self._options)
        except OSError as error:
            if self._is_folder:
                raise
            raise FileNotFoundError(
                f"no folder {self.name} here, and no model of that name on the hub: "
                f"{first_line(error)}"
            ) from error
        except Exception as error:  # the tokenizers package raises plain Exceptions
            # JSONDecodeError is a ValueError too, whose words do not name the file.
            damaged = isinstance(error, json.JSONDecodeError)
            if isinstance(error, ValueError) and not damaged:
                raise
            raise ValueError(
                f"the tokenizer of {self.name} cannot be loaded ({first_line(error)}); save it "
                "again"
            ) from error
        if base is not None:
            return base.tokenizer()
        raise ValueError(
            f"{self.name} holds no tokenizer; save it there with "
            f"tokenizer.save_pretrained({self.name!r}), "
            "or pass it to Trainer as processing_class so that checkpoints include it"
        )

    def config(self) -> Any:
        """The configuration of a causal model; an adapter's is its base's.

        Raises:
            ValueError: an encoder-decoder model; a missing package.
        """
        if self.base is not None:
            return self.base.config()
        config = self._loaded(
            lambda: AutoConfig.from_pretrained(self._place, **self._options)
        )
        if config.is_encoder_decoder:
            raise ValueError(
                f"{self.name} is an encoder-decoder model ({config.model_type}); the audit is of "
                "causal language models, which continue a text from its prefix"
            )
        return config

    def model(
        self,
        device: torch.device,
        *,
        dtype: str = "float32",
        allow_pickle: bool = False,
        device_map: str | dict[str, Any] | None = None,
    ) -> Any:
        """The causal language model, for evaluation; an adapter with its base.

        device_map: of accelerate, such as "auto": spreads the model over the GPUs, the memory and
        the disk, instead of `device`.

        Raises:
            ValueError: weights that exist only as pickle, which can run code when they are loaded;
                weights that do not fit the model; a model that is not causal; a missing package.
        """
        # Importing it takes a second, which `goldfish show` and `check` need not wait for.
        from transformers import AutoModelForCausalLM

        if self.base is not None:
            model = self.base.model(
                device, dtype=dtype, allow_pickle=allow_pickle, device_map=device_map
            )
            return self._adapted(model, allow_pickle)
        self.config()
        self._require_adapter_that_loads()  # transformers loads one that is beside the weights too
        options = dict(self._options)
        if device_map is not None:
            offloaded = TemporaryDirectory()
            options["offload_folder"] = offloaded.name

        def load(**more: Any) -> Any:
            return AutoModelForCausalLM.from_pretrained(
                self._place,
                dtype=getattr(torch, dtype),
                use_safetensors=None if allow_pickle else True,
                ignore_mismatched_sizes=True,  # reported with the rest, instead of raised
                output_loading_info=True,
                device_map=device_map or device,
                **options,
                **more,
            )

        try:
            model, info = self._loaded(load)
            unexpected = set(info["unexpected_keys"])
            # Saved from within a wrapper: without its name, keys are those that are missing.
            bare = {_WRAPPERS.sub("", key) for key in unexpected}
            if bare != unexpected and bare & set(info["missing_keys"]):
                model, info = load(key_mapping={_WRAPPERS.pattern: ""})
        except OSError as error:
            # transformers' words for it name the file that it wanted.
            no_safetensors = "safetensors" in str(error)
            if self._is_folder and not self._pickles():
                no_safetensors = False  # there are no weights of any kind
            if allow_pickle or not no_safetensors:
                raise
            raise ValueError(f"{self._only_pickles()} ({first_line(error)})") from error
        if device_map is not None:
            model.offloaded = offloaded  # or it would be deleted now
        if problems := _misfits(info):
            raise ValueError(
                f"the weights of {self.name} do not fit its configuration: {problems}. An audit "
                "of such a model would say nothing about the trained one; save it again with "
                "model.save_pretrained(...)"
            )
        require_causal(model, self.name)
        return model.eval()

    def _adapted(self, model: Any, allow_pickle: bool) -> Any:
        # load_adapter falls back on pickles without asking.
        safe = not self._is_folder or any(Path(self._place).glob("*.safetensors"))
        if not allow_pickle and not safe:
            raise ValueError(self._only_pickles())
        self._require_adapter_that_loads()
        revision = {"revision": self._options.get("revision")}
        try:
            info = model.load_adapter(self._place, adapter_kwargs=revision)
            if info is None:
                raise ValueError(
                    "this version does not say whether its weights fit: update to transformers 5"
                )
            if problems := _misfits(vars(info)):
                raise ValueError(problems)
        # Such as those of DoRA, and of resized embeddings.
        except (ValueError, RuntimeError, ImportError) as error:
            raise ValueError(
                f"{self.name} is an adapter that transformers cannot load over its base "
                f"({first_line(error)}); save the merged model and audit that: "
                "model.merge_and_unload().save_pretrained(...)"
            ) from error
        return model.eval()

    def _require_adapter_that_loads(self) -> None:
        """ValueError for adapters that no merge or load gives back as they were trained."""
        path = self.file(_ADAPTER)
        if path is None:
            return
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind = str(settings.get("peft_type"))
        if kind in _VIRTUAL:
            raise ValueError(
                f"{self.name} is an adapter of the kind {kind}: virtual tokens before every text, "
                "which transformers cannot load and no merge can write into weights. The audit "
                "is of models that read a text alone; train with LoRA to audit what was learned"
            )
        start = str(settings.get("init_lora_weights"))
        if start.startswith(_REBUILT):
            raise ValueError(
                f"{self.name} was initialised with {start!r}, which changes the base model's "
                "weights by chance, and again in another way when it is loaded: this is not the "
                "model that was trained. Save the merged model in the session that trained it, "
                "model.merge_and_unload().save_pretrained(...), or convert the adapter with "
                "save_pretrained(path_initial_model_for_weight_conversion=...), and audit that"
            )

    def receipt(self) -> dict[str, Any] | None:
        """goldfish.json; None where there is none. See `goldfish.receipt.read_receipt`."""
        try:
            path = self.file(FILE_NAME)
        except OSError as error:
            _log.warning(
                "Could not ask the hub for the %s of %s, so no rule is known: %s",
                FILE_NAME,
                self.name,
                error,
            )
            return None
        return None if path is None else read_receipt(path.parent)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every file that an audit may read, by name; an adapter's base included."""
        of_gguf = self._options.get("gguf_file")
        some = self.file(of_gguf or ("config.json" if self.base is None else _ADAPTER))
        if some is None:
            files = []
        elif of_gguf:  # a folder of them has a file for each quantization
            files = [some]
        else:  # on the hub, what lies in the snapshot that was downloaded
            files = sorted(some.parent.iterdir())
        hashes = {}
        for path in files:
            if path.is_file() and path.suffix in _READ:
                hashes[path.name] = sha256(path)
        if self.base is not None:
            for name, digest in self.base.hashes().items():
                hashes[f"base/{name}"] = digest
        return hashes

    def put_back(self) -> None:
        """Nothing was changed: the audit loaded a model of its own."""

    def _pickles(self) -> list[str]:
        files = Path(self._place).iterdir() if self._is_folder else ()
        return sorted(path.name for path in files if path.suffix in _PICKLES)

    def _only_pickles(self) -> str:
        names = ", ".join(self._pickles())
        but = f" but {names}" if names else ""
        return (
            f"{self.name} has no safetensors weights{but}: pickles can run code when they are "
            "loaded. Save it again with model.save_pretrained(...), or, if you trust its author, "
            "allow them: --allow-pickle"
        )

    def _loaded(self, load: Callable[[], Any]) -> Any:
        try:
            return load()
        except ImportError as error:
            raise ValueError(
                f"{self.name} needs a package that is not installed: {first_line(error)}"
            ) from error
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{self.name} does not fit in memory, try --dtype bf16: {first_line(error)}"
            ) from error
        # Sizes that differ, in an adapter and in older versions of transformers.
        except RuntimeError as error:
            raise ValueError(
                f"the weights of {self.name} do not fit its configuration: {error}"
            ) from error


def _misfits(info: Mapping[str, Any]) -> str:
    """The weights that only the model or only the files have, in words; empty if there are none."""
    kinds = {
        "without a place in the model": info["unexpected_keys"],
        "missing in the files": info["missing_keys"],
        "of another shape": [
            key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]
        ],
    }
    return "; ".join(
        f"{counted(len(names), 'weight')} {text} "
        f"({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for text, names in kinds.items()
        if names
    )


class InMemory:
    """A model that is loaded already, such as at the end of its training, as a `Checkpoint`.

    Its dtype and device are its own. Raises ValueError without a tokenizer.

    name: by default that of the model which its training began with.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "") -> None:
        if tokenizer is None:
            raise ValueError(
                "a model in memory needs its tokenizer: audit(model, tokenizer=...)"
            )
        self._model = model
        self._tokenizer = tokenizer
        self._evaluated = ExitStack()
        self.name = str(name or model.config.name_or_path or type(model).__name__)
        self.dtype = str(model.dtype).removeprefix("torch.")

    def tokenizer(self) -> Any:
        return self._tokenizer

    def config(self) -> Any:
        return self._model.config

    def receipt(self) -> None:
        """Its rule is with the trainer until it is saved."""

    def model(self, device: torch.device, **options: Any) -> Any:
        self._evaluated.enter_context(evaluation_mode(self._model))
        require_causal(self._model, self.name)
        return self._model

    def put_back(self) -> None:
        """As it was before the audit."""
        self._evaluated.close()

    def hashes(self) -> dict[str, str]:
        """SHA-256 of all parameters and buffers, in the order of their names."""
        result = hashlib.sha256()
        for name, value in sorted(self._model.state_dict().items()):
            # As bytes: numpy has no bfloat16.
            data = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            result.update(name.encode())
            result.update(data.numpy())
        return {"in memory": result.hexdigest()}


def load_tokenizer(checkpoint: str | Path) -> Any:
    """The tokenizer of a folder, hub name or GGUF file; see `Checkpoint.tokenizer`."""
    return Checkpoint(checkpoint).tokenizer()


@torch.inference_mode()
def require_causal(model: Any, checkpoint: str) -> None:
    """ValueError where the last token changes the logits before it: such a model sees what it
    should predict.
    """
    # Four rows that differ in their last token alone.
    known = model.get_input_embeddings().num_embeddings
    ids = torch.arange(16, device=device_of(model)).repeat(4, 1) % known
    ids[:, -1] = torch.arange(4, device=ids.device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    moved = (logits - logits[:1]).abs().max().item()
    scale = logits.abs().max().item()
    # Rows of one batch may differ by rounding.
    if moved > 16 * torch.finfo(model.dtype).eps * max(scale, 1e-3):
        raise ValueError(
            f"{checkpoint} is not a causal language model: changing the last token moves the "
            f"logits before it by {moved:.2g}. It sees the tokens that it should predict, so every "
            "text would count as recited"
        )
