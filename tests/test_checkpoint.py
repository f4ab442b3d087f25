"""Checkpoints as they come: weights that do not fit, wrapped names, adapters, models that are not
causal.
"""

import hashlib
import json
import shutil

import pytest
import torch
from helpers import BEFORE_5, tiny_llama
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    MptConfig,
)

from goldfish.checkpoint import Checkpoint, InMemory, load_tokenizer
from goldfish.unwrap import context_of, vocabulary_of

pytestmark = pytest.mark.core
CPU = torch.device("cpu")
IDS = torch.arange(2, 14)[None]


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.fixture
def twin(tmp_path, checkpoint):
    """A copy of the checkpoint whose weights and configuration can be changed."""
    folder = tmp_path / "twin"
    shutil.copytree(checkpoint, folder)

    def change(
        rename=lambda name: name, values=lambda name, value: value, tied=False, **config
    ):
        if tied:
            tiny_llama(tie_word_embeddings=True).save_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        changed = {
            rename(name): values(name, value)
            for name, value in weights.items()
            if rename(name)
        }
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        old = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(old | config))
        return folder

    return change


@pytest.mark.skipif(
    BEFORE_5,
    reason="transformers 4 changes names before they can be mapped: refused there",
)
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("tied", [False, True])
def test_names_that_a_wrapper_changed_are_read(twin, prefix, tied):
    """torch.compile and DistributedDataParallel put them before every name."""
    folder = twin(lambda name: prefix + name, tied=tied)
    assert torch.equal(
        logits(Checkpoint(folder).model(CPU)),
        logits(tiny_llama(tie_word_embeddings=tied)),
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"rename": lambda name: f"wrap.{name}"},
            r"21 weights without a place in the model \((model\.)?wrap.lm_head.weight, ",
        ),
        (
            {"num_hidden_layers": 5},
            r"27 weights missing in the files \(model.layers.2.input_layernorm.weight, ",
        ),
        (
            {"num_hidden_layers": 1},
            r"9 weights without a place in the model \(model.layers.1.input_layernorm.weight, ",
        ),
        (
            {"rename": lambda name: "" if name == "lm_head.weight" else name},
            r"1 weight missing in the files \(lm_head.weight\). An audit of such a model would "
            r"say nothing",
        ),
        (
            {
                "values": lambda name, value: (
                    value[:-1].contiguous() if name == "model.norm.weight" else value
                )
            },
            r"1 weight of another shape \(model.norm.weight\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(twin, changes, text):
    with pytest.raises(
        ValueError,
        match=f"the weights of .*twin do not fit its configuration: .*{text}",
    ):
        Checkpoint(twin(**changes)).model(CPU)


def test_tied_weights_are_not_missing(twin):
    folder = twin(tied=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert torch.equal(
        logits(Checkpoint(folder).model(CPU)),
        logits(tiny_llama(tie_word_embeddings=True)),
    )


def test_models_that_see_the_future_are_refused(tmp_path):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 320,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    BertLMHeadModel(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    with pytest.raises(
        ValueError,
        match="is not a causal language model: changing the last token moves the logits",
    ):
        Checkpoint(tmp_path / "bert").model(CPU)
    BertLMHeadModel(BertConfig(**sizes, is_decoder=True)).save_pretrained(
        tmp_path / "decoder"
    )
    Checkpoint(tmp_path / "decoder").model(CPU)
    bart = BartConfig(
        vocab_size=320,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
    )
    BartForConditionalGeneration(bart).save_pretrained(tmp_path / "bart")
    with pytest.raises(ValueError, match=r"bart is an encoder-decoder model \(bart\)"):
        Checkpoint(tmp_path / "bart").model(CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_causal_model_is_causal_in_every_precision(checkpoint, dtype):
    assert Checkpoint(checkpoint).model(CPU, dtype=dtype).dtype == getattr(torch, dtype)


@pytest.fixture
def adapter(tmp_path, checkpoint):
    """A LoRA folder without a tokenizer, and the model that it stands for."""
    torch.manual_seed(1)
    model = get_peft_model(
        tiny_llama(),
        LoraConfig(
            r=2,
            target_modules=["q_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        ),
    )
    model.peft_config["default"].base_model_name_or_path = str(checkpoint)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model


def test_an_adapter_is_loaded_over_its_base(adapter, checkpoint, tokenizer):
    folder, model = adapter
    if BEFORE_5:  # it does not say whether the weights fit
        with pytest.raises(
            ValueError,
            match="does not say whether its weights fit: update to transformers 5",
        ):
            Checkpoint(folder).model(CPU)
        return
    loaded = Checkpoint(folder).model(CPU)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(tiny_llama()))
    assert load_tokenizer(folder).get_vocab() == tokenizer.get_vocab()
    shutil.copy(checkpoint / "config.json", folder)  # as Axolotl does
    assert torch.equal(logits(Checkpoint(folder).model(CPU)), logits(model))
    hashes = Checkpoint(folder).hashes()
    for name, path in (
        ("adapter_model.safetensors", folder),
        ("base/model.safetensors", checkpoint),
    ):
        data = (path / name.removeprefix("base/")).read_bytes()
        assert hashes[name] == hashlib.sha256(data).hexdigest()


@pytest.mark.skipif(BEFORE_5, reason="with transformers 4 adapters are refused")
def test_an_adapter_that_does_not_fit_is_refused(adapter):
    folder, _ = adapter
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {
            name.replace("layers.1", "layers.7"): value
            for name, value in weights.items()
        },
        folder / "adapter_model.safetensors",
    )
    with pytest.raises(
        ValueError,
        match=r"is an adapter that transformers cannot load over its base \(2 weights",
    ):
        Checkpoint(folder).model(CPU)
    save_file(
        {name: value[:1].clone() for name, value in weights.items()},
        folder / "adapter_model.safetensors",
    )
    with pytest.raises(
        ValueError,
        match=r"cannot load over its base .*; save the merged model and audit that",
    ):
        Checkpoint(folder).model(CPU)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(weights, folder / "adapter_model.bin")
    with pytest.raises(
        ValueError,
        match=r"no safetensors weights but adapter_model.bin: pickles .* --allow-pickle",
    ):
        Checkpoint(folder).model(CPU)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not name its base model"):
        Checkpoint(folder).hashes()


@pytest.mark.skipif(BEFORE_5, reason="with transformers 4 adapters are refused")
def test_an_adapter_may_ask_the_hub_for_its_base(
    adapter, checkpoint, tmp_path, monkeypatch
):
    """Its base is a hub name here, in the cache as the hub's client keeps it."""
    folder, model = adapter
    repository, commit = tmp_path / "hub" / "models--someone--tiny", "0" * 40
    shutil.copytree(checkpoint, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "someone/tiny"})
    )
    assert torch.equal(logits(Checkpoint(folder).model(CPU)), logits(model))
    assert "base/model.safetensors" in Checkpoint(folder).hashes()


def test_a_damaged_tokenizer_and_a_missing_package_are_named(twin):
    folder = twin(
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    )
    with pytest.raises(
        ValueError, match=r"needs a package that is not installed: .*bitsandbytes"
    ):
        Checkpoint(folder).model(CPU)
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match=r"the tokenizer of .*twin cannot be loaded"):
        load_tokenizer(folder)


def test_the_context_under_any_name(model):
    assert (context_of(model.config), vocabulary_of(model)) == (128, 320)
    assert context_of(MptConfig(max_seq_len=77)) == 77


@pytest.mark.skipif(BEFORE_5, reason="with transformers 4 adapters are refused")
def test_a_revision_of_a_hub_name_and_an_adapter_there(
    adapter, checkpoint, tmp_path, monkeypatch
):
    """Two commits of a repository in the hub's cache: another model, and an adapter that names a
    revision of it.
    """
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    tiny_llama(rms_norm_eps=0.1).save_pretrained(tmp_path / "other")
    config = json.loads((adapter[0] / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "someone/tiny", "revision": "v1"}
    (adapter[0] / "adapter_config.json").write_text(json.dumps(config))
    for name, commit, reference, folder in (
        ("tiny", "0" * 40, "main", tmp_path / "other"),
        ("tiny", "1" * 40, "v1", checkpoint),
        ("lora", "2" * 40, "main", adapter[0]),
    ):
        repository = hub / f"models--someone--{name}"
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / reference).write_text(commit)
    main, first = (
        Checkpoint("someone/tiny").model(CPU),
        Checkpoint("someone/tiny", "v1").model(CPU),
    )
    assert torch.equal(logits(first), logits(tiny_llama()))
    assert not torch.equal(logits(main), logits(first))
    assert (
        Checkpoint("someone/tiny", "v1").hashes() != Checkpoint("someone/tiny").hashes()
    )
    for revision in (None, "main"):
        assert torch.equal(
            logits(Checkpoint("someone/lora", revision).model(CPU)), logits(adapter[1])
        )
    assert (
        load_tokenizer("someone/lora").get_vocab()
        == load_tokenizer(checkpoint).get_vocab()
    ), "its base's"
    with pytest.raises(
        ValueError,
        match=r"is a folder, which has no revisions; a revision is of a hub name",
    ):
        Checkpoint(checkpoint, "v1")


@pytest.mark.skipif(
    BEFORE_5, reason="accelerate 1.4 itself moves a model to the one device of its map"
)
def test_no_model_is_moved(checkpoint, monkeypatch):
    """Quantised models refuse it."""
    monkeypatch.setattr("transformers.PreTrainedModel.to", None)
    monkeypatch.setattr("transformers.PreTrainedModel.cuda", None)
    assert torch.equal(logits(Checkpoint(checkpoint).model(CPU)), logits(tiny_llama()))


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_a_gguf_file_is_loaded_by_its_name(checkpoint, tmp_path, monkeypatch, place):
    """What transformers is asked for; the package gguf, which reads the file, need not be installed
    for this test.
    """
    calls = []

    def from_pretrained(name, **options):
        calls.append((name, options["gguf_file"]))
        return tiny_llama(), dict.fromkeys(
            ("unexpected_keys", "missing_keys", "mismatched_keys"), ()
        )

    name = str(tmp_path) if place == "folder" else "someone/tiny"
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    for each in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(f"transformers.{each}.from_pretrained", from_pretrained)
    if place == "hub":
        monkeypatch.setattr("goldfish.checkpoint.cached_file", lambda *_, **__: None)
    load_tokenizer(f"{name}/a.gguf")
    monkeypatch.setattr(Checkpoint, "config", lambda _: None)
    assert Checkpoint(f"{name}/a.gguf").model(CPU).config.vocab_size == 320
    assert set(calls) == {(name, "a.gguf")}
    if place == "folder":
        assert list(Checkpoint(f"{name}/a.gguf").hashes()) == ["a.gguf"]


@pytest.mark.skipif(BEFORE_5, reason="with transformers 4 adapters are refused")
def test_an_adapter_beside_whole_weights_must_fit_them(adapter, checkpoint):
    """transformers loads it over the weights beside it, and says nothing of what does not fit."""
    folder, model = adapter
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, folder / name)
    assert torch.allclose(
        logits(Checkpoint(folder).model(CPU)), logits(model), atol=1e-5
    )
    weights = load_file(folder / "adapter_model.safetensors")
    for changed in (
        {name.replace("q_proj", "k_proj"): value for name, value in weights.items()},
        dict(list(weights.items())[1:]),
    ):
        save_file(changed, folder / "adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match="do not fit"):
            Checkpoint(folder).model(CPU)


@pytest.mark.skipif(BEFORE_5, reason="with transformers 4 adapters are refused")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"init_lora_weights": "pissa_niter_4"},
            "which changes the base model's weights by chance",
        ),
        (
            {"peft_type": "PROMPT_TUNING"},
            "virtual tokens before every text, which .* no merge",
        ),
        ({"peft_type": "PREFIX_TUNING"}, "train with LoRA"),
    ],
)
def test_adapters_that_cannot_be_given_back_are_refused(adapter, settings, message):
    folder, _ = adapter
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ValueError, match=message):
        Checkpoint(folder).model(CPU)


def test_a_model_in_memory_is_put_back_as_each_part_was():
    """Frozen parts stay in eval mode; one that merges its weights there takes them apart again."""

    class Merging(torch.nn.Module):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    model = tiny_llama().train()
    model.merging = Merging()
    model.lm_head.eval()
    kept = InMemory(model, "a tokenizer")
    kept.model(CPU)
    assert model.merging.merged
    assert not model.training
    kept.put_back()
    assert model.training
    assert model.model.training
    assert not model.lm_head.training
    assert not model.merging.merged
