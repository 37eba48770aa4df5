"""The arguments of `AutoRound`, made from the option groups: signature, documentation, and reading."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from auto_round.autoround.auto_scheme import AutoScheme
from auto_round.autoround.pipelines import is_live_pipeline
from auto_round.calibration.grammar import DatasetItem
from auto_round.config import (
    GROUPS,
    EvaluationOptions,
    Options,
    Setting,
    all_settings,
    argument_names,
    build_options,
    read_environment,
    settings,
)
from auto_round.config.auto_scheme import AutoSchemeOptions
from auto_round.config.later import GRANTED, granted_notes, later_names, not_there_yet, split_later
from auto_round.errors import ArgumentError, ConfigError, nearest
from auto_round.log import logger

ORDER: Final = (
    "platform",
    "scheme",
    "layer_config",
    "dataset",
    "iters",
    "seqlen",
    "nsamples",
    "batch_size",
    "gradient_accumulate_steps",
    "low_gpu_mem_usage",
    "device_map",
    "enable_torch_compile",
    "seed",
)
"""Options that may follow `model, tokenizer` by position."""

OLD_ORDER: Final = ("bits", "group_size", "sym", "layer_config", "batch_size")
"""The same in the first releases; recognised by its first value being a number."""

_OWN: Final = frozenset({"model", "tokenizer", "dry_run"})
"""Options that are no arguments by name: the first two have their own place, the last is for commands."""

_EVALUATION: Final = frozenset(
    name for setting in settings(EvaluationOptions) for name in (setting.name, *setting.flags)
)


def collect(positional: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Give a name to every argument after `model, tokenizer`.

    Raises:
        ConfigError: an unknown or doubled argument.
    """
    order = OLD_ORDER if positional and isinstance(positional[0], int) else ORDER
    if len(positional) > len(order):
        raise ArgumentError(
            f"AutoRound() takes at most {len(order)} arguments by position after model and tokenizer"
        )
    given = dict(zip(order, positional, strict=False))
    for name, value in named.items():
        if name in given:
            raise ArgumentError(f'AutoRound() got "{name}" both by position and by name')
        given[name] = value
    given |= _bundle(given.pop("extra_config", None))
    known = [name for name in (*argument_names(), *later_names(), *GRANTED) if name not in _OWN]
    for name in given:
        if name in _EVALUATION:
            raise ArgumentError(
                f'AutoRound() has no "{name}": give it to EvaluationOptions (docs/evaluation.md)'
            )
        if name not in known:
            raise ArgumentError(
                f'AutoRound() got an unexpected keyword argument "{name}": {nearest(name, known)}'
            )
    return given


def read_arguments(given: Mapping[str, Any], recipe: str) -> Options:
    """Turn named arguments into options.

    Raises:
        ConfigError: a wrong value.
        UnsupportedError: an argument of later work.
    """
    if isinstance(scheme := given.get("scheme"), AutoScheme):
        given = _with_auto_scheme({n: v for n, v in given.items() if n != "scheme"}, scheme.arguments())
    files = {n: given[n] for n in ("dataset", "score_dataset") if isinstance(given.get(n), Path)}
    given = {**given, **{name: str(DatasetItem(str(path))) for name, path in files.items()}}
    now, later = split_later(given)
    if later:
        raise not_there_yet(later)
    for note in granted_notes(name for name, value in given.items() if value):
        logger.warning(note)
    return build_options(now, recipe, read_environment())


def _with_auto_scheme(given: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with those of an `AutoScheme`, which the user may not give beside it.

    Raises:
        ArgumentError: an argument is one of AutoScheme's.
    """
    group = {setting.name for setting in settings(AutoSchemeOptions)}
    twice = [name for name, value in given.items() if name in group and value is not None]
    if twice:
        raise ArgumentError(
            f"{', '.join(twice)} beside an AutoScheme, which says what it chooses by: give it to AutoScheme()"
        )
    return {**given, **chosen}


def refuse_other_things(model: Any, tokenizer: Any) -> None:
    """See that the first two arguments are what they are called.

    Raises:
        ConfigError: one of them is something else, or each has the other's place.
    """
    if is_name(model) and (tokenizer is None or is_name(tokenizer)):
        return
    if not is_name(model) and not _is_model(model) and _is_model(tokenizer):
        raise ConfigError("model and tokenizer have changed places: AutoRound(model, tokenizer, ...)")
    if not (is_name(model) or _is_model(model) or is_live_pipeline(model)):
        raise ConfigError(
            f"model is {_kind(model)}: expected a folder, a hub name, or a model or pipeline in memory"
        )
    other = isinstance(tokenizer, type) or _is_model(tokenizer) or not callable(tokenizer)
    if other and tokenizer is not None and not is_name(tokenizer):
        raise ConfigError(
            f"tokenizer is {_kind(tokenizer)}: expected a folder, a hub name, or a tokenizer in memory"
        )


def is_name(value: Any) -> bool:
    """Whether an argument names a folder or something on a hub, and is no object."""
    return isinstance(value, (str, Path))


def _is_model(value: Any) -> bool:
    """Whether an object is a model; nothing is imported to find out."""
    return not isinstance(value, type) and hasattr(value, "named_parameters")


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"


def live_processor(given: dict[str, Any]) -> Any:
    """The processor among the arguments, where it is an object; it is taken out of them.

    An image processor that is an object takes the place of its own, in a copy.

    Raises:
        ConfigError: an image processor without a processor.
    """
    objects = {
        name: given.pop(name)
        for name in ("processor", "image_processor")
        if given.get(name) is not None and not isinstance(given[name], (str, Path))
    }
    processor = objects.get("processor")
    if "image_processor" in objects:
        if processor is None:
            raise ConfigError("an image_processor that is an object needs a processor that is one")
        processor = copy.copy(processor)
        processor.image_processor = objects["image_processor"]
    return processor


def _bundle(extra: Any) -> dict[str, Any]:
    """Read `extra_config`: a mapping of arguments that overrule the others."""
    if extra is None:
        return {}
    if not isinstance(extra, Mapping):
        raise ConfigError(f"extra_config must be a mapping of argument to value, got {type(extra).__name__}")
    return dict(extra)


def make_signature() -> inspect.Signature:
    """Build the signature that `help()` and editors show."""
    by_name = {setting.name: setting for setting in all_settings()}
    either, named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("model", either), inspect.Parameter("tokenizer", either, default=None)]
    parameters += [inspect.Parameter(n, either, default=by_name[n].default) for n in ORDER]
    rest = [s for s in by_name.values() if s.name not in ORDER and s.name not in _OWN]
    parameters += [inspect.Parameter(s.name, named, default=s.default) for s in rest]
    parameters += [
        inspect.Parameter(n, named, default=d) for n, d in (("recipe", "default"), ("progress", None))
    ]
    return inspect.Signature(parameters)


def make_documentation() -> str:
    """Describe every argument, group by group."""
    lines: list[str] = []
    for group in GROUPS.values():
        lines += ["", (group.__doc__ or "").strip().splitlines()[0], ""]
        lines += [_described(setting) for setting in settings(group) if setting.name not in _OWN]
    return "\n".join(lines)


def _described(setting: Setting) -> str:
    others = (*setting.spec.aliases, *(f"{name} (the opposite)" for name in setting.spec.off))
    also = f" Also: {', '.join(others)}." if others else ""
    choices = f" One of {', '.join(setting.spec.choices)}." if setting.spec.choices else ""
    return f"    {setting.name} = {setting.default!r}: {setting.spec.help}.{choices}{also}"
