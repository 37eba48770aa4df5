"""Which modules of a model get quantized inputs, and which layers cannot have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from auto_round.errors import Refusal, UnsupportedError
from auto_round.facts.group_names import inside
from auto_round.facts.inputs import WEIGHT, input_of
from auto_round.facts.layer import Layer
from auto_round.models.source import ModelSource
from auto_round.numerics.activation_float import CalibratedScale, InputFormat
from auto_round.schemes.condense import some
from auto_round.schemes.plan import Plan


def refuse_unreachable(plan: Plan, source: ModelSource) -> None:
    """Refuse to quantize inputs that cannot be told apart, or of layers outside the blocks.

    Raises:
        UnsupportedError: there are such layers; names them.
    """
    refusals: list[Refusal] = []
    chosen = [layer for layer in source.layers if plan.activation_of(layer.name) is not None]
    apart = {layer.parameter: source.tells_experts_apart(layer.parameter) for layer in chosen if layer.expert}
    fused = [
        layer.name
        for layer in chosen
        if layer.block is not None and (input_name(layer) is None or not apart.get(layer.parameter, True))
    ]
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
    """Name of each input (`facts.inputs`) -> what it is rounded to.

    Steps that calibration fixes are stored in the dtype of the layer, as its readers hold them.
    """
    found: dict[str, InputFormat] = {}
    for layer in layers:
        fmt, name = plan.inputs_of(layer), input_name(layer)
        if fmt is not None and name is not None:
            found[name] = fmt
    return found


def to_calibrate(formats: Mapping[str, InputFormat]) -> list[str]:
    """Inputs of which calibration is to fix a number."""
    return [name for name, fmt in formats.items() if isinstance(fmt, CalibratedScale)]


def formats_inside(
    plan: Plan, layers: Iterable[Layer], prefixes: Mapping[str, str]
) -> dict[str, InputFormat]:
    """`activation_formats` by names inside a group of blocks with these `prefixes`."""
    return inside(activation_formats(plan, layers), prefixes)


def input_name(layer: Layer) -> str | None:
    """Name of the input that a matrix multiplies; None for one of several that are no experts."""
    if layer.expert is None and (layer.rows is not None or not layer.parameter.endswith(WEIGHT)):
        return None
    return input_of(layer.parameter, layer.expert)
