"""What scripts take from the package is there: nothing else runs all of them."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [script for folder in ("benchmarks", "examples") for script in sorted((ROOT / folder).glob("*.py"))]


def _taken(script: Path) -> Iterator[tuple[str, str]]:
    """Module of the package and a name that a script imports from it."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "auto_round":
            yield from ((str(node.module), alias.name) for alias in node.names)


def _is_there(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name) or bool(
            importlib.import_module(f"{module}.{name}")
        )
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_what_a_script_imports_is_there(script: Path) -> None:
    assert not [f"{module}.{name}" for module, name in _taken(script) if not _is_there(module, name)]
