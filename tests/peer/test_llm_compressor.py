"""Plain rounding gives what llm-compressor gives (`QuantizationModifier`, round to nearest).

Its arithmetic is done in the model's dtype, ours in float32. Where it gets a float32 model every code and
every scale is the same; of a bfloat16 model a few scales are the neighbouring number, and codes under them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from peer.ours import DEMO
from peer.peers import LLM_COMPRESSOR
from pipeline.runs import quantize, token_rows

pytestmark = pytest.mark.peer

SCHEMES: dict[str, dict[str, Any]] = {
    "NVFP4": {"scheme": "NVFP4"},
    "MXFP4": {"scheme": "MXFP4"},
    "MXFP8": {"scheme": "MXFP8"},
    "FP8": {"scheme": "FP8_STATIC", "group_size": 0},
    "FP8_DYNAMIC": {"scheme": "FP8_STATIC", "act_dynamic": True, "act_group_size": -1},
    "FP8_BLOCK": {"scheme": "FP8_BLOCK"},
    "FP8_STATIC": {"scheme": "FP8_STATIC"},
}
"""Its scheme -> ours."""

_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
UNNAMED = {
    "FP8_STATIC": {
        "rows": {
            "targets": ["Linear"],
            "weights": {**_FP8, "strategy": "channel"},
            "input_activations": {**_FP8, "strategy": "tensor", "observer": "static_minmax"},
        }
    }
}
"""Settings of what it has no name for, observed as what it has names for."""

UNPACKED = ("NVFP4", "MXFP4", "MXFP8")
"""Readers unpack these to bfloat16: `llm_compressor` refuses them for a float32 model, so it gets the
bfloat16 one, whose weights are the same numbers."""

ROWS = token_rows(14, 64)
TUNED = 4
"""Rows that calibrate; those behind them measure the result."""

OF_BFLOAT16 = {
    **dict.fromkeys(("FP8", "FP8_STATIC", "FP8_DYNAMIC", "FP8_BLOCK"), 0.06),
    **{"NVFP4": 0.04, "MXFP4": 0.0, "MXFP8": 0.0},
}
"""Share of a bfloat16 model's codes that may differ. FP8 weights that are divided
in bfloat16 are rounded twice: 3 % get another code. FP8 scales of NVFP4 that are divided there are the
neighbouring number in 2.5 % of the groups. Powers of two are exact."""


@dataclass(frozen=True)
class Both:
    """Tensors of both folders, by the name of the dtype and its scheme."""

    ours: dict[tuple[str, str], dict[str, Tensor]]
    theirs: dict[tuple[str, str], dict[str, Tensor]]


@pytest.fixture(scope="module")
def both(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Both:
    LLM_COMPRESSOR.python()
    scratch = tmp_path_factory.mktemp("llm-compressor")
    models = {"float32": demo, "bfloat16": DEMO}
    asked = {(dtype, scheme): scratch / f"{dtype}-{scheme}" for dtype in models for scheme in SCHEMES}
    jobs = [
        {
            "model": str(models[dtype]),
            "folder": str(folder),
            "scheme": UNNAMED.get(scheme, scheme),
            "rows": ROWS[:TUNED],
        }
        for (dtype, scheme), folder in asked.items()
    ]
    LLM_COMPRESSOR.run("quantize_with_llm_compressor.py", {"jobs": jobs}, scratch / "made")
    ours, theirs = {}, {}
    for key, folder in asked.items():
        facts = json.loads(Path(f"{folder}.json").read_text())
        assert "error" not in facts, facts["error"]
        theirs[key] = load_file(folder / "model.safetensors")
        given = {"group_size": None, "iters": 0, "disable_opt_rtn": True, "nsamples": TUNED, "seqlen": 64}
        out = scratch / "ours" / folder.name
        result = quantize(
            DEMO if key[1] in UNPACKED else models[key[0]],
            out,
            dataset=ROWS,
            format="llm_compressor",
            **{**given, **SCHEMES[key[1]]},
        )
        ours[key] = load_file(result.folders[0] / "model.safetensors")
    return Both(ours, theirs)


def stored(tensors: dict[str, Tensor], *, inputs: bool) -> dict[str, Tensor]:
    """Numbers of inputs, or everything else."""
    return {name: t for name, t in tensors.items() if (".input_" in name) is inputs}


def octets(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_and_scales_of_a_float32_model_are_the_same(both: Both, scheme: str) -> None:
    got = stored(both.ours["float32", scheme], inputs=False)
    want = stored(both.theirs["float32", scheme], inputs=False)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].shape == tensor.shape, name
        same = tensor.to(got[name].dtype)  # what is not quantized is kept as it is
        assert torch.equal(octets(got[name]), octets(same)), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_of_a_bfloat16_model_are_nearly_the_same(both: Both, scheme: str) -> None:
    got, want = (stored(each["bfloat16", scheme], inputs=False) for each in (both.ours, both.theirs))
    assert got.keys() == want.keys()
    codes = [n for n in want if n.endswith(("_packed", "proj.weight"))]
    differ = sum(int((octets(got[n]) != octets(want[n])).sum()) for n in codes)
    assert differ <= OF_BFLOAT16[scheme] * sum(octets(want[n]).numel() for n in codes)
    for name in want.keys() - set(codes):
        torch.testing.assert_close(got[name].float(), want[name].float(), rtol=2.0**-3, atol=0)


@pytest.mark.parametrize("scheme", ["NVFP4", "FP8", "FP8_STATIC"])
def test_numbers_of_inputs(both: Both, scheme: str) -> None:
    """The first layer's are the same; in llm-compressor later layers see quantized ones before them."""
    got, want = (stored(each["float32", scheme], inputs=True) for each in (both.ours, both.theirs))
    assert got.keys() == want.keys()
    assert got
    for name, tensor in want.items():
        first = "layers.0.self_attn.q_proj" in name
        torch.testing.assert_close(got[name].float(), tensor.float(), rtol=0.01 if first else 0.3, atol=0)
