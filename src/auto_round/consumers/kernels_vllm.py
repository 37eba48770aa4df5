"""Which kernel vLLM multiplies a module with on one NVIDIA GPU, or why it has none.

vLLM's CUDA build requires Humming, a separate package of kernels for 2 to 8 bits.
"""

from __future__ import annotations

from auto_round.consumers.fields import FLOAT_BITS, CannotReadError, CompressedFields, Fields
from auto_round.consumers.kernels import (
    BY_DEVICE,
    HUMMING,
    MARLIN,
    MARLIN_EXPERTS,
    MARLIN_SYM_BITS,
    PADDED,
    TRITON,
    TRITON_AWQ,
    expert_sizes,
    experts_kernel,
    has_marlin,
    needs_four_bits,
    needs_groups,
    needs_marlin_group,
    needs_whole_groups,
    sizes,
)
from auto_round.consumers.kernels_float import vllm_floats
from auto_round.consumers.modules import Module
from auto_round.layouts.compressed import INT_QUANTIZED, PACK_QUANTIZED

HUMMING_BITS = (2, 3, 5, 6, 7)
"""Widths that go to Humming.

Source: `CUDA_HUMMING_SUPPORTED_BITS` in vLLM `inc/schemes/inc_wna16_scheme.py`."""

HUMMING_LEAST_GROUP = 16
"""Smallest group for 16-bit activations; groups are powers of two.

Source: humming `tune/candidate.py` (`get_problem_rejection_reasons`) and `transform.py`; release 0.1.20 cuts
other multiples of 16 into powers of two, 0.1.14 refuses them."""

MARLIN_TILES = ((64, 128), (128, 64))
"""Multiples of outputs and inputs that need no padding. Source: `marlin_padded_nk` in `marlin_utils.py`."""

TRITON_GROUP = 256
"""Group of 4 bits that neither Marlin nor Machete takes. Source: `TRITON_W4A16_SUPPORTED_GROUP_SIZES` in
`kernels/linear/mixed_precision/triton_w4a16.py`."""

WIDTHS = tuple(range(2, 9))
"""Source: `WNA16_SUPPORTED_TYPES_MAP` in `compressed_tensors/schemes/compressed_tensors_wNa16.py`."""

ACTIVATIONS = (4, 8)
"""Source: `CompressedTensorsWNA4Int` and `CompressedTensorsWNA8Int` in `compressed_tensors.py`."""


def vllm_gptq(module: Module, fields: Fields) -> str:
    """`gptq` folders: Marlin, for symmetric 4 and 8 bits only. Tiles that do not fit are padded.

    Source: vLLM `auto_gptq.py`, `kernels/linear/mixed_precision/marlin.py`.
    """
    _needs_common_width(fields)
    return experts_kernel(module, fields) if module.experts else _marlin(module, fields)


def vllm_inc_gptq(module: Module, fields: Fields) -> str:
    """`auto-round` folders with codes along the input: Marlin for 4 and 8 bits, Humming for the others.

    Source: vLLM `inc/schemes/inc_wna16_scheme.py` and `inc_wna16_linear.py`; humming `schema/gptq.py`.
    """
    if fields.bits in HUMMING_BITS:
        if not fields.sym:
            raise CannotReadError(
                f"reads zero points of {fields.bits} bits as they are, but here they are stored minus one: "
                "weights would be off by one step without an error"
            )
        needs_groups(fields)
        return needs_humming(module, fields)
    if module.experts:
        return experts_kernel(module, fields)
    _needs_common_width(fields)
    return _marlin(module, fields)


def vllm_awq(module: Module, fields: Fields) -> str:
    """Codes packed along the output: Marlin with zero points, else its older AWQ kernel, which wants groups.

    Source: vLLM `auto_awq.py`.
    """
    needs_four_bits(fields)
    if module.experts:
        return experts_kernel(module, fields)
    needs_whole_groups(module, fields)
    if not fields.sym and has_marlin(fields):
        return _marlin(module, fields)
    needs_groups(fields)
    return TRITON_AWQ


def vllm_compressed(module: Module, fields: Fields) -> str:
    """Folders of compressed-tensors: packed words of 2 to 8 bits have kernels; for some the device decides.

    Source: vLLM `compressed_tensors/compressed_tensors.py` (`_get_scheme_from_parts`), `schemes/`,
    `compressed_tensors_moe/`; the order of kernels in `kernels/linear/__init__.py` (`_POSSIBLE_KERNELS`).
    """
    if not isinstance(fields, CompressedFields):
        return BY_DEVICE
    return _whole_numbers(module, fields) if fields.numbers == "int" else vllm_floats(module, fields)


def _whole_numbers(module: Module, fields: CompressedFields) -> str:
    if fields.form == INT_QUANTIZED.name:
        return _bytes(fields)
    if fields.form != PACK_QUANTIZED.name or fields.bits not in WIDTHS:
        raise CannotReadError(f"has no scheme for {fields} stored as {fields.form}")
    plain = fields.activations >= FLOAT_BITS
    if not plain and (module.experts or fields.activations not in ACTIVATIONS or not fields.by_token):
        raise CannotReadError(f"has no scheme for {fields} stored as {fields.form}")
    needs_whole_groups(module, fields)
    if module.experts:
        return _packed_experts(module, fields)
    if has_marlin(fields):
        return _marlin(module, fields)
    if fields.bits == 4 and fields.group_size == TRITON_GROUP:
        return TRITON
    if not fields.sym and fields.bits == fields.activations:
        raise CannotReadError(
            "has no kernel for zero points where weights and activations have the same width"
        )
    return needs_humming(module, fields)


def _packed_experts(module: Module, fields: Fields) -> str:
    """Kernel of packed experts: Marlin, which pads the intermediate size, else Triton or Humming."""
    hidden, _ = expert_sizes(module, fields)
    if has_marlin(fields) and all(n % 128 == 0 for n in hidden):
        return MARLIN_EXPERTS
    needs_groups(fields)
    return needs_humming(module, fields)


def _bytes(fields: CompressedFields) -> str:
    """Weights of one byte each, which only run with activations of 8 bits."""
    if not fields.sym or fields.activations != 8:
        raise CannotReadError(f"has no scheme for {fields} stored as {fields.form}")
    if fields.bits == 8 and fields.group_size < 0:
        return BY_DEVICE
    raise CannotReadError(
        f"has no scheme on GPUs for {fields} stored as {fields.form} (for {PACK_QUANTIZED.name} it has one)"
    )


def needs_humming(module: Module, fields: Fields) -> str:
    """Humming, or an error where its groups do not fit."""
    size = fields.group_size
    least = HUMMING_LEAST_GROUP * FLOAT_BITS // min(getattr(fields, "activations", FLOAT_BITS), FLOAT_BITS)
    if size > 0 and (size < least or size & (size - 1)):
        raise CannotReadError(
            f"multiplies {fields.bits} bits with Humming, which takes powers of two from {least} as group "
            f"sizes, not {size}"
        )
    needs_whole_groups(module, fields)
    return HUMMING


def _marlin(module: Module, fields: Fields) -> str:
    needs_marlin_group(fields)
    needs_whole_groups(module, fields)
    out, n_in = sizes(module, fields)
    return MARLIN if any(out % n == 0 and n_in % k == 0 for n, k in MARLIN_TILES) else PADDED


def _needs_common_width(fields: Fields) -> None:
    if not fields.sym or fields.bits not in MARLIN_SYM_BITS:
        raise CannotReadError(
            f"has kernels for symmetric 4 and 8 bits in this order of bytes, not for {fields}"
        )
