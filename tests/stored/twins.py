"""Quantized folders made with plain PyTorch, each beside its twin of 16 bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]

Maker = Callable[[str, Tensor], tuple[Tensors, Tensor]]
"""Name and weight of a matrix -> what is stored of it, and the weight that this stands for."""

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@dataclass(frozen=True)
class Twins:
    """Two folders of one model.

    Attributes:
        packed: the quantized one.
        plain: the same weights in 16 bits.
    """

    packed: Path
    plain: Path


def make_twins(
    folder: Path, model: Path, config: Mapping[str, Any], pack: Maker, wanted: Callable[[str, Tensor], bool]
) -> Twins:
    """Write both folders.

    Args:
        folder: where.
        model: folder of a plain model of one file.
        config: `quantization_config`.
        pack: packs one matrix.
        wanted: whether a tensor is packed.
    """
    twins = Twins(folder / "packed", folder / "plain")
    weights = load_file(model / "model.safetensors")
    packed: Tensors = {}
    for name, weight in weights.items():
        if wanted(name, weight):
            stored, dequantized = pack(name, weight)
            packed |= stored
            weights[name] = dequantized.to(weight.dtype).contiguous()
        else:
            packed[name] = weight
    for path, tensors in ((twins.packed, packed), (twins.plain, weights)):
        shutil.copytree(model, path)
        save_file(
            {n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", {"format": "pt"}
        )
    said = json.loads((model / "config.json").read_text())
    (twins.packed / "config.json").write_text(json.dumps({**said, "quantization_config": dict(config)}))
    return twins


def in_blocks(name: str, weight: Tensor) -> bool:
    """Whether a tensor is a matrix of a block other than a router."""
    return weight.dim() == 2 and ".layers." in name and not name.endswith("mlp.gate.weight")


def fp8(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def spread(scale: Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """Scale of each weight, one number after the other."""
    full = torch.empty(shape)
    for i in range(shape[0]):
        for j in range(shape[1]):
            full[i, j] = scale[i // block[0], j // block[1]]
    return full


def nibbles(weight: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """FP4 codes two in a byte, the first input in the low half, and the numbers that they stand for."""
    u = weight.float() / step
    code = (u.abs().unsqueeze(-1) - FP4).abs().argmin(-1)
    number = torch.where(u < 0, -FP4[code], FP4[code])
    code = (code + 8 * (u < 0)).to(torch.uint8)
    return code[..., ::2] | (code[..., 1::2] << 4), number * step


def powers(weight: Tensor, size: int, top: float) -> tuple[Tensor, Tensor]:
    """Biased powers of two of groups, and the power of each weight."""
    extreme = weight.float().unflatten(-1, (-1, size)).abs().amax(-1)
    exponent = torch.floor(torch.log2(extreme / top)) + 1
    step = (2.0**exponent).repeat_interleave(size, -1)
    return (exponent + 127).to(torch.uint8), step
