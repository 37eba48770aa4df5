"""Tiny models on disk, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round.testing.tiny_models import save_tiny_model
from pipeline.runs import SIZES

ModelMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelMaker:
    """Folder of a tiny model of a family; equal arguments give the same folder, so nothing may change it."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(family: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
        key = (family, dtype, *sorted(changes.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("model") / family
            made[key] = save_tiny_model(family, folder, dtype=dtype, **{**SIZES, **changes})
        return made[key]

    return make
