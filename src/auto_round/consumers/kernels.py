"""Which kernel an engine multiplies a module with on one NVIDIA GPU, or why it has none."""

from __future__ import annotations

from collections.abc import Callable

from auto_round.consumers.fields import CannotReadError, Fields
from auto_round.consumers.modules import Module

MARLIN_GROUPS = (-1, 32, 64, 128)
"""Source: `MARLIN_SUPPORTED_GROUP_SIZES` in `marlin_utils.py` of vLLM and SGLang."""

MARLIN_OUT, MARLIN_IN = 64, 128
"""Multiples of outputs and inputs for Marlin. Source: `GPTQ_MARLIN_MIN_THREAD_N` and `_K` there."""

MARLIN_EXPERT_HIDDEN, MARLIN_EXPERT_INNER = 128, 64
"""Multiples of hidden and intermediate size for experts. Source: `check_moe_marlin_supports_layer` there."""

MARLIN_SYM_BITS = (4, 8)
"""Widths without zero points. Source: `TYPE_MAP` of vLLM `auto_gptq.py` and SGLang `gptq/gptq.py`."""

MARLIN_ZERO_BITS = (4,)
"""Widths with zero points. Source: `query_marlin_supported_quant_types` in `marlin_utils.py`."""

MARLIN, PADDED, EXLLAMA, TRITON_AWQ = "Marlin", "Marlin, padded", "GPTQ (ExLlama)", "AWQ"
MARLIN_EXPERTS, WNA16_EXPERTS = "Marlin for experts", "WNA16 for experts"

HALF_ONLY = (EXLLAMA, TRITON_AWQ)
"""Kernels that compute in float16 only. Source: `get_supported_act_dtypes` of the configurations that choose
them, in SGLang `gptq/gptq.py` and `awq/awq.py`, vLLM `kernels/linear/mixed_precision/exllama.py`."""

KernelOf = Callable[[Module, Fields], str]
"""Name of the kernel for a module.

Raises:
    CannotReadError: the engine has none.
"""


def vllm_gptq(module: Module, fields: Fields) -> str:
    """Codes packed along the input, in vLLM: Marlin, for symmetric 4 and 8 bits only.

    Tiles that do not fit are padded; releases before 2026 have no kernel for them.
    Source: vLLM `inc/schemes/inc_wna16_linear.py`, `kernels/linear/mixed_precision/marlin.py`.
    """
    if module.experts:
        return _experts(module, fields)
    if not fields.sym or fields.bits not in MARLIN_SYM_BITS:
        raise CannotReadError(
            f"has kernels for symmetric 4 and 8 bits in this order of bytes, not for {fields}"
        )
    _needs_marlin_group(fields)
    _needs_whole_groups(module, fields)
    return MARLIN if _fits_tiles(module) else PADDED


def vllm_awq(module: Module, fields: Fields) -> str:
    """Codes packed along the output, in vLLM: Marlin with zero points, else its older AWQ kernel.

    Source: vLLM `auto_awq.py`.
    """
    _needs_four_bits(fields)
    if module.experts:
        return _experts(module, fields)
    _needs_whole_groups(module, fields)
    if fields.sym or fields.group_size not in MARLIN_GROUPS:
        return TRITON_AWQ
    return MARLIN if _fits_tiles(module) else PADDED


def sglang_gptq(module: Module, fields: Fields) -> str:
    """Codes packed along the input, in SGLang: Marlin for symmetric 4 and 8 bits, else ExLlama.

    Source: SGLang `auto_round/routing.py`, `gptq/gptq.py`, `gptq/schemes/gptq_linear.py`.
    """
    _needs_whole_groups(module, fields)
    marlin = fields.sym and fields.bits in MARLIN_SYM_BITS and fields.group_size in MARLIN_GROUPS
    if module.experts:
        if not marlin:
            raise CannotReadError(f"has no kernel for experts of {fields} in this order of bytes")
        return _experts(module, fields)
    if not marlin:
        return EXLLAMA
    _needs_tiles(module)
    return MARLIN


def sglang_awq(module: Module, fields: Fields) -> str:
    """Codes packed along the output, in SGLang: Marlin with zero points, else its AWQ kernel.

    Source: SGLang `awq/awq.py`, `auto_round/routing.py`.
    """
    _needs_four_bits(fields)
    _needs_whole_groups(module, fields)
    marlin = not fields.sym and fields.group_size in MARLIN_GROUPS
    if module.experts:
        if not marlin:
            raise CannotReadError(f"has no kernel for experts of {fields} in this order of bytes")
        return _experts(module, fields)
    return MARLIN if marlin and _fits_tiles(module) else TRITON_AWQ


GPTQMODEL_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
"""Source: `TorchLinear.SUPPORTS_GROUP_SIZE` in GPTQModel `gptqmodel/nn_modules/qlinear/torch.py`."""
GPTQMODEL_AWQ_GROUPS = (-1, 16, 32, 64, 128)
"""Source: `AwqTorchLinear.SUPPORTS_GROUP_SIZE` in GPTQModel `gptqmodel/nn_modules/qlinear/torch_awq.py`."""
GPTQMODEL_BITS = (2, 3, 4, 5, 6, 7, 8)
"""Source: `TorchLinear.SUPPORTS_BITS` there."""


def gptqmodel_gptq(module: Module, fields: Fields) -> str:
    """GPTQModel's choice by priority: Marlin, ExLlama v2, PyTorch.

    Source: GPTQModel `gptqmodel/nn_modules/qlinear/{marlin,exllamav2,torch}.py`.
    """
    out, n_in = _sizes(module)
    if fields.group_size not in GPTQMODEL_GROUPS or fields.bits not in GPTQMODEL_BITS:
        raise CannotReadError(f"has no kernel for {fields}; group sizes are {_listed(GPTQMODEL_GROUPS)}")
    if fields.group_size not in MARLIN_GROUPS:
        return "PyTorch"
    if fields.sym and fields.bits in MARLIN_SYM_BITS and out % MARLIN_OUT == 0:
        return MARLIN
    return "ExLlama v2" if fields.bits == 4 and not (out % 32 or n_in % 32) else "PyTorch"


def gptqmodel_awq(module: Module, fields: Fields) -> str:
    """GPTQModel's choice by priority: Marlin, PyTorch.

    Source: GPTQModel `gptqmodel/nn_modules/qlinear/{marlin_awq,torch_awq}.py`.
    """
    _needs_four_bits(fields)
    if fields.group_size not in GPTQMODEL_AWQ_GROUPS:
        raise CannotReadError(f"has no kernel for {fields}; group sizes are {_listed(GPTQMODEL_AWQ_GROUPS)}")
    out, _ = _sizes(module)
    return MARLIN if fields.group_size in MARLIN_GROUPS and out % MARLIN_OUT == 0 else "PyTorch"


def compressed(module: Module, fields: Fields) -> str:
    """Packed whole numbers of compressed-tensors: Marlin; for other formats the device decides.

    Source: vLLM `compressed_tensors/schemes/compressed_tensors_wNa16.py`; SGLang has the same table.
    """
    words = any(name.endswith(".weight_packed") for part in module.parts for name in part.tensors)
    if not words or not all(
        part.scale_dtype is not None and part.scale_dtype.itemsize > 1 for part in module.parts
    ):
        return "by device"
    if fields.bits not in MARLIN_SYM_BITS:
        raise CannotReadError(f"has kernels for packed 4 and 8 bits, not for {fields}")
    _needs_marlin_group(fields)
    return MARLIN_EXPERTS if module.experts else MARLIN


def _sizes(module: Module) -> tuple[int, int]:
    """Outputs of all parts together, and inputs."""
    return sum(part.shape[0] for part in module.parts), module.parts[0].shape[1]


def _fits_tiles(module: Module) -> bool:
    out, n_in = _sizes(module)
    return out % MARLIN_OUT == 0 and n_in % MARLIN_IN == 0


def _needs_tiles(module: Module) -> None:
    if not _fits_tiles(module):
        out, n_in = _sizes(module)
        raise CannotReadError(
            f"multiplies it with Marlin, which takes multiples of {MARLIN_OUT} outputs and {MARLIN_IN} "
            f"inputs, not {out} and {n_in}"
        )


def _needs_marlin_group(fields: Fields) -> None:
    if fields.group_size not in MARLIN_GROUPS:
        raise CannotReadError(f"takes group sizes {_listed(MARLIN_GROUPS)}, not {fields.group_size}")


def _needs_whole_groups(module: Module, fields: Fields) -> None:
    sizes = {part.shape[1] for part in module.parts}
    if fields.group_size > 0 and any(n_in % fields.group_size for n_in in sizes):
        raise CannotReadError(f"needs whole groups: {max(sizes)} inputs, group_size {fields.group_size}")


def _needs_four_bits(fields: Fields) -> None:
    if fields.bits != 4:
        raise CannotReadError(f"takes 4 bits in this order of bytes, not {fields.bits}")


def _experts(module: Module, fields: Fields) -> str:
    """Marlin where the sizes fit, else the WNA16 kernel, which takes 4 and 8 bits.

    The hidden size is the longer side that all projections share: inputs of gate and up, outputs of down.
    """
    if fields.bits not in MARLIN_SYM_BITS:
        raise CannotReadError(f"has kernels for experts of 4 and 8 bits, not of {fields.bits}")
    sides = [set(part.shape) for part in module.parts]
    hidden = {n for part in module.parts for n in part.shape[1:] if part.name.endswith(("gate_proj", "w1"))}
    inner = {n for side in sides for n in side} - hidden
    fits = all(n % MARLIN_EXPERT_HIDDEN == 0 for n in hidden) and all(
        n % max(MARLIN_EXPERT_INNER, fields.group_size) == 0 for n in inner
    )
    return MARLIN_EXPERTS if fits and fields.group_size in MARLIN_GROUPS else WNA16_EXPERTS


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
