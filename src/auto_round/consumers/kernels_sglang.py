"""Which kernel SGLang multiplies a module with on one NVIDIA GPU, or why it has none."""

from __future__ import annotations

from auto_round.consumers.fields import FLOAT_BITS, CannotReadError, CompressedFields, Fields
from auto_round.consumers.kernels import (
    BY_DEVICE,
    MARLIN,
    MARLIN_EXPERT_HIDDEN,
    MARLIN_EXPERT_INNER,
    MARLIN_EXPERTS,
    MARLIN_SYM_BITS,
    TRITON_AWQ,
    experts_kernel,
    fits_tiles,
    has_marlin,
    needs_four_bits,
    needs_groups,
    needs_marlin_group,
    needs_tiles,
    needs_whole_groups,
)
from auto_round.consumers.kernels_float import sglang_floats
from auto_round.consumers.modules import Module
from auto_round.layouts.compressed import INT_QUANTIZED, PACK_QUANTIZED


def sglang_gptq(module: Module, fields: Fields) -> str:
    """`gptq` folders: Marlin, without padding; its other kernel was removed.

    Source: SGLang `gptq/gptq.py`, `gptq/schemes/gptq_linear.py` (`_init_kernel`).
    """
    _needs_marlin(fields)
    needs_whole_groups(module, fields)
    if module.experts:
        return _marlin_experts(module, fields)
    needs_tiles(module, fields)
    return MARLIN


def sglang_auto_round_gptq(module: Module, fields: Fields) -> str:
    """`auto-round` folders with codes along the input: as `gptq`, but experts may go to WNA16.

    Source: SGLang `auto_round.py` (`apply_gptq_quant_layer`), `moe_wna16.py`.
    """
    return experts_kernel(module, fields) if module.experts else sglang_gptq(module, fields)


def sglang_awq(module: Module, fields: Fields) -> str:
    """Codes packed along the output: Marlin with zero points, else its AWQ kernel, which wants groups.

    Source: SGLang `awq/awq.py`, `awq/schemes/awq_linear.py`.
    """
    needs_four_bits(fields)
    needs_whole_groups(module, fields)
    marlin = not fields.sym and has_marlin(fields)
    if module.experts:
        if not marlin:
            raise CannotReadError(f"has no kernel for experts of {fields} in this order of bytes")
        return experts_kernel(module, fields)
    if marlin and fits_tiles(module, fields):
        return MARLIN
    needs_groups(fields)
    return TRITON_AWQ


def sglang_auto_round_awq(module: Module, fields: Fields) -> str:
    """`auto-round` folders with codes along the output: as `awq`, but experts may go to WNA16.

    What Marlin's tiles do not cover has no way back to the AWQ kernel here.
    Source: SGLang `auto_round.py` (`apply_awq_quant_layer`).
    """
    needs_four_bits(fields)
    if module.experts:
        return experts_kernel(module, fields)
    if not fields.sym and has_marlin(fields):
        needs_whole_groups(module, fields)
        needs_tiles(module, fields)
        return MARLIN
    return sglang_awq(module, fields)


def sglang_compressed(module: Module, fields: Fields) -> str:
    """Folders of compressed-tensors: packed words go to Marlin, for the rest the device decides.

    Source: SGLang `compressed_tensors/compressed_tensors.py` (`_get_scheme_from_parts`),
    `schemes/compressed_tensors_wNa16.py`.
    """
    if not isinstance(fields, CompressedFields):
        return BY_DEVICE
    if fields.numbers != "int":
        return sglang_floats(module, fields)
    packed = fields.form == PACK_QUANTIZED.name
    if packed and fields.activations >= FLOAT_BITS:
        if not has_marlin(fields):
            raise CannotReadError(f"multiplies packed words with Marlin, which has nothing for {fields}")
        needs_whole_groups(module, fields)
        if module.experts:
            return _marlin_experts(module, fields)
        needs_tiles(module, fields)
        return MARLIN
    eight = fields.bits == 8 and fields.activations == 8 and fields.group_size < 0
    if eight and fields.sym and fields.form == INT_QUANTIZED.name:
        return BY_DEVICE
    raise CannotReadError(f"has no scheme for {fields} stored as {fields.form}")


def _needs_marlin(fields: Fields) -> None:
    if not fields.sym or fields.bits not in MARLIN_SYM_BITS:
        raise CannotReadError(
            f"has kernels for symmetric 4 and 8 bits in this order of bytes, not for {fields}"
        )
    needs_marlin_group(fields)


def _marlin_experts(module: Module, fields: Fields) -> str:
    if experts_kernel(module, fields) != MARLIN_EXPERTS:
        raise CannotReadError(
            f"multiplies experts with Marlin, for hidden sizes in multiples of {MARLIN_EXPERT_HIDDEN} "
            f"and intermediate sizes in multiples of {MARLIN_EXPERT_INNER} and of the group"
        )
    return MARLIN_EXPERTS
