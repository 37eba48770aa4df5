"""Tiny models on disk, made once, and a place of its own for the scores of each test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round.autoscheme import scores
from auto_round.autoscheme.parts import Part
from auto_round.testing.tiny_models import save_tiny_model
from pipeline.runs import SIZES


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Folder of the scores."""
    monkeypatch.setenv("AR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes folders of tiny models; equal arguments give the same folder."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(family: str = "qwen3", **changes: Any) -> Path:
        key = (family, *sorted(changes.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("model") / family
            made[key] = save_tiny_model(
                family, folder, dtype=torch.bfloat16, **{**SIZES, "head_dim": 32, **changes}
            )
        return made[key]

    return make


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[Part, list[float]]]:
    """What `measured_scores` returned, one entry a call."""
    found: list[dict[Part, list[float]]] = []
    plain = scores.measured_scores

    def watch(*args: Any) -> Any:
        found.append(dict(plain(*args)))
        return found[-1]

    monkeypatch.setattr("auto_round.autoscheme.runs.measured_scores", watch)
    return found
