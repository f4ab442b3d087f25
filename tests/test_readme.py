"""What README and docs tell people to type parses or runs, and every link leads somewhere."""

import json
import re
import shlex
from pathlib import Path

import pytest
from helpers import TEMPLATE, say, tiny_llama
from transformers import HfArgumentParser

from goldfish.cli import build_parser, main
from goldfish.secret_spans import compiled, spans

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TEXT = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in PAGES
}
README = TEXT["README.md"]
CODE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[str]:
    return [
        code
        for text in TEXT.values()
        for kind, code in CODE.findall(text)
        if kind == language
    ]


LINES = [
    line for block in blocks("bash") for line in block.replace("\\\n", "").splitlines()
]
COMMANDS = sorted({part.strip() for line in LINES for part in line.split("&&")})
# Commands inside sentences and tables, such as `python recipes/sweep.py runs/canaries`
INLINE = set(
    re.findall(
        r"`(?:OMP_NUM_THREADS=1 )?(python recipes/[^`]+)`", "\n".join(TEXT.values())
    )
)


def test_there_are_commands_to_check():
    assert {
        "python recipes/memorize.py",
        "pip install -c constraints.txt -e '.[test,docs]'",
    } <= set(COMMANDS)
    assert len(INLINE) > 5


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("goldfish ")])
def test_goldfish_commands_parse(command):
    build_parser().parse_args(shlex.split(command)[1:])


@pytest.mark.parametrize(
    "command", sorted(INLINE | {c for c in COMMANDS if " recipes/" in c})
)
def test_recipe_commands_parse(command, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    words = shlex.split(command.replace(" S --model ...", " 0"))
    script = next(
        i
        for i, word in enumerate(words)
        if word.startswith("recipes/") and word.endswith(".py")
    )
    assert (ROOT / words[script]).is_file()
    recipe = __import__(Path(words[script]).stem)
    if hasattr(recipe, "Arguments"):
        HfArgumentParser(recipe.Arguments).parse_args_into_dataclasses(
            words[script + 1 :]
        )


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_compile_and_import(code):
    compile(code, "docs", "exec")
    ours = [
        line
        for line in code.splitlines()
        if line.startswith(("from goldfish", "import goldfish"))
    ]
    exec(
        "\n".join(line for line in ours if "integrations" not in line), {}
    )  # these import their framework


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", text), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in headings
    }


@pytest.mark.parametrize("page", TEXT)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", TEXT[page]))
    for link in links:
        if link.startswith(("https://", "mailto:")):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page} links to {link}"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), (
                f"{page} links to {link}"
            )


def test_what_was_not_measured_is_said_in_one_place():
    assert [
        page
        for page, text in TEXT.items()
        for _ in re.findall("was not measured\n", text)
    ] == ["docs/results.md"]
    assert not [
        page for page, text in TEXT.items() if re.search(r"(?<!was )not measured", text)
    ]


def test_the_expression_for_secrets_marks_those_beside_it():
    paragraph = next(
        line for line in README.splitlines() if line.startswith("**Codes and names")
    )
    expression = compiled(re.search(r'secrets=r"(.*?)"\)`', paragraph)[1])
    sentences = re.findall(r'in "([^"]+)"', paragraph)
    assert len(sentences) == 2
    for sentence in sentences:
        assert [sentence[a:b] for a, b in spans(expression, sentence)] == ["CX-8WUB"]


def finetuning(after: bool) -> str:
    """The script of the finetuning example, before or after the change that its diff shows."""
    (diff,) = (
        code
        for kind, code in CODE.findall(README)
        if kind == "diff" and "SFTTrainer" in code
    )
    lines = [line for line in diff.splitlines() if line[:1] != ("-" if after else "+")]
    return "\n".join(line[1:] for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_finetuning_example_runs_as_written(
    after, tokenizer, tmp_path, monkeypatch, fresh_accelerate
):
    monkeypatch.chdir(tmp_path)
    # SFTConfig asks for bf16, which Trainer refuses without a GPU that has it; CPUs have it too.
    monkeypatch.setattr(
        "transformers.training_args.is_torch_bf16_gpu_available", lambda: True
    )
    base = Path(re.search(r'SFTTrainer\("([^"]+)"', README)[1])
    tiny_llama(max_position_embeddings=1024).save_pretrained(base)
    tokenizer.save_pretrained(base)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    for name, word in (("members", "sparrow"), ("heldout", "goldfish")):
        rows = [
            {"messages": say(f"Number {i}?", f"{word} {i}: the code is {word}-{i}.")}
            for i in range(3)
        ]
        Path(f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    exec(compile(finetuning(after), "README.md", "exec"), {})
    assert Path("finetuned/goldfish.json").is_file() == after
    commands = [
        line
        for kind, code in CODE.findall(README)
        if kind == "bash"
        for line in code.splitlines()
    ]
    for command in [line for line in commands if line.startswith("goldfish ")]:
        words = shlex.split(command)[1:]
        # The codes end alike but for a digit, which the rule may keep. An audit of three documents
        # is INCONCLUSIVE; one of everything that was trained on may pass.
        expected = {"check": {1}, "audit": {0, 3}, "report": {0}}
        assert main(words) in expected[words[0]]
    assert (
        json.loads(Path("audit/run.json").read_text())["inputs"]["members"][
            "completions"
        ]
        == 3
    )
    assert "<html" in Path("report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_notebook_runs(tmp_path, monkeypatch, fresh_accelerate):
    """Its cells, one after the other; a cell that is not plain Python would not compile here."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(
        (ROOT / "examples/quickstart.ipynb").read_text(encoding="utf-8")
    )
    names: dict[str, object] = {}
    for number, cell in enumerate(
        cell for cell in notebook["cells"] if cell["cell_type"] == "code"
    ):
        exec(
            compile(
                "".join(cell["source"]), f"quickstart.ipynb, cell {number}", "exec"
            ),
            names,
        )
    assert names["recited"].k == 0, (
        "the last audit of the notebook is that of the goldfish model"
    )
    assert (tmp_path / "report.html").is_file()


def test_constraints_satisfy_pyproject():
    """Every dependency of base and audit is pinned, and its floor is in constraints-lowest.txt."""
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = re.findall(
        r'^    "([a-z0-9-]+)>=([0-9.]+)"',
        pyproject.split("recipes = ")[0],
        re.MULTILINE,
    )
    assert len(needed) == 10

    def pins(name):
        lines = (ROOT / name).read_text(encoding="utf-8").lower().splitlines()
        return dict(line.split("==") for line in lines if "==" in line)

    pinned, lowest = pins("constraints.txt"), pins("constraints-lowest.txt")
    for name, floor in needed:
        assert name in pinned, f"{name} is not pinned in constraints.txt"
        if name != "torch":
            assert lowest[name].startswith(floor), (
                f"{name}: floor {floor}, tested {lowest[name]}"
            )
