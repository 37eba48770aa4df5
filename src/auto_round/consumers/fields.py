"""What an engine takes a module to be, and the complaint it raises where it cannot decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from auto_round.consumers.folder import Folder
from auto_round.consumers.modules import Module
from auto_round.facts.compressed import FP8, MXFP4, MXFP6, MXFP8, NVFP4

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
class Inputs:
    """How a compressed-tensors group rounds what flows into its layers.

    Attributes:
        bits: width of a code.
        numbers: `int` or `float`.
        strategy: `token`, `tensor`, `group`, `tensor_group`, ...
        group_size: numbers that share a step; None where the strategy says it.
        sym: without zero points.
        dynamic: steps are measured as the model runs; with `tensor_group` those of groups only.
    """

    bits: int
    numbers: str
    strategy: str
    group_size: int | None
    sym: bool
    dynamic: bool


@dataclass(frozen=True, slots=True)
class CompressedFields(Fields):
    """Scheme of one module of a compressed-tensors folder.

    Attributes:
        numbers: `int` or `float`.
        stated: `format` of its config group.
        strategy: what shares a step: `group`, `tensor_group`, `channel`, `tensor`, `block`.
        form: how its codes are stored. For floats engines go by the other fields, not by `stated`.
        block: rows and columns of a block.
        inputs: what flows in, where it is rounded.
    """

    numbers: str = "int"
    stated: str = ""
    strategy: str = "group"
    form: str = ""
    block: tuple[int, int] | None = None
    inputs: Inputs | None = None

    @property
    def activations(self) -> int:
        """Bits of quantized activations, else 16."""
        return FLOAT_BITS if self.inputs is None else self.inputs.bits

    @property
    def by_token(self) -> bool:
        """Activations get one symmetric step for each token while the model runs."""
        i = self.inputs
        return i is not None and i.dynamic and i.sym and i.strategy == "token"

    def __str__(self) -> str:
        if self.form in FLOAT_NAMES:
            return self._float_text()
        text = Fields.__str__(self)
        width, _, rest = text.partition(" ")
        return text if self.inputs is None else f"{width}A{self.activations} {rest}"

    def _float_text(self) -> str:
        words = [FLOAT_NAMES[self.form] + ("" if self.activations == self.bits else f"A{self.activations}")]
        if self.form == FP8:
            block = None if self.block is None else f"{self.block[0]}x{self.block[1]}"
            where = {"channel": "per row", "tensor": "per tensor", "block": block or "in blocks"}
            words.append(where.get(self.strategy, f"g{self.group_size}"))
        if self.inputs is not None and not self.inputs.dynamic:
            words.append("static")
        return " ".join(words)


FP8_STRATEGIES = ("channel", "tensor", "block")
"""What shares a step of FP8 weights that engines read."""

FLOAT_NAMES = {MXFP4: "MXFP4", MXFP6: "MXFP6", MXFP8: "MXFP8", NVFP4: "NVFP4", FP8: "FP8"}
"""Floating `format`s of compressed-tensors -> what people call them."""


Reading = Callable[[Folder, Module], "Fields | None"]
"""How an engine reads the configuration for one module; None for one that it does not quantize."""


class CannotReadError(Exception):
    """An engine stops with an error at this module; the text says why. Caught inside of `consumers`."""


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
