r"""What does it cost to let a guide read the data (strategy "entropy")?

    python benchmarks/guide.py --data mine.jsonl --base DIR

Rows of 256 tokens, SmolLM2-135M-Instruct in float32, one thread: `premask` with a guide, then an
epoch of the plain loop (batches of 4 rows) on the result. Prints processor seconds and the peak of
the resident memory after each, in MB of 10^6 bytes, and adds them to
benchmarks/results/guide.jsonl.
"""

import argparse
import resource
import time

import about
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from goldfish import Goldfish, premask

TOKENS, BATCH = 256, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help=".jsonl with a `text` field")
    parser.add_argument("--base", required=True, help="the model's folder")
    parser.add_argument("--rows", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    texts = about.load_texts(args.data)[: args.rows]
    ids = tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"]
    rows = [ids[i * TOKENS : (i + 1) * TOKENS] for i in range(args.rows)]
    result = {"rows": len(rows), "tokens": TOKENS, "loaded_mb": peak()}

    began = time.process_time()
    dataset = Dataset.from_dict({"input_ids": rows})
    rule = Goldfish(k=4, strategy="entropy")
    masked = premask(dataset, rule, guide=model)
    result |= {"read_seconds": time.process_time() - began, "read_mb": peak()}

    began = time.process_time()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()
    for start in range(0, len(masked), BATCH):
        batch = masked[start : start + BATCH]
        loss = model(
            input_ids=torch.tensor(batch["input_ids"]),
            labels=torch.tensor(batch["labels"]),
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    result |= {"epoch_seconds": time.process_time() - began, "epoch_mb": peak()}
    about.append(about.RESULTS / "guide.jsonl", result | about.about("datasets"))
    print(result)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()
