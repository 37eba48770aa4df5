"""The `llm_compressor` format: compressed-tensors folders, loaded by Transformers, vLLM and SGLang."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from auto_round.errors import InternalError, Refusal
from auto_round.export.compressed_cache import scale_name, scale_specs
from auto_round.export.compressed_config import (
    compressed_config,
    compressed_layout,
    group_of,
    loader_notes,
    refuse_numbers,
)
from auto_round.export.compressed_loading import unloadable, unread_experts
from auto_round.export.exporter import Exporter, TuningFacts
from auto_round.export.manifest import Manifest
from auto_round.export.packed import (
    LayerByLayer,
    gather_refusals,
    planned_inputs,
    prefixed,
    refuse_transposed,
    refuse_whole,
)
from auto_round.facts.attention import Attention
from auto_round.facts.layer import Block, Layer
from auto_round.facts.loading import Loading
from auto_round.facts.tensor import TensorSpec, dtype_name
from auto_round.layouts.compressed_table import COMPRESSED
from auto_round.layouts.layout import Layout
from auto_round.numerics.activation_float import InputFormat
from auto_round.numerics.format import Format
from auto_round.numerics.qtensor import QuantizedLayer
from auto_round.schemes.attention import AttentionPlan
from auto_round.schemes.plan import Plan

_SCALE = "weight_scale"
_ASKED = "other code asks for its weight, which compressed-tensors lacks (use the format auto_round)"


@dataclass(frozen=True, slots=True)
class LLMCompressorFormat(LayerByLayer):
    """Layers as compressed-tensors stores them, each in the order of bytes that its number type has there.

    Attributes:
        name: name on the command line.
        orders: layer -> name of its order of bytes; None until a plan has decided.
        inputs: layer -> what its input is rounded to, where it is.
        caches: which scales of attention it will be given.
        unread: why Transformers does not read its experts, for people; empty where it does.
    """

    name: str = "llm_compressor"
    orders: Mapping[str, str] | None = field(default=None, hash=False)
    inputs: Mapping[str, InputFormat] = field(default_factory=dict, hash=False)
    caches: AttentionPlan | None = None
    unread: str = ""

    holds_scales: ClassVar[bool] = True
    scales_in_model_dtype: ClassVar[bool] = True

    def for_plan(self, plan: Plan, layers: Sequence[Layer]) -> LLMCompressorFormat:
        """This format with the order of bytes of each layer decided."""
        schemes = {layer.name: s for layer in layers if (s := plan.scheme_of(layer.name)) is not None}
        orders = {name: compressed_layout(scheme).name for name, scheme in schemes.items()}
        unread = unread_experts(plan, layers)
        return replace(self, orders=orders, inputs=planned_inputs(plan, layers), unread=unread)

    def refusals(self, plan: Plan, layers: Sequence[Layer]) -> list[Refusal]:
        """One refusal for each reason, with the layers that it holds for."""

        def unspeakable(layer: Layer, fmt: Format) -> Refusal | None:
            scheme = plan.scheme_of(layer.name)
            return None if scheme is None else refuse_numbers(self.name, scheme)

        if found := gather_refusals(plan, layers, unspeakable):
            return found
        exact = self.for_plan(plan, layers)
        schemes = {s for layer in layers if (s := plan.scheme_of(layer.name)) is not None}
        mixed = len({group_of(scheme) for scheme in schemes}) > 1

        def refuse(layer: Layer, fmt: Format) -> Refusal | None:
            scheme = plan.scheme_of(layer.name)
            if scheme is not None and scheme.act_quantized and _has_zeros(fmt):
                return Refusal(
                    self.name,
                    "Transformers dequantizes weights with zero points and then rounds no activations",
                    "use symmetric weights",
                )
            return exact._refusal(layer, fmt, mixed=mixed)

        return gather_refusals(plan, layers, refuse)

    def unloadable(self, plan: Plan, layers: Sequence[Layer], loading: Loading) -> list[Refusal]:
        """What Transformers cannot load of the folder, where anything is packed."""
        found = LayerByLayer.unloadable(self, plan, layers, loading)
        return [*found, *unloadable(self.name, plan, layers, loading)] if plan.quantized else found

    def holds_activation(self, fmt: InputFormat) -> bool:
        """All that can be planned: a group of the configuration says how its inputs are rounded."""
        return True

    def kept(self, layer: Layer) -> str:
        """Layers whose `weight` other code asks for: compressed-tensors makes it in their first call."""
        return _ASKED if layer.asked else Exporter.kept(self, layer)

    def warnings(self, plan: Plan, layers: Sequence[Layer]) -> list[str]:
        """What some loaders of such a folder cannot do with the plan."""
        unread = unread_experts(plan, layers)
        return [*([f"{self.name}: {unread}"] if unread else []), *loader_notes(plan, layers)]

    @property
    def unchecked(self) -> str:
        """See `Exporter.unchecked`."""
        return self.unread

    def spec(self, layer: Layer, fmt: Format) -> Mapping[str, TensorSpec]:
        """`<layer>.weight_packed` or `<layer>.weight`, `<layer>.weight_scale` and what belongs to them.

        Scales are stored in the layer's dtype, which holds them exactly. compressed-tensors multiplies in the
        dtype of the scale, so float16 scales would round the weights of a float32 model twice.
        """
        found = self._stored(layer, fmt).spec()
        if _has_steps(fmt):
            found[_SCALE] = replace(found[_SCALE], dtype=layer.dtype)
        return prefixed(layer, found)

    def encode(self, layer: Layer, q: QuantizedLayer) -> Mapping[str, Tensor]:
        """The tensors of `spec`."""
        found = self._stored(layer, q.weight.format).pack(q)
        if _has_steps(q.weight.format):
            found[_SCALE] = found[_SCALE].to(layer.dtype)
        return prefixed(layer, found)

    def config(
        self, plan: Plan, layers: Sequence[Layer], blocks: Sequence[Block], facts: TuningFacts | None = None
    ) -> dict[str, Any] | None:
        """The `quantization_config`; None when the plan quantizes nothing."""
        return compressed_config(plan, layers, self.caches)

    def manifest(self, plan: Plan, layers: Sequence[Layer], tensors: Mapping[str, TensorSpec]) -> Manifest:
        """The tensors of layers and of the source, and scales of attention behind them."""
        found = Exporter.manifest(self, plan, layers, tensors)
        return (
            found
            if self.caches is None
            else replace(found, specs={**found.specs, **scale_specs(self.caches)})
        )

    def with_scales(self, caches: AttentionPlan) -> LLMCompressorFormat:
        """This format with a place for scales of attention."""
        return replace(self, caches=caches)

    def encode_scales(self, attention: Attention, scales: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """`<attention>.k_scale` and so on, see `scale_specs`."""
        if self.caches is None:
            raise InternalError(f"{self.name} was not told of scales of attention")
        specs = scale_specs(replace(self.caches, modules=(attention,)))
        named = {scale_name(attention, part): step for part, step in scales.items()}
        return {name: named[name].to(spec.dtype).reshape(tuple(spec.shape)) for name, spec in specs.items()}

    def _input_of(self, layer: Layer) -> InputFormat | None:
        return self.inputs.get(layer.name)

    def _layout(self, layer: Layer) -> Layout:
        if self.orders is None:
            raise InternalError(f"{self.name} has several orders of bytes: ask for_plan first")
        return COMPRESSED[self.orders[layer.name]]

    def _refusal(self, layer: Layer, fmt: Format, *, mixed: bool) -> Refusal | None:
        refusal = self._layout(layer).accepts(fmt, layer.shape)
        if refusal is not None:
            return replace(refusal, who=self.name)
        if refusal := refuse_whole(self.name, layer) or refuse_transposed(self.name, layer):
            return refusal
        if _has_zeros(fmt) and (mixed or layer.expert is not None):
            # Transformers 5.23 reads zero points of one scheme only and none of experts
            # (`integrations/compressed_tensors.py`); vLLM's kernels for experts want none either.
            where = "beside other schemes" if mixed else "of routed experts"
            remedy = "use symmetric weights" + (", or one scheme" if mixed else "")
            return Refusal(self.name, f"Transformers loads no zero points {where}", remedy)
        return _refuse_dtype(self.name, layer, fmt)


def _refuse_dtype(who: str, layer: Layer, fmt: Format) -> Refusal | None:
    """Why loaders would use other scales than were tuned, or compute in another dtype than the model's."""
    own = dtype_name(layer.dtype)
    if not _has_steps(fmt):
        if layer.dtype is torch.bfloat16:
            return None
        return Refusal(
            who,
            f"compressed-tensors unpacks {fmt.name} to bfloat16, and the rest of the model is {own}",
            "store the model in bfloat16 first, or use the format fake",
        )
    stored = fmt.rule.stored["step"].dtype
    if torch.promote_types(stored, layer.dtype) is layer.dtype:
        return None
    narrow = dtype_name(stored)
    return Refusal(
        who,
        f"loaders hold scales in the model's dtype, which would round {narrow} again",
        f"use --scale_dtype {own}",
    )


def _has_steps(fmt: Format) -> bool:
    """Whether scales are stored as floats of 16 or 32 bits, not as codes of one byte."""
    return "step" in fmt.rule.stored


def _has_zeros(fmt: Format) -> bool:
    """Whether zero points are stored."""
    return "zero" in fmt.rule.stored
