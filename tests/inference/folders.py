"""Tiny quantized folders written by hand: layouts and safetensors only, none of the package's exporters."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from auto_round.inference.disk_names import DiskNames
from auto_round.layouts.gptq import GPTQ
from auto_round.layouts.table import layout_for
from auto_round.numerics.presets import int_format

TINY = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Request:
    """What to write."""

    packing: str = "auto_round:auto_gptq"
    bits: int = 4
    group_size: int = 32
    sym: bool = True
    dtype: torch.dtype = torch.float32
    family: str = "llama"
    overrides: tuple[tuple[str, Any], ...] = ()
    extra: tuple[tuple[str, dict[str, Any]], ...] = ()
    head: bool = False
    experts: bool = False
    config: tuple[tuple[str, Any], ...] = ()


def tiny_model(request: Request) -> Any:
    """A random model, weights from one generator, in the request's dtype."""
    config = AutoConfig.for_model(request.family, **{**TINY, **dict(request.overrides)})
    model = AutoModelForCausalLM.from_config(config, dtype=request.dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval()


def fields_of(request: Request, layer: str) -> dict[str, Any] | None:
    """Scheme of a matrix by its name on disk; None to keep it."""
    named = dict(request.extra).get(layer)
    top = {"bits": request.bits, "group_size": request.group_size, "sym": request.sym}
    if named is not None:
        return None if named.get("bits") == 16 else {**top, **named}
    if layer == "lm_head":
        return top if request.head else None
    if "experts" in layer:
        return top if request.experts else None
    return top if "layers." in layer and layer.endswith("_proj") else None


def write_folder(folder: Path, request: Request) -> Any:
    """Write a quantized folder; returns the float model whose weights are the dequantized ones."""
    model = tiny_model(request)
    layout = layout_for(request.packing)
    if dict(request.config).get("model_free") and isinstance(layout, GPTQ):
        layout = replace(layout, filled=True)
    names = DiskNames.of(model)
    disk = {n: t.clone() for n, t in revert_weight_conversion(model, model.state_dict()).items()}
    assert set(disk) == {piece.name for recipe in names.map.recipes for piece in recipe.pieces}
    tensors: dict[str, torch.Tensor] = {}
    rounded = dict(disk)
    for name, w in disk.items():
        layer = name.removesuffix(".weight")
        fields = fields_of(request, layer) if w.dim() == 2 and name.endswith(".weight") else None
        if fields is None:
            tensors[name] = w.contiguous()
            continue
        fmt = int_format(fields["bits"], fields["group_size"], sym=fields["sym"])
        q = fmt.quantize(w)
        rounded[name] = fmt.dequantize(q, request.dtype)
        tensors |= {f"{layer}.{suffix}": part for suffix, part in layout.pack(q).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {
        "architectures": [type(model).__name__],
        "dtype": str(request.dtype).removeprefix("torch."),
        "quantization_config": {
            "quant_method": "auto-round",
            "packing_format": request.packing,
            "bits": request.bits,
            "group_size": request.group_size,
            "sym": request.sym,
            "data_type": "int",
            "block_name_to_quantize": "model.layers",
            "extra_config": dict(request.extra)
            | ({"lm_head": {"bits": request.bits, "group_size": request.group_size}} if request.head else {}),
        }
        | dict(request.config),
    }
    (folder / "config.json").write_text(json.dumps(config))
    state = {}
    for recipe in names.map.recipes:
        state |= recipe.make(rounded.__getitem__, model)
    model.load_state_dict(state)
    return model
