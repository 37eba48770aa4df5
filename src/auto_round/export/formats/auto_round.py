"""The `auto_round` format: packed numbers, loaded by Transformers; whole ones also by vLLM and SGLang."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from auto_round.errors import InternalError, Refusal
from auto_round.export.auto_round_config import auto_round_config, scheme_fields
from auto_round.export.exporter import TuningFacts
from auto_round.export.packed import (
    LayerByLayer,
    gather_refusals,
    planned_inputs,
    quantized_layers,
    refuse_unloadable,
    top_scheme,
)
from auto_round.facts.layer import Block, Layer
from auto_round.layouts.by_numbers import ByNumbers
from auto_round.layouts.compressed import INT_QUANTIZED, OCTET
from auto_round.layouts.integers import is_symmetric
from auto_round.layouts.layout import Layout
from auto_round.layouts.table import AWQ_GEMM, FP8, GPTQ_V1, layout_for
from auto_round.numerics.activation import TokenInt
from auto_round.numerics.activation_float import CalibratedScale, InputFormat, MeasuredScales
from auto_round.numerics.format import Format
from auto_round.numerics.grid_float import FloatGrid
from auto_round.schemes.condense import some
from auto_round.schemes.plan import Plan

AWQ_BITS = 4

COMPRESSED = "auto_round:llm_compressor"
"""Packing of other numbers that have rounded inputs."""

FP8_STATIC, FP8_OTHER = "auto_round:fp8_static", "auto_round:fp8"
"""Packings of FP8 with and without scales of inputs that calibration fixed."""

ROUND_INPUTS = (COMPRESSED, FP8_STATIC, FP8_OTHER)
"""Packings whose readers round what flows in."""

READ_AS_THEY_ARE = (2, 3)
"""Widths whose zero points vLLM takes as stored in every packing of codes along the input.

Source: vLLM `inc/schemes/inc_wna16_scheme.py` (`CUDA_HUMMING_SUPPORTED_BITS`), humming `schema/gptq.py`."""


@dataclass(frozen=True, slots=True)
class AutoRoundFormat(LayerByLayer):
    """Packed numbers with one of five `packing_format`s.

    A quantized head that was tied to the embedding is written apart (`lm_head.qweight`, ...); the embedding
    stays and `config.json` has to say that they are no longer tied.

    Attributes:
        name: name on the command line.
        packing: `packing_format` to write; None to take the one that fits the plan: `auto_round:auto_gptq`
            for symmetric plans, `auto_round:auto_awq` for asymmetric ones of 4 bits throughout,
            `auto_round:fp8_static` for FP8 with one scale for each row or tensor, of weights and of inputs,
            `auto_round:fp8` for such weights alone, `auto_round:llm_compressor` for other floating numbers,
            else `auto_round`.
        others: layer -> its packing, where that is another one: floating numbers beside whole ones.
        inputs: layer -> what its input is rounded to, where it is.
    """

    packing: str | None = None
    others: Mapping[str, str] = field(default_factory=dict, hash=False)
    inputs: Mapping[str, InputFormat] = field(default_factory=dict, hash=False)

    def for_plan(self, plan: Plan, layers: Sequence[Layer]) -> AutoRoundFormat:
        """This format with its packing decided."""
        packing, others = (self.packing, self.others) if self.packing else _fitting(plan, layers)
        return replace(self, packing=packing, others=others, inputs=planned_inputs(plan, layers))

    def refusals(self, plan: Plan, layers: Sequence[Layer]) -> list[Refusal]:
        """One refusal for each reason, with the layers that it holds for: of inputs, then of weights."""
        exact = self.for_plan(plan, layers)

        def refuse_inputs(layer: Layer, fmt: Format) -> Refusal | None:
            return exact._refuse_inputs(layer, fmt, plan.activation_of(layer.name))

        return gather_refusals(plan, layers, refuse_inputs) + gather_refusals(plan, layers, exact._refusal)

    def holds_activation(self, fmt: InputFormat) -> bool:
        """True for floating numbers, and for whole ones of 8 bits without zero points."""
        if isinstance(fmt, TokenInt):
            return fmt.sym and fmt.bits == OCTET
        if isinstance(fmt, CalibratedScale):
            return not fmt.has_zero and (isinstance(fmt.format.grid, FloatGrid) or fmt.bits == OCTET)
        return isinstance(fmt, MeasuredScales) and isinstance(fmt.format.grid, FloatGrid)

    def warnings(self, plan: Plan, layers: Sequence[Layer]) -> list[str]:
        """Readers that know one packing for a folder, or take zero points stored minus one for others."""
        form = self.for_plan(plan, layers)
        notes = []
        if form.others:
            notes.append(
                f"{self.name}: whole and floating numbers in one folder are read by Transformers with this "
                "package, not by vLLM and SGLang; for those use the format llm_compressor"
            )
        written = quantized_layers(plan, layers)
        asymmetric = [
            layer.name for layer, fmt in written if form._layout(layer) is GPTQ_V1 and not is_symmetric(fmt)
        ]
        if not asymmetric:
            return notes
        return [
            *notes,
            f"{self.name}: {some(asymmetric)}: zero points are stored minus one. Transformers reads them "
            "with this package; vLLM and SGLang have no kernel for such linear layers. Use the format "
            "auto_round or auto_round:gptqmodel, or a symmetric scheme",
        ]

    def config(
        self, plan: Plan, layers: Sequence[Layer], blocks: Sequence[Block], facts: TuningFacts | None = None
    ) -> dict[str, Any] | None:
        """The `quantization_config`; None when the plan quantizes nothing."""
        form = self.for_plan(plan, layers)
        packing = form.packing
        if packing is None:
            raise InternalError(f"{self.name} did not decide on a packing")
        return auto_round_config(packing, plan, layers, blocks, facts, form.others)

    def _packing(self, layer: Layer) -> str:
        if self.packing is None:
            raise InternalError(f"{self.name} has several packings: ask for_plan first")
        return self.others.get(layer.name, self.packing)

    def _layout(self, layer: Layer) -> Layout:
        return layout_for(self._packing(layer))

    def _input_of(self, layer: Layer) -> InputFormat | None:
        return self.inputs.get(layer.name)

    def _refusal(self, layer: Layer, fmt: Format) -> Refusal | None:
        layout = self._layout(layer)
        if layout is GPTQ_V1 and not is_symmetric(fmt) and fmt.grid.bits in READ_AS_THEY_ARE:
            return Refusal(
                self.name,
                f"zero points are stored minus one, and vLLM reads those of {fmt.grid.bits} bits as they "
                "are: weights would be off by one step without an error",
                "use the format auto_round or auto_round:gptqmodel, or a symmetric scheme",
            )
        if isinstance(layout, ByNumbers):
            if not isinstance(fmt.grid, FloatGrid) and layer.name not in self.inputs:
                reason = "holds whole numbers where their inputs are rounded too"
                return Refusal(self.name, reason, "use the format auto_round")
            return refuse_floats(self.name, layer, fmt, layout)
        return refuse_unloadable(self.name, layer, fmt, layout)

    def _refuse_inputs(self, layer: Layer, fmt: Format, inputs: InputFormat | None) -> Refusal | None:
        """Why a packing does not say how a layer's input is rounded; None where it does."""
        rounds = isinstance(fmt.grid, FloatGrid) or INT_QUANTIZED.holds(fmt)
        rounds &= self._packing(layer) in ROUND_INPUTS
        if inputs is not None and self.holds_activation(inputs) and not rounds:
            reason = "its readers leave activations alone, but for floating numbers and 8 bits by 8 bits"
            return Refusal(self.name, reason, "use the format llm_compressor or fake")
        calibrated = isinstance(inputs, CalibratedScale)
        if self._packing(layer) == FP8_STATIC and not calibrated:
            reason = "holds layers whose inputs have one scale that calibration fixes"
            return Refusal(self.name, reason, f"use the scheme FP8_STATIC, or the format {FP8_OTHER}")
        if self._packing(layer) == FP8_OTHER and calibrated:
            return Refusal(self.name, "holds no scales of inputs", f"use the format {FP8_STATIC}")
        return None


def refuse_floats(who: str, layer: Layer, fmt: Format, layout: Layout) -> Refusal | None:
    """Why loaders of `auto_round` folders do not read a layer of such numbers; None where they do."""
    refusal = layout.accepts(fmt, layer.shape)
    return refusal and replace(refusal, who=who, remedy=refusal.remedy or "use another format")


def _fitting(plan: Plan, layers: Sequence[Layer]) -> tuple[str, dict[str, str]]:
    """`packing_format` for a plan, and layer -> that of layers with other numbers than those at the top."""
    quantized = quantized_layers(plan, layers)
    floats = [(layer, fmt) for layer, fmt in quantized if _as_compressed(plan, layer, fmt)]
    whole = [(layer, fmt) for layer, fmt in quantized if not _as_compressed(plan, layer, fmt)]
    if not floats:
        return _fitting_whole(whole, alone=True), {}
    if not whole:
        return _fitting_floats(plan, floats), {}
    top = top_scheme(plan, layers, scheme_fields).weight_format()
    of_whole, of_floats = _fitting_whole(whole, alone=False), _fitting_floats(plan, floats)
    if top is not None and any(fmt == top for _, fmt in floats):
        return of_floats, {layer.name: of_whole for layer, _ in whole}
    return of_whole, {layer.name: of_floats for layer, _ in floats}


def _as_compressed(plan: Plan, layer: Layer, fmt: Format) -> bool:
    """Whether a layer is stored as compressed-tensors has it: floats, and bytes that meet rounded inputs."""
    return isinstance(fmt.grid, FloatGrid) or (
        plan.activation_of(layer.name) is not None and INT_QUANTIZED.holds(fmt)
    )


def _fitting_whole(quantized: Sequence[tuple[Layer, Format]], *, alone: bool) -> str:
    """`packing_format` for whole numbers; that of AWQ only where nothing else lies beside them."""
    if all(is_symmetric(fmt) for _, fmt in quantized):
        return "auto_round:auto_gptq"
    uniform = all(not is_symmetric(fmt) and fmt.grid.bits == AWQ_BITS for _, fmt in quantized)
    if alone and uniform and all(AWQ_GEMM.accepts(fmt, layer.shape) is None for layer, fmt in quantized):
        return "auto_round:auto_awq"
    return "auto_round"


def _fitting_floats(plan: Plan, quantized: Sequence[tuple[Layer, Format]]) -> str:
    """`packing_format` for floating numbers: that of auto-round 0.16 for FP8 where it has one."""
    inputs = {plan.activation_of(layer.name) for layer, _ in quantized}
    if all(FP8.accepts(fmt, layer.shape) is None for layer, fmt in quantized):
        if all(isinstance(each, CalibratedScale) for each in inputs):
            return FP8_STATIC
        if all(fmt.group.size == 0 for _, fmt in quantized) and inputs == {None}:
            return FP8_OTHER
    return COMPRESSED
