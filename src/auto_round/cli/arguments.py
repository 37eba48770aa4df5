"""The command line: a parser made from the option groups, and the command that its words mean."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from auto_round.cli.flags import Parser, add_flags, stray, underscored, with_model
from auto_round.config import GROUPS, RECIPES, EvaluationOptions, all_settings, settings
from auto_round.config.later import GRANTED, LATER, granted_notes, later_names, not_there_yet
from auto_round.errors import ConfigError, nearest

USAGE = """auto-round MODEL [options]          make MODEL small
       auto-round inspect FOLDER [--json]
       auto-round convert FOLDER --format FORMAT [--output DIR]
       auto-round eval MODEL [--tasks TASKS] [--original MODEL --text FILE] [options]
       auto-round report RUN... [-o FILE.html]
       auto-round list [format|scheme|dataset|backend]
       auto-round help | --version"""
FOLDER_COMMANDS = ("inspect", "convert", "eval", "report")
"""Commands on finished models; each reads its own words."""
COMMANDS = ("quantize", "list", "help", *FOLDER_COMMANDS)


@dataclass(frozen=True, slots=True)
class Command:
    """What the user asked for.

    Attributes:
        verb: "quantize", "list", "help", "version" or one of `FOLDER_COMMANDS`.
        given: options by name, only those that were written.
        recipe: recipe name.
        topics: what to list; the words of a command on folders.
        notes: what to say of flags that change nothing.
        evaluation: options of `EvaluationOptions` that were written.
    """

    verb: str
    given: dict[str, Any]
    recipe: str = "default"
    topics: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    evaluation: Mapping[str, Any] = field(default_factory=dict)


def parse(argv: Sequence[str], recipe: str = "default") -> Command:
    """Read a command line.

    Args:
        argv: words after the program's name.
        recipe: recipe that the program's name stands for; `--recipe` overrules it.

    Raises:
        ConfigError: unknown flag (with the nearest flags), a missing or a wrong value, no model.
        UnsupportedError: a flag of later work.
    """
    words = [underscored(word) for word in argv]
    verb = words[0] if words and words[0] in COMMANDS else ""
    if verb == "help" and len(words) > 1 and words[1] in ("list", *FOLDER_COMMANDS):
        verb, words = words[1], [words[1], "--help"]
    if verb in ("", "quantize") and "--eval" in words:
        verb, words = "eval", ["eval", *(word for word in words[bool(verb) :] if word != "--eval")]
    if verb == "list" or verb in FOLDER_COMMANDS:
        return Command(verb, {}, topics=tuple(words[1:]))
    if verb == "help" and len(words) > 1 and words[1] not in COMMANDS:
        raise ConfigError(f'no command "{words[1]}": {nearest(words[1], COMMANDS)}')
    if not words or verb == "help" or "-h" in words or "--help" in words:
        return Command("help", {})
    return _quantize(words[1:] if verb else words, recipe)


def _quantize(words: list[str], recipe: str) -> Command:
    found, unknown = build_parser().parse_known_args(words)
    given = vars(found)
    if given.pop("version", False):
        return Command("version", {})
    topics = given.pop("list", None)
    if topics is not None:
        return Command("list", {}, topics=tuple(topics))
    if unknown:
        raise _unknown(unknown, given.get("bare_model"))
    later = [name for name in later_names() if name in given]
    if later:
        raise not_there_yet(later, prefix="--")
    granted = [name for name in GRANTED if given.pop(name, False)]
    recipe = given.pop("recipe", recipe)
    evaluation = {s.name: given.pop(s.name) for s in settings(EvaluationOptions) if s.name in given}
    notes = tuple(granted_notes(granted))
    return Command("quantize", with_model(given), recipe, notes=notes, evaluation=evaluation)


def _unknown(words: Sequence[str], bare: str | None) -> ConfigError:
    """The error for words that are left over behind the first bare one."""
    flags = [word.partition("=")[0] for word in words if word.startswith("-")]
    if not flags and bare is not None and difflib.get_close_matches(bare, COMMANDS):
        return ConfigError(f'no command "{bare}": {nearest(bare, COMMANDS)}')
    if not flags:
        return ConfigError(
            f'unexpected "{words[0]}": one model at a time; quote values that hold spaces; {stray(words[0])}'
        )
    known = ["--help", "--version", "--recipe", "--list", "--eval"]
    options = (*all_settings(), *settings(EvaluationOptions))
    known += [f"--{flag}" for setting in options for flag in (*setting.flags, *setting.spec.off)]
    known += [f"--{flag}" for flag in later_names()]
    return ConfigError(f"unknown flag {flags[0]}: {nearest(flags[0], known)} (auto-round --help lists all)")


def build_parser() -> Parser:
    """Build the parser of the main command from the option groups."""
    parser = Parser(
        prog="auto-round",
        usage=USAGE,
        description="Round the weights of a language model to a few bits, tuned block by block against the "
        "block's own output.",
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("bare_model", metavar="MODEL", nargs="?", help="folder or hub name of the model")
    general = parser.add_argument_group("general")
    general.add_argument("-h", "--help", action="store_true", help="show this text and stop")
    general.add_argument("--version", action="store_true", help="show the version and stop")
    general.add_argument("--recipe", choices=tuple(RECIPES), help="a named set of options")
    general.add_argument("--list", nargs="*", help="what there is: format, scheme, dataset, backend")
    general.add_argument("--eval", action="store_true", help="evaluate the model as it is: auto-round eval")
    for name, group in {**GROUPS, "evaluation": EvaluationOptions}.items():
        section = parser.add_argument_group(name, group.__doc__)
        for setting in settings(group):
            if setting.spec.cli:
                add_flags(section, setting)
    _add_later(parser)
    return parser


def _add_later(parser: argparse.ArgumentParser) -> None:
    for later in LATER:
        for name in later.switches:
            parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)
        for name in later.values:
            parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
        for name in later.lists:
            parser.add_argument(f"--{name}", nargs="*", help=argparse.SUPPRESS)
    for name in GRANTED:
        parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)


def _epilog() -> str:
    recipes = "\n  ".join(
        f"{name}: " + (", ".join(f"{key} {value}" for key, value in values.items()) or "the defaults above")
        for name, values in RECIPES.items()
    )
    commands = ", ".join("auto-round-" + name.replace("_", "-") for name in RECIPES if name != "default")
    return (
        "Flags may be written with - or _ between words, and switches with --no- in front.\n"
        f"Recipes (also commands: {commands}):\n  {recipes}\n"
        "Known, but not there yet:\n  " + "\n  ".join(later.feature for later in LATER)
    )
