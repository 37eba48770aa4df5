"""The bundle of all option groups, and how flat names become one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from auto_round.config.auto_scheme import AutoSchemeOptions
from auto_round.config.cache import CacheOptions
from auto_round.config.diffusion import DiffusionOptions
from auto_round.config.env import Environment
from auto_round.config.evaluation import EvaluationOptions, FidelityOptions
from auto_round.config.groups import (
    CalibrationOptions,
    ModelOptions,
    OutputOptions,
    SchemeOptions,
)
from auto_round.config.memory import MemoryOptions
from auto_round.config.option import Setting, settings
from auto_round.config.recipes import RECIPES
from auto_round.config.tuning import TuneOptions
from auto_round.errors import ArgumentError, ConfigError, nearest

GROUPS: Final[Mapping[str, type]] = MappingProxyType(
    {
        "model": ModelOptions,
        "scheme": SchemeOptions,
        "auto": AutoSchemeOptions,
        "cache": CacheOptions,
        "calibration": CalibrationOptions,
        "diffusion": DiffusionOptions,
        "tune": TuneOptions,
        "memory": MemoryOptions,
        "output": OutputOptions,
    }
)

EVALUATION_GROUPS: Final[Mapping[str, type]] = MappingProxyType(
    {"evaluation": EvaluationOptions, "fidelity": FidelityOptions}
)
"""Options of `auto-round eval`, beside those of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Everything a quantization run is told, as plain data; live objects travel beside it.

    Attributes:
        given: names of the options that the user set, to whatever value.
        chosen: what AutoScheme chose, as JSON values, to be written beside the output; None where it was not
            asked.
        chosen_layers: layers whose scheme it chose.
        typed: option -> what the user wrote for it, where paths in it were made absolute since.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    scheme: SchemeOptions = field(default_factory=SchemeOptions)
    auto: AutoSchemeOptions = field(default_factory=AutoSchemeOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    diffusion: DiffusionOptions = field(default_factory=DiffusionOptions)
    tune: TuneOptions = field(default_factory=TuneOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    given: frozenset[str] = field(default=frozenset(), compare=False)
    chosen: Mapping[str, Any] | None = field(default=None, compare=False)
    chosen_layers: frozenset[str] = field(default=frozenset(), compare=False)
    typed: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def said_dataset(self) -> str:
        """The calibration data as the user named it."""
        return self.typed.get("dataset", self.calibration.dataset)


def all_settings() -> tuple[Setting, ...]:
    """List every option of every group."""
    return tuple(setting for group in GROUPS.values() for setting in settings(group))


def argument_names() -> dict[str, tuple[Setting, bool]]:
    """Map every accepted Python argument to its option, and whether it says the opposite (`disable_amp`)."""
    found: dict[str, tuple[Setting, bool]] = {}
    for setting in all_settings():
        found |= dict.fromkeys((setting.name, *setting.spec.aliases), (setting, False))
        found |= dict.fromkeys(setting.spec.off, (setting, True))
    return found


def build_options(
    given: Mapping[str, Any], recipe: str = "default", environment: Environment | None = None
) -> Options:
    """Build the bundle from flat names.

    Args:
        given: option, alias or opposite (`disable_amp`) to value; what is absent, or None for an option that
            cannot be None, takes the recipe's value, else the default.
        recipe: a name of `RECIPES`.
        environment: environment variables, weaker than everything else; None for none.

    Raises:
        ConfigError: unknown recipe or option (with the nearest names), an option given twice under two names,
            or a value that the option cannot take.
    """
    if recipe not in RECIPES:
        raise ConfigError(f'unknown recipe "{recipe}": {nearest(str(recipe), RECIPES)}')
    hub = {"platform": "model_scope"} if environment is not None and environment.use_modelscope else {}
    said = _settled_names(given)
    flat = {**hub, **RECIPES[recipe], **said}
    parts: dict[str, Any] = {}
    for key, group in GROUPS.items():
        own = [setting.name for setting in settings(group)]
        parts[key] = group(**{name: flat[name] for name in own if name in flat})
    return Options(**parts, given=frozenset(said))


def _settled_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """Resolve aliases and opposites."""
    known = argument_names()
    flat: dict[str, Any] = {}
    said: dict[str, str] = {}
    for name, value in given.items():
        if name not in known:
            raise ArgumentError(f'unknown option "{name}": {nearest(name, known)}')
        setting, opposite = known[name]
        if value is None and (opposite or not setting.nullable):
            continue
        if setting.name in said:
            raise ArgumentError(f'"{name}" and "{said[setting.name]}" set the same option: give one of them')
        said[setting.name] = name
        flat[setting.name] = not setting.admit(value) if opposite else value
    return flat


def options_markdown(groups: Mapping[str, type] = GROUPS) -> str:
    """Return the tables of options for the manual: Python argument, flags, default, meaning."""
    lines: list[str] = []
    for key, group in groups.items():
        title = (group.__doc__ or "").strip().splitlines()[0]
        lines += [f"### {key}: {title}", "", "| argument | flags | default | meaning |", "|---|---|---|---|"]
        for setting in settings(group):
            flags = (
                [f"`--{flag}`" for flag in (*setting.flags, *setting.spec.off)] if setting.spec.cli else []
            )
            meaning = setting.spec.help.replace("|", "\\|")
            if setting.spec.choices:
                meaning += " (" + ", ".join(setting.spec.choices) + ")"
            lines.append(f"| `{setting.name}` | {' '.join(flags)} | `{setting.default!r}` | {meaning} |")
        lines.append("")
    return "\n".join(lines)
