"""Settings of the whole suite: one thread a process (pytest-xdist runs several), one compute dtype."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from auto_round.pipeline.checking import verify
from auto_round.pipeline.machine import device

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _bfloat16_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs compute in bfloat16 on every processor, so that tests see the same numbers everywhere."""
    monkeypatch.setattr(device, "has_bfloat16_arithmetic", lambda: True)


@pytest.fixture(autouse=True)
def _tiny_runs_stay_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short sample, and no waits for the disk: most of a tiny model's time. No test cuts the power."""
    monkeypatch.setattr(verify, "NEW_TOKENS", 4)
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def copied_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of the test's own for the code of models that Transformers copies and imports.

    Python is told of that folder and keeps what it imported. Both are undone, or the next test would find
    the code of this one.
    """
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "copied_code"))
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not (Path(p) / "transformers_modules").is_dir()])
    _forget_copied_code()
    yield
    _forget_copied_code()


def _forget_copied_code() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]
