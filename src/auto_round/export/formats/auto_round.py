"""The `auto_round` format: packed numbers, loaded by Transformers; whole ones also by vLLM and SGLang."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from auto_round.errors import InternalError, Refusal
from auto_round.export.auto_round_config import auto_round_config
from auto_round.export.exporter import TuningFacts
from auto_round.export.packed import OneLayout, gather_refusals, quantized_layers, refuse_unloadable
from auto_round.facts.layer import Block, Layer
from auto_round.layouts.integers import is_symmetric
from auto_round.layouts.layout import Layout
from auto_round.layouts.table import AWQ_GEMM, COMPRESSED_FLOATS, GPTQ_V1, layout_for
from auto_round.numerics.activation_float import InputFormat, MeasuredScales
from auto_round.numerics.format import Format
from auto_round.numerics.grid_float import FloatGrid
from auto_round.schemes.condense import some
from auto_round.schemes.plan import Plan

AWQ_BITS = 4

READ_AS_THEY_ARE = (2, 3)
"""Widths whose zero points vLLM takes as stored in every packing of codes along the input.

Source: vLLM `inc/schemes/inc_wna16_scheme.py` (`CUDA_HUMMING_SUPPORTED_BITS`), humming `schema/gptq.py`."""


@dataclass(frozen=True, slots=True)
class AutoRoundFormat(OneLayout):
    """Packed numbers with one of five `packing_format`s.

    A quantized head that was tied to the embedding is written apart (`lm_head.qweight`, ...); the embedding
    stays and `config.json` has to say that they are no longer tied.

    Attributes:
        name: name on the command line.
        packing: `packing_format` to write; None to take the one that fits the plan: `auto_round:auto_gptq`
            for symmetric plans, `auto_round:auto_awq` for asymmetric ones of 4 bits throughout,
            `auto_round:llm_compressor` where there are floating numbers, else `auto_round`.
    """

    packing: str | None = None

    def for_plan(self, plan: Plan, layers: Sequence[Layer]) -> AutoRoundFormat:
        """This format with its packing decided."""
        return self if self.packing else replace(self, packing=_fitting(plan, layers))

    def refusals(self, plan: Plan, layers: Sequence[Layer]) -> list[Refusal]:
        """One refusal for each reason, with the layers that it holds for."""
        exact = self.for_plan(plan, layers)

        def refuse(layer: Layer, fmt: Format) -> Refusal | None:
            scheme = plan.scheme_of(layer.name)
            found = exact._refusal(layer, fmt)
            if found or scheme is None or not scheme.act_quantized or isinstance(fmt.grid, FloatGrid):
                return found
            reason = "its readers leave activations of layers of whole numbers alone"
            return Refusal(self.name, reason, "use the format llm_compressor or fake")

        return gather_refusals(plan, layers, refuse)

    def holds_activation(self, fmt: InputFormat) -> bool:
        """True for floating numbers whose scales are measured as the model runs."""
        return isinstance(fmt, MeasuredScales)

    def warnings(self, plan: Plan, layers: Sequence[Layer]) -> list[str]:
        """Readers that take zero points stored minus one for something else."""
        form = self.for_plan(plan, layers)
        if form._layout() is not GPTQ_V1:
            return []
        asymmetric = [layer.name for layer, fmt in quantized_layers(plan, layers) if not is_symmetric(fmt)]
        if not asymmetric:
            return []
        return [
            f"{self.name}: {some(asymmetric)}: zero points are stored minus one. Transformers reads them "
            "with this package; vLLM and SGLang have no kernel for such linear layers. Use the format "
            "auto_round or auto_round:gptqmodel, or a symmetric scheme"
        ]

    def config(
        self, plan: Plan, layers: Sequence[Layer], blocks: Sequence[Block], facts: TuningFacts | None = None
    ) -> dict[str, Any] | None:
        """The `quantization_config`; None when the plan quantizes nothing."""
        packing = self.for_plan(plan, layers).packing
        if packing is None:
            raise InternalError(f"{self.name} did not decide on a packing")
        return auto_round_config(packing, plan, layers, blocks, facts)

    def _layout(self) -> Layout:
        if self.packing is None:
            raise InternalError(f"{self.name} has several packings: ask for_plan first")
        return layout_for(self.packing)

    def _refusal(self, layer: Layer, fmt: Format) -> Refusal | None:
        layout = self._layout()
        if layout is GPTQ_V1 and not is_symmetric(fmt) and fmt.grid.bits in READ_AS_THEY_ARE:
            return Refusal(
                self.name,
                f"zero points are stored minus one, and vLLM reads those of {fmt.grid.bits} bits as they "
                "are: weights would be off by one step without an error",
                "use the format auto_round or auto_round:gptqmodel, or a symmetric scheme",
            )
        if layout is COMPRESSED_FLOATS:
            return refuse_floats(self.name, layer, fmt)
        return refuse_unloadable(self.name, layer, fmt, layout)


def refuse_floats(who: str, layer: Layer, fmt: Format) -> Refusal | None:
    """Why loaders of `auto_round` folders do not read a layer of floating numbers; None where they do.

    Source: Transformers 5.24 `AutoRoundConfig.post_init`, which takes group sizes that are whole numbers and
    no 0.
    """
    refusal = COMPRESSED_FLOATS.accepts(fmt, layer.shape)
    if refusal is not None:
        return replace(refusal, who=who, remedy=refusal.remedy or "use the format fake")
    if fmt.group.size == 0 or fmt.group.rows > 1:
        what = "one scale for a whole tensor" if fmt.group.size == 0 else "scales of blocks of several rows"
        return Refusal(who, f"Transformers does not load {what} from it", "use the format llm_compressor")
    return None


def _fitting(plan: Plan, layers: Sequence[Layer]) -> str:
    """`packing_format` for a plan."""
    quantized = quantized_layers(plan, layers)
    if any(isinstance(fmt.grid, FloatGrid) for _, fmt in quantized):
        return "auto_round:llm_compressor"
    if all(is_symmetric(fmt) for _, fmt in quantized):
        return "auto_round:auto_gptq"
    uniform = all(not is_symmetric(fmt) and fmt.grid.bits == AWQ_BITS for _, fmt in quantized)
    if uniform and all(AWQ_GEMM.accepts(fmt, layer.shape) is None for layer, fmt in quantized):
        return "auto_round:auto_awq"
    return "auto_round"
