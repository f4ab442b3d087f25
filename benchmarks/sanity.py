"""What the audit's sanity check measures of a model as it is, and of the same model damaged.

    python benchmarks/sanity.py --model DIR_OR_NAME

The damages are those of conversions that went wrong: nothing fails to load, and the model still
predicts better than a uniform guess. Texts are topics of the Python reference. Figures are what the
prefix is worth beside its tokens in a shuffled order, in nats per token, if so many tokens of the
suffix are read. The audit reads `sanity.TOKENS` and asks for more than `sanity.GAIN`.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from about import load_texts, markdown, parser
from transformers import AutoModelForCausalLM, AutoTokenizer

from goldfish.audit.documents import Relations
from goldfish.audit.questions import sanity
from goldfish.audit.score import Scorer
from goldfish.audit.windows import Cutter, Survey


def nothing(model: Any) -> None:
    """As it is."""


def rotary_layout(model: Any) -> None:
    """Queries and keys laid out for rotary factors of neighbours (2i, 2i + 1).

    The model's own are of halves: (i, i + d / 2) of a head's d numbers.
    """
    for layer in model.model.layers:
        attention = layer.self_attn
        for linear in (attention.q_proj, attention.k_proj):
            weight = linear.weight
            halves = weight.view(-1, 2, attention.head_dim // 2, weight.shape[1])
            weight.copy_(halves.transpose(1, 2).reshape(weight.shape).clone())


def query_heads(model: Any) -> None:
    """The query heads in the opposite order."""
    for layer in model.model.layers:
        weight = layer.self_attn.q_proj.weight
        heads = weight.view(-1, layer.self_attn.head_dim, weight.shape[1])
        weight.copy_(heads.flip(0).reshape(weight.shape).clone())


def eps(model: Any) -> None:
    """An eps of 0.1 in the norms."""
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.1


DAMAGES = (nothing, eps, rotary_layout, query_heads)
LENGTHS = (8, 16, 32, 50)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", required=True, help="a Llama: folder or name")
    args = options.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = [{"text": text} for text in load_texts()]
    table = []
    with tempfile.TemporaryDirectory() as folder:
        cutter = Cutter(tokenizer, 50, 50)
        relations = Relations()
        survey = Survey(rows, "heldout", cutter, Path(folder, "windows"), relations)
        survey.documents = relations.number_documents()
        for damage in DAMAGES:
            model = AutoModelForCausalLM.from_pretrained(
                args.model, dtype=torch.float32
            )
            with torch.no_grad():
                damage(model.eval())
            scorer = Scorer(model)
            gains = []
            for length in LENGTHS:
                sanity.TOKENS = length
                found = sanity.measure(scorer, {"heldout": survey})["heldout"]
                gains.append(f"{found['nll_shuffled'] - found['nll']:.2f}")
            table.append((damage.__name__, found["windows"], *gains))
            print(table[-1], flush=True)
    print(markdown(("damage", "windows", *map(str, LENGTHS)), table))


if __name__ == "__main__":
    main()
