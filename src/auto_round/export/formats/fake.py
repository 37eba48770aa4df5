"""The `fake` format: dequantized weights under their old names, for any tool that reads the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from auto_round.errors import Refusal
from auto_round.export.exporter import Facts
from auto_round.facts.layer import Block, Layer, Role
from auto_round.facts.tensor import TensorSpec
from auto_round.numerics.format import Format
from auto_round.numerics.qtensor import QuantizedLayer
from auto_round.schemes.plan import Plan


@dataclass(frozen=True, slots=True)
class FakeFormat:
    """Every weight in the dtype of the source, rounded to what its format can hold.

    The folder is as large as the source's and loads wherever that loads. It shows the accuracy of a format
    that has no packed layout yet.

    Attributes:
        name: name on the command line.
    """

    name: str = "fake"

    def for_plan(self, plan: Plan, layers: Sequence[Layer]) -> FakeFormat:
        """This format has no variants."""
        return self

    def refusals(self, plan: Plan, layers: Sequence[Layer]) -> list[Refusal]:
        """None: every format can be dequantized."""
        return []

    def spec(self, layer: Layer, fmt: Format) -> Mapping[str, TensorSpec]:
        """One tensor with the source's shape and dtype."""
        return {_tensor(layer): TensorSpec(layer.dtype, layer.stored_shape)}

    def encode(self, layer: Layer, q: QuantizedLayer) -> Mapping[str, Tensor]:
        """The dequantized weight, rounded once to the source's dtype."""
        weight = q.weight.format.dequantize(q.weight, layer.dtype)
        return {_tensor(layer): weight.t().contiguous() if layer.transposed else weight}

    def config(
        self, plan: Plan, layers: Sequence[Layer], blocks: Sequence[Block], facts: Facts | None = None
    ) -> dict[str, Any] | None:
        """None: the folder looks like an unquantized model."""
        return None


def _tensor(layer: Layer) -> str:
    """Name of the stored weight; a head that was tied to the embedding gets a tensor of its own."""
    return f"{layer.name}.weight" if layer.role is Role.HEAD else layer.tensor
