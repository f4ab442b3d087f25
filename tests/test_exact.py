"""Exact in every loop: loss and gradients of one optimiser step, against an eager oracle.

The oracle computes row by row in fp64. The budget of each figure is what the same oracle loses in
fp32: twice its distance from fp64, and a few roundings.
"""

import pytest
import torch
import transformers
from accelerate import Accelerator
from helpers import (
    RULE,
    NoLossArguments,
    OwnMean,
    model_of,
    tiny_llama,
    trained,
    unequal_rows,
)
from packaging.version import Version
from torch.nn import functional as F
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    LlamaForCausalLM,
    Trainer,
)

from goldfish import (
    Goldfish,
    GoldfishLoss,
    GoldfishTrainer,
    attach,
    fuse_head,
    mask_labels,
)
from goldfish.loss import smoothed_loss

pytestmark = pytest.mark.core
ROUNDED = (
    5e-5 if Version(transformers.__version__) < Version("5") else 0
)  # its logs have four decimals
BATCHES = [(8, 1), (1, 8)]  # rows a micro-batch, micro-batches a step
WAYS = {
    "fused": {"trainer_class": GoldfishTrainer, "goldfish": RULE},
    "logits": {"trainer_class": GoldfishTrainer, "goldfish": RULE, "fused": False},
    "attached": {"then": lambda trainer: attach(trainer, RULE)},
    "attached and fused": {"then": lambda trainer: attach(trainer, RULE, fused=True)},
}


def rows():
    """Eight rows of unequal lengths, one of them without any target."""
    eight = unequal_rows(8).to_dict()
    eight["labels"][5] = [-100] * len(eight["labels"][5])
    return type(unequal_rows()).from_dict(eight)


def by_hand(dtype, smoothing=0.0, rule=RULE):
    """Loss, gradients and number of kept tokens of one step, each row alone and without padding."""
    model, total, kept = tiny_llama().to(dtype), 0.0, 0
    for row in rows():
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        taught = (labels != -100) & ~rule.dropped(ids)
        log_p = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1], -1)[
            taught[1:]
        ]
        nll = -log_p[torch.arange(len(log_p)), ids[1:][taught[1:]]]
        total = total + ((1 - smoothing) * nll - smoothing * log_p.mean(-1)).sum()
        kept += len(nll)
    (total / kept).backward()
    return (
        (total / kept).item(),
        torch.cat([p.grad.flatten() for p in model.parameters()]),
        kept,
    )


def assert_as_good(loss, gradient, smoothing=0.0):
    exact, plain = by_hand(torch.float64, smoothing), by_hand(torch.float32, smoothing)
    assert (
        abs(loss - exact[0]) <= 2 * abs(plain[0] - exact[0]) + 4e-7 * exact[0] + ROUNDED
    )
    own = (plain[1] - exact[1]).abs().max()
    assert (gradient - exact[1]).abs().max() <= 2 * own + 4e-7 * exact[1].abs().max()


def one_step(
    folder, tokenizer, batch, accumulation, model=LlamaForCausalLM, settings=None, **how
):
    trainer, (loss,), (gradient,) = trained(
        folder,
        tokenizer,
        batch=batch,
        accumulation=accumulation,
        steps=1,
        train_dataset=rows(),
        model=model_of(model),
        settings=settings or {},
        **how,
    )
    return trainer, loss, gradient


@pytest.mark.parametrize(("batch", "accumulation"), BATCHES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", [LlamaForCausalLM, NoLossArguments, OwnMean])
def test_trainer(tmp_path, tokenizer, model, way, batch, accumulation):
    """Models that take num_items_in_batch, and those that divide their loss themselves."""
    assert_as_good(
        *one_step(tmp_path, tokenizer, batch, accumulation, model, **WAYS[way])[1:]
    )


@pytest.mark.parametrize(("batch", "accumulation"), BATCHES)
@pytest.mark.parametrize("way", ["fused", "logits", "attached"])
@pytest.mark.parametrize("model", [LlamaForCausalLM, NoLossArguments])
def test_label_smoothing(tmp_path, tokenizer, model, way, batch, accumulation):
    """Smoothed over the kept tokens of the whole step, though some micro-batch has none."""
    settings = {"label_smoothing_factor": 0.2}
    trainer, loss, gradient = one_step(
        tmp_path, tokenizer, batch, accumulation, model, settings, **WAYS[way]
    )
    assert_as_good(loss, gradient, smoothing=0.2)
    assert abs(by_hand(torch.float64)[0] - loss) > 1e-3, "smoothing makes a difference"
    if (
        model is LlamaForCausalLM
    ):  # the only class here whose labels transformers' own smoother shifts
        plain = Trainer(
            model=trainer.model, args=trainer.args, data_collator=trainer.data_collator
        )
        ours = trainer.evaluate()["eval_loss"]
        assert ours == pytest.approx(
            plain.evaluate(trainer.eval_dataset)["eval_loss"], rel=1e-6
        )


def test_smoothing_is_transformers_own_where_nothing_is_dropped(tmp_path, tokenizer):
    settings = {"label_smoothing_factor": 0.2}
    _, plain, plain_gradient = one_step(tmp_path, tokenizer, 8, 1, settings=settings)
    nothing = {"then": lambda trainer: attach(trainer, Goldfish(k=10**9))}
    _, loss, gradient = one_step(
        tmp_path, tokenizer, 8, 1, settings=settings, **nothing
    )
    assert loss == pytest.approx(plain, rel=1e-6)
    torch.testing.assert_close(gradient, plain_gradient, rtol=1e-5, atol=1e-7)


def test_smoothed_loss_of_no_target_is_a_zero():
    logits = torch.randn(1, 3, 5, requires_grad=True)
    loss = smoothed_loss((logits,), torch.full((1, 3), -100), epsilon=0.1)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0
    assert not gradient.any()


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.device_count() != 1,
    reason="needs one CUDA device; several make a DataParallel",
)
@pytest.mark.parametrize("model", [LlamaForCausalLM, NoLossArguments])
@pytest.mark.parametrize("way", WAYS)
def test_trainer_on_cuda(fresh_accelerate, tmp_path, tokenizer, way, model):
    trainer, loss, gradient = one_step(
        tmp_path, tokenizer, 2, 4, model, {"use_cpu": False}, **WAYS[way]
    )
    assert trainer.model.device.type == "cuda"
    assert_as_good(loss, gradient.cpu())


def test_evaluation_of_a_model_with_its_own_mean(tmp_path, tokenizer):
    trainer, _, _ = one_step(tmp_path, tokenizer, 2, 4, OwnMean, **WAYS["logits"])
    plain = Trainer(
        model=trainer.model, args=trainer.args, data_collator=trainer.data_collator
    )
    assert (
        trainer.evaluate()["eval_loss"]
        == plain.evaluate(trainer.eval_dataset)["eval_loss"]
    )


@pytest.mark.parametrize("way", ["fused", "logits"])
def test_resuming_in_mid_epoch_gives_the_same_next_losses(tmp_path, tokenizer, way):
    """A new trainer, with other weights until it loads those of the checkpoint."""
    settings = {"save_strategy": "steps", "save_steps": 1, "seed": 3}
    how = WAYS[way] | {"batch": 2, "accumulation": 2, "steps": 4, "settings": settings}
    _, losses, gradients = trained(tmp_path, tokenizer, **how)
    other = tiny_llama()
    other.lm_head.weight.data.add_(1.0)
    resumed = {"resume_from_checkpoint": str(tmp_path / "checkpoint-1")}
    _, again, next_gradients = trained(
        tmp_path, tokenizer, **how, model=other, train=resumed
    )
    assert again == losses
    assert len(next_gradients) == 3
    assert all(
        torch.equal(a, b) for a, b in zip(next_gradients, gradients[1:], strict=True)
    )


def micro_batches(tokenizer, size):
    collator = DataCollatorForSeq2Seq(tokenizer)
    found = list(rows())
    return [
        collator([dict(row) for row in found[at : at + size]])
        for at in range(0, len(found), size)
    ]


def masked(batch):
    return mask_labels(
        RULE,
        batch["input_ids"],
        batch["labels"],
        attention_mask=batch["attention_mask"],
    )


def goldfish_loss(model, batch, total):
    """GoldfishLoss is a mean over the batch's kept tokens; their share of the step's is exact."""
    ids, attention_mask = batch["input_ids"], batch["attention_mask"]
    loss = GoldfishLoss(RULE)(
        model(input_ids=ids, attention_mask=attention_mask).logits,
        batch["labels"],
        input_ids=ids,
        attention_mask=attention_mask,
    )
    return loss * (masked(batch)[:, 1:] != -100).sum() / total


def masked_labels(model, batch, total):
    return model(**batch | {"labels": masked(batch)}, num_items_in_batch=total).loss


def fused_head(model, batch, total):
    fuse_head(model)
    output = model(**batch | {"labels": masked(batch)}, num_items_in_batch=total)
    assert "logits" not in output
    return output.loss


LOSSES = [goldfish_loss, masked_labels, fused_head]


@pytest.mark.parametrize("size", [8, 1])
@pytest.mark.parametrize("loss_of", LOSSES)
def test_a_custom_loop(tokenizer, loss_of, size):
    model, batches = tiny_llama().train(), micro_batches(tokenizer, size)
    total = sum((masked(batch)[:, 1:] != -100).sum() for batch in batches)
    loss = 0.0
    for batch in batches:
        part = loss_of(model, batch, total)
        part.backward()
        loss += part.item()
    assert_as_good(loss, torch.cat([p.grad.flatten() for p in model.parameters()]))


@pytest.mark.parametrize("size", [8, 2])
@pytest.mark.parametrize("loss_of", LOSSES)
def test_an_accelerate_loop(fresh_accelerate, tokenizer, loss_of, size):
    """accelerate divides by the number of micro-batches; the loss is divided by tokens already."""
    steps = 8 // size
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    model = tiny_llama().train()
    model, optimizer = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=1e-2)
    )
    batches, loss = micro_batches(tokenizer, size), 0.0
    total = sum((masked(batch)[:, 1:] != -100).sum() for batch in batches)
    before = [p.detach().clone() for p in model.parameters()]
    for batch in batches:
        with accelerator.accumulate(model):
            part = loss_of(model, batch, total)
            accelerator.backward(part * steps)
            loss += part.item()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            optimizer.step()
            optimizer.zero_grad()
    assert_as_good(loss, gradient)
    assert any(
        not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)
    ), "it stepped"


@pytest.mark.parametrize("fused", [True, False])
def test_a_collator_that_makes_no_labels(tmp_path, tokenizer, fused):
    """They are made once: training, receipt and gauge agree that padding is no target."""
    unlabelled = unequal_rows(8).remove_columns("labels")
    settings = {"learning_rate": 0.0}
    trainer, (loss,), _ = trained(
        tmp_path,
        tokenizer,
        trainer_class=GoldfishTrainer,
        goldfish=RULE,
        fused=fused,
        batch=8,
        steps=1,
        train_dataset=unlabelled,
        data_collator=DataCollatorWithPadding(tokenizer),
        settings=settings,
    )
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    sums = torch.zeros(4, dtype=torch.float64)
    with torch.no_grad():
        for row in unlabelled:
            ids = torch.tensor(row["input_ids"])
            nll = F.cross_entropy(
                trainer.model(input_ids=ids[None]).logits[0, :-1],
                ids[1:],
                reduction="none",
            )
            dropped = RULE.dropped(ids)[1:]
            sums += torch.stack(
                [
                    nll[~dropped].sum(),
                    (~dropped).sum(),
                    nll[dropped].sum(),
                    dropped.sum(),
                ]
            )
    assert loss == pytest.approx((sums[0] / sums[1]).item(), rel=1e-5)
    assert entry["goldfish/drop_rate"] == (sums[3] / (sums[1] + sums[3])).item()
