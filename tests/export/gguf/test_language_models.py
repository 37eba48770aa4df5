"""GGUF files of models that read images: their language model, as a model of text alone would be written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from auto_round.config import build_options
from auto_round.errors import UnsupportedError
from auto_round.pipeline.quantize import run
from export.gguf.small_models import VOCABULARY, byte_level_tokenizer
from sweep.multimodal import FAMILIES
from sweep.outcome import save_config

gguf = pytest.importorskip("gguf")

SHORT = {"iters": 0, "disable_opt_rtn": True, "device_map": "cpu", "verify": True}


def save(name: str, folder: Path) -> Path:
    """A random model of a family with a tokenizer that llama.cpp knows."""
    from transformers import AutoConfig

    family = FAMILIES[name]
    sizes = dict(family.config)
    more = {"hidden_size_per_layer_input": 0} if name == "gemma4" else {}
    kept = {"query_pre_attn_scalar": 16} if name == "gemma3" else {}
    sizes["text_config"] = {**sizes["text_config"], "vocab_size": VOCABULARY, **more, **kept}
    save_config(AutoConfig.for_model(family.model_type, **sizes), folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def write(model: Path, out: Path, form: str = "gguf:f16", **given) -> Path:
    run(build_options({"model": str(model), "output_dir": str(out), "format": form, **SHORT, **given}))
    (path,) = out.glob("*.gguf")
    return path


def fields(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors(path: Path) -> dict[str, bytes]:
    return {t.name: t.data.tobytes() for t in gguf.GGUFReader(path).tensors}


PLAIN = {
    "llava": "language_model.model.",
    "idefics3": "model.text_model.",
    "mistral3": "language_model.model.",
    "internvl": "language_model.model.",
    "gemma3": "language_model.model.",
}
"""Models whose language model is a family of its own -> what its tensors are called with on disk."""


ALWAYS = ("llava", "gemma3")
"""The others take a while."""


def kept_for_later(names: Iterable[str]) -> list[Any]:
    return [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", kept_for_later(PLAIN))
def test_the_file_is_that_of_the_language_model_alone(tmp_path, name):
    model, alone = save(name, tmp_path / "both"), tmp_path / "alone"
    alone.mkdir()
    config = json.loads((model / "config.json").read_text())
    text = config["text_config"] | {"tie_word_embeddings": config.get("tie_word_embeddings", True)}
    (alone / "config.json").write_text(json.dumps(text))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (alone / file).write_bytes((model / file).read_bytes())
    weights = load_file(model / "model.safetensors")
    inside = {n.replace(PLAIN[name], "model."): w for n, w in weights.items() if n.startswith(PLAIN[name])}
    for head in (w for n, w in weights.items() if n.endswith("lm_head.weight")):
        inside["lm_head.weight"] = head
    save_file(inside, alone / "model.safetensors", {"format": "pt"})
    one, other = (write(folder, tmp_path / f"out-{folder.name}") for folder in (model, alone))
    assert tensors(one) == tensors(other)
    found, wanted = (
        {n: v for n, v in fields(path).items() if not n.startswith(("GGUF.", "tokenizer.", "general.name"))}
        for path in (one, other)
    )
    assert found == wanted


@pytest.mark.parametrize(
    ("name", "arch", "prefix", "more"),
    [
        pytest.param("qwen2_vl", "qwen2vl", "model.", {}, marks=pytest.mark.slow),
        ("qwen2_5_vl", "qwen2vl", "model.", {}),
        ("qwen3_vl", "qwen3vl", "model.language_model.", {"qwen3vl.n_deepstack_layers": 2}),
    ],
)
def test_positions_in_images_are_told(tmp_path, name, arch, prefix, more):
    model = save(name, tmp_path / "model")
    path = write(model, tmp_path / "out")
    found, read = fields(path), {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert found["general.architecture"] == arch
    assert found[f"{arch}.rope.dimension_sections"] == [2, 3, 3, 0]
    assert found.items() >= more.items()
    assert not any(name.startswith(("v.", "mm.")) for name in read)
    weights = load_file(model / "model.safetensors")
    inside = [n for n in weights if n.startswith((prefix + "layers", prefix + "embed", prefix + "norm"))]
    assert len(read) == len(inside) + 1
    query = weights[f"{prefix}layers.1.self_attn.q_proj.weight"]
    stored = torch.from_numpy(read["blk.1.attn_q.weight"].data.copy())
    torch.testing.assert_close(stored.float(), query.half().float(), rtol=0, atol=0)


def test_language_blocks_are_tuned_and_encoders_are_left_out(tmp_path, caplog):
    model = save("qwen2_5_vl", tmp_path / "model")
    rows = torch.randint(3, 90, (10, 16), generator=torch.Generator().manual_seed(0)).tolist()
    given = {"format": "gguf:q8_0", "iters": 1, "disable_opt_rtn": False, "nsamples": 4, "seqlen": 16}
    options = {"model": str(model), "output_dir": str(tmp_path / "out"), **SHORT, **given}
    result = run(build_options({**options, "quant_nontext_module": True}), dataset=rows)
    assert len(result.plan.quantized) == 15
    assert all(not name.startswith("visual") for name in result.plan.quantized)
    assert any("tensors of encoders and projectors are not in it" in w for w in result.plan.warnings)
    assert "quant_nontext_module has no effect: the file holds the language model" in caplog.text


def test_a_language_model_that_llama_cpp_does_not_know_is_refused(tmp_path):
    model = save("aria", tmp_path / "model")
    with pytest.raises(UnsupportedError, match='no GGUF description of model type "aria_text"'):
        write(model, tmp_path / "out")
