import pytest
import torch
from torch.nn import functional as F

from goldfish import Goldfish, GoldfishLoss, mask_labels

RULE = Goldfish(k=2, h=3)


def batch(rows=3, length=40, vocab=50, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(
        rows, length, vocab, generator=generator, dtype=dtype, requires_grad=True
    )
    return logits, torch.randint(0, vocab, (rows, length), generator=generator)


def plain_loss(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_two_by_three_by_hand():
    """Three rows of uniform logits over 4 tokens: log 4 each, whatever is kept."""
    logits = torch.zeros(2, 3, 4, requires_grad=True)
    ids = torch.ones(2, 3, dtype=torch.int64)
    loss = GoldfishLoss(Goldfish(k=2, strategy="static"))(logits, ids, input_ids=ids)
    loss.backward()
    assert loss.item() == pytest.approx(1.3862943611)
    # static, k=2: position 2 is dropped, position 1 kept, so only the first logits of a row learn
    assert logits.grad[:, 1:].abs().max() == 0
    assert logits.grad[0, 0].tolist() == pytest.approx([0.125, -0.375, 0.125, 0.125])


def test_equals_cross_entropy_on_masked_labels():
    logits, ids = batch()
    labels = ids.clone()
    labels[0, :15] = -100
    loss = GoldfishLoss(RULE)(logits, labels, input_ids=ids)
    expected = plain_loss(logits, mask_labels(RULE, ids, labels))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(loss, logits),
        torch.autograd.grad(expected, logits),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-18)


def test_bf16_logits_lose_nothing_more_than_the_plain_loss():
    logits, ids = batch(dtype=torch.bfloat16)
    exact = GoldfishLoss(RULE)(logits.double(), ids, input_ids=ids)
    baseline = plain_loss(logits.float(), mask_labels(RULE, ids))
    ours = GoldfishLoss(RULE)(logits, ids, input_ids=ids)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs() <= (baseline - exact).abs() + 1e-6


@pytest.mark.parametrize("counted", [None, 0, torch.tensor(0), torch.tensor(7)])
@pytest.mark.parametrize("everything", ["ignored", "empty batch", "one token"])
def test_no_target_gives_a_zero_that_can_be_differentiated(everything, counted):
    """counted: what Trainer counts over the whole step, 0 where every label is ignored."""
    logits, ids = batch()
    if everything == "empty batch":
        logits, ids = logits[:0], ids[:0]
    elif everything == "one token":
        logits, ids = logits[:, :1], ids[:, :1]
    labels = torch.full_like(ids, -100) if everything == "ignored" else ids
    loss = GoldfishLoss(RULE)(logits, labels, input_ids=ids, num_items_in_batch=counted)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0
    assert (gradient == 0).all()


def test_from_labels_padding_does_not_shift_decisions():
    """Trainer's call: the rule sees labels only; ignored tokens are as if they were not there."""
    logits, ids = batch(rows=1)
    for pad in ((5, 0), (0, 5)):
        padded_logits, padded = F.pad(logits, (0, 0, *pad)), F.pad(ids, pad, value=-100)
        expected = plain_loss(
            padded_logits, F.pad(mask_labels(RULE, ids), pad, value=-100)
        )
        torch.testing.assert_close(
            GoldfishLoss(RULE)((padded_logits,), padded), expected, rtol=1e-12, atol=0
        )


def test_trainer_call_has_the_scale_of_the_mean_over_kept_tokens():
    logits, ids = batch()
    outputs = {"logits": logits}
    expected = plain_loss(logits, mask_labels(RULE, ids))
    counted = torch.tensor(ids[:, 1:].numel())  # what Trainer counts: before dropping
    torch.testing.assert_close(
        GoldfishLoss(RULE)(outputs, ids, num_items_in_batch=counted),
        expected,
        rtol=1e-12,
        atol=0,
    )
    # one of two equal micro-batches of a step contributes half of its mean
    half = GoldfishLoss(RULE)(outputs, ids, num_items_in_batch=2 * int(counted))
    torch.testing.assert_close(half, expected / 2, rtol=1e-12, atol=0)


def test_trainer_evaluation_is_the_plain_loss():
    logits, ids = batch()
    with torch.no_grad():
        loss = GoldfishLoss(RULE)((logits,), ids)
        in_a_loop = GoldfishLoss(RULE)(logits, ids, input_ids=ids)
    torch.testing.assert_close(
        loss, plain_loss(logits, ids).detach(), rtol=1e-12, atol=0
    )
    assert (in_a_loop - loss).abs() > 1e-3


def test_errors():
    logits, ids = batch()
    with pytest.raises(
        ValueError, match=r"logits \(3, 39, 50\) and labels \(3, 40\) do not fit"
    ):
        GoldfishLoss(RULE)(logits[:, :-1], ids, input_ids=ids)
    with pytest.raises(
        ValueError,
        match=r"needs input_ids in a training loop: loss\(logits, labels, input_ids=input",
    ):
        GoldfishLoss(RULE)(logits, ids)
    with pytest.raises(ValueError, match="needs labels"):
        GoldfishLoss(RULE)({"logits": logits}, None)
