"""Encoder and projector of models that read images in a GGUF file of their own, read back by `gguf`."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from auto_round.config import build_options
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.pipeline.quantize import run
from export.gguf.test_language_models import SHORT, save

gguf = pytest.importorskip("gguf")

PROCESSOR = {"image_mean": [0.5, 0.25, 0.125], "image_std": [0.5, 0.5, 1.0], "size": {"longest_edge": 112}}


def written(name, tmp_path, kind, **given):
    model, out = save(name, tmp_path / "model"), tmp_path / "out"
    (model / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    options = {"model": str(model), "output_dir": str(out), "format": "gguf:q8_0", **SHORT, **given}
    result = run(build_options({**options, "mmproj": kind}))
    (path,) = out.glob("mmproj-*.gguf")
    assert len(list(out.glob("*.gguf"))) == 2
    return load_file(model / "model.safetensors"), gguf.GGUFReader(path), result, path


def values(tensor):
    shape = [int(n) for n in reversed(tensor.shape)]
    return torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).reshape(shape)


PLACES = {
    "idefics3": {
        "v.blk.1.attn_q.weight": "model.vision_model.encoder.layers.1.self_attn.q_proj.weight",
        "v.blk.0.ffn_up.bias": "model.vision_model.encoder.layers.0.mlp.fc1.bias",
        "v.patch_embd.weight": "model.vision_model.embeddings.patch_embedding.weight",
        "mm.model.fc.weight": "model.connector.modality_projection.proj.weight",
    },
    "gemma3": {
        "v.blk.1.attn_out.weight": "vision_tower.encoder.layers.1.self_attn.out_proj.weight",
        "v.position_embd.weight": "vision_tower.embeddings.position_embedding.weight",
        "v.post_ln.weight": "vision_tower.post_layernorm.weight",
        "mm.input_projection.weight": "multi_modal_projector.mm_input_projection_weight",
    },
}


@pytest.mark.parametrize(("name", "kind"), [("idefics3", "q8_0"), ("gemma3", "f16")])
def test_every_number_is_where_llama_cpp_looks(tmp_path, name, kind):
    weights, reader, result, path = written(name, tmp_path, kind)
    there = {tensor.name: tensor for tensor in reader.tensors}
    assert path.name == f"mmproj-model-{kind.upper()}.gguf"
    for place, source in PLACES[name].items():
        bound = 0.02 if there[place].tensor_type.name == "Q8_0" else 1e-3
        torch.testing.assert_close(values(there[place]), weights[source], rtol=bound, atol=bound * 0.3)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["v.patch_embd.weight"] == "F32"
    assert types["v.blk.0.ln1.weight"] == "F32"
    assert types["v.blk.0.ffn_down.weight"] == kind.upper()
    told = {key: field.contents() for key, field in reader.fields.items()}
    assert told["general.architecture"] == "clip"
    assert told["clip.projector_type"] == name
    assert told["clip.vision.image_mean"] == PROCESSOR["image_mean"]
    assert told["clip.vision.block_count"] == 2
    assert told["clip.vision.projection_dim"] == 64
    checked = result.report["verified"]["gguf:q8_0"]
    assert checked["mmproj_tensors"] == len(there)


def test_what_gemma_multiplies_by_and_what_llama_cpp_does_not_read(tmp_path):
    weights, reader, _, _ = written("gemma3", tmp_path, "f16")
    there = {tensor.name: tensor for tensor in reader.tensors}
    norm = weights["multi_modal_projector.mm_soft_emb_norm.weight"]
    torch.testing.assert_close(values(there["mm.soft_emb_norm.weight"]), norm + 1)
    assert there["mm.input_projection.weight"].tensor_type.name == "F16"
    outside = [n for n in weights if not n.startswith("language_model.") and ".head." not in n]
    assert len(there) == len(outside)


def test_what_is_not_known_is_refused_before_work(tmp_path):
    model = save("qwen2_5_vl", tmp_path / "qwen")
    given = {"output_dir": str(tmp_path / "out"), "format": "gguf:q8_0", "mmproj": "f16", **SHORT}
    with pytest.raises(UnsupportedError, match=r'no mmproj file of model type "qwen2_5_vl".*\n.*idefics3'):
        run(build_options({"model": str(model), **given}))
    bare = save("idefics3", tmp_path / "idefics3")
    with pytest.raises(ConfigError, match="nothing in the model's folder does: expected image_mean"):
        run(build_options({"model": str(bare), **given}))
    with pytest.raises(ConfigError, match="mmproj belongs to GGUF files"):
        run(build_options({"model": str(bare), **given, "format": "auto_round"}))
    with pytest.raises(ConfigError, match="q8_0"):
        build_options({"model": str(bare), **given, "mmproj": "q4_0"})
    assert not (tmp_path / "out").exists()
