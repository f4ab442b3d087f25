"""Provenance and toy tokenizers for the benchmarks: those of the recipes, so that there is one of each."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "recipes"))

from runs import about, installed

RESULTS = Path(__file__).parent / "results"

__all__ = ["RESULTS", "about", "installed"]
