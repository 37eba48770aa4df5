"""Which modules of a model get quantized inputs, and which layers cannot have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from auto_round.errors import Refusal, UnsupportedError
from auto_round.facts.layer import Layer
from auto_round.numerics.activation_float import CalibratedScale, InputFormat
from auto_round.schemes.condense import some
from auto_round.schemes.plan import Plan

_WEIGHT = ".weight"


def refuse_unreachable(plan: Plan, layers: Sequence[Layer]) -> None:
    """Refuse to quantize inputs of a layer that shares its module with others, or lies outside the blocks.

    Raises:
        UnsupportedError: there are such layers; names them.
    """
    refusals: list[Refusal] = []
    chosen = [layer for layer in layers if plan.activation_of(layer.name) is not None]
    fused = [layer.name for layer in chosen if layer.block is not None and _module(layer) is None]
    if fused:
        reason = f"{some(fused)} share one parameter with others, so that their inputs cannot be told apart"
        refusals.append(
            Refusal("activations", reason, "keep them (--ignore_layers), or give them act_bits 16")
        )
    outside = [layer.name for layer in chosen if layer.block is None]
    if outside:
        reason = f"{some(outside)} lies outside of the blocks, where inputs are not quantized"
        remedy = f'leave it out, or layer_config {{"{outside[0]}": {{"act_bits": 16}}}}'
        refusals.append(Refusal("activations", reason, remedy))
    if refusals:
        raise UnsupportedError("these activations cannot be quantized", refusals)


def activation_formats(plan: Plan, layers: Iterable[Layer]) -> dict[str, InputFormat]:
    """Dotted name of each module in the model's tree -> what its input is rounded to.

    Steps that calibration fixes are stored in the dtype of the layer, as its readers hold them.
    """
    found: dict[str, InputFormat] = {}
    for layer in layers:
        fmt, module = plan.inputs_of(layer), _module(layer)
        if fmt is not None and module is not None:
            found[module] = fmt
    return found


def to_calibrate(formats: Mapping[str, InputFormat]) -> list[str]:
    """Modules of whose inputs calibration is to fix a number."""
    return [name for name, fmt in formats.items() if isinstance(fmt, CalibratedScale)]


def formats_inside(
    plan: Plan, layers: Iterable[Layer], prefixes: Mapping[str, str]
) -> dict[str, InputFormat]:
    """`activation_formats` by names inside a group of blocks: position in the group -> path of the block."""
    found = activation_formats(plan, layers)
    return {
        f"{position}.{module.removeprefix(prefix + '.')}": fmt
        for module, fmt in found.items()
        for position, prefix in prefixes.items()
        if module.startswith(f"{prefix}.")
    }


def _module(layer: Layer) -> str | None:
    """Module whose whole input a matrix multiplies; None where several matrices share a parameter."""
    if layer.expert is not None or layer.rows is not None or not layer.parameter.endswith(_WEIGHT):
        return None
    return layer.parameter.removesuffix(_WEIGHT)
