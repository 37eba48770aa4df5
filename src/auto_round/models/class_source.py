"""Source text of a model's classes, parsed: what they do with each other's weights and settings."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


def classes_of(module: nn.Module) -> tuple[Any, ...]:
    """The module's class and those that it is made of, without PyTorch's own."""
    kinds = type(module).__mro__
    return tuple(k for k in kinds if issubclass(k, nn.Module) and k.__module__.partition(".")[0] != "torch")


@functools.cache
def tree_of(kind: Any) -> ast.AST | None:
    """Parsed source of a class; None where it was made without a file."""
    try:
        module = inspect.getmodule(kind)
        known = {} if module is None else _classes_in(inspect.getsource(module))
        return known.get(kind.__qualname__) or ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return None


@functools.lru_cache(maxsize=8)
def _classes_in(source: str) -> Mapping[str, ast.ClassDef]:
    """Classes of a module's source by qualified name, those in functions left out.

    `inspect.getsource` parses the whole file again for each class.
    """
    found: dict[str, ast.ClassDef] = {}

    def look(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                found[f"{prefix}{child.name}"] = child
                look(child, f"{prefix}{child.name}.")
            elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                look(child, prefix)

    look(ast.parse(source), "")
    return found


@functools.cache
def asks_of_parts(kind: Any) -> frozenset[str]:
    """Attributes that a class asks of others than itself."""
    tree = tree_of(kind)
    asked = () if tree is None else (n for n in ast.walk(tree) if isinstance(n, ast.Attribute))
    return frozenset(n.attr for n in asked if not isinstance(n.value, ast.Name) or n.value.id != "self")


def compares(model: nn.Module, attribute: str, text: str) -> bool:
    """Whether some class of the model compares an attribute with a text, alone or among others."""
    kinds = {kind for module in model.modules() for kind in classes_of(module)}
    return any(_compares(kind, attribute, text) for kind in kinds)


@functools.cache
def _compares(kind: Any, attribute: str, text: str) -> bool:
    tree = tree_of(kind)
    return tree is not None and any(
        any(isinstance(n, ast.Attribute) and n.attr == attribute for n in ast.walk(test))
        and any(isinstance(n, ast.Constant) and n.value == text for n in ast.walk(test))
        for test in _comparisons(tree)
    )


def _comparisons(tree: ast.AST) -> Iterator[ast.Compare]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Compare))
