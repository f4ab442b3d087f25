"""Sequence parallelism: two processes (gloo) that hold half of every row each, against one that holds the whole."""

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed as dist
from torch.nn.functional import cross_entropy, pad

from goldfish import Goldfish, GoldfishCollator, mask_labels
from goldfish.letters import Vocabulary

VOCABULARY = Vocabulary([bytes([i]) for i in b"abcdefghij klmno"])
RULES = [
    Goldfish(k=2, h=5),
    Goldfish(k=2, h=2, strategy="letters", vocabulary=VOCABULARY),
    Goldfish(k=3, strategy="static"),
]
IDS = torch.randint(0, 16, (3, 40), generator=torch.Generator().manual_seed(0))


def bigram_loss(ids, shift_labels, dtype=torch.float64):
    """The sum of the losses of a model without attention, so that a token needs none of its row; and its gradient."""
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(1), dtype=dtype).requires_grad_()
    loss = cross_entropy(weight[ids].flatten(0, 1), shift_labels.flatten(), ignore_index=-100, reduction="sum")
    loss.backward()
    return torch.cat([loss.detach().reshape(1), weight.grad.flatten()])


def shifted(labels):
    return pad(labels, (0, 1), value=-100)[:, 1:]


def half(rank: int, folder: str) -> None:
    """What one of two processes does: decide and shift on whole rows, then cut, then sum over the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mine = slice(20 * rank, 20 * rank + 20)
    results = []
    for rule in RULES:
        batch = GoldfishCollator(torch.utils.data.default_collate, rule)([{"input_ids": row} for row in IDS])
        labels = shifted(batch["labels"])[:, mine]
        total = torch.cat([bigram_loss(IDS[:, mine], labels), (labels != -100).sum().reshape(1)])
        dist.all_reduce(total)
        results.append(total[:-1] / total[-1])
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_rows_cut_among_two_processes_are_whole_rows(tmp_path):
    mp.spawn(half, args=(str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        for rule, sharded in zip(RULES, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            labels = shifted(mask_labels(rule, IDS))
            whole = bigram_loss(IDS, labels) / (labels != -100).sum()
            torch.testing.assert_close(sharded, whole, rtol=1e-12, atol=1e-12)
            assert whole[0] > 0


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.strategy)
def test_deciding_after_the_cut_is_another_rule(rule):
    """Why the order matters: a second half that is decided by itself drops other tokens at its beginning."""
    assert not torch.equal(rule.dropped(IDS)[:, 20:], rule.dropped(IDS[:, 20:]))
