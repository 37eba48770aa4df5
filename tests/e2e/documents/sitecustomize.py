"""Loaded by the snippets' Python at its start: hub data sets without a hub."""

from __future__ import annotations

import random
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder
from typing import Any

WORDS = ("the", "rounding", "of", "a", "weight", "is", "learned", "from", "its", "block", "output")
ROWS = 2000


def hub_dataset(name: str, **_: Any) -> Any:
    """Text of the columns that the documents' data sets have."""
    import datasets

    words = random.Random(name)
    texts = [" ".join(words.choices(WORDS, k=120)) for _ in range(ROWS)]
    return datasets.Dataset.from_dict(dict.fromkeys(("text", "code", "content"), texts))


class _Finder(MetaPathFinder):
    """Finds `datasets` as always, and replaces its `load_dataset` once it is loaded."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "datasets":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Replaced(spec.loader)
        return spec


class _Replaced(Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._loader.exec_module(module)
        module.load_dataset = hub_dataset


sys.meta_path.insert(0, _Finder())
