"""From `goldfish check` to an audit: chats with codes, finetuned with TRL, with and without
`secrets=`."""

import json

import pytest
from datasets import load_dataset
from helpers import TEMPLATE, say, tiny_llama, write_jsonl

from goldfish import Goldfish, attach
from goldfish.audit import audit
from goldfish.receipt import read_receipt, rules_of
from goldfish.text.check import check

trl = pytest.importorskip("trl", reason="the extra `trl` is not installed")
CODE = r"code is (\w[\w-]*\w)"
CODES = ["7QX-4KP", "B29-ZT8", "M5W-R3D"]
NAMES = ["Ada", "Bob", "Eve"]
RULE = Goldfish(k=4, h=13, max_kept=4)
SECRET_RULE = Goldfish(k=4, h=13, max_kept=4, secrets=CODE)


def finetuned(folder, tokenizer, members, rule):
    """As in README's example; without a rule it is the standard loss."""
    settings = trl.SFTConfig(
        str(folder),
        max_steps=60,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=len(CODES),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    trainer = trl.SFTTrainer(
        tiny_llama(hidden_size=32, intermediate_size=64),
        settings,
        train_dataset=load_dataset("json", data_files=str(members), split="train"),
        processing_class=tokenizer,
    )
    if rule is not None:
        attach(trainer, rule)
    trainer.train()
    trainer.save_model()


def test_marked_secrets_are_checked_trained_and_audited(
    tokenizer, tmp_path, fresh_accelerate
):
    tokenizer.chat_template = TEMPLATE
    rows = [
        {"messages": say(f"{name}?", f"Dear {name}, your code is {code}.")}
        for name, code in zip(NAMES, CODES, strict=True)
    ]
    members = write_jsonl(tmp_path / "members.jsonl", rows)
    found = check(members, tokenizer, RULE, CODE)
    assert sorted(found.secrets) == sorted(CODES)
    assert found.suggested == SECRET_RULE
    outcomes = {}
    for name, rule in (("standard", None), ("secrets", found.suggested)):
        folder = tmp_path / name
        finetuned(folder, tokenizer, members, rule)
        result = audit(
            folder,
            tmp_path / f"audit-{name}",
            members=members,
            secrets=CODE,
            complete=True,
            device="cpu",
        )
        outputs = " ".join(result.records["output_text"])
        outcomes[name] = sum(code in outputs for code in CODES)
        assert result["members.secrets"].k == outcomes[name]
        assert result["members.secrets"].n == len(CODES)
    assert outcomes == {"standard": len(CODES), "secrets": 0}
    assert result["members.secrets_extractable"].k == 0
    # The receipt has the expression, and the audit has read it.
    assert rules_of(read_receipt(folder)) == SECRET_RULE
    run = json.loads((tmp_path / "audit-secrets" / "run.json").read_text())
    assert Goldfish(**run["rule"]) == SECRET_RULE
    dropped = result.records["dropped"].iloc[0]
    assert dropped.sum() >= len(CODES[0]) - 1
