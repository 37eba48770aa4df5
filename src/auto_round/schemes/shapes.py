"""Shapes: which matrices whole-number formats can hold, and which groups divide their rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from auto_round.errors import ConfigError, Refusal, UnsupportedError
from auto_round.schemes.condense import some

MULTIPLE = 32
"""Codes are packed 32 at a time along both axes by the GPTQ layout and its kernels."""

READ_EVERYWHERE = (64, 32)
"""Group sizes below 128 that the kernels of vLLM, SGLang and GPTQModel all take (`consumers.kernels`)."""

GROUP_SIZES = (16, 32, 64, 128, 256, -1)
"""Group sizes that are offered when the asked one does not divide."""


@dataclass(frozen=True, slots=True)
class Misfit:
    """A layer whose rows are not a whole number of groups.

    Attributes:
        name: name of the layer.
        n_in: length of a row, its in_features.
        group_size: weights, or inputs, in a group.
    """

    name: str
    n_in: int
    group_size: int


def awkward_shape(shape: tuple[int, int]) -> str | None:
    """Why a matrix `(out, in)` has to be kept, None when it need not."""
    for label, size in zip(("out", "in"), shape, strict=True):
        if size % MULTIPLE:
            return f"{label}_features {size} is no multiple of {MULTIPLE}"
    return None


def divides(group_size: int, n_in: int) -> bool:
    """Whether a row of `n_in` weights is a whole number of groups; -1 (row) and 0 (tensor) always fit."""
    return group_size <= 0 or n_in % group_size == 0


def fitting_group(group_size: int, n_in: int) -> int | None:
    """The largest group below `group_size` that divides a row of `n_in` and is read everywhere."""
    return next((size for size in READ_EVERYWHERE if size < group_size and divides(size, n_in)), None)


def refuse_misfits(misfits: Iterable[Misfit]) -> None:
    """Refuse groups that do not divide.

    Raises:
        ConfigError: there are any; names layers, in_features, the group sizes that fit and the remedies.
    """
    cases: dict[tuple[int, int], list[str]] = {}
    for misfit in misfits:
        cases.setdefault((misfit.group_size, misfit.n_in), []).append(misfit.name)
    if not cases:
        return
    lines = [_line(size, n_in, names) for (size, n_in), names in cases.items()]
    fitting = [size for size in GROUP_SIZES if all(divides(size, n_in) for _, n_in in cases)]
    best = max(fitting)
    piece = next(iter(cases.values()))[0].rpartition(".")[2]
    raise ConfigError(
        "\n  - ".join(["the group size does not divide the rows of some layers", *lines])
        + f"\neither use a size that fits everywhere (--group_size {best}), or keep these layers "
        f'(--ignore_layers {piece}) or give them their own size (layer_config {{"{piece}": '
        f'{{"group_size": {best}}}}})'
    )


def refuse_input_misfits(misfits: Sequence[Misfit]) -> None:
    """Refuse groups of inputs that do not divide: engines and compressed-tensors take whole ones only.

    Raises:
        UnsupportedError: there are any; names layers, in_features and the remedies.
    """
    if not misfits:
        return
    cases: dict[tuple[int, int], list[str]] = {}
    for misfit in misfits:
        cases.setdefault((misfit.group_size, misfit.n_in), []).append(misfit.name)
    piece = misfits[0].name.rpartition(".")[2]
    remedy = (
        f'leave the inputs alone (--act_bits 16, or layer_config {{"{piece}": {{"act_bits": 16}}}}), or keep '
        f"these layers (--ignore_layers {piece})"
    )
    raise UnsupportedError(
        "the inputs of some layers are not a whole number of groups",
        [
            Refusal("activations", f"{some(names, most=4)}: {size} does not divide {n_in} inputs", remedy)
            for (size, n_in), names in cases.items()
        ],
    )


def _line(group_size: int, n_in: int, names: list[str]) -> str:
    fitting = ", ".join(str(size) for size in GROUP_SIZES if divides(size, n_in))
    where = some(names, most=4)
    return f"{where}: in_features {n_in} is no multiple of {group_size}; these sizes fit: {fitting}"
