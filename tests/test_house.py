"""The plan of the house: what imports what, and what a user gets without asking."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import goldfish

PACKAGE = Path(goldfish.__file__).parent
# A file imports only from files before it.
ORDER = [
    "goldfish",
    "text",
    "text.printable",
    "text.rows",
    "text.prompts",
    "secret_spans",
    "text.chats",
    "spec",
    "hashing",
    "vocabulary",
    "letters",
    "rule",
    "masking",
    "unwrap",
    "text.show",
    "text.passages",
    "text.exposure",
    "text.findings",
    "text.check",
    "kernels",
    "linear",
    "loss",
    "fused",
    "guide",
    "gauge",
    "receipt",
    "checkpoint",
    "premasking",
    "unsupported",
    "trainer",
    "audit.documents",
    "audit.marks",
    "audit.windows",
    "audit.model",
    "audit.score",
    "audit.intervals",
    "audit.questions",
    "audit.questions.sanity",
    "audit.questions.membership",
    "audit.records",
    "audit.questions.secrets",
    "audit.questions.ask",
    "audit.questions.proof",
    "audit.figures",
    "audit.verdict",
    "audit.results",
    "audit.render",
    "audit.run",
    "audit.compare",
    "report",
    "integrations",
    "audit",
    "cli",
    "__main__",
]


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "goldfish"


def room(module: str) -> int:
    """The place of a module in ORDER; files inside `report` and `integrations` share one place."""
    name = module.removeprefix("goldfish.")
    folder = name.partition(".")[0]
    return ORDER.index(folder if folder in ("report", "integrations") else name)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_of)
def test_imports_go_one_way(path):
    here = room(module_of(path))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").split(".")[0] == "goldfish"
            and here
        ):
            names = [node.module]
            if node.module == "goldfish":  # from goldfish import spec, __version__
                submodules = {path.stem for path in PACKAGE.glob("*.py")}
                names = [
                    f"goldfish.{alias.name}"
                    for alias in node.names
                    if alias.name in submodules
                ]
            for name in names:
                assert room(name) <= here, (
                    f"{path.name} imports {name}, which comes after it"
                )


ROOMS = sorted({path.parent for path in PACKAGE.rglob("*.py")})


def density(files: list[Path]) -> tuple[float, float]:
    """AST nodes per line of code, and lines with a comment alone per 100 lines of code.

    A line of code has a node that is neither a docstring nor blank or a comment.
    """
    nodes = code = comments = 0
    for path in files:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        nodes += sum(1 for _ in ast.walk(tree))
        lines = source.splitlines()
        docstrings = {
            number
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
            for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        }
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if number in docstrings or not text:
                continue
            is_comment = text.startswith("#")
            comments += is_comment
            code += not is_comment
    return nodes / max(1, code), 100 * comments / max(1, code)


@pytest.mark.parametrize("folder", ROOMS, ids=lambda path: path.name)
def test_room_to_breathe(folder):
    nodes, comments = density(sorted(folder.glob("*.py")))
    assert nodes <= 9
    assert comments >= 5


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout.split()
    )


def test_import_goldfish_needs_only_torch():
    loaded = loaded_after("import goldfish; goldfish.Goldfish().dropped([[1, 2, 3]])")
    assert not loaded & {
        "transformers",
        "accelerate",
        "datasets",
        "matplotlib",
        "scipy",
        "rich",
        "pyarrow",
    }


def test_training_and_audit_do_not_load_each_other():
    assert not any(
        name.startswith("goldfish.audit")
        for name in loaded_after("import goldfish.trainer")
    )
    assert "goldfish.trainer" not in loaded_after("import goldfish.audit")


def test_the_first_hour_on_a_gpu_starts_without_extras():
    """A machine with a GPU may have torch and transformers only: gpu.sh runs what it can."""
    root = PACKAGE.parent
    files = ("tests/gpu/test_gpu.py", "benchmarks/loss.py", "benchmarks/step.py")
    if not (root / files[0]).is_file():
        pytest.skip("goldfish is installed from a wheel: there is no checkout")
    code = (
        "import runpy, sys\n"
        "sys.modules.update(dict.fromkeys(('datasets', 'trl', 'peft', 'rapidfuzz')))\n"
        "sys.path[:0] = ['tests', 'benchmarks']\n"
        f"for path in {files}: runpy.run_path(path)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_public_names():
    for name in goldfish.__all__:
        assert getattr(goldfish, name) is not None
    assert set(goldfish.__all__) <= set(dir(goldfish))
    with pytest.raises(
        AttributeError, match="has no attribute 'Goldfisch'; it has DropCounts"
    ):
        _ = goldfish.Goldfisch


def test_wheel_works_outside_the_checkout(tmp_path):
    """Templates and the type marker are in the wheel, and nothing that is not ours."""
    root = PACKAGE.parent
    if not (root / "pyproject.toml").is_file():
        pytest.skip(
            "goldfish is installed from a wheel: there is no checkout to build one from"
        )
    pytest.importorskip("hatchling", reason="hatchling builds the wheel")
    pytest.importorskip("hatch_fancy_pypi_readme", reason="and this its description")
    build = [
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "-t",
        "wheel",
        "-d",
        str(tmp_path),
    ]
    subprocess.run(build, cwd=root, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("goldfish_loss-*.whl")
    files = zipfile.ZipFile(wheel)
    names = files.namelist()
    assert "goldfish/py.typed" in names
    assert any(name.endswith("report.html") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {
        "goldfish",
        "goldfish_loss",
    }
    (metadata,) = (name for name in names if name.endswith("/METADATA"))
    assert not re.findall(r"\]\((?!https://)[^)]*", files.read(metadata).decode()), (
        "a package index has no such file"
    )
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import goldfish.report as r; "
        "print(r.__file__)"
    )
    found = subprocess.run(
        [sys.executable, "-I", "-c", code, str(wheel)],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert str(wheel) in found.stdout


def test_what_tests_share_is_in_no_test():
    """Otherwise a change of one test breaks another; helpers.py is for both."""
    tests = Path(__file__).parent
    imports = re.compile(r"^(from|import) (test_|conftest)", re.MULTILINE)
    assert not [p.name for p in tests.glob("*.py") if imports.search(p.read_text())]
