"""The table of output formats, and how a user names them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from auto_round.errors import ConfigError, Refusal, UnsupportedError, nearest
from auto_round.export.exporter import Exporter, Warns
from auto_round.export.formats.auto_round import AutoRoundFormat
from auto_round.export.formats.awq import AWQFormat
from auto_round.export.formats.fake import FakeFormat
from auto_round.export.formats.gptq import GPTQFormat
from auto_round.export.formats.llm_compressor import LLMCompressorFormat
from auto_round.facts.layer import Layer, Role
from auto_round.schemes.entry import PlanEntry
from auto_round.schemes.gguf_types import FILE_TYPES, FORMAT_PREFIX, SCHEME_PREFIX, TYPES
from auto_round.schemes.make import KEPT_ROLES
from auto_round.schemes.plan import Plan
from auto_round.schemes.scheme import PRESET_SCHEMES, QuantizationScheme
from auto_round.schemes.vocabulary import SCALE_DTYPES

EXPORTERS: dict[str, Exporter] = {
    e.name: e
    for e in (
        AutoRoundFormat("auto_round"),
        AutoRoundFormat("auto_round:auto_gptq", packing="auto_round:auto_gptq"),
        AutoRoundFormat("auto_round:gptqmodel", packing="auto_round:gptqmodel"),
        AutoRoundFormat("auto_round:auto_awq", packing="auto_round:auto_awq"),
        GPTQFormat("auto_gptq", "gptq"),
        GPTQFormat("gptqmodel", "gptq_v2"),
        AWQFormat("auto_awq"),
        LLMCompressorFormat("llm_compressor"),
        FakeFormat("fake"),
    )
}
"""Output formats by the name that a user gives."""

LATER = (
    "auto_round:llm_compressor",
    "auto_round:fp8",
    "auto_round:fp8_static",
    "auto_round:mlx",
    "fp8",
    "mlx",
)
"""Names of formats that cannot be written yet."""

GGUF: dict[str, str] = {
    f"{FORMAT_PREFIX}{kind.name}": "BF16" if TYPES[kind.base].preset is None else kind.preset
    for kind in FILE_TYPES.values()
}
"""Formats of one GGUF file -> the scheme that each has; `pipeline.gguf` makes their exporters."""

BESIDE_GGUF = ("fake",)
"""Formats that may be written in the run of a GGUF file, and with its schemes: they take any plan."""

ACTIVATIONS = ("llm_compressor", "fake")
"""Formats for plans that quantize activations: one says how, the other keeps nothing but weights anyway."""

SCALES_IN_MODEL_DTYPE = ("llm_compressor",)
"""Formats whose loaders hold scales in the dtype of the model."""

_SYNONYMS = {"auto_round:gptq": "auto_round:auto_gptq", "auto_round:awq": "auto_round:auto_awq"}


def parse_formats(text: str) -> list[Exporter]:
    """Exporters of a comma list such as `auto_round,fake`.

    Args:
        text: names, in any case, blanks ignored, `-` for `_` allowed; a name given twice counts once.

    Raises:
        ConfigError: no name, or one that is not known (names the nearest).
        UnsupportedError: a format that cannot be written yet.
    """
    names = [part.strip().casefold().replace("-", "_") for part in text.split(",")]
    names = [_SYNONYMS.get(name, name) for name in names if name]
    if not names:
        raise ConfigError(f'no format in "{text}"; known: {", ".join(EXPORTERS)}')
    later = [name for name in names if name in LATER]
    if later:
        raise UnsupportedError(
            f"format {', '.join(later)} is not there yet",
            [Refusal(name, "cannot be written yet", f"use one of {', '.join(EXPORTERS)}") for name in later],
        )
    for name in names:
        if name not in EXPORTERS:
            raise ConfigError(f'unknown format "{name}"; {nearest(name, (*EXPORTERS, *GGUF, *LATER))}')
    return [EXPORTERS[name] for name in dict.fromkeys(names)]


def refusals(exporter: Exporter, plan: Plan, layers: Sequence[Layer]) -> list[Refusal]:
    """Why a plan cannot be written in a format: activations that it cannot describe, and its own reasons."""
    found = exporter.refusals(plan, layers)
    if exporter.name in ACTIVATIONS:
        return found
    quantized = [
        n for n, entry in plan.entries.items() if entry.scheme is not None and entry.scheme.act_quantized
    ]
    if not quantized:
        return found
    reason = f"its readers leave activations alone, this plan quantizes those of {len(quantized)} layers"
    return [Refusal(exporter.name, reason, f"use the format {' or '.join(ACTIVATIONS)}"), *found]


def notes(exporter: Exporter, plan: Plan, layers: Sequence[Layer]) -> list[str]:
    """What some readers of a format cannot do with a plan that can be written in it, for people."""
    found = exporter.warnings(plan, layers) if isinstance(exporter, Warns) else []
    if isinstance(exporter, FakeFormat) and any(plan.activation_of(name) for name in plan.quantized):
        found = [f"{exporter.name}: the folder holds rounded weights, and leaves activations alone", *found]
    return found


def scale_dtype(exporters: Iterable[Exporter], model: torch.dtype) -> str | None:
    """Dtype of scales when the user names none: the model's where a format wants that; None for the usual."""
    own = str(model).removeprefix("torch.")
    wanted = any(exporter.name in SCALES_IN_MODEL_DTYPE for exporter in exporters)
    return own if wanted and own in SCALE_DTYPES and model.itemsize == _HALF else None


_HALF = 2
"""Bytes of 16 bits: float32 holds the usual float16 exactly."""


def describe_formats() -> dict[str, tuple[str, ...]]:
    """Format -> presets that can be written in it, for `auto_round list format`."""
    written = {
        name: tuple(
            preset
            for preset, scheme in PRESET_SCHEMES.items()
            if (name in BESIDE_GGUF or not preset.startswith(SCHEME_PREFIX)) and _writes(exporter, scheme)
        )
        for name, exporter in EXPORTERS.items()
    }
    return written | {name: (preset,) for name, preset in GGUF.items()}


def _writes(exporter: Exporter, scheme: QuantizationScheme) -> bool:
    """Whether a format holds a preset, asked with a matrix of each usual role that all group sizes divide."""
    layers = [
        Layer(f"model.layers.0.{role.name}", "", "", (1024, 1024), torch.bfloat16, 0, role)
        for role in Role
        if role.value not in KEPT_ROLES
    ]
    scheme = replace(scheme, scale_dtype=scale_dtype([exporter], torch.bfloat16) or scheme.scale_dtype)
    schemes = {layer.name: scheme.for_role(layer.role.value) for layer in layers}
    plan = Plan(scheme, {name: PlanEntry(s if s.quantized else None, "") for name, s in schemes.items()})
    try:
        computed = [scheme.weight_format() for scheme in schemes.values()]
    except UnsupportedError:
        return False
    return bool(computed) and not refusals(exporter, plan, layers)
