"""Folders written by hand: headers with the right shapes, configurations with one fault each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, INNER = 256, 512
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
EXPERT_SHAPES = {
    f"mlp.experts.{e}.{p}": (HIDDEN, INNER) if p == "down_proj" else (INNER, HIDDEN)
    for e in range(2)
    for p in ("gate_proj", "up_proj", "down_proj")
}
BLOCKS = 2

Kept = None
Stored = tuple[int, int]
"""Bits and group size."""


@dataclass
class Case:
    """What to write: `stored` says what lies on disk, `config` what the configuration claims."""

    order: str = "gptq"
    stored: Stored = (4, 128)
    others: Mapping[str, Stored | None] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=lambda: SHAPES)
    config: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    head: Stored | None = None
    index: bool = False


AUTO_ROUND = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "data_type": "int",
    "block_name_to_quantize": "model.layers",
}
AUTO_ROUND_AWQ = {**AUTO_ROUND, "packing_format": "auto_round:auto_awq", "sym": False}
GPTQ = {
    "quant_method": "gptq",
    "checkpoint_format": "gptq",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "desc_act": False,
    "lm_head": False,
}
AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 128, "zero_point": True}


def names(*ends: str) -> list[str]:
    return [f"model.layers.{b}.{end}" for b in range(BLOCKS) for end in ends]


def write(folder: Path, case: Case) -> Path:
    tensors: dict[str, torch.Tensor] = {
        "model.embed_tokens.weight": torch.zeros(64, HIDDEN, dtype=torch.float16),
        "model.norm.weight": torch.zeros(HIDDEN, dtype=torch.float16),
    }
    for name in names(*case.shapes):
        short = name.split(".", 3)[3]
        stored = case.others.get(name, case.others.get(short, case.stored))
        tensors |= _layer(name, case.shapes[short], stored, case)
    tensors |= _layer("lm_head", (64, HIDDEN), case.head, case)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", "dtype": "float16", "tie_word_embeddings": False, **case.model}
    config["quantization_config"] = dict(case.config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _layer(name: str, shape: tuple[int, int], stored: Stored | None, case: Case) -> dict[str, torch.Tensor]:
    out, n_in = shape
    if stored is None:
        return {f"{name}.weight": torch.zeros(shape, dtype=torch.float16)}
    bits, size = stored
    groups = 1 if size < 0 else -(-n_in // size)
    words = (n_in * bits // 32, out) if case.order == "gptq" else (n_in, out * bits // 32)
    found = {
        f"{name}.qweight": torch.zeros(words, dtype=torch.int32),
        f"{name}.qzeros": torch.zeros(groups, out * bits // 32, dtype=torch.int32),
        f"{name}.scales": torch.ones(groups, out, dtype=torch.float16),
    }
    if case.index:
        found[f"{name}.g_idx"] = torch.arange(n_in, dtype=torch.int32) // (size if size > 0 else n_in)
    return found


def compressed(
    folder: Path, weights: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], **group: Any
) -> Path:
    """A compressed-tensors folder of one block whose matrices have these tensors."""
    ends = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    stored = {f"model.layers.0.{end}.{k}": t.clone() for end in ends for k, t in tensors.items()}
    folder.mkdir()
    save_file(stored, folder / "model.safetensors")
    numbers = {"type": "int", "symmetric": True, "strategy": "group", **weights}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": numbers, **group}},
    }
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": config}))
    return folder
