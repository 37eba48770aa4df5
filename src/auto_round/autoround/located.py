"""Relative paths among the arguments: they begin where the program stood when it gave them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from auto_round.calibration.grammar import parse_dataset
from auto_round.config import GROUPS, Options, settings
from auto_round.config.option import Paths
from auto_round.config.values import folders_by_kind, whole_path
from auto_round.errors import ConfigError


def located(options: Options) -> Options:
    """The same options with absolute paths, so that a program may change its folder between two calls.

    What is read and is not there stays as it was written: it may be a name on a hub, and if it is a mistake,
    the message shows it as the user knows it. `Options.typed` keeps what was written for the others.
    """
    typed = dict(options.typed)
    groups = {}
    for key, group in GROUPS.items():
        own = getattr(options, key)
        found = {}
        for setting in settings(group):
            text = getattr(own, setting.name)
            if setting.spec.paths and text and (whole := _absolute(text, setting.spec.paths)) != text:
                found[setting.name] = whole
                typed.setdefault(setting.name, text)
        groups[key] = replace(own, **found) if found else own
    return replace(options, **groups, typed=typed)


def _absolute(text: str, paths: Paths) -> str:
    if paths == "data sets":
        return _of_items(text)
    if paths == "folders":
        return _of_kinds(text)
    if paths == "written":
        return text if text.startswith("~") else str(Path(text).absolute())
    return whole_path(text)


def _of_kinds(text: str) -> str:
    """A folder, or folders by kind."""
    kinds = folders_by_kind(text)
    if "=" not in text:
        return whole_path(text)
    return ",".join(f"{kind}={whole_path(folder)}" for kind, folder in kinds.items())


def _of_items(text: str) -> str:
    """A list of data sets; what cannot be read as one is refused later, where it is read."""
    try:
        items = parse_dataset(text)
    except ConfigError:
        return text
    whole = [replace(item, name=whole_path(item.name)) for item in items]
    return text if whole == list(items) else ",".join(map(str, whole))
