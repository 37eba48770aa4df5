"""What installing takes: open versions in the package, tested ones in constraints.txt."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from auto_round.cli import main
from auto_round.cli.arguments import build_parser
from auto_round.config import RECIPES

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]
TESTED_WITH = {
    canonicalize_name(pin.name): pin
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line.strip() and not line.startswith("#")
    for pin in [Requirement(line)]
}


def test_no_dependency_takes_a_newer_version_away():
    capped = [str(need) for need in NEEDED if {s.operator for s in need.specifier} - {">="}]
    assert capped == []


def test_every_package_that_ci_installs_is_pinned_to_one_version_that_the_package_accepts():
    extras = [Requirement(line) for key in ("test", "lint") for line in PROJECT["optional-dependencies"][key]]
    for need in (*NEEDED, *extras):
        pin = TESTED_WITH[canonicalize_name(need.name)]
        (only,) = pin.specifier
        assert only.operator == "=="
        assert need.specifier.contains(Version(only.version))


def test_what_the_documents_use_comes_with_a_plain_install():
    assert {"accelerate", "gguf"} <= {need.name for need in NEEDED}


@pytest.mark.parametrize("marker", ["main-job", "tests"])
def test_commands_of_the_readme_install_the_tested_versions(marker):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(rf"^<!-- {marker} -->\n```bash\n(.+)\n```$", readme, re.MULTILINE)
    assert re.findall(r"pip install [^&|]*", command)[0].startswith("pip install -q -c constraints.txt ")


def test_ci_installs_the_tested_versions():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    installs = [line for line in lines if "pip install" in line and not line.startswith("#")]
    assert installs
    assert all("-c constraints.txt" in line for line in installs)


def test_every_recipe_has_the_commands_that_the_help_names():
    scripts = {name: getattr(main, target.partition(":")[2]) for name, target in PROJECT["scripts"].items()}
    assert all(target.startswith("auto_round.cli.main:") for target in PROJECT["scripts"].values())
    named = set(re.findall(r"auto-round-[a-z-]+", build_parser().format_help()))
    assert named == {"auto-round-" + name.replace("_", "-") for name in RECIPES if name != "default"}
    for name in named:
        assert (
            scripts[name]
            is scripts[name.replace("-", "_")]
            is getattr(main, f"main_{name[11:].replace('-', '_')}")
        )


def test_the_command_of_a_recipe_takes_it(monkeypatch):
    seen = []
    monkeypatch.setattr(main, "_run", lambda argv, recipe: seen.append(recipe) or 0)
    for recipe in RECIPES:
        (main.main if recipe == "default" else getattr(main, f"main_{recipe}"))([])
    assert seen == list(RECIPES)
