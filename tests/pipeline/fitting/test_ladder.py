"""Models larger than the memory that a run may take are quantized to the end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

LADDER = Path(__file__).parents[3] / "benchmarks" / "memory_ladder.py"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of address space")
@pytest.mark.parametrize(("how", "times"), [("plain", 1.0), ("optimized", 0.1), ("tuned", 0.15)])
def test_a_model_is_quantized_below_a_limit(tmp_path, how, times):
    """Two GiB of address space, of which PyTorch takes a part; larger models are in docs/LOG.md."""
    command = [sys.executable, LADDER, tmp_path, "--times", str(times), "--how", how]
    found = json.loads(subprocess.check_output(command, text=True))
    assert found["ended"] == "finished", found
    assert found["peak_gb"] <= found["planned_gb"] <= 1.15 * found["peak_gb"], found
