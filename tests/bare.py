"""Training needs no package of the extras, and the command line names a missing one.

Without pytest, which is an extra too.
.ci/run starts this in an environment with the base dependencies only.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

EXTRAS = ("rapidfuzz", "scipy", "matplotlib", "jinja2", "rich", "trl", "peft")
VERBS = (
    ["audit", "none", "--members", "none.jsonl", "-o", "none"],
    ["compare", "none", "none", "-o", "none"],
    ["report", "none"],
)


def goldfish(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "goldfish", *words], capture_output=True, text=True
    )


def main() -> None:
    absent = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    # jinja2 and rich also come with packages of the base: torch and transformers bring them.
    assert {"rapidfuzz", "scipy", "matplotlib", "trl", "peft"} <= set(absent), (
        f"only {absent} are absent"
    )

    assert goldfish("--version").returncode == 0
    for words in VERBS:
        result = goldfish(*words)
        assert result.returncode == 2, result
        assert result.stderr.count("\n") == 1, result.stderr
        assert "pip install 'goldfish-loss[audit]'" in result.stderr, result.stderr
        assert any(name in result.stderr for name in absent), result.stderr

    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

    from goldfish import Goldfish, GoldfishTrainer

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, max_position_embeddings=32, **sizes)
    )
    rows = [{"input_ids": [(7 * i + j) % 64 for j in range(32)]} for i in range(8)]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True
        )
        trainer = GoldfishTrainer(
            model, args, train_dataset=rows, goldfish=Goldfish(k=4, h=3)
        )
        trainer.train()
        trainer.save_model()
        receipt = json.loads((Path(folder) / "goldfish.json").read_text())
    assert 0 < receipt["dropped"] < receipt["targets"] == 2 * 8 * 31, receipt
    print(f"bare: trains without {', '.join(absent)}")


if __name__ == "__main__":
    main()
