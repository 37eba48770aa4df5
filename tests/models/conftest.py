"""Tiny checkpoints, made once per session and never written to afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from auto_round.testing.tiny_models import save_tiny_model


@pytest.fixture(scope="session", autouse=True)
def _quiet_transformers():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Callable[[str], Path]:
    """Family -> folder of a tiny model of it."""
    root = tmp_path_factory.mktemp("models")

    def folder(family: str) -> Path:
        path = root / family
        return path if path.exists() else save_tiny_model(family, path)

    return folder
