"""The table of kernels: one row each, with its priority and other names.

Behind it stand names that users may ask for and that mean no kernel here, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from auto_round.kernels.cpu_avx512 import CpuAvx512Kernel
from auto_round.kernels.cpu_float import CpuFloatKernel
from auto_round.kernels.cpu_int4 import CpuIntKernel
from auto_round.kernels.cuda_int4 import CudaInt4Kernel
from auto_round.kernels.kernel import Kernel, LinearSpec
from auto_round.kernels.marlin import MarlinKernel
from auto_round.kernels.reference import TorchKernel
from auto_round.kernels.scaled_mm import ScaledMmKernel
from auto_round.kernels.triton_linear import TritonKernel
from auto_round.numerics.activation_float import CalibratedScale
from auto_round.numerics.group import Group
from auto_round.numerics.presets import int_format
from auto_round.numerics.presets_float import fp8_format, mx_format


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One row of the table: a kernel and when it is taken.

    Attributes:
        kernel: the kernel.
        priority: the largest of those that do not refuse is taken.
        aliases: other names for `backend=`, also those of older checkpoints and guides.
        devices: kinds of device, in words.
        bits: widths of codes, in words.
        sample: a layer that it is made for: whether it is refused says whether the kernel can run here.
        unasked: dtypes of activations for which it may be taken without being named; others would lose
            accuracy that the user asked for. None for all.
        named_only: why it is never taken without being named; empty when it may be.
        tried: whether each kind of layer is tried on the machine before the kernel is trusted with it.
        inputs: whether it rounds inputs where a layer wants that.
    """

    kernel: Kernel
    priority: int
    aliases: tuple[str, ...]
    devices: str
    bits: str
    sample: LinearSpec
    unasked: tuple[torch.dtype, ...] | None = None
    named_only: str = ""
    tried: bool = False
    inputs: bool = False


def _sample(bits: int, device: str) -> LinearSpec:
    return LinearSpec(int_format(bits, 128, sym=True), (4096, 4096), torch.bfloat16, device)


def _fp8_sample() -> LinearSpec:
    inputs = CalibratedScale(fp8_format(Group(0)))
    return LinearSpec(fp8_format(Group(-1)), (4096, 4096), torch.bfloat16, "cuda", inputs)


_HALVES = (torch.bfloat16, torch.float16)

KERNELS: Mapping[str, KernelRow] = MappingProxyType(
    {
        "marlin": KernelRow(
            MarlinKernel(),
            6,
            (
                "gptqmodel",
                "gptqmodel:marlin",
                "gptqmodel:marlin_zp",
                "gptqmodel:awq_marlin",
                "gptqmodel:autoawq_marlin",
                "gptqmodel_awq_marlin",
            ),
            "cuda",
            "4, 8",
            _sample(4, "cuda"),
            named_only="it depends on another package with which this version was not tried",
            tried=True,
        ),
        "cpu_avx512": KernelRow(
            CpuAvx512Kernel(),
            6,
            ("auto_round:cpu_avx512",),
            "cpu",
            "2-8",
            _sample(4, "cpu"),
            _HALVES,
            tried=True,
        ),
        "cpu_int4": KernelRow(
            CpuIntKernel(),
            5,
            ("int4pack", "cpu", "auto_round:cpu_int4"),
            "cpu",
            "2-4",
            _sample(4, "cpu"),
            _HALVES,
        ),
        "cpu_int8": KernelRow(
            CpuIntKernel("cpu_int8", (5, 6, 7, 8)),
            5,
            ("auto_round:cpu_int8",),
            "cpu",
            "5-8",
            _sample(8, "cpu"),
            _HALVES,
        ),
        "cpu_float": KernelRow(
            CpuFloatKernel(),
            5,
            ("auto_round:cpu_float",),
            "cpu",
            "4, 8 (FP4, FP8)",
            LinearSpec(mx_format("fp4"), (4096, 4096), torch.bfloat16, "cpu"),
            tried=True,
            inputs=True,
        ),
        "fp8_scaled_mm": KernelRow(
            ScaledMmKernel(),
            4,
            ("scaled_mm", "auto_round:fp8_scaled_mm"),
            "cuda",
            "8 (FP8)",
            _fp8_sample(),
            tried=True,
            inputs=True,
        ),
        "triton": KernelRow(
            TritonKernel(),
            2,
            ("tritonv2", "tritonv2_zp", "auto_round:tritonv2", "auto_round:tritonv2_zp", "auto_round:triton"),
            "cuda, xpu",
            "2-8",
            _sample(4, "cuda"),
            tried=True,
        ),
        "torch_int4": KernelRow(
            CudaInt4Kernel(),
            1,
            ("tinygemm", "auto_round:torch_int4"),
            "cuda",
            "2-4",
            _sample(4, "cuda"),
            tried=True,
        ),
        "torch": KernelRow(
            TorchKernel(),
            0,
            (
                "auto_round",
                "torch_zp",
                "auto_round:torch",
                "auto_round:torch_zp",
                "auto_round:torch_fp8_static",
                "auto_round:torch_mxfp8",
                "auto_round:torch_mxfp4",
                "auto_round:torch_nvfp4",
                "gptqmodel:awq_torch",
                "gptqmodel:autoawq_torch",
                "gptqmodel_awq_torch",
                "reference",
            ),
            "any",
            "2-8",
            _sample(4, "cpu"),
            inputs=True,
        ),
    }
)
"""Kernels by name."""


@dataclass(frozen=True, slots=True)
class StandIn:
    """Kernels that do the work of one that is not here.

    Attributes:
        names: kernels among which the choice is made.
        reason: why not the one that was named, and what is done.
    """

    names: tuple[str, ...]
    reason: str


_OURS = ("triton", "torch_int4", "cpu_avx512", "cpu_int4", "cpu_int8", "cpu_float", "torch")
_ON_CPU_OR_XPU = ("cpu_avx512", "cpu_int4", "cpu_int8", "cpu_float", "triton", "torch")

_IPEX = StandIn(
    _ON_CPU_OR_XPU,
    "the extension has ended and its programs went into PyTorch, whose kernels are used",
)
_ARK = StandIn(_ON_CPU_OR_XPU, "PyTorch's own kernels are used")
_GAUDI = StandIn(
    ("torch",), "the reference kernel is used, which runs on any PyTorch device; not tried on Gaudi"
)
_OPAQUE = StandIn(
    _OURS,
    "its programs keep weights where they cannot be read back, so that a loaded model could not be saved; "
    "own kernels for the same tensors are used",
)
_ENDED = StandIn(
    _OURS,
    "the package has ended and does not run with Transformers 5; own kernels for the same tensors are used",
)
_OTHER = StandIn(_OURS, "own kernels for the same tensors are used")


def _all(reason: StandIn, names: str) -> dict[str, StandIn]:
    return dict.fromkeys(names.split(), reason)


STAND_INS: Mapping[str, StandIn] = MappingProxyType(
    {
        **_all(_IPEX, "ipex ipex_gptq ipex_awq ipex_gptq_cpu ipex_awq_cpu"),
        **_all(
            _ARK,
            "ark auto_round_kernel auto_round_kernel_zp auto_round_kernel_awq auto_round_kernel_xpu "
            "auto_round_kernel_zp_xpu auto_round_kernel_awq_xpu",
        ),
        **_all(_GAUDI, "hpu hpu_zp"),
        **_all(
            _OPAQUE,
            "exllamav2 gptqmodel:exllamav2 gptqmodel:awq_exllamav2 gptqmodel:awq gptqmodel:autoawq "
            "gptqmodel_awq",
        ),
        **_all(
            _ENDED,
            "gptq gptq:cuda gptq:exllamav2 gptq:tritonv2 auto_gptq auto_gptq:exllamav2 auto_gptq:cuda "
            "auto_gptq:tritonv2 awq awq:gemm auto_awq auto_awq:gemm",
        ),
        **_all(
            _OTHER,
            "gptqmodel:awq_gemm gptqmodel:autoawq_gemm gptqmodel_awq_gemm humming humming_zp humming_awq "
            "auto_round:humming auto_round:humming_zp auto_round:humming_awq",
        ),
    }
)
"""Names of kernels that are not here -> what does their work.

Source of the names: auto-round 0.16 `inference/backend.py`."""

ABSENT: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "mlx": ("not in this version yet", "torch"),
    }
)
"""Names of kernels that are not here -> why, and the one to use instead."""
