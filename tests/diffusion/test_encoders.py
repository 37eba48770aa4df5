"""Text encoders of pipelines, tuned on the captions that their pipeline reads."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", exc_type=ImportError)

from auto_round.diffusion.run import run_pipeline
from auto_round.errors import UnsupportedError
from diffusion.runs import Killed, job, killed_after, part, tree

TUNED = {"components": "text_encoder_2", "format": "auto_round,fake", "group_size": 16, "iters": 4}
ENCODERS = {
    "sd3": "text_encoder,text_encoder_2,text_encoder_3",
    "qwen_image": "text_encoder",
    "wan": "text_encoder",
    "z_image": "text_encoder",
    "sdxl": "text_encoder_2,text_encoder",
}


@pytest.fixture(scope="module")
def flux(tiny, tmp_path_factory):
    return run_pipeline(job(tiny("flux"), "flux", tmp_path_factory.mktemp("encoder") / "out", **TUNED))


def test_transformers_loads_what_was_tuned(flux):
    from transformers import T5EncoderModel

    found = part(flux, "text_encoder_2")
    assert found["rows"] == {**found["rows"], "tuned": 5, "held_out": 2}  # a row for each caption
    assert sum(b["loss"] for b in found["blocks"]) < sum(b["initial_loss"] for b in found["blocks"])
    assert all(found["verified"][name]["error"] < 1e-9 for name in ("auto_round", "fake"))
    packed, plain = (folder / "text_encoder_2" for folder in flux.folders)
    whole = dict(T5EncoderModel.from_pretrained(plain).named_modules())
    layers = [
        (name, module)
        for name, module in T5EncoderModel.from_pretrained(packed, dtype=torch.bfloat16).named_modules()
        if type(module).__name__ == "QuantLinear"
    ]
    assert len(layers) == found["layers"]["quantized"] == 12
    assert all(torch.equal(m.dequantize(torch.float32), whole[name].weight) for name, m in layers)


def test_the_rest_of_the_pipeline_is_as_it_was(flux, tiny):
    source = tree(tiny("flux"))
    others = {name: data for name, data in source.items() if not name.startswith("text_encoder_2/")}
    for folder in flux.folders:
        found = tree(folder)
        assert all(found[name] == data for name, data in others.items())
        assert not any("diffusion_pytorch" in name for name in found if name.startswith("text_encoder_2"))


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ("tokenizer", "is no text encoder"),
        ("scheduler", "blocks of FlowMatchEulerDiscreteScheduler are not known"),
        ("vae", "blocks of AutoencoderKL are not known"),
    ],
)
def test_parts_without_blocks_are_refused(tiny, tmp_path, component, message):
    with pytest.raises(UnsupportedError, match=message):
        job(tiny("flux"), "flux", tmp_path / "out", components=f"transformer,{component}")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_every_family(tiny, tmp_path, name):
    given = {**TUNED, "components": ENCODERS[name], "iters": 30, "prompt": "a red cat"}
    result = run_pipeline(job(tiny(name), name, tmp_path / "out", **given))
    assert list(result.report["components"]) == ENCODERS[name].split(",")
    for found in result.report["components"].values():
        assert sum(b["loss"] for b in found["blocks"]) < sum(b["initial_loss"] for b in found["blocks"])
        assert all(found["verified"][form]["error"] < 1e-9 for form in ("auto_round", "fake"))
        assert 0 < found["held_out"]["relative_error"] < 0.3
    assert result.report["pictures"]["psnr"] > 20


@pytest.mark.slow
def test_with_the_transformer_killed_and_continued(tiny, tmp_path):
    """Each is tuned on what the original pipeline gave it, so the transformer is as it is alone."""
    given = {**TUNED, "components": "text_encoder_2,transformer", "format": "auto_round"}
    whole = run_pipeline(job(tiny("flux"), "flux", tmp_path / "whole", **given)).folders[0]
    for blocks in (1, 3):  # inside the encoder, and inside the transformer
        with pytest.raises(Killed):
            run_pipeline(job(tiny("flux"), "flux", tmp_path / "out", **given), killed_after(blocks))
    assert tree(run_pipeline(job(tiny("flux"), "flux", tmp_path / "out", **given)).folders[0]) == tree(whole)
    alone = {**given, "components": "transformer"}
    found = run_pipeline(job(tiny("flux"), "flux", tmp_path / "alone", **alone)).folders[0]
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (found / weights).read_bytes() == (whole / weights).read_bytes()


@pytest.mark.slow
def test_one_caption_again_and_again(tiny, tmp_path):
    """An encoder reads it once: there is one row to tune on, and none to judge by."""
    from auto_round.config import build_options
    from auto_round.diffusion.prepare import prepare_pipeline
    from diffusion.runs import SHORT
    from diffusion.tiny import FAMILIES

    given = {**SHORT, **TUNED, "format": "fake", "pipeline_args": FAMILIES["flux"][1]}
    options = build_options({**given, "model": str(tiny("flux")), "output_dir": str(tmp_path / "out")})
    result = run_pipeline(prepare_pipeline(options, dataset=["a red cat"] * 6))
    assert part(result, "text_encoder_2")["rows"]["tuned"] == 1
    assert "held_out" not in part(result, "text_encoder_2")
