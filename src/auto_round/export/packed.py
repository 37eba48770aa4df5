"""What the formats of packed whole numbers share: layers that they write, refusals, the scheme at the top."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from auto_round.errors import Refusal
from auto_round.export.exporter import Exporter
from auto_round.facts.layer import Layer, Role
from auto_round.facts.loading import Loading
from auto_round.facts.tensor import TensorSpec, dtype_name
from auto_round.layouts.integers import step_dtype
from auto_round.layouts.layer import LayerLayout
from auto_round.layouts.layout import Layout
from auto_round.numerics.activation_float import InputFormat
from auto_round.numerics.format import Format
from auto_round.numerics.grid_float import FloatGrid
from auto_round.numerics.qtensor import QuantizedLayer
from auto_round.schemes.condense import some
from auto_round.schemes.plan import Plan
from auto_round.schemes.scheme import QuantizationScheme

T = TypeVar("T")

Fields = Mapping[str, Any]
"""What a configuration says of one layer."""

LOADABLE_BITS = (2, 3, 4, 8)
"""Widths of codes that loaders of packed whole numbers read."""


@dataclass(frozen=True, slots=True)
class LayerByLayer(Exporter):
    """A format that stores each layer as a layout says, with the number of its input where that has one."""

    @abstractmethod
    def _layout(self, layer: Layer) -> Layout: ...

    def _input_of(self, layer: Layer) -> InputFormat | None:
        """What the input of a layer is rounded to; None where the folder says nothing of it."""
        return None

    def _stored(self, layer: Layer, fmt: Format) -> LayerLayout:
        return LayerLayout(self._layout(layer), fmt, layer.shape, self._input_of(layer))

    def spec(self, layer: Layer, fmt: Format) -> Mapping[str, TensorSpec]:
        """The tensors of the layout, for example `<layer>.qweight`."""
        return prefixed(layer, self._stored(layer, fmt).spec())

    def unloadable(self, plan: Plan, layers: Sequence[Layer], loading: Loading) -> list[Refusal]:
        """Layers whose packed tensors Transformers would not find under their names on disk."""
        renamed = [e for e in quantized_layers(plan, layers) if e[0].tensor in loading.weights_only]
        if not renamed or self.refusals(plan, layers):
            return []
        exact = self.for_plan(plan, layers)
        lost = [layer.name for layer, fmt in renamed if not _as_weight(layer, exact.spec(layer, fmt))]
        if not lost:
            return []
        reason = f"Transformers finds only tensors called `weight` under this name on disk: {some(lost)}"
        return [Refusal(self.name, reason, "keep these layers at 16 bits, or use the format fake")]

    def encode(self, layer: Layer, q: QuantizedLayer) -> Mapping[str, Tensor]:
        """The tensors of `spec`."""
        return prefixed(layer, self._stored(layer, q.weight.format).pack(q))


def _as_weight(layer: Layer, spec: Mapping[str, TensorSpec]) -> bool:
    """Whether a layer is stored under its own name, with numbers whose names begin so."""
    return layer.tensor in spec and all(name.startswith(layer.tensor) for name in spec)


def planned_inputs(plan: Plan, layers: Sequence[Layer]) -> dict[str, InputFormat]:
    """Layer -> what its input is rounded to, where it is."""
    return {layer.name: fmt for layer in layers if (fmt := plan.inputs_of(layer)) is not None}


def quantized_layers(plan: Plan, layers: Sequence[Layer]) -> list[tuple[Layer, Format]]:
    """Layers that the plan quantizes, with their formats."""
    return [(layer, fmt) for layer in layers if (fmt := plan.format_of(layer.name)) is not None]


def prefixed(layer: Layer, parts: Mapping[str, T]) -> dict[str, T]:
    """Full tensor name -> part, for parts by suffix."""
    return {f"{layer.name}.{suffix}": part for suffix, part in parts.items()}


def gather_refusals(
    plan: Plan, layers: Sequence[Layer], refuse: Callable[[Layer, Format], Refusal | None]
) -> list[Refusal]:
    """One refusal for each reason, with the layers that it holds for."""
    found: dict[Refusal, list[str]] = {}
    for layer, fmt in quantized_layers(plan, layers):
        refusal = refuse(layer, fmt)
        if refusal is not None:
            found.setdefault(refusal, []).append(layer.name)
    return [replace(r, reason=f"{r.reason}: {some(names)}") for r, names in found.items()]


def refuse_unloadable(who: str, layer: Layer, fmt: Format, layout: Layout) -> Refusal | None:
    """Why no loader of packed whole numbers reads a layer, or its layout cannot hold it; None if all is well.

    Args:
        who: name of the output format.
        layer: the layer.
        fmt: its format.
        layout: order of bytes that it would get.
    """
    if isinstance(fmt.grid, FloatGrid):
        return Refusal(
            who, f"holds whole numbers, not {fmt.name}", "keep these layers, or use another format"
        )
    bits, n_in = fmt.grid.bits, layer.shape[1]
    if bits not in LOADABLE_BITS:
        return Refusal(
            who,
            f"no loader of packed whole numbers reads {bits} bits",
            "use 2, 3, 4 or 8 bits, or the format fake",
        )
    if fmt.group.size == 0:
        return Refusal(
            who,
            "Transformers does not load group_size 0 (one scale for a whole tensor)",
            "use group_size -1 (one scale a row)",
        )
    if n_in % fmt.group.width(n_in):
        return Refusal(
            who,
            f"group_size {fmt.group.size} does not divide {n_in} inputs, which loaders require",
            "choose another group_size, -1 for one scale a row, or keep these layers",
        )
    refusal = layout.accepts(fmt, layer.shape)
    if refusal is None:
        return None
    return replace(refusal, who=who, remedy=refusal.remedy or "keep these layers, or use another format")


def refuse_foreign(who: str, layer: Layer, fmt: Format, layout: Layout) -> Refusal | None:
    """Why readers of GPTQ and AWQ folders would not load a layer as it is meant; None when they would.

    Arguments as in `refuse_unloadable`.
    """
    return (
        refuse_whole(who, layer)
        or refuse_unloadable(who, layer, fmt, layout)
        or _refuse_scale_dtype(who, fmt)
        or _refuse_outside(who, layer)
    )


def _refuse_scale_dtype(who: str, fmt: Format) -> Refusal | None:
    """Why readers of GPTQ and AWQ folders would round a layer's steps again; None when they would not.

    They copy the steps into tensors of the model's dtype, which is float16 in these folders.
    """
    if step_dtype(fmt) is torch.float16:
        return None
    return Refusal(
        who,
        f"scales are float16, not {dtype_name(step_dtype(fmt))}",
        "use scale_dtype float16",
    )


def _refuse_outside(who: str, layer: Layer) -> Refusal | None:
    """Why readers of GPTQ and AWQ folders would not find a layer; None when they would."""
    if layer.block is not None or layer.role is Role.HEAD:
        return None
    return Refusal(
        who,
        "GPTQModel and Transformers look for quantized layers in the blocks only",
        "keep layers outside of them, or use the format auto_round",
    )


def refuse_whole(who: str, layer: Layer) -> Refusal | None:
    """Why no engine would find packed experts of one tensor; None where some read them one by one."""
    if not layer.whole:
        return None
    return Refusal(
        who,
        "engines read these experts as one tensor, and none in this format",
        "use the format auto_round, fake or a GGUF one, or keep them (--ignore_layers experts)",
    )


def refuse_transposed(who: str, layer: Layer) -> Refusal | None:
    """Why readers that know `nn.Linear` only would not find a layer; None when they would."""
    if not layer.transposed or layer.fused:
        return None
    return Refusal(
        who,
        "its readers replace linear layers only, and this one is a Conv1D",
        "use the format auto_round or auto_gptq",
    )


def top_scheme(
    plan: Plan, layers: Sequence[Layer], fields: Callable[[QuantizationScheme], Fields]
) -> QuantizationScheme:
    """Scheme for the fields at the top of a configuration; something must be quantized.

    The plan's own scheme where some layer in a block has it, else the most common one.

    Args:
        plan: what becomes of each layer.
        layers: the layers of the plan.
        fields: what the configuration would say of a scheme.
    """
    used = Counter(s for layer in layers if layer.block is not None and (s := plan.scheme_of(layer.name)))
    used = used or Counter(s for layer in layers if (s := plan.scheme_of(layer.name)))
    return next((s for s in used if fields(s) == fields(plan.scheme)), used.most_common(1)[0][0])
