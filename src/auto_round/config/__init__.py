"""Options, recipes and environment variables: what a user can say, in one place. No torch here."""

from __future__ import annotations

from auto_round.config.auto_scheme import AutoSchemeOptions
from auto_round.config.diffusion import DiffusionOptions
from auto_round.config.env import (
    VARIABLES,
    Environment,
    cache_folder,
    environment_markdown,
    read_environment,
    show_accelerators,
    unknown_variables,
)
from auto_round.config.evaluation import EvaluationOptions, FidelityOptions
from auto_round.config.groups import (
    CalibrationOptions,
    ModelOptions,
    OutputOptions,
    SchemeOptions,
    long_dtype,
)
from auto_round.config.memory import MemoryOptions
from auto_round.config.option import Setting, Spec, settings
from auto_round.config.options import (
    EVALUATION_GROUPS,
    GROUPS,
    Options,
    all_settings,
    argument_names,
    build_options,
    options_markdown,
)
from auto_round.config.recipes import RECIPES
from auto_round.config.tuning import TuneOptions

__all__ = [
    "EVALUATION_GROUPS",
    "GROUPS",
    "RECIPES",
    "VARIABLES",
    "AutoSchemeOptions",
    "CalibrationOptions",
    "DiffusionOptions",
    "Environment",
    "EvaluationOptions",
    "FidelityOptions",
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
    "cache_folder",
    "environment_markdown",
    "long_dtype",
    "options_markdown",
    "read_environment",
    "settings",
    "show_accelerators",
    "unknown_variables",
]
