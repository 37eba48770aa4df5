"""The table of output formats, and how a user names them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from auto_round.config.options import Options
from auto_round.errors import ConfigError, Refusal, UnsupportedError, nearest
from auto_round.export.exporter import Exporter
from auto_round.export.formats.auto_round import FP8_OTHER, FP8_STATIC, AutoRoundFormat
from auto_round.export.formats.awq import AWQFormat
from auto_round.export.formats.fake import FakeFormat
from auto_round.export.formats.gptq import GPTQFormat
from auto_round.export.formats.llm_compressor import LLMCompressorFormat
from auto_round.export.gguf.format import EVERY_TYPE
from auto_round.facts.layer import Layer, Role
from auto_round.facts.loading import Loading
from auto_round.facts.tensor import dtype_name
from auto_round.schemes.entry import PlanEntry
from auto_round.schemes.float_types import FLOAT_TYPES
from auto_round.schemes.make import KEPT_ROLES
from auto_round.schemes.plan import Plan
from auto_round.schemes.scheme import PRESET_SCHEMES, QuantizationScheme
from auto_round.schemes.vocabulary import SCALE_DTYPE_SPELLINGS

EXPORTERS: dict[str, Exporter] = {
    e.name: e
    for e in (
        AutoRoundFormat("auto_round"),
        AutoRoundFormat("auto_round:auto_gptq", packing="auto_round:auto_gptq"),
        AutoRoundFormat("auto_round:gptqmodel", packing="auto_round:gptqmodel"),
        AutoRoundFormat("auto_round:auto_awq", packing="auto_round:auto_awq"),
        AutoRoundFormat("auto_round:llm_compressor", packing="auto_round:llm_compressor"),
        AutoRoundFormat("auto_round:fp8_static", packing=FP8_STATIC),
        AutoRoundFormat("auto_round:fp8", packing=FP8_OTHER),
        GPTQFormat("auto_gptq", "gptq"),
        GPTQFormat("gptqmodel", "gptq_v2"),
        AWQFormat("auto_awq"),
        LLMCompressorFormat("llm_compressor"),
        FakeFormat("fake"),
        *EVERY_TYPE,
    )
}
"""Output formats by the name that a user gives."""

LATER = (
    "auto_round:mlx",
    "fp8",
    "mlx",
)
"""Names of formats that cannot be written yet."""

_SYNONYMS = {"auto_round:gptq": "auto_round:auto_gptq", "auto_round:awq": "auto_round:auto_awq"}


def full_name(name: str) -> str:
    """Name of a format in the table, for any name that a user may give it."""
    return _SYNONYMS.get(name, name)


def plans_alone(name: str) -> bool:
    """Whether a format or scheme of this name has a plan of its own, and is written by a run of its own."""
    return any(kind.claims(name) for kind in _kinds())


def takes_any_plan(name: str) -> bool:
    """Whether a format takes any plan, so that it may be written beside a format that plans for itself."""
    return name in EXPORTERS and EXPORTERS[name].any_plan


def settle_formats(options: Options) -> tuple[Options, tuple[Exporter, ...]]:
    """The options in line with the formats that they ask for, and these formats.

    Raises:
        ConfigError: unknown formats, or options that contradict them.
        UnsupportedError: a format that cannot be written yet.
    """
    beside = tuple(name for name in EXPORTERS if takes_any_plan(name))
    _refuse_two_plans(options.output.formats, beside)
    for kind in _kinds():
        options = kind.settle(options, beside)
    _refuse_two_plans(options.output.formats, beside)  # a scheme may have named one of them
    return options, tuple(parse_formats(",".join(options.output.formats)))


def _kinds() -> tuple[type[Exporter], ...]:
    """Kinds of formats: each settles the options and claims names for all of its rows."""
    return tuple(dict.fromkeys(type(e) for e in EXPORTERS.values()))


def _refuse_two_plans(formats: Sequence[str], beside: Sequence[str]) -> None:
    """Refuse formats of one run that need plans of their own."""
    alone = {name: kind for name in formats for kind in _kinds() if kind.claims(name)}
    others = [name for name in formats if name not in alone and name not in beside]
    if alone and (others or len(alone) > 1):
        noun = next(iter(alone.values())).noun
        raise ConfigError(
            f'format "{",".join(formats)}": {noun} has a plan of its own, so it is written alone (or '
            f"with {', '.join(beside)}); run once for each format"
        )


def parse_formats(text: str) -> list[Exporter]:
    """Exporters of a comma list such as `auto_round,fake`.

    Args:
        text: names, in any case, blanks ignored, `-` for `_` allowed; a name given twice counts once.

    Raises:
        ConfigError: no name, or one that is not known (names the nearest).
        UnsupportedError: a format that cannot be written yet.
    """
    names = [part.strip().casefold().replace("-", "_") for part in text.split(",")]
    names = [full_name(name) for name in names if name]
    common = ", ".join(name for name in EXPORTERS if not plans_alone(name))
    if not names:
        raise ConfigError(f'no format in "{text}"; known: {common}')
    later = [name for name in names if name in LATER]
    if later:
        raise UnsupportedError(
            f"format {', '.join(later)} is not there yet",
            [Refusal(name, "cannot be written yet", f"use one of {common}") for name in later],
        )
    for name in names:
        if name not in EXPORTERS:
            raise ConfigError(
                f'unknown format "{name}"; {nearest(name, EXPORTERS)} ("auto-round list format")'
            )
    return [EXPORTERS[name] for name in dict.fromkeys(names)]


def all_refusals(
    exporter: Exporter, plan: Plan, layers: Sequence[Layer], loading: Loading | None = None
) -> list[Refusal]:
    """Why a plan cannot be written in a format: activations that it cannot describe, and its own reasons.

    Args:
        exporter: the format.
        plan: what becomes of each layer.
        layers: the layers of the plan.
        loading: how Transformers loads the model; None where there is none to ask.
    """
    found = exporter.refusals(plan, layers)
    if loading is not None:
        found += exporter.unloadable(plan, layers, loading)
    lost = _lost_inputs(exporter, plan)
    if not lost:
        return found
    reason = f"its readers leave activations alone, this plan quantizes those of {lost} layers"
    return [Refusal(exporter.name, reason, "use another format, or act_bits 16"), *found]


def _lost_inputs(exporter: Exporter, plan: Plan) -> int:
    """How many layers have rounded inputs of which a format cannot say so."""
    wanted = (plan.activation_of(name) for name in plan.quantized)
    return sum(1 for fmt in wanted if fmt is not None and not exporter.holds_activation(fmt))


def scale_dtype(exporters: Iterable[Exporter], model: torch.dtype, data_type: str) -> str | None:
    """Dtype of scales when the user names none; None for the usual one.

    It is the model's where a format wants that. Steps of floating numbers are always in the dtype of the
    model: readers hold them in it, and those of FP8 are so small that float16 would lose bits.

    Args:
        exporters: the formats that are written.
        model: dtype of the model.
        data_type: number type of the weights.
    """
    own = dtype_name(model)
    if own not in SCALE_DTYPE_SPELLINGS:
        return None
    wanted = any(exporter.scales_in_model_dtype for exporter in exporters)
    floating = data_type in FLOAT_TYPES
    return own if floating or (wanted and model.itemsize == _HALF) else None


_HALF = 2
"""Bytes of 16 bits: float32 holds the usual float16 exactly."""


def describe_formats() -> dict[str, tuple[str, ...]]:
    """Format -> presets that can be written in it, for `auto_round list format`."""
    return {
        name: tuple(
            preset
            for preset, scheme in PRESET_SCHEMES.items()
            if (exporter.any_plan or not plans_alone(preset)) and _writes(exporter, scheme)
        )
        if exporter.presets is None
        else exporter.presets
        for name, exporter in EXPORTERS.items()
    }


def _writes(exporter: Exporter, scheme: QuantizationScheme) -> bool:
    """Whether a format holds a preset, asked with a matrix of each usual role that all group sizes divide."""
    layers = [
        Layer(f"model.layers.0.{role.name}", "", "", (1024, 1024), torch.bfloat16, 0, role)
        for role in Role
        if role not in KEPT_ROLES
    ]
    own = scale_dtype([exporter], torch.bfloat16, scheme.data_type)
    scheme = replace(scheme, scale_dtype=own or scheme.scale_dtype)
    schemes = {layer.name: scheme.for_role(layer.role) for layer in layers}
    plan = Plan(scheme, {name: PlanEntry(s if s.quantized else None, "") for name, s in schemes.items()})
    try:
        for scheme in schemes.values():
            scheme.weight_format()
        return not _lost_inputs(exporter, plan) and not exporter.refusals(plan, layers)
    except UnsupportedError:
        return False
