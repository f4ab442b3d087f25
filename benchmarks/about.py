"""Provenance, tables and small models for the benchmarks: those of the recipes, so that each exists once."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "recipes"))

from common import byte_level_bpe, small_llama
from runs import about, markdown

RESULTS = Path(__file__).parent / "results"

__all__ = ["RESULTS", "about", "byte_level_bpe", "markdown", "small_llama"]
