"""The table of output formats, and how a user names them."""

from __future__ import annotations

import torch

from auto_round.errors import ConfigError, Refusal, UnsupportedError, nearest
from auto_round.export.exporter import Exporter
from auto_round.export.formats.auto_round import AutoRoundFormat
from auto_round.export.formats.fake import FakeFormat
from auto_round.models.layer import Layer, Role
from auto_round.schemes.entry import PlanEntry
from auto_round.schemes.plan import Plan
from auto_round.schemes.scheme import PRESET_SCHEMES, QuantizationScheme

EXPORTERS: dict[str, Exporter] = {
    e.name: e
    for e in (
        AutoRoundFormat("auto_round"),
        AutoRoundFormat("auto_round:auto_gptq", packing="auto_round:auto_gptq"),
        AutoRoundFormat("auto_round:gptqmodel", packing="auto_round:gptqmodel"),
        AutoRoundFormat("auto_round:auto_awq", packing="auto_round:auto_awq"),
        FakeFormat("fake"),
    )
}
"""Output formats by the name that a user gives."""

LATER = (
    "auto_gptq",
    "gptqmodel",
    "auto_awq",
    "llm_compressor",
    "auto_round:llm_compressor",
    "auto_round:fp8",
    "auto_round:fp8_static",
    "auto_round:mlx",
    "fp8",
    "mlx",
    "gguf",
)
"""Names of formats that cannot be written yet; so are all that begin with `gguf:`."""

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
    later = [name for name in names if name in LATER or name.startswith("gguf:")]
    if later:
        raise UnsupportedError(
            f"format {', '.join(later)} is not there yet",
            [Refusal(name, "cannot be written yet", f"use one of {', '.join(EXPORTERS)}") for name in later],
        )
    for name in names:
        if name not in EXPORTERS:
            raise ConfigError(f'unknown format "{name}"; {nearest(name, (*EXPORTERS, *LATER))}')
    return [EXPORTERS[name] for name in dict.fromkeys(names)]


def describe_formats() -> dict[str, tuple[str, ...]]:
    """Format -> presets that can be written in it, for `auto_round list format`."""
    return {
        name: tuple(preset for preset, scheme in PRESET_SCHEMES.items() if _writes(exporter, scheme))
        for name, exporter in EXPORTERS.items()
    }


def _writes(exporter: Exporter, scheme: QuantizationScheme) -> bool:
    """Whether a format holds a preset, asked with one matrix of each role that every group size divides."""
    layers = [
        Layer(f"model.layers.0.{role.name}", "", "", (1024, 1024), torch.bfloat16, 0, role) for role in Role
    ]
    schemes = {layer.name: scheme.for_role(layer.role.value) for layer in layers}
    plan = Plan(scheme, {name: PlanEntry(s if s.quantized else None, "") for name, s in schemes.items()})
    try:
        computed = [scheme.weight_format() for scheme in schemes.values()]
    except UnsupportedError:
        return False
    return bool(computed) and not exporter.refusals(plan, layers)
