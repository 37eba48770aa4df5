"""What a reader expects of a module, compared with what lies on disk."""

from __future__ import annotations

from collections.abc import Iterator

from auto_round.consumers.fields import FP8_STRATEGIES, CannotReadError, CompressedFields, Fields
from auto_round.consumers.modules import Module
from auto_round.facts.compressed import FP8, NVFP4
from auto_round.stored.matrices import Matrix

_ROUTERS = ("gate", "router")
_SCALE = "weight_scale"


def compare(module: Module, fields: Fields | None) -> str:
    """Compare what a reader expects with what lies on disk; text of a doubt that is no refusal.

    Raises:
        CannotReadError: they differ, so that a tensor is missing or has another shape.
    """
    packed = [part for part in module.parts if part.packed]
    plain = [part for part in module.parts if not part.packed]
    if fields is None:
        if packed:
            raise CannotReadError("takes {} for 16 bits, but it is packed".replace("{}", module.name))
        return ""
    if plain and len(module.parts) == 1 and module.name.rpartition(".")[2] in _ROUTERS:
        return "{} is not named as kept: loads only if the engine never quantizes it"
    if plain:
        raise CannotReadError(f"expects {fields} for {module.name}, but finds 16 bits")
    for part in packed:
        _compare_part(module, part, fields)
    return ""


def _compare_part(module: Module, part: Matrix, fields: Fields) -> None:
    if isinstance(fields, CompressedFields) and fields.form != part.form:
        found = f" ({part.form})" if part.form else ""
        raise CannotReadError(
            f"expects {module.name} stored as {fields.form}, but finds another order of bytes{found}"
        )
    if part.bits and part.bits != fields.bits:
        raise CannotReadError(f"expects {fields} for {module.name}, but finds {part.bits} bits")
    if isinstance(fields, CompressedFields):
        _compare_scales(module, part, fields)
    n_in = part.inputs(fields.bits)
    if part.groups and part.groups != fields.groups(n_in):
        raise CannotReadError(
            f"expects {fields} for {module.name}, but finds {part.groups} groups of {n_in} inputs"
        )


def _compare_scales(module: Module, part: Matrix, fields: CompressedFields) -> None:
    """Check the scales that the number of groups does not tell: those of floats and of inputs."""
    missing = [name for name in _tensors(fields) if name not in part.stored]
    if missing:
        raise CannotReadError(f"expects {fields} for {module.name}, but finds no {' and no '.join(missing)}")
    wanted = _scale_shape(part, fields)
    found = part.stored[_SCALE].shape if _SCALE in part.stored else None
    if wanted is not None and found != wanted:
        raise CannotReadError(
            f"expects {_SCALE} {list(wanted)} of {fields} for {module.name}, but finds {list(found or ())}"
        )


def _tensors(fields: CompressedFields) -> Iterator[str]:
    """Tensors that readers do not miss: without them they compute with whatever lies in memory."""
    if fields.form == FP8:
        yield _SCALE
        if fields.inputs is not None and not fields.inputs.dynamic:
            yield "input_scale"
    elif fields.form == NVFP4 and fields.inputs is not None:
        yield "input_global_scale"
    elif fields.numbers == "int" and fields.inputs is not None and not fields.inputs.dynamic:
        yield "input_scale"
        if not fields.inputs.sym:
            yield "input_zero_point"


def _scale_shape(part: Matrix, fields: CompressedFields) -> tuple[int, ...] | None:
    """Shape of the scales of FP8; None for all others, whose groups were counted."""
    out, n_in = part.shape
    if fields.form != FP8 or fields.strategy not in FP8_STRATEGIES:
        return None
    if fields.block is not None:
        rows, columns = fields.block
        return -(-out // rows), -(-n_in // columns)
    return (1,) if fields.strategy == "tensor" else (out, 1)
