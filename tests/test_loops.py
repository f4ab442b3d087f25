"""The loops of one's own: the step's loss is the sum over its kept tokens divided once, however the step is cut."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))
import accelerate_loop
import memorize
import plain_loop

from goldfish import Goldfish

STEPS = 3


@pytest.fixture(scope="module")
def whole():
    """Each step in one piece."""
    return plain_loop.main(["--steps", str(STEPS), "--accumulation", "1"])


@pytest.mark.core
def test_accumulation_changes_nothing(whole):
    assert plain_loop.main(["--steps", str(STEPS), "--accumulation", "4"]) == pytest.approx(whole, rel=1e-5)
    assert accelerate_loop.main(["--steps", str(STEPS), "--accumulation", "4"]) == pytest.approx(whole, rel=1e-5)


def test_first_loss_by_hand(whole):
    """Token by token: the mean of -log p over what the rule leaves of the first step's rows."""
    settings = memorize.Arguments()
    texts = memorize.load_texts(settings)
    tokenizer = memorize.load_tokenizer(settings, texts)
    torch.manual_seed(0)
    model = LlamaForCausalLM(memorize.small_llama(settings, tokenizer))
    rows = torch.tensor(memorize.cut_windows(texts, tokenizer, 64))
    (step,) = plain_loop.batches(rows, 8, 1)
    losses = []
    for ids in step:
        dropped = Goldfish(k=4, h=13).dropped(ids)
        with torch.no_grad():
            log_p = model(ids[None]).logits[0].double().log_softmax(-1)
        losses += [-log_p[i - 1, ids[i]].item() for i in range(1, len(ids)) if not dropped[i]]
    assert whole[0] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_two_processes_are_one(whole, tmp_path):
    code = (
        "import json, sys; sys.path.insert(0, sys.argv.pop(1)); out = sys.argv.pop(1); import accelerate_loop as loop; "
        "losses = loop.main(); import os; os.environ['RANK'] == '1' and open(out, 'w').write(json.dumps(losses))"
    )
    worker = tmp_path / "worker.py"
    worker.write_text(code)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", str(worker), str(RECIPES), str(tmp_path / "losses"), "--steps", str(STEPS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "losses").read_text()) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("loop", [plain_loop, accelerate_loop])
def test_batches_that_do_not_divide_are_refused(loop, capsys):
    with pytest.raises(SystemExit):
        loop.main(["--batch_size", "8", "--accumulation", "3"])
    assert "--batch_size 8 does not divide into" in capsys.readouterr().err
