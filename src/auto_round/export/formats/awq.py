"""The format `auto_awq`: AWQ folders of version GEMM."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from auto_round.errors import Refusal
from auto_round.export.awq_config import awq_config, clashes
from auto_round.export.exporter import TuningFacts
from auto_round.export.packed import (
    LayerByLayer,
    gather_refusals,
    quantized_layers,
    refuse_foreign,
    refuse_transposed,
)
from auto_round.facts.layer import Block, Layer, Role
from auto_round.layouts.layout import Layout
from auto_round.layouts.table import AWQ_GEMM
from auto_round.numerics.format import Format
from auto_round.schemes.plan import Plan


@dataclass(frozen=True, slots=True)
class AWQFormat(LayerByLayer):
    """4-bit whole numbers, symmetric or not, in AWQ order: `qweight`, `qzeros`, `scales`.

    Attributes:
        name: name on the command line.
    """

    name: str = "auto_awq"

    @property
    def float_dtype(self) -> torch.dtype:
        """Kernels for AWQ folders compute in float16; Transformers casts to it."""
        return torch.float16

    def refusals(self, plan: Plan, layers: Sequence[Layer]) -> list[Refusal]:
        """One refusal for each reason, with the layers that it holds for."""
        return [*gather_refusals(plan, layers, self._refusal), *self._of_all(plan, layers)]

    def config(
        self, plan: Plan, layers: Sequence[Layer], blocks: Sequence[Block], facts: TuningFacts | None = None
    ) -> dict[str, Any] | None:
        """The `quantization_config`; None when the plan quantizes nothing."""
        return awq_config(plan, layers, blocks)

    def _layout(self, layer: Layer) -> Layout:
        return AWQ_GEMM

    def _refusal(self, layer: Layer, fmt: Format) -> Refusal | None:
        refusal = refuse_foreign(self.name, layer, fmt, AWQ_GEMM) or refuse_transposed(self.name, layer)
        if refusal is None and layer.role is Role.HEAD:
            return Refusal(
                self.name,
                "Transformers never reads a quantized head from an AWQ folder",
                "leave out --quant_lm_head, or use the format auto_round",
            )
        return refusal

    def _of_all(self, plan: Plan, layers: Sequence[Layer]) -> list[Refusal]:
        """What no single layer is to blame for."""
        found = []
        sizes = Counter(fmt.group.size for _, fmt in quantized_layers(plan, layers))
        if len(sizes) > 1:
            listed = ", ".join(f"{size} for {count} layers" for size, count in sizes.most_common())
            found.append(
                Refusal(
                    self.name,
                    f"an AWQ folder has one group size, not {listed}",
                    "use one group_size, keep the other layers at 16 bits, or use the format auto_round",
                )
            )
        for kept, written in clashes(plan, layers)[:1]:
            found.append(
                Refusal(
                    self.name,
                    f"{kept} is kept, and vLLM would leave {written} alone too, whose name contains that",
                    "quantize both, keep both, or use the format auto_round",
                )
            )
        return found
