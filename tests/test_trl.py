"""TRL's SFTTrainer and PEFT's adapters through `attach`: the loss, computed again by hand."""

import pytest
import torch
from datasets import Dataset
from helpers import tiny_llama

from goldfish import Goldfish, attach, mask_labels, premask
from goldfish.guide import Guide
from goldfish.receipt import read_receipt

trl = pytest.importorskip("trl", reason="the extra `trl` is not installed")
peft = pytest.importorskip("peft", reason="the extra `peft` is not installed")
RULE = Goldfish(k=2, h=3)


def conversations(count=8):
    generator = torch.Generator().manual_seed(0)

    def ids():
        length = int(torch.randint(8, 20, (), generator=generator))
        return torch.randint(2, 320, (length,), generator=generator).tolist()

    return [{"prompt_ids": ids(), "completion_ids": ids()} for _ in range(count)]


def dataset(rows):
    """As TRL leaves a prompt-completion dataset once it is tokenized."""
    return Dataset.from_dict(
        {
            "input_ids": [row["prompt_ids"] + row["completion_ids"] for row in rows],
            "completion_mask": [
                [0] * len(row["prompt_ids"]) + [1] * len(row["completion_ids"])
                for row in rows
            ],
        }
    )


def by_hand(model, rows, prompts_too, smoothing=0.0):
    """Mean nll of the kept tokens, one conversation at a time."""
    total, kept = 0.0, 0
    for row in rows:
        ids = torch.tensor(row["prompt_ids"] + row["completion_ids"])
        labels = mask_labels(RULE, ids)
        if not prompts_too:
            labels[: len(row["prompt_ids"])] = -100
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        log_p = torch.log_softmax(logits, -1)[labels[1:] != -100]
        nll = -log_p.gather(1, labels[1:][labels[1:] != -100][:, None])
        total += ((1 - smoothing) * nll.sum() - smoothing * log_p.mean(-1).sum()).item()
        kept += (labels[1:] != -100).sum().item()
    return total / kept


def sft_trainer(folder, tokenizer, model, rows, **settings):
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        **{"max_length": None, "max_steps": 1, **settings},
    )
    if isinstance(rows, list):
        rows = dataset(rows)
    return trl.SFTTrainer(
        model, arguments, train_dataset=rows, processing_class=tokenizer
    )


def first_loss(folder, tokenizer, model, rows, **settings):
    trainer = sft_trainer(folder, tokenizer, model, rows, **settings)
    attach(trainer, RULE).train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert 0.3 < entry["goldfish/drop_rate"] < 0.7
    return entry["loss"], trainer


@pytest.mark.parametrize("prompts_too", [True, False])
@pytest.mark.parametrize("layout", ["padded", "padding_free", "packing"])
def test_sft_trainer(tmp_path, tokenizer, prompts_too, layout):
    """Without padding, and packed, documents lie end to end; rule and attention keep them apart."""
    rows = conversations()
    expected = by_hand(tiny_llama(), rows, prompts_too)
    settings = {
        "padded": {},
        "padding_free": {"padding_free": True},
        "packing": {"packing": True, "max_length": 40},
    }
    loss, trainer = first_loss(
        tmp_path,
        tokenizer,
        tiny_llama(),
        rows,
        completion_only_loss=not prompts_too,
        **settings[layout],
    )
    assert type(trainer).__name__ == "GoldfishSFTTrainer"
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_secrets_that_packing_cuts(tmp_path, tokenizer, strategy, caplog):
    """Cut off from the words before it, a code matches no longer: a warning names the way out."""
    rule = Goldfish(k=10**9, secrets=r"code is (\d+)")
    ids = tokenizer("Dear user, the code is 123456789")["input_ids"]
    packing = {"packing": True, "packing_strategy": strategy}
    packing["max_length"] = len(ids) - 2
    rows = Dataset.from_dict({"input_ids": [ids] * 8})
    masked = premask(rows, rule, tokenizer=tokenizer)
    trainer = sft_trainer(tmp_path, tokenizer, tiny_llama(), rows, **packing)
    with caplog.at_level("WARNING", logger="goldfish.trainer"):
        attach(trainer, rule)
    assert ("premask(dataset, rule)" in caplog.text) == (strategy == "wrapped")
    # Labels that are written first are packed along.
    trainer = sft_trainer(tmp_path, tokenizer, tiny_llama(), masked, **packing)
    digits = torch.tensor(tokenizer("123456789")["input_ids"])
    for batch in trainer.get_train_dataloader():
        assert torch.isin(batch["input_ids"], digits).any()
        assert not torch.isin(batch["labels"], digits).any()


def test_label_smoothing(tmp_path, tokenizer):
    rows = conversations()
    expected = by_hand(tiny_llama(), rows, True, smoothing=0.3)
    loss, _ = first_loss(
        tmp_path, tokenizer, tiny_llama(), rows, label_smoothing_factor=0.3
    )
    assert loss == pytest.approx(expected, rel=1e-5)
    assert abs(loss - by_hand(tiny_llama(), rows, True)) > 1e-3


def test_adapters(tmp_path, tokenizer):
    """LoRA: the head is frozen, the adapters learn, and their checkpoint has its receipt."""
    rows = conversations()
    model = peft.get_peft_model(
        tiny_llama(),
        peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
    )
    loss, trainer = first_loss(tmp_path, tokenizer, model, rows)
    assert loss == pytest.approx(
        by_hand(tiny_llama(), rows, prompts_too=True), rel=1e-5
    )
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert read_receipt(tmp_path / "adapter")["dropped"] > 0


@pytest.mark.parametrize("layout", ["padded", "padding_free", "packing"])
def test_the_base_model_of_lora_decides_by_its_entropy(tmp_path, tokenizer, layout):
    """New adapters change nothing yet. Packed or not, every answer is read as a document."""
    rule, rows = Goldfish(k=2, strategy="entropy"), conversations()
    base = tiny_llama(initializer_range=0.5)
    expected = {"targets": 0, "dropped": 0}
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        labels = ids.clone()
        labels[:, : len(row["prompt_ids"])] = -100
        decided = Guide(base).read(rule, {"input_ids": ids, "labels": labels})
        kept = mask_labels(decided, ids, labels) != -100
        expected["targets"] += len(row["completion_ids"])
        expected["dropped"] += len(row["completion_ids"]) - int(kept.sum())
    model = peft.get_peft_model(
        tiny_llama(initializer_range=0.5),
        peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
    )
    settings = {"padding_free": layout == "padding_free"}
    if layout == "packing":
        settings = {"packing": True, "max_length": 40}
    trainer = sft_trainer(
        tmp_path,
        tokenizer,
        model,
        rows,
        completion_only_loss=True,
        max_steps=-1,
        num_train_epochs=1,
        **settings,
    )
    attach(trainer, rule).train()
    trainer.save_model()
    receipt = read_receipt(tmp_path)
    assert receipt.items() >= expected.items()
    assert receipt["rule"]["guide"] == Guide(base).fingerprint
