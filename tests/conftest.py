"""Settings of the whole suite: one thread a process (pytest-xdist runs several), one compute dtype."""

from __future__ import annotations

import os

import pytest

from auto_round.pipeline.machine import device

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _bfloat16_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs compute in bfloat16 on every processor, so that tests see the same numbers everywhere."""
    monkeypatch.setattr(device, "has_bfloat16_arithmetic", lambda: True)
