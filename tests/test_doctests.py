"""The examples in docstrings give what they show."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import goldfish

PACKAGE = Path(goldfish.__file__).parent
WITH_EXAMPLES = [
    path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text("utf-8")
]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.stem)
def test_examples(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    failed, _ = doctest.testmod(import_module(".".join(parts)))
    assert failed == 0
