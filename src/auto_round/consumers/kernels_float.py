"""Which scheme vLLM and SGLang have for floating weights of compressed-tensors folders.

Which kernel multiplies is decided by the device and by the libraries that are there.
Source: `_get_scheme_from_parts` in `compressed_tensors.py` and `schemes/` of vLLM 0.32 and SGLang 0.5.23.
"""

from __future__ import annotations

from auto_round.consumers.fields import (
    FP8_STRATEGIES,
    CannotReadError,
    CompressedFields,
    Fields,
    Inputs,
)
from auto_round.consumers.kernels import BY_DEVICE, expert_sizes
from auto_round.consumers.modules import Module
from auto_round.facts.compressed import BYTES, FP8, MXFP4, MXFP8, NAIVE, NVFP4

_AS_THEY_ARE = (NAIVE, BYTES, FP8, NVFP4)
"""`format`s of FP8 that lead to its schemes. Source: `is_activation_quantization_format` of both."""

_NV_GROUP = 16
_MX_GROUP = 32
_INC_FORMS = {4: MXFP4, 8: MXFP8}


def vllm_floats(module: Module, fields: CompressedFields) -> str:
    """vLLM: NVFP4, MXFP4, MXFP8 and FP8."""
    _needs_symmetric(fields)
    if fields.form == NVFP4:
        return _nvfp4(fields)
    if fields.form in (MXFP4, MXFP8):
        return BY_DEVICE
    if not _is_fp8(fields):
        raise CannotReadError(f"has no scheme for {fields}: of floats it knows MXFP4, MXFP8, NVFP4 and FP8")
    _needs_fp8_inputs(module, fields)
    if fields.block is not None:
        _needs_blocks(module, fields.block)
    return BY_DEVICE


def vllm_inc_floats(module: Module, fields: Fields) -> str:
    """vLLM, `auto-round` folders: MXFP4 and MXFP8, by their bits.

    Source: vLLM 0.32 `inc/inc.py` (`_validate_mxfp_quantization`), `inc/schemes/factory.py`.
    """
    wanted = _INC_FORMS.get(fields.bits)
    if wanted is None or fields.group_size != _MX_GROUP or not fields.sym:
        raise CannotReadError(
            f"has no scheme for floats of {fields.bits} bits in groups of {fields.group_size}"
        )
    other = [part.form for part in module.parts if part.form != wanted]
    if other:
        raise CannotReadError(f"expects {module.name} stored as {wanted}, but finds {other[0] or 'others'}")
    return BY_DEVICE


def sglang_floats(module: Module, fields: CompressedFields) -> str:
    """SGLang: NVFP4 and FP8."""
    _needs_symmetric(fields)
    if fields.form == NVFP4:
        return _nvfp4(fields)
    if not _is_fp8(fields):
        raise CannotReadError(f"has no scheme for {fields}: of floats it knows NVFP4 and FP8")
    _needs_fp8_inputs(module, fields)
    if fields.strategy == "block" and fields.inputs is None:
        raise CannotReadError(f"has no scheme for {fields}: blocks need quantized activations")
    return BY_DEVICE


def remarks_on_floats(engine: str, fields: Fields) -> tuple[str, ...]:
    """Sentences for people where an engine treats activations in another way than the folder says.

    Args:
        engine: "vLLM" or "SGLang".
        fields: of a module that it loads.
    """
    if not isinstance(fields, CompressedFields):
        return ()
    rounded = fields.inputs is not None
    if fields.form in (NVFP4, MXFP4, MXFP8) and fields.activations == fields.bits:
        return ("below compute capability 10.0 activations stay in 16 bits",)
    if fields.form == MXFP4 and engine == "vLLM":
        return ("from compute capability 10.0 on it rounds activations, which this folder leaves alone",)
    if fields.form == MXFP8 and not rounded:
        return ("its newer kernels round activations, which this folder leaves alone",)
    if fields.form == FP8 and rounded:
        return ("below compute capability 8.9 activations stay in 16 bits",)
    return ()


def _is_fp8(fields: CompressedFields) -> bool:
    return fields.form == FP8 and fields.strategy in FP8_STRATEGIES


def _needs_symmetric(fields: CompressedFields) -> None:
    if not fields.sym:
        raise CannotReadError(f"has no scheme for {fields} with zero points")


def _nvfp4(fields: CompressedFields) -> str:
    if fields.inputs is not None and not _is_nvfp4(fields.inputs):
        raise CannotReadError("takes NVFP4 weights with NVFP4 activations or with none")
    return BY_DEVICE


def _is_nvfp4(inputs: Inputs) -> bool:
    found = (inputs.numbers, inputs.bits, inputs.strategy, inputs.group_size, inputs.sym)
    return found == ("float", 4, "tensor_group", _NV_GROUP, True)


def _needs_fp8_inputs(module: Module, fields: CompressedFields) -> None:
    """Raise where an engine has no scheme for FP8 weights with these activations."""
    inputs = fields.inputs
    if fields.stated not in _AS_THEY_ARE:
        raise CannotReadError(f"has no scheme for {fields} stored as {fields.stated}")
    if inputs is None:
        if module.experts:
            raise CannotReadError(f"has no scheme for experts of {fields}: they need quantized activations")
        return
    static = not inputs.dynamic
    if inputs.numbers != "float" or (static and (inputs.strategy != "tensor" or not inputs.sym)):
        raise CannotReadError(
            f"takes FP8 weights with FP8 activations whose steps are measured, or fixed one for the tensor; "
            f"here they are {inputs.numbers}{inputs.bits} by {inputs.strategy}"
        )
    if static and fields.strategy == "block":
        raise CannotReadError("takes blocks of FP8 with measured activations only")


def _needs_blocks(module: Module, block: tuple[int, int]) -> None:
    """Raise where blocks would reach over the border of two merged matrices, or end inside of a row.

    Source: `validate_fp8_block_shape`, `validate_fp8_block_shape_moe` and `per_token_group_quant_fp8` in vLLM
    `utils/fp8_utils.py`; groups of Marlin's scales in `utils/marlin_utils_fp8.py`.
    """
    rows, columns = block
    if short := sorted({part.shape[1] for part in module.parts if part.shape[1] % columns}):
        raise CannotReadError(
            f"multiplies {module.name} in blocks of {columns} inputs, which do not divide {short[0]}"
        )
    inside = [part.shape[0] for part in module.parts[:-1]]
    if module.experts:
        _, inner = expert_sizes(module, Fields(8, -1, True))
        inside = list(inner)
    if bad := sorted({n for n in inside if n % rows}):
        raise CannotReadError(
            f"merges {module.name}, whose parts have to have multiples of {rows} outputs, not {bad[0]}"
        )
