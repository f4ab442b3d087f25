"""What several test modules share: texts, chats, a tiny model and one short training of it."""

import json

import pytest
import torch
import transformers
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from goldfish import Goldfish

BEFORE_5 = transformers.__version__ < "5"
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])]
PROSE = [
    "The goldfish remembers what it saw a moment ago, and forgets it before the next turn of the "
    "bowl.",
    "A sparrow sat on the fence. “Why,” it asked, “do you swim in circles?” Naïve question, said "
    "the fish.",
    "Count: one, two, three, four, five, six, seven, eight, nine, ten; then begin again at "
    "one.\n\n\tIndented.",
] * 4
TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system\nrole') }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As Qwen3's: earlier answers are rendered without their thoughts.
THINKING = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and loop.last %}"
    "<think>{{ m.reasoning_content | default('') }}</think>{% endif %}"
    "{{ m.content | default('', true) | trim }}"
    "{% for call in m.tool_calls | default([], true) %}"
    "<call>{{ call.function | tojson }}</call>{% endfor %}"
    "<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
RULE = Goldfish(k=3, h=4)


def tiny_llama(vocab_size: int = 320, **changes) -> LlamaForCausalLM:
    """The same weights whenever it is called with the same arguments."""
    torch.manual_seed(0)
    config = {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes}))


class NoLossArguments(LlamaForCausalLM):
    """Its loss is the mean over a micro-batch, whatever the step holds."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels
        )


class OwnMean(LlamaForCausalLM):
    """The same, and 0 / 0 where a micro-batch keeps no token."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        if labels is not None:
            log_p, targets = (
                torch.log_softmax(output.logits[:, :-1], -1),
                labels[:, 1:, None],
            )
            kept = targets != -100
            output["loss"] = (
                -(log_p.gather(-1, targets * kept) * kept).sum() / kept.sum()
            )
        return output


def model_of(kind=LlamaForCausalLM):
    model = tiny_llama()
    model.__class__ = kind
    return model


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def say(*contents):
    """Messages of the user and the assistant in turn."""
    return [
        {"role": ("user", "assistant")[i % 2], "content": text}
        for i, text in enumerate(contents)
    ]


def unequal_rows(count=16, longest=40):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, longest, (count,), generator=generator).tolist()
    ids = [torch.randint(2, 320, (n,), generator=generator).tolist() for n in lengths]
    # Here, because tests/gpu must start without datasets.
    from datasets import Dataset

    return Dataset.from_dict(
        {"input_ids": ids, "attention_mask": [[1] * n for n in lengths], "labels": ids}
    )


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimiser step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(
            torch.cat(
                [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            )
        )


def trained(
    folder,
    tokenizer,
    *,
    trainer_class=Trainer,
    batch=4,
    accumulation=1,
    steps=4,
    then=None,
    train=None,
    **more,
):
    gradients = Gradients()
    settings = {
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
    }
    settings |= more.pop("settings", {})
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    trainer = trainer_class(
        model=more.pop("model", None) or tiny_llama(),
        args=arguments,
        train_dataset=more.pop("train_dataset", unequal_rows()),
        eval_dataset=unequal_rows(8, 30),
        data_collator=more.pop("data_collator", DataCollatorForSeq2Seq(tokenizer)),
        processing_class=tokenizer,
        callbacks=[gradients],
        **more,
    )
    if then is not None:
        trainer = then(trainer)
    trainer.train(**train or {})
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, losses, gradients.steps
