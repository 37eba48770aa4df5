"""Flags of the commands, made from the declarations of options."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from auto_round.config import Setting
from auto_round.errors import ConfigError, nearest


class Parser(argparse.ArgumentParser):
    """A parser that raises `ConfigError` where argparse would exit."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise ConfigError(message)

    def parse_all(self, words: Sequence[str]) -> argparse.Namespace:
        """Read all words of a command.

        Raises:
            ConfigError: a word that is none of its flags and values; names the nearest flags.
        """
        found, unknown = self.parse_known_args(list(words))
        if not unknown:
            return found
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        if not flags:
            raise ConfigError(f'unexpected "{unknown[0]}"; {self.prog} --help says what it takes')
        hint = nearest(flags[0], self._option_string_actions)
        raise ConfigError(f"unknown flag {flags[0]}: {hint} ({self.prog} --help lists all)")


def stray(word: str) -> str:
    """What may be meant by a word that has no flag it belongs to."""
    if word.casefold() in {"true", "false", "yes", "no", "on", "off", "1", "0"}:
        return "a switch takes no value: write --sym, or --no-sym for the opposite"
    return "words of a list have commas between them and no spaces: --format auto_round,auto_gptq"


def underscored(word: str) -> str:
    """Write `--group-size=64` as `--group_size=64`; values are left alone."""
    if not word.startswith("--") or word == "--":
        return word
    flag, equals, value = word[2:].partition("=")
    return "--" + flag.replace("-", "_") + equals + value


def with_model(given: dict[str, Any]) -> dict[str, Any]:
    """Bring the bare model name and `--model` together."""
    bare = given.pop("bare_model", None)
    named = given.get("model")
    if bare is None and named is None:
        raise ConfigError(
            "no model given: write its folder or hub name, for example: auto-round path/to/model"
        )
    if bare is not None and named is not None and bare != named:
        raise ConfigError(f'two models given, "{bare}" and "{named}": give one of them; {stray(bare)}')
    return {**given, "model": named if bare is None else bare}


def add_flags(section: argparse._ArgumentGroup, setting: Setting) -> None:
    """Add the flags of one option; `--help` shows the first, its other spellings work too."""
    shown = setting.flags[0]
    if setting.kind != "flag":
        for flag in setting.flags:
            section.add_argument(
                f"--{flag}",
                dest=setting.name,
                type=str if setting.spec.many else _reader(setting),
                nargs="*" if setting.spec.many else None,
                action="append" if setting.spec.again else "store",
                metavar=_metavar(setting),
                help=_help(setting) if flag == shown else argparse.SUPPRESS,
            )
        return
    either = section.add_mutually_exclusive_group()
    for flag in dict.fromkeys((*setting.flags, *setting.spec.off, *(f"no_{flag}" for flag in setting.flags))):
        either.add_argument(
            f"--{flag}",
            dest=setting.name,
            action="store_const",
            const=flag in setting.flags,
            help=_switch_help(setting, flag) or argparse.SUPPRESS,
        )


def _switch_help(setting: Setting, flag: str) -> str:
    """Return the help of one flag of a switch; empty for spellings that are not shown."""
    if flag in setting.spec.off[:1]:
        return setting.spec.off_help
    shown = flag == setting.flags[0] and setting.default is not True
    return setting.spec.help if shown else ""


def _reader(setting: Setting) -> Callable[[str], Any]:
    """Return the function that reads the text of an option's value."""
    numbers: dict[str, Callable[[str], Any]] = {"int": int, "float": float}

    def read(text: str) -> Any:
        number = numbers.get(setting.kind)
        if number is None or setting.spec.convert is not None:
            return setting.admit(text)
        try:
            value = number(text)
        except ValueError:
            raise setting.refuse(text, f"expected {setting.expected()}") from None
        return setting.admit(value)

    def read_or_say(text: str) -> Any:
        try:
            return read(text)
        except ConfigError as error:  # argparse would replace the words of a ValueError by its own
            raise argparse.ArgumentTypeError(str(error)) from error

    return read_or_say


def _metavar(setting: Setting) -> str:
    if setting.spec.choices:
        return "{" + ",".join(setting.spec.choices) + "}"
    if setting.spec.convert is not None:
        return "TEXT"
    return {"int": "N", "float": "X"}.get(setting.kind, "TEXT")


def _help(setting: Setting) -> str:
    shown = setting.default not in (None, "", ())
    return setting.spec.help.replace("%", "%%") + (f" [{setting.default}]" if shown else "")
