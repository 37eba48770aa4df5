"""Floating formats of pipelines: diffusers and Transformers load them through this package."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", exc_type=ImportError)

from auto_round.diffusion.run import run_pipeline
from auto_round.errors import UnsupportedError
from diffusion.runs import job, part
from diffusion.tiny import flux, save

PLAIN = {"components": "transformer,text_encoder_2", "iters": 0, "bits": None, "nsamples": 2}
OTHERS = ["MXFP8", "NVFP4", "FP8_STATIC", "FPW8A16", "INT8_W8A8"]


def dequantized(kind, folder, dtype):
    """Weights of the packed layers as they compute, by name."""
    model = kind.from_pretrained(folder, dtype=dtype)
    packed = {n: m for n, m in model.named_modules() if type(m).__name__ == "QuantLinear"}
    return {name: module.dequantize(torch.float32) for name, module in packed.items()}


@pytest.mark.parametrize("scheme", ["MXFP4", *(pytest.param(s, marks=pytest.mark.slow) for s in OTHERS)])
def test_floats(tiny, tmp_path, scheme):
    """Weights are what was tuned; steps in float32, as this pipeline has them, are cut short by bfloat16."""
    from diffusers import FluxTransformer2DModel
    from transformers import T5EncoderModel

    given = {**PLAIN, "scheme": scheme, "format": "auto_round,fake", "disable_opt_rtn": True}
    result = run_pipeline(job(tiny("flux"), "flux", tmp_path / "out", **given))
    for name, kind in {"transformer": FluxTransformer2DModel, "text_encoder_2": T5EncoderModel}.items():
        packed, plain = (folder / name for folder in result.folders)
        whole = dict(kind.from_pretrained(plain, dtype=torch.float32).named_modules())
        for dtype in (torch.float32, torch.bfloat16):
            found = dequantized(kind, packed, dtype)
            assert len(found) == part(result, name)["layers"]["quantized"]
            lost = 2**-7 if dtype is torch.bfloat16 and not scheme.startswith("MX") else 0
            for layer, weight in found.items():
                torch.testing.assert_close(weight, whole[layer].weight.data, rtol=lost, atol=0)
        checked = part(result, name)["verified"]
        assert all(checked[fmt].get("error", 0) < 1e-9 for fmt in ("auto_round", "fake"))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["FP8_STATIC", "FPW8A16"])
def test_floats_of_a_pipeline_in_bfloat16(tmp_path, scheme):
    """As those that people have: its steps bear what diffusers casts to."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    FluxPipeline.from_pretrained(save(flux, tmp_path / "in")).to(torch.bfloat16).save_pretrained(
        tmp_path / "in"
    )
    given = {**PLAIN, "components": "transformer", "scheme": scheme, "format": "auto_round,fake"}
    result = run_pipeline(job(tmp_path / "in", "flux", tmp_path / "out", **given, disable_opt_rtn=True))
    packed, plain = (folder / "transformer" for folder in result.folders)
    whole = dict(FluxTransformer2DModel.from_pretrained(plain, dtype=torch.bfloat16).named_modules())
    for layer, weight in dequantized(FluxTransformer2DModel, packed, torch.bfloat16).items():
        assert torch.equal(weight.bfloat16(), whole[layer].weight)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"scheme": "MXFP4", "format": "llm_compressor"}, ["llm_compressor", "auto_round or fake"]),
        ({"scheme": "MXINT4"}, ["mxint4", "formats that can: fake"]),
        ({"scheme": "W4A16", "bits": 5}, ["5 bits", "formats that can: fake"]),
        ({"scheme": "FP8_BLOCK", "components": "transformer"}, ["128 does not divide 32 inputs"]),
    ],
    ids=lambda given: given.get("scheme") if isinstance(given, dict) else "",
)
def test_what_no_reader_loads_is_refused(tiny, tmp_path, given, words):
    with pytest.raises(UnsupportedError) as caught:
        job(tiny("flux"), "flux", tmp_path / "out", **{**PLAIN, **given})
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "llm_compressor, fake" not in str(caught.value)
    assert not list(tmp_path.iterdir())
