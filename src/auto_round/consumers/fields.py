"""What an engine takes a module to be, and the complaint it raises where it cannot decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from auto_round.consumers.folder import Folder
from auto_round.consumers.modules import Module

FLOAT_BITS = 16
"""Width from which every engine takes a layer for one that is not quantized."""


@dataclass(frozen=True, slots=True)
class Fields:
    """Scheme of one module, as an engine reads it from the configuration.

    Attributes:
        bits: width of a code.
        group_size: weights in a group, -1 for one group a row.
        sym: without zero points.
    """

    bits: int
    group_size: int
    sym: bool

    def groups(self, n_in: int) -> int:
        """Groups in a row of `n_in` weights."""
        return -(-n_in // self.group_size) if 0 < self.group_size < n_in else 1

    def __str__(self) -> str:
        size = "per row" if self.group_size < 0 else f"g{self.group_size}"
        return f"W{self.bits} {size} {'sym' if self.sym else 'asym'}"


@dataclass(frozen=True, slots=True)
class CompressedFields(Fields):
    """Scheme of one module of a compressed-tensors folder.

    Attributes:
        numbers: `int` or `float`.
        form: `format` of its config group: how codes are stored.
        activations: bits of quantized activations, else 16.
        by_token: activations get one symmetric step for each token while the model runs.
    """

    numbers: str = "int"
    form: str = ""
    activations: int = FLOAT_BITS
    by_token: bool = False

    def __str__(self) -> str:
        text = Fields.__str__(self)
        width, _, rest = text.partition(" ")
        return text if self.activations >= FLOAT_BITS else f"{width}A{self.activations} {rest}"


Reading = Callable[[Folder, Module], "Fields | None"]
"""How an engine reads the configuration for one module; None for one that it does not quantize."""


class CannotReadError(Exception):
    """An engine stops with an error at this module; the text says why. Never leaves this package."""


def make_fields(bits: Any, group_size: Any, sym: Any, where: str) -> Fields:
    """Fields of values from a configuration.

    Raises:
        CannotReadError: values of other types.
    """
    if type(bits) is not int or type(group_size) is not int or bits < 1 or group_size == 0:
        raise CannotReadError(
            f"{where} has bits {bits!r} and group_size {group_size!r}, it expects whole numbers"
        )
    return Fields(bits, group_size, bool(sym))


def agreed(module: Module, found: Mapping[str, Fields | None]) -> Fields | None:
    """The one scheme of all parts of a module.

    Raises:
        CannotReadError: the parts differ.
    """
    values = list(found.values())
    if all(value == values[0] for value in values):
        return values[0]
    texts: dict[str, str] = {}
    for name, value in found.items():
        texts.setdefault("16 bits" if value is None else str(value), name.rpartition(".")[2])
    parts = ", ".join(f"{last} {text}" for text, last in texts.items())
    raise CannotReadError(f"it fuses {module.name} and needs one scheme for its parts, here {parts}")
