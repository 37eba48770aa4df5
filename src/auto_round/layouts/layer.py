"""All tensors of a quantized layer: those of its weight, and the calibrated number of its input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from auto_round.errors import CheckpointError, InternalError, Refusal
from auto_round.facts.tensor import TensorSpec
from auto_round.layouts.layout import Layout
from auto_round.numerics.activation_float import CalibratedScale, InputFormat
from auto_round.numerics.format import Format
from auto_round.numerics.qtensor import QuantizedLayer

INPUT_TENSORS = {"step": "input_scale", "tensor": "input_global_scale"}
"""Stored part of an activation format that calibration fixes -> its tensor.

Source: `initialize_qparams` in compressed-tensors 0.20, `quantization/lifecycle/initialize.py`; auto-round
0.16 uses the same names."""

INPUT_ZERO = "input_zero_point"
"""Tensor of an input's zero point, int8. Source: the same."""


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """How one quantized layer is stored.

    Attributes:
        weight: order of the bytes of its weight.
        format: numeric format of the weight.
        shape: `(out, in)`.
        inputs: what its input is rounded to; None where it is left alone.
    """

    weight: Layout
    format: Format
    shape: tuple[int, int]
    inputs: InputFormat | None = None

    def refuses(self) -> Refusal | None:
        """Why the weight cannot be stored like this; None where it can."""
        return self.weight.accepts(self.format, self.shape)

    def spec(self) -> dict[str, TensorSpec]:
        """What `pack` will return, by the last name of each tensor."""
        return {**self.weight.spec(self.format, self.shape), **self.input_spec()}

    def input_spec(self) -> dict[str, TensorSpec]:
        """Tensors of what calibration fixes of the input, `[1]` each: a number, then a zero point."""
        if not isinstance(self.inputs, CalibratedScale):
            return {}
        found = {INPUT_TENSORS[self.inputs.part]: TensorSpec(self.inputs.dtype, (1,))}
        return found | ({INPUT_ZERO: TensorSpec(torch.int8, (1,))} if self.inputs.has_zero else {})

    def pack(self, layer: QuantizedLayer) -> dict[str, Tensor]:
        """Stored tensors of the layer, each by its last name.

        Raises:
            InternalError: the layer lacks the number of its input.
        """
        found = dict(self.weight.pack(layer.weight))
        fixed = (layer.input_scale, layer.input_zero)
        for (name, spec), number in zip(self.input_spec().items(), fixed, strict=False):
            if number is None:
                raise InternalError("nothing has fixed the number of the input of a layer")
            found[name] = number.to(spec.dtype)
        return found

    def unpack(self, parts: Mapping[str, Tensor]) -> QuantizedLayer:
        """Inverse of `pack`, bit for bit.

        Raises:
            CheckpointError: tensors that `pack` would not have written.
        """
        rest, numbers = dict(parts), list[Tensor | None]()
        for name, spec in self.input_spec().items():
            number = rest.pop(name, None)
            numbers.append(number)
            if number is None or (number.dtype, tuple(number.shape)) != (spec.dtype, spec.shape):
                found = "none" if number is None else f"{number.dtype} {list(number.shape)}"
                raise CheckpointError(f"{name}: expected {spec.dtype} {list(spec.shape)}, found {found}")
        return QuantizedLayer(self.weight.unpack(rest, self.format, self.shape), *numbers)

    def with_weight(self, weight: Layout) -> LayerLayout:
        """The same layer with its weight in another order of bytes."""
        return replace(self, weight=weight)
