"""Memory of a run does not grow with the number of blocks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers", exc_type=ImportError)

from diffusion.tiny import save, wide_flux

TESTS = Path(__file__).parents[1]

RUN = """
import json, re, sys
from pathlib import Path
from auto_round.config import build_options
from auto_round.diffusion.prepare import prepare_pipeline
from auto_round.diffusion.run import run_pipeline
from diffusion.tiny import CAPTIONS
given = {"iters": 1, "nsamples": 2, "num_inference_steps": 2, "steps_per_caption": 1, "amp": False}
given |= {"device_map": "cpu", "verify": False, "model": sys.argv[1], "output_dir": sys.argv[2]}
given["pipeline_args"] = {"height": 16, "width": 16, "max_sequence_length": 16}
result = run_pipeline(prepare_pipeline(build_options(given), dataset=CAPTIONS))
blocks = result.report["components"]["transformer"]["blocks"]
status = Path("/proc/self/status").read_text()  # unlike what getrusage tells, nothing of the parent's
peak = 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", status)[1])
print(json.dumps({"peak": peak, "blocks": len(blocks)}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="nobody tells the peak of a process")
def test_one_block_is_in_memory(tmp_path):
    """32 blocks hold 300 MB of weights; of each remain a few kB of plan, journal and header."""
    peaks = {}
    for depth in (2, 8, 32):
        folder = save(wide_flux, tmp_path / f"in-{depth}", depth=depth)
        weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        words = [sys.executable, "-c", RUN, str(folder), str(tmp_path / f"out-{depth}")]
        found = subprocess.run(words, capture_output=True, text=True, check=True, cwd=TESTS)
        said = json.loads(found.stdout.splitlines()[-1])
        assert said["blocks"] == depth
        peaks[depth] = (said["peak"], weights.stat().st_size)
    for depth in (8, 32):
        grown, more = (peaks[depth][i] - peaks[2][i] for i in (0, 1))
        assert more > 9e6 * (depth - 2)
        assert grown < 10e6 + 0.1 * more, peaks
