"""The formats `auto_gptq` and `gptqmodel`: GPTQ folders, version 1 and version 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from auto_round.errors import Refusal
from auto_round.export.exporter import TuningFacts
from auto_round.export.gptq_config import gptq_config
from auto_round.export.packed import LayerByLayer, gather_refusals, quantized_layers, refuse_foreign
from auto_round.facts.layer import Block, Layer
from auto_round.layouts.integers import is_symmetric
from auto_round.layouts.layout import Layout
from auto_round.layouts.table import CHECKPOINT_LAYOUTS, GPTQ_V1_INDEXED
from auto_round.numerics.format import Format
from auto_round.schemes.condense import some
from auto_round.schemes.plan import Plan


@dataclass(frozen=True, slots=True)
class GPTQFormat(LayerByLayer):
    """Packed whole numbers as GPTQ tools write them: `qweight`, `qzeros`, `scales`, `g_idx`.

    Attributes:
        name: name on the command line.
        checkpoint_format: `gptq` (version 1) or `gptq_v2`.
    """

    checkpoint_format: str

    @property
    def float_dtype(self) -> torch.dtype:
        """Kernels for GPTQ folders compute in float16, some in bfloat16 too."""
        return torch.float16

    def refusals(self, plan: Plan, layers: Sequence[Layer]) -> list[Refusal]:
        """One refusal for each reason, with the layers that it holds for."""
        return gather_refusals(plan, layers, self._refusal)

    def warnings(self, plan: Plan, layers: Sequence[Layer]) -> list[str]:
        """Readers of GPTQ folders that cannot do with asymmetric weights, or with several schemes."""
        written = quantized_layers(plan, layers)
        notes = []
        asymmetric = [layer.name for layer, fmt in written if not is_symmetric(fmt)]
        if asymmetric and CHECKPOINT_LAYOUTS[self.checkpoint_format] is GPTQ_V1_INDEXED:
            notes.append(
                f"{self.name}: {some(asymmetric)}: asymmetric weights in version 1 of GPTQ. Some kernels "
                "lose much accuracy with them, most at 2 bits and with small models; GPTQModel and vLLM "
                "refuse them. Use the format gptqmodel or auto_round, or a symmetric scheme"
            )
        elif asymmetric:
            notes.append(
                f"{self.name}: {some(asymmetric)}: asymmetric weights. GPTQModel reads them, vLLM does not: "
                "for vLLM use auto_awq (4 bits) or a symmetric scheme"
            )
        if len({fmt for _, fmt in written}) > 1:
            notes.append(
                f"{self.name}: several schemes in one folder are read by GPTQModel and vLLM, but not by "
                "Transformers, unless it is given quantization_config=AutoRoundConfig()"
            )
        return notes

    def config(
        self, plan: Plan, layers: Sequence[Layer], blocks: Sequence[Block], facts: TuningFacts | None = None
    ) -> dict[str, Any] | None:
        """The `quantization_config`; None when the plan quantizes nothing."""
        return gptq_config(self.checkpoint_format, plan, layers, blocks)

    def _layout(self, layer: Layer) -> Layout:
        return CHECKPOINT_LAYOUTS[self.checkpoint_format]

    def _refusal(self, layer: Layer, fmt: Format) -> Refusal | None:
        return refuse_foreign(self.name, layer, fmt, self._layout(layer))
