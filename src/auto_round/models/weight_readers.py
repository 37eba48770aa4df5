"""Linear layers whose weights other code reads: found in the source of a model's classes.

Some code multiplies by `layer.weight` instead of calling the layer, or changes the weight in place. Such a
layer cannot be replaced by packed codes: nobody would call it, or the change would be lost. Other code only
asks for the dtype of a weight, or initializes it by its name. Our loader answers for the `weight` of these
layers; not every loader does.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from auto_round.models.class_source import classes_of, tree_of

ELSEWHERE = "its weight is multiplied by other code, the layer itself is never called"
CHANGED = "its weight is changed in place by other code"
ASKED = "other code asks for its weight"
_ORDER = (CHANGED, ELSEWHERE, ASKED)
_FACTS = frozenset({"dtype", "device", "shape", "ndim", "size", "dim", "numel", "is_meta", "requires_grad"})
"""What can be asked of a weight without its numbers."""
_SETUP = ("__init__", "init_", "tie_weights", "_tie", "get_output_embeddings", "set_", "fuse_projections")
"""Beginnings of the names of methods that run before weights are there, or when a user of diffusers asks."""
_INITIALIZES = "_init_weights"


@dataclass(frozen=True, slots=True)
class _Read:
    """One `<root>.<path>.weight` in a class.

    Attributes:
        own: the root is `self`.
        path: module path below the root.
        reason: why the module has to stay as it is.
    """

    own: bool
    path: str
    reason: str


def read_elsewhere(model: nn.Module) -> dict[str, str]:
    """Module path -> why other code needs the `weight` of that module as it is."""
    found: dict[str, str] = {}
    paths = [path for path, _ in model.named_modules()]
    for path, module in model.named_modules():
        for read in _reads(module):
            for target in _targets(path, read, paths):
                known = found.get(target)
                if known is None or _ORDER.index(read.reason) < _ORDER.index(known):
                    found[target] = read.reason
    return found


def _targets(path: str, read: _Read, paths: Iterable[str]) -> Iterator[str]:
    inside = f"{path}." if path else ""
    if read.own:
        yield f"{inside}{read.path}"
        return
    end = f".{read.path}"
    yield from (p for p in paths if p.startswith(inside) and f".{p}".endswith(end))


def _reads(module: nn.Module) -> Iterator[_Read]:
    """Reads of weights in a module's classes."""
    for kind in classes_of(module):
        yield from _reads_in(kind)


@functools.cache
def _reads_in(kind: Any) -> tuple[_Read, ...]:
    tree = tree_of(kind)
    if tree is None:
        return ()
    methods = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and not node.name.startswith(_SETUP)
    ]
    called = {_dotted(n.func) for m in methods for n in ast.walk(m) if isinstance(n, ast.Call)}
    found = []
    for method in methods:
        above = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(method):
            if not isinstance(node, ast.Attribute) or node.attr != "weight":
                continue
            owner = _dotted(node.value)
            root, _, path = owner.partition(".")
            if not path:
                continue
            own, fact = root == "self", _is_fact(node, above)
            if method.name == _INITIALIZES or (fact and not _in_branch(node, above)):
                found.append(_Read(own, path, ASKED))
            elif fact:
                continue
            elif _is_changed(node, above):
                found.append(_Read(own, path, CHANGED))
            elif own and owner not in called:
                found.append(_Read(own, path, ELSEWHERE))
    return tuple(dict.fromkeys(found))


def _dotted(node: ast.AST) -> str:
    """`a.b.c` of an expression; empty for anything but names and attributes."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def _is_fact(node: ast.AST, above: dict[ast.AST, ast.AST]) -> bool:
    parent = above.get(node)
    return isinstance(parent, ast.Attribute) and parent.attr in _FACTS


def _in_branch(node: ast.AST, above: dict[ast.AST, ast.AST]) -> bool:
    """Whether an expression lies below an `if`: such branches are for special cases that few models take."""
    at: ast.AST | None = node
    while at is not None and not isinstance(at, ast.If):
        at = above.get(at)
    return at is not None


def _is_changed(node: ast.AST, above: dict[ast.AST, ast.AST]) -> bool:
    """Whether an expression is assigned to, or a method of it is called that works in place (`div_`)."""
    at: Any = node
    while isinstance(parent := above.get(at), (ast.Attribute, ast.Subscript)) and parent.value is at:
        at = parent
        if isinstance(parent, ast.Attribute) and parent.attr.endswith("_") and parent.attr[:1] != "_":
            return isinstance(above.get(parent), ast.Call)
    return isinstance(getattr(at, "ctx", None), ast.Store)
