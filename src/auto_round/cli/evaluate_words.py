"""The words of `auto-round eval`: its parser, made from the option groups."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from auto_round.cli.flags import Parser, add_flags, underscored, with_model
from auto_round.config import (
    EVALUATION_GROUPS,
    EvaluationOptions,
    FidelityOptions,
    ModelOptions,
    Setting,
    all_settings,
    settings,
)
from auto_round.errors import ConfigError, nearest

MORE_FLAGS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"eval_bs": ("bs", "batch_size"), "eval_model_dtype": ("model_dtype",)}
)
"""Further spellings of options, which have another meaning while a model is quantized."""
MODEL_HELP: Final[Mapping[str, str]] = MappingProxyType(
    {
        "model": "folder, hub name or GGUF file to evaluate",
        "tokenizer": "folder or hub name of the tokenizer; the original's or the model's own when not given",
        "platform": "hub to download from",
        "trust_remote_code": "run Python code that comes with a model; off unless asked",
        "device_map": 'where models run: "auto", "cpu", "0", "cuda:0"; over several ("0,1") they are spread',
    }
)
"""Options of `ModelOptions` that this command has, and what they mean here."""


@dataclass(frozen=True, slots=True)
class EvaluationRequest:
    """What is evaluated, and how the answer is given.

    Attributes:
        model: which model, where it runs.
        evaluation: tasks.
        fidelity: text and original.
        json: print JSON.
        output: file that gets the JSON; None for none.
    """

    model: ModelOptions
    evaluation: EvaluationOptions
    fidelity: FidelityOptions
    json: bool = False
    output: Path | None = None


def read_words(parser: Parser, words: Sequence[str]) -> EvaluationRequest:
    """Read the words after `eval`.

    Raises:
        ConfigError: unknown flags, wrong values, no model, or nothing to do.
    """
    found, unknown = parser.parse_known_args([underscored(word) for word in words])
    if unknown:
        raise _unknown(unknown)
    given = with_model(vars(found))
    output = given.get("output")
    return EvaluationRequest(
        _group(ModelOptions, given),
        _group(EvaluationOptions, given),
        _group(FidelityOptions, given),
        given.get("json", False),
        None if output is None else Path(output),
    )


def _group(kind: type, given: Mapping[str, Any]) -> Any:
    return kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given})


def _settings() -> dict[str, list[Setting]]:
    """Options of the command, by section, with the spellings and meanings that they have here."""
    groups = {"model": ModelOptions, **EVALUATION_GROUPS}
    return {
        name: [
            _as_here(s) for s in settings(group) if s.spec.cli and (name != "model" or s.name in MODEL_HELP)
        ]
        for name, group in groups.items()
    }


def _as_here(setting: Setting) -> Setting:
    flags = (*setting.flags, *MORE_FLAGS.get(setting.name, ()))
    meaning = MODEL_HELP.get(setting.name, setting.spec.help)
    return replace(setting, spec=replace(setting.spec, flags=flags, help=meaning))


def eval_parser() -> Parser:
    """Build the parser of `auto-round eval` from the option groups."""
    parser = Parser(
        prog="auto-round eval",
        usage="auto-round eval MODEL --original MODEL --text FILE [options]\n"
        "       auto-round eval MODEL --tasks piqa,arc_easy [options]\n"
        "       auto-round eval MODEL --text FILE [options]",
        description="Say how far a model's predictions are from its original's, run it on tasks of "
        "lm-evaluation-harness, or measure its perplexity. Models are folders (quantized or not), hub names "
        "and GGUF files. With neither a text nor tasks, the usual tasks are run.",
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("bare_model", metavar="MODEL", nargs="?", help="folder, hub name or GGUF file")
    general = parser.add_argument_group("general")
    general.add_argument("-h", "--help", action="store_true", help="show this text and stop")
    general.add_argument("--json", action="store_true", help="print JSON instead of a table")
    general.add_argument("--output", metavar="FILE", help="write the JSON to a file as well")
    for name, part in _settings().items():
        group = {"model": ModelOptions, **EVALUATION_GROUPS}[name]
        section = parser.add_argument_group(name, group.__doc__)
        for setting in part:
            add_flags(section, setting)
    return parser


def _unknown(words: Sequence[str]) -> ConfigError:
    flags = [word.partition("=")[0] for word in words if word.startswith("-")]
    if not flags:
        return ConfigError(f'unexpected "{words[0]}": one model at a time; quote values that hold spaces')
    name = flags[0].lstrip("-")
    if any(name in setting.flags for setting in all_settings()):
        return ConfigError(f"{flags[0]} belongs to quantizing a model; eval takes it as it is")
    known = [f"--{flag}" for part in _settings().values() for s in part for flag in s.flags]
    return ConfigError(
        f"unknown flag {flags[0]}: {nearest(flags[0], [*known, '--json', '--output'])} "
        "(auto-round eval --help lists all)"
    )
