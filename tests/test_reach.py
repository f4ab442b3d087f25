"""The trainers, models and batches that people bring along: right, or refused in words."""

import importlib
import pickle
import sys
import types
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate.state import GradientState
from helpers import RULE, tiny_llama, trained, unequal_rows
from transformers import (
    BatchEncoding,
    DataCollatorForSeq2Seq,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from goldfish import Goldfish, GoldfishTrainer, attach, mask_labels
from goldfish.receipt import read_receipt
from goldfish.unsupported import why_not_this_model, why_not_this_trainer

pytestmark = pytest.mark.core
NOTHING = Goldfish(k=10**9)
TARGETS = sum(len(row["input_ids"]) - 1 for row in unequal_rows())


def attached(rule=RULE, **how):
    return lambda trainer: attach(trainer, rule, **how)


def logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class OnlyKeywords(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return super().compute_loss(model, inputs, return_outputs, **kwargs)


class OtherOrder(Trainer):
    def compute_loss(
        self, model, inputs, num_items_in_batch=None, return_outputs=False
    ):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


@pytest.mark.parametrize("kind", [OnlyKeywords, OtherOrder])
def test_compute_loss_of_a_subclass_gets_keywords(tmp_path, tokenizer, kind):
    _, losses, _ = trained(
        tmp_path, tokenizer, trainer_class=kind, then=attached(), accumulation=2
    )
    _, expected, _ = trained(tmp_path, tokenizer, then=attached(), accumulation=2)
    assert losses == expected


# The gauge


def test_the_gauge_of_prompt_tuning_skips_the_virtual_tokens(tmp_path, tokenizer):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer, _, _ = trained(
        tmp_path,
        tokenizer,
        model=peft.get_peft_model(tiny_llama(), config),
        batch=1,
        steps=1,
        then=attached(),
        train_dataset=unequal_rows().select([0]),
        settings={"learning_rate": 0.0},
    )
    (entry,) = logs(trainer)
    ids = torch.tensor(unequal_rows()[0]["input_ids"])
    dropped = RULE.dropped(ids)[1:]
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=ids[None]).logits[0, 3:-1]
    nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    assert entry["goldfish/kept_loss"] == pytest.approx(
        nll[~dropped].mean().item(), rel=1e-5
    )
    assert entry["goldfish/dropped_loss"] == pytest.approx(
        nll[dropped].mean().item(), rel=1e-5
    )


def test_a_gauge_that_fails_is_off_and_training_goes_on(
    tmp_path, tokenizer, monkeypatch, caplog
):
    calls = []

    def fails(*arguments):
        calls.append(arguments)
        raise RuntimeError("no logits here")

    monkeypatch.setattr("goldfish.trainer.measure", fails)
    with caplog.at_level("WARNING", logger="goldfish.trainer"):
        trainer, losses, _ = trained(tmp_path, tokenizer, then=attached())
    assert len(losses) == 4
    assert (
        len(calls)
        == caplog.text.count("gauge of memorization is off")
        == caplog.text.count("no logits here")
        == 1
    )
    assert "goldfish/drop_rate" in logs(trainer)[-1]
    assert "goldfish/gap" not in logs(trainer)[-1]


class Sees(LlamaForCausalLM):
    """Stands for a vision-language model: it cannot do without its pictures."""

    def forward(self, input_ids=None, pixel_values=None, **kwargs):
        assert pixel_values is not None
        return super().forward(input_ids=input_ids, **kwargs)


def test_the_gauge_skips_batches_with_pictures(tmp_path, tokenizer, caplog):
    collate, model = DataCollatorForSeq2Seq(tokenizer), tiny_llama()
    model.__class__ = Sees
    with caplog.at_level("WARNING", logger="goldfish.trainer"):
        trainer, losses, _ = trained(
            tmp_path,
            tokenizer,
            model=model,
            then=attached(),
            steps=2,
            data_collator=lambda rows: {
                **collate(rows),
                "pixel_values": torch.zeros(7, 3),
            },
        )
    assert len(losses) == 2
    assert not any("goldfish/gap" in entry for entry in logs(trainer))
    assert "off" not in caplog.text


@pytest.mark.parametrize(
    ("settings", "measured"),
    [
        ({"logging_strategy": "epoch", "num_train_epochs": 2}, 2),
        ({"logging_strategy": "no", "num_train_epochs": 2}, 0),
        (
            {
                "logging_strategy": "steps",
                "logging_steps": 3,
                "logging_first_step": True,
                "num_train_epochs": 1,
            },
            2,
        ),
    ],
)
def test_the_gauge_is_read_for_every_log_and_no_other(
    tmp_path, tokenizer, monkeypatch, settings, measured
):
    from goldfish import gauge

    calls = []
    monkeypatch.setattr(
        "goldfish.trainer.measure", lambda *a: calls.append(a) or gauge.measure(*a)
    )
    trainer, _, _ = trained(
        tmp_path, tokenizer, then=attached(), batch=4, steps=-1, settings=settings
    )
    assert len(calls) == len(logs(trainer)) == measured
    assert all("goldfish/gap" in entry for entry in logs(trainer))


# Models


def tiny_config(kind, **more):
    sizes = {
        "vocab_size": 320,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    return kind(**{**sizes, **more})


@pytest.mark.parametrize(
    ("model", "config", "reason"),
    [
        ("T5ForConditionalGeneration", transformers.T5Config, "encoder-decoder"),
        ("BertForMaskedLM", transformers.BertConfig, "ForMaskedLMLoss"),
        (
            "BertForTokenClassification",
            transformers.BertConfig,
            "ForTokenClassification",
        ),
        (
            "BertForQuestionAnswering",
            transformers.BertConfig,
            "ForQuestionAnsweringLoss",
        ),
        ("BertForPreTraining", transformers.BertConfig, "generates no text"),
        ("BertForNextSentencePrediction", transformers.BertConfig, "generates no text"),
        (
            "LlamaForSequenceClassification",
            transformers.LlamaConfig,
            "ForSequenceClassificationLoss",
        ),
    ],
)
def test_models_that_do_not_predict_the_next_token_are_refused(
    tmp_path, model, config, reason
):
    with torch.device("meta"):
        other = getattr(transformers, model)(
            tiny_config(config, d_model=16, d_ff=16, num_layers=1, num_heads=2)
        )
    arguments = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True
    )
    for give in (
        lambda **how: GoldfishTrainer(
            other.to_empty(device="cpu"), arguments, goldfish=RULE, **how
        ),
        lambda **how: attach(
            Trainer(other.to_empty(device="cpu"), arguments, **how), RULE
        ),
    ):
        with pytest.raises(
            ValueError,
            match=rf"{model} .*{reason}.*causal language models; pass a compute_loss_func",
        ):
            give()
        give(compute_loss_func=lambda outputs, labels, **_: outputs[0].sum())


def test_vision_language_models_pass():
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                vision_config=vision, text_config=tiny_config(transformers.LlamaConfig)
            )
        )
    assert (
        why_not_this_model(model)
        == why_not_this_model(tiny_llama())
        == why_not_this_model(torch.nn.Linear(2, 2))
        == ""
    )


@pytest.mark.parametrize("rule", [NOTHING, RULE])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_gpt2_is_exact_whatever_trainer_counts(tmp_path, tokenizer, rule, accumulation):
    """Trainer counts the first token of its rows as a target, as older versions do everywhere."""
    sizes = {
        "vocab_size": 320,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 64,
        "initializer_range": 0.3,
    }
    config = transformers.GPT2Config(
        **sizes,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    total, kept = 0.0, 0
    for row in unequal_rows():
        ids = torch.tensor(row["input_ids"])
        labels = mask_labels(rule, ids)[1:]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(
            logits, labels, reduction="sum"
        ).item()
        kept += (labels != -100).sum().item()
    _, losses, _ = trained(
        tmp_path,
        tokenizer,
        model=model,
        then=attached(rule),
        batch=16 // accumulation,
        accumulation=accumulation,
        steps=1,
    )
    assert losses[0] == pytest.approx(total / kept, rel=1e-5)


# Batches


class ReadsAttributes(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        assert type(inputs) is BatchEncoding
        assert inputs.input_ids.shape == inputs.labels.shape
        return super().compute_loss(
            model, inputs, return_outputs=return_outputs, **kwargs
        )


def test_batches_keep_their_type(tmp_path, tokenizer):
    collate = DataCollatorForSeq2Seq(tokenizer)
    _, losses, _ = trained(
        tmp_path,
        tokenizer,
        trainer_class=ReadsAttributes,
        then=attached(),
        data_collator=lambda rows: BatchEncoding(dict(collate(rows))),
    )
    assert losses == trained(tmp_path, tokenizer, then=attached())[1]


def test_rows_that_were_cut_among_processes_are_refused(tmp_path, tokenizer):
    """DeepSpeed Ulysses' loader makes shift_labels of labels and cuts the rows, before Trainer."""
    collate = DataCollatorForSeq2Seq(tokenizer)

    def cut(rows):
        batch = dict(collate(rows))
        batch["shift_labels"] = batch.pop("labels").roll(-1)
        return batch

    with pytest.raises(
        ValueError, match=r"shift_labels and no labels.*premask\(dataset, rule\)"
    ):
        trained(tmp_path, tokenizer, then=attached(), data_collator=cut)
    trainer = Trainer(
        tiny_llama(),
        TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True),
    )
    trainer.accelerator = SimpleNamespace(
        parallelism_config=SimpleNamespace(sp_enabled=True)
    )
    with pytest.raises(ValueError, match="DeepSpeed Ulysses"):
        attach(trainer, RULE)


# Receipts


def test_a_new_model_is_counted_anew(tmp_path, tokenizer):
    """model_init makes one for every train(), and so for every trial of hyperparameter_search."""

    def init_trainer(model, **how):
        return Trainer(model_init=lambda: tiny_llama(), **how)

    trainer, losses, _ = trained(
        tmp_path, tokenizer, trainer_class=init_trainer, then=attached(fused=True)
    )
    assert trainer._counts.sum()[0] == TARGETS
    trainer.train()
    assert trainer._counts.sum()[0] == TARGETS
    assert [entry["loss"] for entry in logs(trainer)] == losses


class OutOfMemoryOnce(Trainer):
    def compute_loss(self, model, inputs, **kwargs):
        if len(inputs["input_ids"]) == 8:
            raise RuntimeError("CUDA out of memory.")
        return super().compute_loss(model, inputs, **kwargs)


def test_batches_that_ran_out_of_memory_are_not_counted(tmp_path, tokenizer):
    settings = {"auto_find_batch_size": True, "num_train_epochs": 1}
    trainer, losses, _ = trained(
        tmp_path,
        tokenizer,
        trainer_class=OutOfMemoryOnce,
        then=attached(),
        batch=8,
        steps=-1,
        settings=settings,
    )
    assert len(losses) > 2, "with smaller batches"
    assert trainer._counts.sum()[0] == TARGETS
    dropped = sum(
        int(RULE.dropped(torch.tensor(row["input_ids"]))[1:].sum())
        for row in unequal_rows()
    )
    assert trainer._counts.sum()[1] == dropped


def test_a_mistyped_checkpoint_is_trainers_own_error(tmp_path, tokenizer):
    with pytest.raises((ValueError, OSError), match="nowhere") as error:
        trained(
            tmp_path,
            tokenizer,
            then=attached(),
            train={"resume_from_checkpoint": str(tmp_path / "nowhere")},
        )
    assert "without a rule" not in str(error.value)


def test_the_model_card_has_the_tag_the_rule_and_the_counts(tmp_path, tokenizer):
    trainer, _, _ = trained(tmp_path, tokenizer, then=attached())
    assert trainer.model.model_tags == ["goldfish-loss"]
    trainer.create_model_card(model_name="m", tags="mine")
    card = (tmp_path / "README.md").read_text()
    assert card.count("\n- goldfish-loss") == card.count("\n- mine") == 1
    targets, dropped = trainer._counts.sum()
    assert f"- `{trainer.goldfish}` dropped {dropped:,} of {targets:,} targets." in card


# Trainers


def unsloths(name):
    """Unsloth writes TRL's trainers anew, in modules of its own; they are not TRL's subclasses."""
    source = {"__module__": f"Unsloth{name}"}
    return type(
        f"Unsloth{name}", (type(f"_Unsloth{name}", (Trainer,), source),), source
    )


def test_trainers_that_do_not_learn_given_tokens_are_refused(tmp_path):
    trl = pytest.importorskip("trl")
    names = ("DPOTrainer", "KTOTrainer", "RewardTrainer", "GRPOTrainer", "RLOOTrainer")
    for name, base in [
        *((name, getattr(trl, name)) for name in names),
        ("DPOTrainer", unsloths("DPOTrainer")),
    ]:
        kind = type("Mine", (base,), {})
        trainer = object.__new__(kind)
        trainer.args = SimpleNamespace()
        reason = why_not_this_trainer(trainer)
        assert reason.startswith(
            f"TRL's {name} does not learn the tokens of given documents"
        )
        with pytest.raises(ValueError, match="Train the documents with SFTTrainer"):
            attach(trainer, RULE)
        assert type(trainer) is kind
    try:
        from trl.experimental.gkd import GKDTrainer
    except ImportError:
        from trl import GKDTrainer
    for kind, lmbda, refused in (
        (GKDTrainer, 0.5, True),
        (GKDTrainer, 0.0, False),
        (trl.SFTTrainer, 0.5, False),
        (unsloths("SFTTrainer"), 0.5, False),
    ):
        trainer = object.__new__(kind)
        trainer.args, trainer.accelerator = (
            SimpleNamespace(lmbda=lmbda),
            SimpleNamespace(),
        )
        assert ("set lmbda=0" in why_not_this_trainer(trainer)) == refused


class Unsloth(Trainer):
    """Binds `train` on the instance, as Unsloth does, so that no subclass's method is called."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        plain = type(self).train

        def train(self, *args, **kwargs):
            self.prepared = True
            return plain(self, *args, **kwargs)

        self.train = types.MethodType(train, self)


def test_unsloths_pattern(tmp_path, tokenizer):
    settings = {"save_strategy": "steps", "save_steps": 2}
    trainer, losses, _ = trained(
        tmp_path,
        tokenizer,
        trainer_class=Unsloth,
        then=attached(fused=True),
        settings=settings,
    )
    assert trainer.prepared
    assert losses == pytest.approx(
        trained(tmp_path / "plain", tokenizer, then=attached())[1], rel=1e-5
    )
    assert trainer._counts.sum()[0] == TARGETS
    assert "logits" in trainer.model.train()(
        input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]])
    )
    trainer.goldfish = NOTHING
    with pytest.raises(ValueError, match=r"was trained under Goldfish\(k=3"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trainer.train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2"), allow_other_rule=True
    )
    assert read_receipt(tmp_path / "checkpoint-4")["before"] == read_receipt(
        tmp_path / "checkpoint-2"
    )


@pytest.mark.skipif(
    not hasattr(transformers.trainer, "apply_liger_kernel"),
    reason="Trainer calls it elsewhere",
)
@pytest.mark.parametrize("fused", [True, False])
def test_liger_leaves_the_head_to_a_fused_loss(
    tmp_path, tokenizer, monkeypatch, caplog, fused
):
    applied = []
    monkeypatch.setattr(
        "transformers.trainer.apply_liger_kernel",
        lambda model, config: applied.append(config),
    )
    settings = {"use_liger_kernel": True, "liger_kernel_config": {"rope": True}}
    with caplog.at_level("WARNING", logger="goldfish.trainer"):
        trained(
            tmp_path, tokenizer, then=attached(fused=fused), settings=settings, steps=1
        )
    assert applied == [
        {"rope": True, **({"fused_linear_cross_entropy": False} if fused else {})}
    ]
    assert ("Liger's fused_linear_cross_entropy is off" in caplog.text) == fused


def test_an_attached_trainer_can_be_pickled(tmp_path, tokenizer):
    """As far as Trainer can be: before it trains."""
    GradientState._reset_state()  # accelerate keeps references to the loaders of interrupted runs
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to="none", use_cpu=True
    )
    trainer = Trainer(
        tiny_llama(), arguments, DataCollatorForSeq2Seq(tokenizer), unequal_rows()
    )
    twin = pickle.loads(pickle.dumps(attach(trainer, RULE, fused=True)))
    assert type(twin) is type(trainer)
    assert twin.goldfish == RULE
    twin.train()
    assert twin._counts.sum()[0] > trainer._counts.sum()[0] == 0


# Plugins, with stand-ins for the frameworks that load them


def test_axolotls_plugin(tmp_path, tokenizer, monkeypatch):
    pydantic = pytest.importorskip("pydantic")
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "goldfish.integrations.axolotl", raising=False)
    with pytest.raises(
        RuntimeError, match="goldfish plugin cannot be loaded"
    ):  # Axolotl would ignore an ImportError
        importlib.import_module("goldfish.integrations.axolotl")
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", base)
    monkeypatch.setitem(
        sys.modules, "axolotl.integrations", types.ModuleType("axolotl.integrations")
    )
    monkeypatch.setitem(sys.modules, "axolotl", types.ModuleType("axolotl"))
    plugin = importlib.import_module("goldfish.integrations.axolotl").GoldfishPlugin()
    module, _, name = plugin.get_input_args().rpartition(".")
    arguments = getattr(importlib.import_module(module), name)
    with pytest.raises(pydantic.ValidationError, match="goldfish"):
        arguments()
    cfg = SimpleNamespace(
        goldfish=arguments(goldfish={"k": 3, "h": 4}).goldfish,
        output_dir=str(tmp_path / "out"),
    )

    def create(trainer):
        plugin.post_trainer_create(cfg, trainer)
        return trainer

    trainer, losses, _ = trained(tmp_path, tokenizer, then=create)
    plugin.post_train(cfg, trainer.model)
    assert losses == trained(tmp_path, tokenizer, then=attached())[1]
    assert read_receipt(tmp_path / "out")["targets"] == TARGETS
    monkeypatch.delitem(sys.modules, "goldfish.integrations.axolotl")


def test_ms_swifts_callback(tmp_path, tokenizer, monkeypatch):
    """Made before the trainer is, it attaches at the end of Trainer.__init__."""
    callbacks = types.ModuleType("swift.callbacks")
    callbacks.callbacks_map = {}

    class Callback(transformers.TrainerCallback):
        def __init__(self, args, trainer):
            self.args, self.trainer = args, trainer

    callbacks.TrainerCallback = Callback
    monkeypatch.setitem(sys.modules, "swift", types.ModuleType("swift"))
    monkeypatch.setitem(sys.modules, "swift.callbacks", callbacks)
    importlib.import_module("goldfish.integrations.ms_swift").register(RULE)

    class SwiftTrainer(Trainer):
        def __init__(self, args, callbacks, **kwargs):
            super().__init__(
                args=args,
                callbacks=[*callbacks, callbacks_map["goldfish"](args, self)],
                **kwargs,
            )

    callbacks_map = callbacks.callbacks_map
    trainer, losses, _ = trained(tmp_path, tokenizer, trainer_class=SwiftTrainer)
    assert trainer.goldfish == RULE
    assert losses == trained(tmp_path, tokenizer, then=attached())[1]
    monkeypatch.delitem(sys.modules, "goldfish.integrations.ms_swift")
