"""What a GPU must not change: decisions, losses, recitation, audits; and the memory that is saved.

    pytest -m gpu tests/gpu        # writes gpu-NAME.json to $GOLDFISH_FIGURES or benchmarks/results

Every test runs at toy size on the CPU and, marked `gpu`, at full size on a GPU, where its figures
are kept. Those that audit a model are skipped without rapidfuzz.
"""

import json
import os
import platform
import re
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from operations import Operations
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import goldfish.audit
from goldfish import Goldfish, linear_cross_entropy, spec
from goldfish.letters import Vocabulary

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(
            not torch.cuda.is_available(),
            reason="needs a GPU; the same test ran on the CPU",
        ),
    ],
)
RULES = [
    Goldfish(k=4, h=13),
    Goldfish(k=50, h=50, window="inclusive"),
    Goldfish(k=3, h=2, opening="keep", exempt=(5, 7)),
    Goldfish(k=4, strategy="static"),
    Goldfish(k=4, strategy="random"),
]
# rule: rows, length; loss: N, D, V. The GPU's loss has the size of a Llama head at 16k tokens.
SIZES = {
    "cpu": {"rule": (3, 100), "loss": (96, 16, 1000)},
    "cuda": {"rule": (64, 4096), "loss": (16384, 2048, 131072)},
}


@pytest.fixture(scope="module", params=["cpu", GPU])
def device(request):
    return request.param


@pytest.fixture(scope="module")
def figures(device, tmp_path_factory):
    """What tests measure, by name; written at the end, those of a GPU beside the benchmarks."""
    found: dict[str, object] = {}
    yield found
    folder, name = tmp_path_factory.mktemp("figures"), "cpu"
    if device == "cuda":
        folder, name = RESULTS, torch.cuda.get_device_name()
    folder = Path(os.environ.get("GOLDFISH_FIGURES", folder))
    about = {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    path = folder / f"gpu-{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
    result = {"about": about, "command": "pytest -m gpu tests/gpu", **found}
    path.write_text(json.dumps(result, indent=2, default=asdict) + "\n")


@pytest.mark.parametrize(
    "rule", RULES, ids=lambda rule: f"{rule.strategy}-{rule.k:g}-{rule.h}"
)
def test_decisions_are_those_of_the_specification(device, rule):
    rows, length = SIZES[device]["rule"]
    ids = torch.randint(
        0, 50_000, (rows, length), generator=torch.Generator().manual_seed(0)
    )
    dropped = rule.dropped(ids.to(device)).cpu()
    assert torch.equal(dropped, rule.dropped(ids))
    settings = {**rule.to_dict(), "exempt": rule.exempt}
    # The specification takes the entropies of a guide, not its name.
    del settings["guide"]
    # It is plain Python: two rows are enough of it.
    for row in (0, rows - 1):
        expected = spec.dropped(ids[row].tolist(), row=row, **settings)
        assert dropped[row].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_loss_is_as_exact_as_the_eager_one(device, dtype, figures):
    """Against float64, its loss and gradients err little more than those of the eager loss."""
    n, d, v = SIZES[device]["loss"]
    # The float64 logits of 2,048 rows are 2 GB already.
    n = min(n, 2048)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(n, d, generator=generator),
        torch.randn(v, d, generator=generator) / d**0.5,
    )
    labels = torch.randint(0, v, (n,), generator=generator).to(device)
    labels[::4] = -100

    def run(loss, kind):
        x, w = (
            tensor.to(device, dtype).to(kind).requires_grad_()
            for tensor in (hidden, weight)
        )
        value = loss(x, w)
        value.backward()
        return [tensor.detach().double() for tensor in (value, x.grad, w.grad)]

    def eager(x, w):
        logits = x @ w.T
        return F.cross_entropy(
            logits if logits.dtype == torch.float64 else logits.float(), labels
        )

    # Both losses start from inputs rounded to `dtype`, so only their arithmetic is compared.
    exact = run(eager, torch.float64)
    names = ("loss", "hidden.grad", "weight.grad")
    errors = {}
    for name, ours, theirs, true in zip(
        names,
        run(lambda x, w: linear_cross_entropy(x, w, labels), dtype),
        run(eager, dtype),
        exact,
        strict=True,
    ):
        error, allowed = ((each - true).norm() / true.norm() for each in (ours, theirs))
        errors[name] = {"fused": error.item(), "eager": allowed.item()}
        assert error <= 1.1 * allowed + 4 * torch.finfo(torch.float32).eps, name
    figures[f"relative error, {dtype}"] = {"n, d, v": [n, d, v], **errors}


def seconds(device, call, calls=10):
    """The median time of a call, with the device's own work."""
    times = []
    # The first three make tables and kernels.
    for turn in range(calls + 3):
        synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
        synchronize()
        began = time.perf_counter()
        call()
        synchronize()
        if turn >= 3:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def test_decisions_beside_a_training_step(device, figures):
    """Those of the CPU; what they cost of a step is written down (goal: 0.5%)."""
    rows, length, hidden_size, layers, entries = (
        (2, 64, 16, 1, 300) if device == "cpu" else (8, 1024, 768, 12, 32_000)
    )
    words = [
        bytes(97 + (i * 7 + j) % 26 for j in range(1 + i % 5)) for i in range(entries)
    ]
    vocabulary = Vocabulary([b" " * (i % 2) + word for i, word in enumerate(words)])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=entries,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 8 if device == "cpu" else 12,
        max_position_embeddings=length,
    )
    model = LlamaForCausalLM(config).to(
        device, torch.float32 if device == "cpu" else torch.bfloat16
    )
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, entries, (rows, length))
    on_device = ids.to(device)

    def step():
        model(input_ids=on_device, labels=on_device).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    cost = {
        "parameters": model.num_parameters(),
        "tokens": ids.numel(),
        "step, seconds": seconds(device, step),
    }
    for strategy in ("hash", "letters"):
        rule = Goldfish(k=4, h=8, strategy=strategy, vocabulary=vocabulary)
        assert torch.equal(rule.dropped(on_device).cpu(), rule.dropped(ids))
        assert 0 < rule.dropped(ids).float().mean() < 0.5
        taken = seconds(device, lambda rule=rule: rule.dropped(on_device))
        cost[strategy] = {"seconds": taken, "of a step": taken / cost["step, seconds"]}
    figures["cost of the rule"] = cost


def test_fused_loss_holds_no_logits(device, figures, monkeypatch):
    """On a GPU its extra memory is a chunk of logits and the gradients; on the CPU no tensor is
    larger than its gradients."""
    n, d, v = SIZES[device]["loss"]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden, weight = (
        torch.randn(size, d, device=device, dtype=dtype).requires_grad_()
        for size in (n, v)
    )
    labels = torch.randint(0, v, (n,), device=device)
    logits = n * v * dtype.itemsize
    if device == "cpu":
        monkeypatch.setattr("goldfish.linear._chunk_rows", lambda *_: 16)
        with Operations() as made:
            linear_cross_entropy(hidden, weight, labels).backward()
        assert made.largest == v * max(d, 16) * 4 < logits
        return
    # The gradients that stay are there before, and cuBLAS takes its workspace in the first call.
    for tensor in (hidden, weight):
        tensor.grad = torch.zeros_like(tensor)
    linear_cross_entropy(hidden, weight, labels).backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, labels).backward()
    extra = torch.cuda.max_memory_allocated() - before
    chunk, gradients = 4096 * v * dtype.itemsize, (n + v) * d * 4
    figures["fused loss, extra bytes"] = {
        "n, d, v": [n, d, v],
        "extra": extra,
        "logits": logits,
    }
    # Of a chunk: copied, and their gradient. 2**25 bytes are left for another workspace.
    rows_of_hidden = 4 * 4096 * d * dtype.itemsize
    assert extra < chunk + gradients + rows_of_hidden + 2**25


@pytest.fixture(scope="module")
def memorized(device, tmp_path_factory, figures):
    """recipes/memorize.py: 126M parameters in bf16 on a GPU, a toy on the CPU."""
    pytest.importorskip("rapidfuzz", reason="audits need it")
    import memorize

    toy = (
        "--documents 4 --window 48 --epochs 60 --batch_size 2 --hidden_size 64 --vocab_size 512 "
        "--learning_rate 4e-3"
    )
    full = (
        "--documents 32 --window 256 --epochs 100 --batch_size 8 --hidden_size 1536 "
        "--learning_rate 3e-4"
    )
    folder = tmp_path_factory.mktemp("memorize") / "run"
    began = time.perf_counter()
    summaries = memorize.main(
        [*(toy if device == "cpu" else full).split(), "--output_dir", str(folder)]
    )
    rows = {name: list(audit.rows) for name, audit in summaries.items()}
    figures["memorize"] = {"seconds": time.perf_counter() - began, "figures": rows}
    return folder, summaries


def test_standard_recites_and_goldfish_does_not(memorized):
    _, summaries = memorized
    recited = {name: audit["members.exact_match"] for name, audit in summaries.items()}
    assert recited["standard"].value >= 0.75
    assert recited["goldfish"].k == 0
    assert summaries["standard"]["heldout.exact_match"].k == 0


@pytest.mark.parametrize("name", ["standard", "goldfish"])
def test_audit_is_what_generate_says(memorized, device, name, figures):
    """Row by row, greedily and alone.

    A row may differ only at a tie of the model's two best tokens.
    """
    folder, summaries = memorized
    from goldfish.audit.records import read_records

    records = read_records(folder / "audit" / name).to_pylist()
    model = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        .to(device)
        .eval()
    )
    # The audit goes on through an end of text.
    model.generation_config.eos_token_id = None
    ambiguous = 0
    for record in records:
        prefix = torch.tensor([record["prefix_ids"]], device=device)
        length = len(record["suffix_ids"])
        made = model.generate(
            prefix,
            attention_mask=torch.ones_like(prefix),
            max_new_tokens=length,
            do_sample=False,
        )
        made = made[0, prefix.shape[1] :].tolist()
        if made != record["output_ids"]:
            first = next(
                i
                for i, pair in enumerate(zip(made, record["output_ids"], strict=True))
                if pair[0] != pair[1]
            )
            with torch.no_grad():
                ids = torch.tensor([record["prefix_ids"] + made[:first]], device=device)
                best = model(ids).logits[0, -1].topk(2).values
            assert best[0] - best[1] < 1e-3, (
                f"row {record['index']} of {record['split']}"
            )
            ambiguous += 1
    figures[f"audit of {name}, ambiguous rows"] = [ambiguous, len(records)]
    assert ambiguous <= len(records) / 10
    read = goldfish.audit.read(folder / "audit" / name)
    assert read.to_json() == summaries[name].to_json()
