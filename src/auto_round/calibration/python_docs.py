"""`python-docs`: calibration text that every CPython carries with it, read without running any of it.

Two kinds of documents: the chapters of the language reference that `help()` shows (`pydoc_data/topics.py`),
and for each module of the standard library its docstrings, in the order of its source. The files are parsed
with `ast` and never imported. The same Python installation always gives the same documents.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

from auto_round.errors import ConfigError

_TOPICS = "pydoc_data/topics.py"
_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "__phello__",
        "_bundled",
        "dist-packages",
        "idle_test",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")
_DEFINITION = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class PythonDocs(Sequence[str]):
    """The documents, read from disk when asked for.

    A module without docstrings is an empty document: finding out which ones are empty would mean parsing all.

    Args:
        root: the standard library's folder; None means that of the Python that runs this.

    Attributes:
        names: name of each document, for example `topic:assert` or `module:argparse`.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._root = Path(sysconfig.get_path("stdlib")) if root is None else root
        self._topics = read_topics(self._root / _TOPICS)
        self._modules = module_files(self._root)
        if not self._topics and not self._modules:
            raise ConfigError(
                f"python-docs: this Python carries neither {_TOPICS} nor the sources of its standard library "
                f"under {self._root}; give another data set, for example --dataset path.jsonl"
            )
        self.names = (
            *(f"topic:{name}" for name in self._topics),
            *(f"module:{_module_name(path)}" for path in self._modules),
        )
        self._texts = tuple(self._topics.values())

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        if position < len(self._texts):
            return self._texts[position]
        path = self._modules[position - len(self._texts)]
        return module_text(self._root / path, _module_name(path))


def read_topics(path: Path) -> dict[str, str]:
    """Return topic name -> chapter, sorted by name; empty when the file is not there."""
    if not path.is_file():
        return {}
    for node in _parse(path).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            return {name: topics[name].strip() for name in sorted(topics)}
    return {}


def module_files(root: Path) -> tuple[Path, ...]:
    """Return the library's `.py` files relative to `root`, sorted, without tests and third-party packages."""
    return tuple(sorted(_walk(root, Path()), key=Path.as_posix))


def _walk(root: Path, folder: Path) -> Iterator[Path]:
    for entry in (root / folder).iterdir():
        if entry.name.startswith(_SKIPPED_PREFIXES):
            continue
        if entry.suffix == ".py" and entry.is_file():
            yield folder / entry.name
        elif entry.name not in _SKIPPED_FOLDERS and entry.is_dir():
            yield from _walk(root, folder / entry.name)


def module_text(path: Path, name: str) -> str:
    """Return the docstrings of one source file, each under the line that it documents; "" if it has none.

    Args:
        path: the source file.
        name: dotted name that the module is imported under.
    """
    tree = _parse(path)
    parts = []
    if docstring := ast.get_docstring(tree):
        parts.append(f"module {name}\n\n{docstring}")
    parts.extend(_docstrings(tree, name))
    return "\n\n".join(parts)


def _docstrings(node: ast.AST, prefix: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _DEFINITION):
            name = f"{prefix}.{child.name}"
            if docstring := ast.get_docstring(child):
                yield f"{_heading(child, name)}\n\n{docstring}"
            if isinstance(child, ast.ClassDef):
                yield from _docstrings(child, name)
        elif isinstance(child, (ast.If, ast.Try, ast.With)):
            yield from _docstrings(child, prefix)


def _heading(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    return f"{name}({ast.unparse(node.args)})"


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates with odd contents: no documents in them
            return ast.Module(body=[], type_ignores=[])
