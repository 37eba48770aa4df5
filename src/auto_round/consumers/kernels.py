"""What the kernels of several engines have in common: names, sizes and the demands of Marlin."""

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
"""Widths without zero points. Source: `query_marlin_supported_quant_types` there."""

MARLIN_ZERO_BITS = (4,)
"""Widths with zero points. Source: `query_marlin_supported_quant_types` there."""

WNA16_LEAST_GROUP = 32
"""Smallest group of the WNA16 kernel where groups have to be cut to fit. Source: `moe_wna16.py` of both."""

MARLIN, PADDED, TRITON_AWQ, BY_DEVICE = "Marlin", "Marlin with padding", "AWQ", "by device"
MARLIN_EXPERTS, WNA16_EXPERTS = "Marlin for experts", "WNA16 for experts"
HUMMING, TRITON = "Humming", "Triton"

HALF_ONLY = (TRITON_AWQ,)
"""Kernels that compute in float16 only. Source: `get_supported_act_dtypes` of the configurations that choose
them, in SGLang `awq/awq.py`; the Triton kernel in vLLM `awq_triton.py` multiplies in float16."""

KernelOf = Callable[[Module, Fields], str]
"""Name of the kernel for a module.

Raises:
    CannotReadError: the engine has none.
"""


def sizes(module: Module, fields: Fields) -> tuple[int, int]:
    """Outputs of all parts together, and inputs."""
    return sum(part.shape[0] for part in module.parts), module.parts[0].inputs(fields.bits)


def fits_tiles(module: Module, fields: Fields) -> bool:
    """Whether Marlin's tiles cover a module without padding."""
    out, n_in = sizes(module, fields)
    return out % MARLIN_OUT == 0 and n_in % MARLIN_IN == 0


def has_marlin(fields: Fields) -> bool:
    """Whether Marlin multiplies a scheme, sizes aside."""
    widths = MARLIN_SYM_BITS if fields.sym else MARLIN_ZERO_BITS
    return fields.bits in widths and fields.group_size in MARLIN_GROUPS


def needs_tiles(module: Module, fields: Fields) -> None:
    """Raise where Marlin's tiles do not cover a module and the engine does not pad."""
    if not fits_tiles(module, fields):
        out, n_in = sizes(module, fields)
        raise CannotReadError(
            f"multiplies it with Marlin, which takes multiples of {MARLIN_OUT} outputs and {MARLIN_IN} "
            f"inputs, not {out} and {n_in}"
        )


def needs_marlin_group(fields: Fields) -> None:
    """Raise for a group size that Marlin does not know."""
    if fields.group_size not in MARLIN_GROUPS:
        raise CannotReadError(f"takes group sizes {listed(MARLIN_GROUPS)}, not {fields.group_size}")


def needs_whole_groups(module: Module, fields: Fields) -> None:
    """Raise where a row ends in a part of a group."""
    widest = max(part.inputs(fields.bits) for part in module.parts)
    if fields.group_size > 0 and any(part.inputs(fields.bits) % fields.group_size for part in module.parts):
        raise CannotReadError(f"needs whole groups: {widest} inputs, group_size {fields.group_size}")


def needs_groups(fields: Fields) -> None:
    """Raise for group size -1 (one group a row), since some engines divide by the group size."""
    if fields.group_size <= 0:
        raise CannotReadError(
            f"has no kernel for one group a row of {fields.bits} bits in this order of bytes"
        )


def needs_four_bits(fields: Fields) -> None:
    """Raise for other widths than 4 bits."""
    if fields.bits != 4:
        raise CannotReadError(f"takes 4 bits in this order of bytes, not {fields.bits}")


def experts_kernel(module: Module, fields: Fields) -> str:
    """Marlin where the sizes fit, else the WNA16 kernel, which takes 4 and 8 bits in groups.

    The hidden size is the longer side that all projections share: inputs of gate and up, outputs of down.
    """
    if fields.bits not in MARLIN_SYM_BITS:
        raise CannotReadError(f"has kernels for experts of 4 and 8 bits, not of {fields.bits}")
    hidden, inner = expert_sizes(module, fields)
    fits = all(n % MARLIN_EXPERT_HIDDEN == 0 for n in hidden) and all(
        n % max(MARLIN_EXPERT_INNER, fields.group_size) == 0 for n in inner
    )
    if fits and has_marlin(fields):
        return MARLIN_EXPERTS
    needs_groups(fields)
    if any(n % fields.group_size for n in hidden | inner) and fields.group_size <= WNA16_LEAST_GROUP:
        raise CannotReadError(f"needs whole groups for experts: group_size {fields.group_size}")
    return WNA16_EXPERTS


def expert_sizes(module: Module, fields: Fields) -> tuple[set[int], set[int]]:
    """Hidden and intermediate sizes of a module of experts."""
    shapes = [(part.name, part.shape[0], part.inputs(fields.bits)) for part in module.parts]
    hidden = {n_in for name, _, n_in in shapes if name.endswith(("gate_proj", "up_proj", "w1", "w3"))}
    return hidden, {n for _, *sides in shapes for n in sides} - hidden


def listed(values: tuple[int, ...]) -> str:
    """Numbers for people."""
    return ", ".join(map(str, values))
