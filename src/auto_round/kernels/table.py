"""The table of kernels: priority, other names, and the names of kernels that are not there yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from auto_round.kernels.cpu_int4 import CpuInt4Kernel
from auto_round.kernels.kernel import Kernel
from auto_round.kernels.reference import TorchKernel


@dataclass(frozen=True, slots=True)
class Entry:
    """One row.

    Attributes:
        kernel: the kernel.
        priority: the largest of those that do not refuse is taken.
        aliases: other names for `backend=`, also those of older checkpoints and guides.
        unasked: dtypes of activations for which it may be taken without being named; others would lose
            accuracy that the user asked for. None for all.
    """

    kernel: Kernel
    priority: int
    aliases: tuple[str, ...]
    unasked: tuple[torch.dtype, ...] | None = None


KERNELS: Mapping[str, Entry] = MappingProxyType(
    {
        "cpu_int4": Entry(
            CpuInt4Kernel(), 5, ("int4pack", "cpu", "auto_round:cpu_int4"), (torch.bfloat16, torch.float16)
        ),
        "torch": Entry(
            TorchKernel(),
            0,
            ("auto_round", "torch_zp", "auto_round:torch", "auto_round:torch_zp", "reference"),
        ),
    }
)
"""Kernels by name."""

LATER: Mapping[str, str] = MappingProxyType(
    {
        "triton": "torch",
        "tritonv2": "torch",
        "tritonv2_zp": "torch",
        "auto_round:tritonv2": "torch",
        "auto_round:tritonv2_zp": "torch",
        "marlin": "torch",
        "gptqmodel": "torch",
        "gptqmodel:marlin": "torch",
        "gptqmodel:marlin_zp": "torch",
        "gptqmodel:exllamav2": "torch",
        "exllamav2": "torch",
        "gptq": "torch",
        "auto_gptq": "torch",
        "auto_gptq:exllamav2": "torch",
        "auto_gptq:cuda": "torch",
        "auto_gptq:tritonv2": "torch",
        "awq": "torch",
        "auto_awq:gemm": "torch",
        "ark": "cpu_int4",
        "auto_round_kernel": "cpu_int4",
        "ipex": "cpu_int4",
        "ipex_gptq": "cpu_int4",
        "ipex_awq": "cpu_int4",
        "hpu": "torch",
        "hpu_zp": "torch",
        "mlx": "torch",
    }
)
"""Names of kernels that this version does not have -> the one to use instead."""
