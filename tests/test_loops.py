"""Custom training loops: the loss of a step does not depend on how the step is divided."""

import re

import accelerate_loop
import common
import plain_loop
import pytest
import torch
from launch import LOOP
from transformers import LlamaForCausalLM

from goldfish import Goldfish


@pytest.fixture(scope="module")
def loop(topics):
    return ["--text", str(topics), *LOOP]


@pytest.fixture(scope="module")
def whole(loop):
    """Each step in one piece."""
    return plain_loop.main([*loop, "--accumulation", "1"])


@pytest.mark.core
def test_accumulation_changes_nothing(loop, whole):
    """Nor do micro-batches of different sizes: 3 + 3 + 2 rows."""
    assert plain_loop.main([*loop, "--accumulation", "3"]) == pytest.approx(
        whole, rel=1e-5
    )
    assert accelerate_loop.main([*loop, "--accumulation", "4"]) == pytest.approx(
        whole, rel=1e-5
    )


def test_first_loss_by_hand(topics, whole):
    """Token by token: the mean of -log p over what the rule leaves of the first step's rows."""
    texts = common.load_texts(str(topics))
    tokenizer = common.byte_level_bpe(texts, 2048)
    torch.manual_seed(0)
    model = LlamaForCausalLM(common.small_llama(tokenizer, 128))
    rows = torch.tensor(common.cut_windows(texts, tokenizer, 64))
    (step,) = plain_loop.batches(rows, 1)
    losses = []
    for ids in step:
        dropped = Goldfish(k=4, h=13, max_kept=4).dropped(ids)
        with torch.no_grad():
            log_p = model(ids[None]).logits[0].double().log_softmax(-1)
        losses += [
            -log_p[i - 1, ids[i]].item() for i in range(1, len(ids)) if not dropped[i]
        ]
    assert whole[0] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_two_processes_are_one(whole, in_two):
    printed = re.findall(r"loss (\S+) nats per kept token", in_two[1])
    assert printed == [f"{whole[0]:.3f}", f"{whole[-1]:.3f}"], (
        "one process prints the first and the last"
    )


def test_batches_that_do_not_divide_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(accelerate_loop, "BATCH", 7)
    monkeypatch.setattr(accelerate_loop.Accelerator, "num_processes", 2)
    with pytest.raises(SystemExit):
        accelerate_loop.main([])
    assert (
        "7 rows an optimiser step do not divide among 2 processes"
        in capsys.readouterr().err
    )
