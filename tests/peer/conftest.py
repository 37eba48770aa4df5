"""Models to quantize for peers, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from peer.ours import float32_demo, model_with_biases


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the demo model in float32."""
    return float32_demo(tmp_path_factory.mktemp("demo") / "model")


@pytest.fixture(scope="session")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random model with biases, in float32."""
    return model_with_biases(tmp_path_factory.mktemp("biased") / "model")
