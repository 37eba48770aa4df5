"""`auto-round eval`: how good a model is, and how far from its original."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from auto_round.checkpoint.disk import writing
from auto_round.cli.flags import Parser, add_flags, underscored, with_model
from auto_round.cli.measured import measured
from auto_round.cli.progress import drawn_progress
from auto_round.cli.quantize import quiet_transformers, set_threads
from auto_round.config import (
    EVALUATION_GROUPS,
    EvaluationOptions,
    FidelityOptions,
    ModelOptions,
    Setting,
    all_settings,
    read_environment,
    settings,
)
from auto_round.config.later import not_there_yet
from auto_round.errors import ConfigError, nearest

MORE_FLAGS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"eval_bs": ("bs", "batch_size"), "eval_model_dtype": ("model_dtype",)}
)
"""Further spellings of options, which have another meaning while a model is quantized."""
_EXAMPLE = "auto-round eval FOLDER --original DIR --text FILE"


@dataclass(frozen=True, slots=True)
class Request:
    """What is evaluated, and how the answer is given."""

    model: ModelOptions
    evaluation: EvaluationOptions
    fidelity: FidelityOptions
    json: bool = False
    output: Path | None = None


def evaluate(words: Sequence[str]) -> bool:
    """Do what the words say and print what came of it.

    Returns:
        False where the model is further from its original than `--max_kl` allows.

    Raises:
        AutoRoundError: wrong words, or the evaluation is not possible.
    """
    parser = _parser()
    if not words or not {"-h", "--help"}.isdisjoint(words):
        print(parser.format_help().rstrip())
        return True
    request = read_words(parser, words)
    if request.evaluation.tasks is not None:
        raise not_there_yet(["tasks"], prefix="--")
    environment = read_environment()
    set_threads(environment.num_threads)
    quiet_transformers()
    from auto_round.evaluate.fidelity import measure, plan_measurement

    plan = plan_measurement(request.model, request.evaluation, request.fidelity)
    with drawn_progress() as progress:
        found = measure(plan, progress)
    passed = True
    if (most := request.fidelity.max_kl) is not None:
        passed = found["kl"]["mean"]["value"] <= most
        found["gate"] = {"max_kl": most, "passed": passed}
    text = json.dumps(found, indent=2, ensure_ascii=False)
    if request.output is not None:
        with writing(request.output):
            request.output.write_text(text + "\n", encoding="utf-8")
    print(text if request.json else measured(found))
    return passed


def read_words(parser: Parser, words: Sequence[str]) -> Request:
    """Read the words after `eval`.

    Raises:
        ConfigError: unknown flags, wrong values, no model, or nothing to do.
    """
    found, unknown = parser.parse_known_args([underscored(word) for word in words])
    if unknown:
        raise _unknown(unknown)
    given = with_model(vars(found))
    output = given.get("output")
    return Request(
        _group(ModelOptions, given),
        _group(EvaluationOptions, given),
        _group(FidelityOptions, given),
        given.get("json", False),
        None if output is None else Path(output),
    )


def _group(kind: type, given: Mapping[str, Any]) -> Any:
    return kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given})


def _settings() -> dict[str, list[Setting]]:
    """Options of the command, by section."""
    groups = {"model": ModelOptions, **EVALUATION_GROUPS}
    shown = {name: [s for s in settings(group) if s.spec.cli] for name, group in groups.items()}
    shown["model"] = [s for s in shown["model"] if s.name != "model_dtype"]
    return {
        name: [replace(s, spec=replace(s.spec, flags=(*s.flags, *MORE_FLAGS.get(s.name, ())))) for s in part]
        for name, part in shown.items()
    }


def _parser() -> Parser:
    parser = Parser(
        prog="auto-round eval",
        usage="auto-round eval MODEL --original MODEL --text FILE [options]\n"
        "       auto-round eval MODEL --text FILE [options]",
        description="Say how far a model's predictions are from its original's, or measure its perplexity. "
        "Models are folders (quantized or not), hub names and GGUF files.",
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
        return ConfigError(f"{flags[0]} belongs to quantizing a model; eval takes it as it is ({_EXAMPLE})")
    known = [f"--{flag}" for part in _settings().values() for s in part for flag in s.flags]
    return ConfigError(
        f"unknown flag {flags[0]}: {nearest(flags[0], [*known, '--json', '--output'])} "
        "(auto-round eval --help lists all)"
    )
