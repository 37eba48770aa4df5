"""The shell command that repeats a run, made from its options, so that runs from Python have one too."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from auto_round.config import Setting, all_settings, settings
from auto_round.config.auto_scheme import AutoSchemeOptions
from auto_round.config.options import GROUPS, Options
from auto_round.config.values import FROM_PYTHON
from auto_round.report.record import CHOSEN_PLAN

_LEFT_OUT = ("output_dir", "overwrite", "resume", "dry_run", "report")
"""Options of where a run is put and how it is handled: a repeated one goes to a folder of its own."""


def command_of(options: Options) -> tuple[str, list[str]]:
    """Command with every option that is not at its default, and what no command can say.

    What AutoScheme chose is taken from its file, so that nothing is measured again.

    Args:
        options: of the run.

    Returns:
        The command, and one line for each option whose value only Python can give.
    """
    words, beside = ["auto-round"], list[str]()
    for setting in all_settings():
        value = options.typed.get(setting.name, _value(options, setting))
        if options.chosen is not None and setting in settings(AutoSchemeOptions):
            continue
        if options.chosen is not None and setting.name == "layer_config":
            value = CHOSEN_PLAN
        if value == setting.admit(setting.default) or setting.name in _LEFT_OUT:
            continue
        if setting.name == "model":
            words.append(str(value))
        elif _is_object(setting, value):
            beside.append(f"{setting.name}: {value}")
        elif setting.kind == "flag" and isinstance(value, bool):
            words.append(f"--{setting.flags[0]}" if value else _off(setting))
        else:
            words += [f"--{setting.flags[0]}", _text(value)]
    return shlex.join(words), beside


def _value(options: Options, setting: Setting) -> Any:
    owner = next(key for key, group in GROUPS.items() if setting in settings(group))
    return getattr(getattr(options, owner), setting.name)


def _is_object(setting: Setting, value: Any) -> bool:
    """Only Python can give the value: no flag, or no text that stands for it."""
    if isinstance(value, str):
        return value.endswith(FROM_PYTHON)
    return not setting.spec.cli or not (setting.spec.convert or isinstance(value, (int, float)))


def _off(setting: Setting) -> str:
    return f"--{(*setting.spec.off, f'no_{setting.flags[0]}')[0]}"


def _text(value: Any) -> str:
    """A value as the command line reads it back."""
    if isinstance(value, Mapping):
        return json.dumps(dict(value), default=_fields)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(str, value))
    return str(value)


def _fields(value: Any) -> Any:
    """Fields of a scheme that was given as an object."""
    return value.to_dict() if hasattr(value, "to_dict") else str(value)
