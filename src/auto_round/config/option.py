"""How one option is declared: help, flags, aliases and limits stand beside its default, and nowhere else."""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from auto_round.errors import ConfigError, MissingError, nearest

Kind = Literal["flag", "int", "float", "str", "object"]
Paths = Literal["", "read", "written", "data sets", "folders"]
"""What paths an option's text may hold: none, one that is read, one that is written, those of data sets, or a
folder for each kind of data (`values.folders_by_kind`)."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What an option means, beside its type and default.

    Attributes:
        help: one sentence for `--help` and for the table of options.
        flags: long flags without dashes, written with `_`; empty means the field's own name.
        off: flags, and names of Python arguments, that say the opposite.
        off_help: what the opposite means; empty hides it from `--help`.
        aliases: other names of the Python argument.
        choices: allowed words; compared without case.
        low: smallest allowed number.
        high: largest allowed number.
        convert: turns what a user may write (text, list, number) into the field's type; raises TypeError,
            ValueError or FileNotFoundError.
        cli: False for what only Python can give.
        many: the flag takes any number of words.
        again: the flag may be given more than once; `convert` gets a list of what each held.
        paths: paths that the text may hold.
    """

    help: str
    flags: tuple[str, ...] = ()
    off: tuple[str, ...] = ()
    off_help: str = ""
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    convert: Callable[[Any], Any] | None = None
    cli: bool = True
    many: bool = False
    again: bool = False
    paths: Paths = ""


def option(default: Any, spec: Spec) -> Any:
    """Declare a dataclass field that is also a flag and a Python argument."""
    return field(default=default, metadata={"option": spec})


@dataclass(frozen=True, slots=True)
class Setting:
    """One option as the command line and the documentation see it.

    Attributes:
        name: field and Python argument.
        kind: what the value is, read from the annotation.
        nullable: whether None is allowed.
        default: value when the user says nothing.
        spec: the rest of the declaration.
    """

    name: str
    kind: Kind
    nullable: bool
    default: Any
    spec: Spec

    @property
    def flags(self) -> tuple[str, ...]:
        """Flags that set the option, without dashes."""
        return self.spec.flags or (self.name,)

    def admit(self, value: Any) -> Any:
        """Return `value` in the field's type.

        Raises:
            ConfigError: the value has a wrong type, is out of range or is not one of the choices.
        """
        if value is None:
            if self.nullable:
                return None
            raise self.refuse(value, f"expected {self.expected()}")
        try:
            value = self.spec.convert(value) if self.spec.convert else value
        except FileNotFoundError as error:
            raise MissingError(self._refusal(value, str(error))) from error
        except (TypeError, ValueError) as error:
            raise self.refuse(value, str(error)) from error
        try:
            value = _CASTS[self.kind](value)
        except (TypeError, ValueError):
            raise self.refuse(value, f"expected {self.expected()}") from None
        if self.spec.choices:
            return self._choose(value)
        if self.kind == "str" and not value.strip() and self.default != value:
            raise self.refuse(value, f"expected {self.expected()} that is not empty")
        if self.kind == "str" and "\0" in value:
            raise self.refuse(value, f"expected {self.expected()} without a NUL character")
        low, high = self.spec.low, self.spec.high
        if (low is not None and value < low) or (high is not None and value > high):
            raise self.refuse(value, f"expected {self.expected()}")
        return value

    def _choose(self, value: Any) -> Any:
        for choice in self.spec.choices:
            if str(value).casefold() == choice:
                return choice
        hint, everything = nearest(str(value), self.spec.choices), ", ".join(self.spec.choices)
        near = hint.startswith("did you mean")
        raise self.refuse(value, f"{hint} (all: {everything})" if near else f"expected one of {everything}")

    def expected(self) -> str:
        """Say what the option accepts, in words."""
        words = {"flag": "True or False", "int": "a whole number", "float": "a number", "str": "text"}
        text = words.get(self.kind, "a value")
        if self.spec.low is not None and self.spec.high is not None:
            return f"{text} from {self.spec.low:g} to {self.spec.high:g}"
        if self.spec.low is not None:
            return f"{text}, at least {self.spec.low:g}"
        return text

    def refuse(self, value: Any, reason: str) -> ConfigError:
        """Return the error for a value that this option cannot take."""
        return ConfigError(self._refusal(value, reason))

    def _refusal(self, value: Any, reason: str) -> str:
        return f'option "{self.name}" cannot be {value!r}: {reason}'


def _cast_flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise TypeError


def _cast_int(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _cast_float(value: Any) -> float:
    if isinstance(value, (bool, str)):
        raise TypeError
    number = float(value)
    if number != number:
        raise ValueError
    return number


def _cast_str(value: Any) -> str:
    if isinstance(value, (str, Path)):
        return str(value)
    if type(value).__name__ == "dtype":  # torch.bfloat16, from Python
        return str(value).removeprefix("torch.")
    raise TypeError


def _same(value: Any) -> Any:
    return value


_CASTS: typing.Final = types.MappingProxyType(
    {"flag": _cast_flag, "int": _cast_int, "float": _cast_float, "str": _cast_str, "object": _same}
)
_KINDS: typing.Final = types.MappingProxyType({bool: "flag", int: "int", float: "float", str: "str"})


@functools.cache
def settings(group: type) -> tuple[Setting, ...]:
    """List the options of a group's dataclass, in the order of their declaration."""
    hints = typing.get_type_hints(group)
    found = []
    for entry in dataclasses.fields(group):
        parts = typing.get_args(hints[entry.name])
        nullable = types.NoneType in parts
        plain = [p for p in parts if p is not types.NoneType] if nullable else [hints[entry.name]]
        kind = _KINDS.get(plain[0], "object") if len(plain) == 1 else "object"
        found.append(
            Setting(entry.name, typing.cast(Kind, kind), nullable, entry.default, entry.metadata["option"])
        )
    return tuple(found)


def settle(group: Any) -> None:
    """Check and convert every field of a group in place; called from `__post_init__` only.

    Raises:
        ConfigError: a field's value is not allowed.
    """
    for setting in settings(group.__class__):
        object.__setattr__(group, setting.name, setting.admit(getattr(group, setting.name)))
