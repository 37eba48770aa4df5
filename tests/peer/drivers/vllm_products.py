"""Matrix products of PyTorch in place of vLLM's GPU kernels, and its decisions as on one NVIDIA GPU.

vLLM's CPU build has no kernels for 2, 3 and 8 bits and some others. What a folder has to fit are names,
shapes, fusing and configuration: with this module vLLM decides and loads as on a GPU, and multiplies here.
All of it happens in the process of a test.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.oracle.int_wna16 as int_wna16
import vllm.model_executor.layers.quantization.auto_awq as auto_awq
import vllm.model_executor.layers.quantization.humming as humming
import vllm.model_executor.layers.quantization.inc.schemes.inc_wna16_scheme as inc
import vllm.model_executor.layers.quantization.utils.marlin_utils as marlin
from humming.device import DeviceInfo
from torch import Tensor
from torch.nn.functional import gelu, linear, silu
from vllm.model_executor.kernels.linear import register_linear_kernel
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
from vllm.model_executor.layers.fused_moe.experts.int4_emulation_moe import Int4EmulationTritonExperts
from vllm.platforms import PlatformEnum, current_platform
from vllm.platforms.interface import DeviceCapability

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def ask_no_driver() -> None:
    """Let vLLM look through all modules: humming's device asks a GPU's driver for any attribute."""
    plain = DeviceInfo.__getattr__

    def attribute(self: DeviceInfo, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return plain(self, name)

    DeviceInfo.__getattr__ = attribute


ask_no_driver()


class Gpu:
    """The platform as one NVIDIA GPU, for modules that choose by it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(current_platform, name)

    def is_cpu(self) -> bool:
        return False

    def is_cuda(self) -> bool:
        return True

    def get_device_capability(self, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(8, 0)


def codes_of(words: Tensor, bits: int) -> Tensor:
    """Codes `[..., n]` of words `[..., n * bits / 32]`, first code in the lowest bits."""
    single = (words.unsqueeze(-1) >> torch.arange(32)) & 1
    by_code = single.flatten(-2).unflatten(-1, (-1, bits))
    return (by_code << torch.arange(bits)).sum(-1)


def dense(codes: Tensor, zero: Tensor | int, scale: Tensor) -> Tensor:
    """Weight `[out, in]` of codes `[out, in]`, zero points and scales `[out, groups]`."""
    width = codes.shape[1] // scale.shape[1]
    zeros = zero.repeat_interleave(width, 1) if isinstance(zero, Tensor) else zero
    return (codes - zeros).to(scale.dtype) * scale.repeat_interleave(width, 1)


def along(x: Any, dim: str) -> Tensor:
    """Data of a parameter with its `dim` (`input_dim`, `output_dim`) first."""
    return x.data if getattr(x, dim) == 0 else x.data.t()


class DenseKernel(MPLinearKernel):
    """Unpacks whatever vLLM has loaded, by what the parameters say of themselves."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        bits = self.config.weight_type.size_bits
        packed, scale, zeros = self._get_weight_params(layer)
        codes = codes_of(along(packed, "output_dim").contiguous(), bits)
        scales = along(scale, "output_dim")
        if self.config.zero_points:
            zero: Any = codes_of(along(zeros, "output_dim").t().contiguous(), bits).t()
        else:
            zero = 1 << (bits - 1)
        layer.dense = dense(codes, zero, scales.reshape(len(codes), -1))

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, layer.dense.to(x.dtype), bias)


class DenseInt8(CPUInt8ScaledMMLinearKernel):
    """8 by 8 bits, a step for each token or a stored one; oneDNN's product saturates without VNNI."""

    def process_weights_after_loading(self, layer: Any) -> None:
        weight, scale, step, zero, _ = self.layer_param_names
        layer.dense = getattr(layer, weight).data.float() * getattr(layer, scale).data.float().reshape(-1, 1)
        layer.fixed = None
        if self.config.is_static_input_scheme:
            stored = getattr(layer, zero)
            point = 0.0 if stored is None else stored.data.float()
            layer.fixed = getattr(layer, step).data.float(), point

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        step, zero = layer.fixed or (x.float().abs().amax(-1, keepdim=True) / 127, 0.0)
        rounded = ((x.float() / step + zero).round().clamp(-128, 127) - zero) * step
        return linear(rounded, layer.dense, None if bias is None else bias.float()).to(x.dtype)


class DenseHumming(humming.HummingLinearMethod):
    """Humming with GPTQ words; zero points are read as they are stored, as there."""

    def process_weights_after_loading(self, layer: Any) -> None:
        schema = getattr(self.weight_schema, "_delegate", self.weight_schema)
        codes = codes_of(layer.qweight.data.t().contiguous(), schema.bits)
        zero = 1 << (schema.bits - 1)
        if not schema.sym:
            zero = codes_of(layer.qzeros.data.contiguous(), schema.bits).t()
        layer.dense = dense(codes, zero, layer.scales.data.t())

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, layer.dense.to(x.dtype), bias)


class DenseAWQ(auto_awq.AutoAWQLinearMethod):
    """vLLM's older AWQ kernel."""

    def process_weights_after_loading(self, layer: Any) -> None:
        unpacked = [
            codes_of(x.data, 4).unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2).t()
            for x in (layer.qweight, layer.qzeros)
        ]
        layer.dense = dense(*unpacked, layer.scales.data.t())

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, layer.dense.to(x.dtype), bias)


def replace_products() -> None:
    """From here on this process decides as on a GPU and multiplies with PyTorch."""
    gpu: Any = Gpu()
    for module in (inc, auto_awq, marlin):
        module.current_platform = gpu
    humming.HummingLinearMethod = DenseHumming
    auto_awq.AutoAWQLinearMethod = DenseAWQ
    register_linear_kernel(DenseKernel, PlatformEnum.CPU)
    register_linear_kernel(DenseInt8, PlatformEnum.CPU, "int8")
    os.environ["VLLM_DISABLED_KERNELS"] = "CPUWNA16LinearKernel,CPUInt8ScaledMMLinearKernel"


ACTIVATIONS = {"silu": silu, "gelu": gelu, "gelu_tanh": partial(gelu, approximate="tanh")}
"""vLLM's name of an activation -> what it does with a gate."""


def experts_here(self: Any, **given: Any) -> None:
    """Gated experts, one after another, with weights that vLLM has unpacked."""
    x, chosen, shares = given["hidden_states"], given["topk_ids"], given["topk_weights"]
    if given["apply_router_weight_on_input"]:  # vLLM has done that already
        shares = torch.ones_like(shares)
    activate = ACTIVATIONS[given["activation"].value]
    total = torch.zeros(x.shape, dtype=torch.float32)
    for expert, (inner, outer) in enumerate(zip(given["w1"], given["w2"], strict=True)):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        gate, up = linear(x[token], inner.to(x.dtype)).chunk(2, -1)
        y = linear(activate(gate) * up, outer.to(x.dtype))
        total.index_add_(0, token, y.float() * shares[token, place, None].float())
    given["output"].copy_(total)


def multiply_experts() -> None:
    """Let vLLM's backend `emulation`, which unpacks experts of 4 bits for a product on GPUs, run here.

    It takes zero points of GPTQ words as they are stored, which is off by one for version 1. Marlin, which
    GPUs get, reads none of symmetric words; so does this.
    """
    unpack = int_wna16._process_weights_emulation_gptq
    int_wna16._process_weights_emulation_gptq = lambda *parts: unpack(*parts[:4], None, None)
    Int4EmulationTritonExperts._supports_current_device = staticmethod(lambda: True)
    Int4EmulationTritonExperts.apply = experts_here
