"""Can goldfish-loss be installed beside a training framework? For each one, the versions that satisfy both.

    python benchmarks/frameworks.py

Reads what both require of the packages they share, and lets pip choose versions that satisfy all of it. Nothing is
installed, and only metadata is read: of torch, which is large, it only compares the bounds.
"""

import json
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

FRAMEWORKS = ["llamafactory", "ms-swift", "unsloth", "axolotl", "memaudit"]
ROOT = Path(__file__).parents[1]
PIP = f"{sys.executable} -m pip install --dry-run --ignore-installed --no-deps --quiet --report -".split()


def metadata(*requirements: str) -> list[dict]:
    """Of the distributions that pip would install, without their dependencies; ValueError if there are none."""
    done = subprocess.run([*PIP, *requirements], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise ValueError(errors[-1] if errors else done.stderr)
    return [entry["metadata"] for entry in json.loads(done.stdout)["install"]]


def requires(distribution: dict) -> dict[str, SpecifierSet]:
    """The bounds of every package that a distribution needs here, without extras."""
    bounds: dict[str, SpecifierSet] = {}
    for text in distribution.get("requires_dist", []):
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            name = canonicalize_name(requirement.name)
            bounds[name] = bounds.get(name, SpecifierSet()) & requirement.specifier
    return bounds


def main() -> None:
    (goldfish,) = metadata(str(ROOT))
    ours = requires(goldfish)
    print("| framework | " + " | ".join(ours) + " |")
    print("|---" * (len(ours) + 1) + "|")
    for name in FRAMEWORKS:
        (framework,) = metadata(name)
        theirs = requires(framework)
        both = {package: bounds & theirs.get(package, SpecifierSet()) for package, bounds in ours.items()}
        cells = []
        for package, bounds in both.items():
            if package == "torch":
                cells.append(str(bounds))
                continue
            try:
                cells.append(metadata(f"{package}{bounds}")[0]["version"])
            except ValueError:
                cells.append(f"**none**: {theirs[package]}")
        print(f"| {framework['name']} {framework['version']} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
