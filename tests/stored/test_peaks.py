"""A quantized folder takes no more memory than its twin of 16 bits, and gives the same bytes at that size."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pipeline.fitting.measured_peak import make_model
from pipeline.fitting.test_peaks import SCRIPT
from stored.makers import fp8_tiles, mx_experts
from stored.test_compressed import CASES
from stored.test_sources import FP8, assert_same, is_stack
from stored.twins import in_blocks, make_twins

MORE = 1.05
"""Most memory, in that of the twin: codes of a matrix lie beside it while it is unpacked."""


def fp8_blocks(name, weight):
    """As DeepSeek names them."""
    stored, dequantized = fp8_tiles(name, weight)
    return {name: stored[name], f"{name}_scale_inv": stored[f"{name}_scale"]}, dequantized


SOURCES = {
    "fp8 blocks": ("dense", {**FP8, "weight_block_size": [32, 32]}, fp8_blocks, in_blocks),
    "mxfp4 experts": ("experts of one parameter", {"quant_method": "mxfp4"}, mx_experts, is_stack),
    **{
        f"compressed-tensors {name}": ("dense", *CASES[name], in_blocks)
        for name in ("fp8 rows", "int8 rows", "int4", "mxfp4", "nvfp4")
    },
}
"""Shape of the model, configuration, what packs a tensor, and which tensors."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_it_takes_what_its_plain_twin_takes(tmp_path, name, record_property):
    shape, config, pack, wanted = SOURCES[name]
    make_model(shape, tmp_path / "model")
    pair = make_twins(tmp_path, tmp_path / "model", config, pack, wanted)
    found = {}
    for kind, folder in (("packed", pair.packed), ("plain", pair.plain)):
        (tmp_path / kind / "model").mkdir()
        for file in folder.glob("*.*"):
            file.rename(folder / "model" / file.name)
        said = subprocess.check_output([sys.executable, SCRIPT, shape, folder], text=True)
        found[kind] = json.loads(said.splitlines()[-1])
    assert_same(pair.packed / "out", pair.plain / "out")
    peaks = {kind: said["measured"] for kind, said in found.items()}
    record_property("peaks", peaks)
    assert peaks["packed"] <= MORE * peaks["plain"]
    assert peaks["packed"] <= found["packed"]["planned"]
