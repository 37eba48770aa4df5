"""Tiny models of 16 bits on disk, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from auto_round.testing.tiny_models import save_tiny_model


@pytest.fixture(scope="session")
def plain_models(tmp_path_factory):
    """Folders of tiny models of 16 bits whose matrices can be packed."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64}
            folder = tmp_path_factory.mktemp(family)
            made[family] = save_tiny_model(family, folder, dtype=torch.bfloat16, **sizes)
        return made[family]

    return get
