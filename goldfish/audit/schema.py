"""The columns of an audit's files, published in docs/audit.md."""

import pyarrow as pa

SCHEMA = "goldfish.audit/2"
TRIVIAL = 0.25  # a suffix with a smaller type-token ratio: tables, rulers, repeated lines
ATTACKS = ("loss", "zlib", "lowercase", "reference", "min_k", "min_k_plus_plus", "kept_loss", "dropped_gap")

RECORDS = pa.schema([
    *((name, pa.string()) for name in ("split", "document", "source")),
    *((name, pa.int64()) for name in ("index", "count", "offset")),
    *((name, pa.list_(pa.int64())) for name in ("prefix_ids", "suffix_ids", "output_ids")),
    ("prefix_text", pa.string()),
    *((name, pa.list_(pa.string())) for name in ("suffix_tokens", "output_tokens")),
    ("dropped", pa.list_(pa.bool_())),
    ("greedy", pa.list_(pa.int64())),
    *((name, pa.list_(pa.bool_())) for name in ("correct", "prefix_correct")),
    ("nll", pa.list_(pa.float64())),
    ("rank", pa.list_(pa.int64())),
    ("smallest_margin", pa.float64()),
    *((name, pa.bool_()) for name in ("settled", "exact_match")),
    *((name, pa.int64()) for name in ("first_divergence", "longest_run")),
    *((name, pa.float64()) for name in (
        "token_accuracy", "rouge_l_text", "rouge_l_ids", "edit_similarity", "type_token_ratio")),
    ("log_p", pa.list_(pa.float64())),
    ("beams", pa.int64()),
    *((f"mia_{attack}", pa.float64()) for attack in ATTACKS),
])  # fmt: skip
