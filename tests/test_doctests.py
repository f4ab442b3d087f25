"""The examples in docstrings give what they show."""

import doctest
from importlib import import_module

import pytest

MODULES = (
    "spec",
    "hashing",
    "vocabulary",
    "secrets",
    "rule",
    "masking",
    "premasking",
    "loss",
    "text.printable",
    "text.exposure",
    "text.check",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    failed, attempted = doctest.testmod(import_module(f"goldfish.{name}"))
    assert failed == 0
    assert attempted > 0
