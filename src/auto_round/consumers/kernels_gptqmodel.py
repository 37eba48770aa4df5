"""Which kernel GPTQModel multiplies a module with, or why it has none."""

from __future__ import annotations

from auto_round.consumers.fields import CannotReadError, Fields
from auto_round.consumers.kernels import (
    MARLIN,
    MARLIN_GROUPS,
    MARLIN_OUT,
    MARLIN_SYM_BITS,
    listed,
    needs_four_bits,
    sizes,
)
from auto_round.consumers.modules import Module

GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
"""Source: `TorchLinear.SUPPORTS_GROUP_SIZE` in GPTQModel `gptqmodel/nn_modules/qlinear/torch.py`."""
AWQ_GROUPS = (-1, 16, 32, 64, 128)
"""Source: `AwqTorchLinear.SUPPORTS_GROUP_SIZE` in GPTQModel `gptqmodel/nn_modules/qlinear/torch_awq.py`."""
BITS = (2, 3, 4, 5, 6, 7, 8)
"""Source: `TorchLinear.SUPPORTS_BITS` there."""


def gptqmodel_gptq(module: Module, fields: Fields) -> str:
    """GPTQModel's choice by priority: Marlin, ExLlama v2, PyTorch.

    Source: GPTQModel `gptqmodel/nn_modules/qlinear/{marlin,exllamav2,torch}.py`.
    """
    out, n_in = sizes(module, fields)
    if fields.group_size not in GROUPS or fields.bits not in BITS:
        raise CannotReadError(f"has no kernel for {fields}; group sizes are {listed(GROUPS)}")
    if fields.group_size not in MARLIN_GROUPS:
        return "PyTorch"
    if fields.sym and fields.bits in MARLIN_SYM_BITS and out % MARLIN_OUT == 0:
        return MARLIN
    return "ExLlama v2" if fields.bits == 4 and not (out % 32 or n_in % 32) else "PyTorch"


def gptqmodel_awq(module: Module, fields: Fields) -> str:
    """GPTQModel's choice by priority: Marlin, PyTorch.

    Source: GPTQModel `gptqmodel/nn_modules/qlinear/{marlin_awq,torch_awq}.py`.
    """
    needs_four_bits(fields)
    if fields.group_size not in AWQ_GROUPS:
        raise CannotReadError(f"has no kernel for {fields}; group sizes are {listed(AWQ_GROUPS)}")
    out, _ = sizes(module, fields)
    return MARLIN if fields.group_size in MARLIN_GROUPS and out % MARLIN_OUT == 0 else "PyTorch"
