"""Options, recipes and environment variables: what a user can say, in one place. No torch here."""

from __future__ import annotations

from auto_round.config.env import (
    VARIABLES,
    Environment,
    environment_markdown,
    read_environment,
    unknown_variables,
)
from auto_round.config.groups import (
    CalibrationOptions,
    MemoryOptions,
    ModelOptions,
    OutputOptions,
    SchemeOptions,
    TuneOptions,
    long_dtype,
)
from auto_round.config.option import Setting, Spec, settings
from auto_round.config.options import (
    GROUPS,
    Options,
    all_settings,
    argument_names,
    build_options,
    options_markdown,
)
from auto_round.config.recipes import RECIPES

__all__ = [
    "GROUPS",
    "RECIPES",
    "VARIABLES",
    "CalibrationOptions",
    "Environment",
    "MemoryOptions",
    "ModelOptions",
    "Options",
    "OutputOptions",
    "SchemeOptions",
    "Setting",
    "Spec",
    "TuneOptions",
    "all_settings",
    "argument_names",
    "build_options",
    "environment_markdown",
    "long_dtype",
    "options_markdown",
    "read_environment",
    "settings",
    "unknown_variables",
]
