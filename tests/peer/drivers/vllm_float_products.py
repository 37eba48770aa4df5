"""Matrix products of PyTorch for floating formats that vLLM's CPU build has no kernels for.

With them vLLM reads a whole folder and predicts, instead of stopping where it chooses a kernel. For NVFP4 and
MXFP8 these are its own emulations, which it offers on GPUs only. All of it happens in the process of a test.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm.model_executor.kernels.linear as linear_kernels
from torch import Tensor
from torch.nn.functional import linear
from vllm.model_executor.kernels.linear import register_linear_kernel
from vllm.model_executor.kernels.linear.mxfp4 import MxFp4LinearKernel
from vllm.model_executor.kernels.linear.mxfp8.emulation import EmulationMxfp8LinearKernel
from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import (
    Fp8BlockScaledMMLinearKernel,
)
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import FP8ScaledMMLinearKernel
from vllm.platforms import PlatformEnum

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
E4M3_MAX = 448.0


def spread(steps: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """Steps `[block rows, block columns]`, one for each number of a matrix of this shape."""
    rows, columns = block
    return steps.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]


def to_fp8(x: Tensor, step: Tensor) -> Tensor:
    return (x / step).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * step


class Anywhere:
    """A kernel for every device and every layer."""

    @classmethod
    def is_supported(cls, *_: Any) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, *_: Any) -> tuple[bool, str | None]:
        return True, None


class DenseMxfp4(Anywhere, MxFp4LinearKernel):
    """Two codes a byte, the first in the lower half; inputs stay as they are."""

    def process_weights_after_loading(self, layer: Any) -> None:
        packed, steps = layer.weight.data, torch.exp2(layer.weight_scale.data.float() - 127)
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
        layer.dense = E2M1[codes.long()] * spread(steps, (1, 32), codes.shape)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, layer.dense.to(x.dtype), bias)


class DenseFp8(Anywhere, FP8ScaledMMLinearKernel):
    """FP8 weights `[in, out]` with a step for each row; inputs are rounded as their steps say.

    That is by the layer's one step, by one for each token, or not at all.
    """

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.dense = layer.weight.data.float().t() * layer.weight_scale.data.float().reshape(-1, 1)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x_float, fixed = x.float(), getattr(layer, "input_scale", None)
        if fixed is not None:
            x_float = to_fp8(x_float, fixed.data.float())
        elif self.config.activation_quant_key.scale.group_shape.is_per_token():
            x_float = to_fp8(x_float, x_float.abs().amax(-1, keepdim=True) / E4M3_MAX)
        return linear(x_float, layer.dense, bias).to(x.dtype)

    def apply_scaled_mm(self, **_: Any) -> Tensor:
        raise NotImplementedError


class DenseBlocks(Anywhere, Fp8BlockScaledMMLinearKernel):
    """FP8 weights `[out, in]` in blocks, inputs in groups whose steps are measured."""

    def process_weights_after_loading(self, layer: Any) -> None:
        weight, steps = layer.weight.data.float(), layer.weight_scale.data.float()
        layer.dense = weight * spread(steps, tuple(self.weight_group_shape), weight.shape)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
        groups = x.float().unflatten(-1, (-1, self.weight_group_shape.col))
        step = groups.abs().amax(-1, keepdim=True).clamp_min(2.0**-40) / E4M3_MAX
        return linear(to_fp8(groups, step).flatten(-2), layer.dense, bias).to(x.dtype)

    def apply_block_scaled_mm(self, **_: Any) -> Tensor:
        raise NotImplementedError


def multiply_floats() -> None:
    """From here on this process has a product for each floating format that vLLM reads."""
    register_linear_kernel(EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
    register_linear_kernel(EmulationMxfp8LinearKernel, PlatformEnum.CPU, "mxfp8")
    register_linear_kernel(DenseMxfp4, PlatformEnum.CPU, "mxfp4")
    linear_kernels._POSSIBLE_FP8_KERNELS[PlatformEnum.CPU] = [DenseFp8]
    linear_kernels._POSSIBLE_WFP8A16_KERNELS[PlatformEnum.CPU] = [DenseFp8]
    linear_kernels._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU] = [DenseBlocks]
