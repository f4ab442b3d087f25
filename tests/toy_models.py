"""Small models of several architectures, made from code; weights large enough for opinions of their
own.
"""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

VOCABULARY = 320
NO_SPECIAL = {
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.2,
}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    **NO_SPECIAL,
}


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            **NO_SPECIAL,
        )
    )


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def gpt_neox():
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))


def gemma2():
    """With a soft cap that bends, and a sliding window shorter than the rows."""
    own = {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "final_logit_softcapping": 2.0,
    }
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, **own))


def mamba():
    return MambaForCausalLM(
        MambaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            state_size=8,
            num_hidden_layers=2,
            **NO_SPECIAL,
        )
    )


ARCHITECTURES = {make.__name__: make for make in (gpt2, llama, gpt_neox, gemma2, mamba)}


def toy_model(kind, dtype=torch.float32):
    torch.manual_seed(0)
    return ARCHITECTURES[kind]().to(dtype).eval()
