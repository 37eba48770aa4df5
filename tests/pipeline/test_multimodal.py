"""Models that read images: language blocks are tuned, towers are copied, names on disk stay."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

from auto_round.errors import UnsupportedError
from pipeline.runs import quantize, weights
from sweep.multimodal import model_config
from sweep.outcome import save_config

TOWER, ON_HUB = "vision_tower.", "vision_tower.vision_model."
"""What Transformers 5 and files on the hub call the tower of LLaVA."""


def test_names_of_the_hub_stay_and_towers_are_copied(tmp_path):
    model, out = save_config(model_config("llava"), tmp_path / "model"), tmp_path / "out"
    tensors = {n.replace(TOWER, ON_HUB): t for n, t in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    (model / "preprocessor_config.json").write_text('{"image_processor_type":  "CLIPImageProcessor"}\n')
    result = quantize(model, out)
    assert result.report["verified"]["auto_round"]["kl"] < 1e-6
    assert len(result.plan.quantized) == 14
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["block_name_to_quantize"] == "language_model.model.layers"
    written = weights(out)
    kept = {name: t for name, t in tensors.items() if ".layers." not in name or "vision" in name}
    assert all(written[name].equal(t) for name, t in kept.items())
    assert not any("qweight" in name and "vision" in name for name in written)
    copied = (out / "preprocessor_config.json").read_bytes()
    assert copied == (model / "preprocessor_config.json").read_bytes()


def test_blocks_that_only_images_reach_are_named_before_work(tmp_path):
    model = save_config(model_config("mllama"), tmp_path / "model")
    with pytest.raises(UnsupportedError, match=r"cross_attn.* only where there are images"):
        quantize(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = quantize(model, tmp_path / "out", ignore_layers="model.layers.1")
    assert result.report["verified"]["auto_round"]["kl"] < 1e-6
