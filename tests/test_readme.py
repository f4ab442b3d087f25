"""What the README tells people to type exists and parses; what it shows as code compiles."""

import re
import shlex
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from goldfish.cli import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [part.strip() for block in blocks("bash") for line in block.splitlines() for part in line.split("&&")]


def test_the_readme_has_commands_to_check():
    assert "python recipes/memorize.py" in COMMANDS
    assert "pip install -c constraints.txt -e '.[test]'" in COMMANDS


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("goldfish ")])
def test_goldfish_commands_parse(command):
    build_parser().parse_args(shlex.split(command)[1:])


@pytest.mark.parametrize("command", [c for c in COMMANDS if "recipes/" in c])
def test_recipe_commands_parse(command, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.startswith("recipes/"))
    assert (ROOT / words[script]).is_file()
    recipe = __import__(Path(words[script]).stem)
    HfArgumentParser(recipe.Arguments).parse_args_into_dataclasses(words[script + 1 :])


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_compile_and_import(code):
    compile(code, "README.md", "exec")
    exec("\n".join(line for line in code.splitlines() if line.startswith(("from goldfish", "import goldfish"))), {})


def test_nothing_is_left_to_fill_in():
    assert "<!--" not in README


def test_links_point_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)[)#]", README):
        assert (ROOT / target).exists(), target


def test_constraints_satisfy_pyproject():
    """Every core dependency is pinned, and its floor is in constraints-lowest.txt."""
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    core = re.findall(r'^    "([a-z0-9-]+)>=([0-9.]+)"', pyproject.split("[project.optional")[0], re.MULTILINE)
    assert len(core) > 10

    def pins(name):
        lines = (ROOT / name).read_text(encoding="utf-8").lower().splitlines()
        return dict(line.split("==") for line in lines if "==" in line)

    pinned, lowest = pins("constraints.txt"), pins("constraints-lowest.txt")
    for name, floor in core:
        assert name in pinned, f"{name} is not pinned in constraints.txt"
        if name != "torch":
            assert lowest[name].startswith(floor), f"{name}: floor {floor}, tested {lowest[name]}"
