"""The planned peak is that of the run: not less, and at most 15 % more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.fitting.measured_peak import SHAPES, make_model

SCRIPT = Path(__file__).with_name("measured_peak.py")


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_the_planned_peak_is_that_of_the_run(tmp_path, shape):
    make_model(shape, tmp_path / "model")
    said = subprocess.check_output([sys.executable, SCRIPT, shape, tmp_path], text=True)
    found = json.loads(said.splitlines()[-1])
    assert found["measured"] <= found["planned"] <= 1.15 * found["measured"], found
