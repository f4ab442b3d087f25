"""Small models and tokenizers, made from code: nothing is downloaded."""

import json
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Without a GPU Triton interprets our kernel. It reads this when transformers imports it.
if not (shutil.which("nvidia-smi") or shutil.which("rocminfo")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from helpers import PROSE, tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from toy_tokenizers import KINDS
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from goldfish import Goldfish

torch.set_num_threads(1)  # the models are so small that a second thread only waits


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """For `pytest -n 2`: tests of a file share its fixtures, so they share a process; four files
    share `in_two`.
    """
    from xdist.scheduler import LoadScopeScheduling

    def file_of(nodeid):
        path = nodeid.split("::")[0]
        return (
            "in_two"
            if path.endswith(
                (
                    "test_loops.py",
                    "test_memorize.py",
                    "test_finetune_private.py",
                    "test_audit_callback.py",
                )
            )
            else path
        )

    # The costly files are not those with many tests.
    config.option.loadscopereorder = False
    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = file_of
    return scheduler


@pytest.fixture(scope="session")
def topics(tmp_path_factory):
    """A corpus for the recipes: a few topics of the language reference that comes with Python."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text(
        "".join(
            json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)[:25]
        )
    )
    return path


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    """A saved toy with a chat template, for the finetuning recipe."""
    from toy_models import toy_model
    from toy_tokenizers import byte_level

    folder = tmp_path_factory.mktemp("chat") / "model"
    template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<end>' "
        "}}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), eos_token="<end>", chat_template=template
    )
    model = toy_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    model.config.max_position_embeddings = 512
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def in_two(tmp_path_factory, topics, chat_model, checkpoint):
    """The folder and the standard output of several trainings in two processes: see launch.py."""
    from launch import launch_several

    folder = tmp_path_factory.mktemp("two")
    return launch_several(folder, topics, chat_model, checkpoint)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(PROSE, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, Tokenizer]:
    """One of each kind of `toy_tokenizers`."""
    return {name: make() for name, make in KINDS.items()}


@pytest.fixture(scope="session")
def rules(tokenizers) -> dict[str, Goldfish]:
    """A rule that reads letters, bound to each of them."""
    return {
        name: Goldfish(strategy="letters", h=4, k=3).bind(tokenizer)
        for name, tokenizer in tokenizers.items()
    }


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer):
    """A saved model with its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps the precision and the loaders of earlier Trainers in the same process."""
    from accelerate.state import AcceleratorState, GradientState

    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
