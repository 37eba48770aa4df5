"""The `fake` format: dequantized weights under their old names, for any tool that reads the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from auto_round.export.exporter import Exporter
from auto_round.export.manifest import Manifest
from auto_round.facts.layer import Layer, Role
from auto_round.facts.tensor import TensorSpec
from auto_round.numerics.activation_float import InputFormat
from auto_round.numerics.format import Format
from auto_round.numerics.qtensor import QuantizedLayer
from auto_round.schemes.plan import Plan


@dataclass(frozen=True, slots=True)
class FakeFormat(Exporter):
    """Every weight in the dtype of the source, rounded to what its format can hold.

    The folder is as large as the source's and loads wherever that loads. It shows the accuracy of a format
    that has no packed layout yet.

    Attributes:
        name: name on the command line.
    """

    name: str = "fake"

    any_plan: ClassVar[bool] = True

    def holds_activation(self, fmt: InputFormat) -> bool:
        """True for all: the folder holds weights only, and a warning says that it tells nothing of inputs."""
        return True

    def warnings(self, plan: Plan, layers: Sequence[Layer]) -> list[str]:
        """Says that the folder does not tell how activations are quantized, where they are."""
        if not any(plan.activation_of(name) for name in plan.quantized):
            return []
        return [f"{self.name}: the folder holds rounded weights, and leaves activations alone"]

    def manifest(self, plan: Plan, layers: Sequence[Layer], tensors: Mapping[str, TensorSpec]) -> Manifest:
        """Names and shapes of the source; matrices that are one tensor there are one here."""
        single = Exporter.manifest(self, plan, layers, tensors)
        stacked = {layer.alone: layer for layer in layers if layer.fused and layer.name in single.encoded}
        specs: dict[str, TensorSpec] = {}
        for name, spec in single.specs.items():
            if name in stacked:
                tensor = stacked[name].tensor
                specs[tensor] = replace(tensors[tensor], dtype=spec.dtype)
            else:
                specs[name] = spec
        encoded = {**single.encoded, **{layer.name: (layer.tensor,) for layer in stacked.values()}}
        return Manifest(specs, single.copied, encoded, stacked)

    def spec(self, layer: Layer, fmt: Format) -> Mapping[str, TensorSpec]:
        """One tensor with the source's shape and dtype; matrices of one tensor one by one, `[out, in]`."""
        shape = layer.shape if layer.fused else layer.stored_shape
        return {_tensor(layer): TensorSpec(layer.dtype, shape)}

    def encode(self, layer: Layer, q: QuantizedLayer) -> Mapping[str, Tensor]:
        """The dequantized weight, rounded once to the source's dtype."""
        weight = q.weight.format.dequantize(q.weight, layer.dtype)
        turned = layer.transposed and not layer.fused
        return {_tensor(layer): weight.t().contiguous() if turned else weight}


def _tensor(layer: Layer) -> str:
    """Name of the stored weight; a head that was tied to the embedding gets a tensor of its own."""
    return f"{layer.name}.weight" if layer.role is Role.HEAD else layer.alone
