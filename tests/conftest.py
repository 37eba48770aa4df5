"""Settings of the whole suite: one thread a process (pytest-xdist runs several), one compute dtype."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from auto_round.numerics.search import THOROUGH
from auto_round.pipeline.checking import verify
from auto_round.pipeline.deciding import job
from auto_round.pipeline.machine import device
from auto_round.tuning import sign_round

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(
    int(os.environ["OMP_NUM_THREADS"])
)  # read when PyTorch was loaded: too early for the above

TESTS = Path(__file__).parent
WHOLE_RUNS = (
    "autoround",
    "autoscheme",
    "cli",
    "evaluate",
    "export",
    "inference",
    "pipeline",
    "report",
    "stored",
)
"""Folders whose tests are of what a run does with codes, whichever codes these are."""
SHORT_SEARCH = replace(THOROUGH, points=12, rounds=2, distances=6, sweeps=1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse names that hold an address: it differs between processes, and pytest-xdist stops at that."""
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(f"{item.nodeid}: give this case an id without an address")


@pytest.fixture(autouse=True)
def _bfloat16_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs compute in bfloat16 on every processor, so that tests see the same numbers everywhere."""
    monkeypatch.setattr(device, "has_bfloat16_arithmetic", lambda: True)


@pytest.fixture(autouse=True, scope="module")
def _tiny_runs_stay_short(request: pytest.FixtureRequest) -> Iterator[None]:
    """A short sample, no waits for the disk (no test cuts the power) and, in whole runs, a shorter search.

    These are most of a tiny model's time. What the search finds is for the tests of `numerics` and `tuning`.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "NEW_TOKENS", 4)
        patch.setattr(os, "fsync", lambda _: None)
        if request.path.relative_to(TESTS).parts[0] in WHOLE_RUNS:
            for place in (sign_round, job):
                patch.setattr(place, "THOROUGH", SHORT_SEARCH)
        yield


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


@pytest.fixture(scope="session")
def saved_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the sweep's tiny model of a family, made once; nothing may change it."""
    from sweep.outcome import save_family

    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = save_family(family, tmp_path_factory.mktemp("model") / family)
        return made[family]

    return folder
