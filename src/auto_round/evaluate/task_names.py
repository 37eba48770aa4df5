"""Tasks of lm-evaluation-harness: whether it is there, and whether it knows them; before any long work."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

from auto_round.config import EvaluationOptions
from auto_round.errors import ConfigError, MissingError, nearest

_PACKAGES: Final = {"hf": ("lm_eval",), "vllm": ("lm_eval", "vllm")}
"""Backend -> modules that it needs."""
_TO_INSTALL: Final = {"lm_eval": 'pip install "auto-round[eval]"', "vllm": "pip install vllm"}
_TASK_FILES: Final = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Tasks:
    """Tasks that the harness knows.

    Attributes:
        names: of tasks, groups or tags, or task files; each once.
        manager: the harness's `TaskManager`, which has read the task files.
        options: what else the user said.
    """

    names: tuple[str, ...]
    manager: Any
    options: EvaluationOptions


def find_tasks(options: EvaluationOptions) -> Tasks:
    """The tasks that a user names.

    Raises:
        ConfigError: a package is missing, an unknown task, or settings that cannot be read.
    """
    check_installed(options.eval_backend)
    for option in ("vllm_args", "eval_gen_kwargs"):
        check_pairs(option, getattr(options, option))
    wanted = options.tasks or ()
    if options.include_path is not None:
        folder = Path(options.include_path).expanduser()
        if not folder.is_dir():
            raise MissingError(f"include_path: no folder {folder}")
        own = _manager(folder, defaults=False)
        names, unknown = match_tasks(wanted, own.all_tasks)
        if not unknown:  # the harness's own are 14,000, which take a while to read
            return Tasks(names, own, options)
        manager = _manager(folder, defaults=True)
    else:
        manager = _manager(None, defaults=True)
    names, unknown = match_tasks(wanted, manager.all_tasks)
    if unknown:
        hints = "; ".join(f'"{name}": {nearest(name, manager.all_tasks)}' for name in unknown)
        raise ConfigError(f"unknown task {hints}")
    return Tasks(names, manager, options)


def match_tasks(wanted: Sequence[str], known: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Sort names into those that there are, patterns such as `mmlu_*` spelled out, and unknown ones.

    Args:
        wanted: names, patterns, and paths of task files.
        known: all names.
    """
    there = set(known)
    found: list[str] = []
    unknown: list[str] = []
    for name in wanted:
        if name in there:
            found.append(name)
        elif name.endswith(_TASK_FILES) and Path(name).is_file():
            found.append(str(Path(name).absolute()))  # read later, wherever the program stands then
        elif matching := [other for other in known if fnmatch(other, name)]:
            found += matching
        else:
            unknown.append(name)
    return tuple(dict.fromkeys(found)), unknown


def check_installed(backend: str) -> None:
    """Refuse when a package is missing.

    Raises:
        ConfigError: with the line that installs it.
    """
    missing = [module for module in _PACKAGES[backend] if importlib.util.find_spec(module) is None]
    if missing:
        remedies = ", ".join(_TO_INSTALL[module] for module in missing)
        raise ConfigError(f"tasks with the {backend} backend need {' and '.join(missing)}: {remedies}")


def check_pairs(option: str, text: str | None) -> None:
    """Refuse settings that are no comma list of `name=value`.

    Raises:
        ConfigError: they are not.
    """
    for part in (text or "").split(",") if text else ():
        name, equals, value = part.partition("=")
        if not (name.strip().isidentifier() and equals and value.strip()):
            raise ConfigError(f'option "{option}": expected name=value,name=value, found {part.strip()!r}')


def _manager(folder: Path | None, *, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(
        include_path=None if folder is None else str(folder.absolute()), include_defaults=defaults
    )
