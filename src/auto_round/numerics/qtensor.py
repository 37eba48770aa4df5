"""A quantized tensor (codes, scale and the format that gives them meaning), and the layer it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from auto_round.numerics.scale import Scale

if TYPE_CHECKING:
    from auto_round.numerics.format import Format

EVERYTHING = slice(None)


@dataclass(frozen=True, slots=True)
class QTensor:
    """Codes and scales of one weight.

    Attributes:
        codes: `[..., out, in]` uint8, the grid's code of each weight (for whole-number grids `n - grid.lo`).
        scale: steps and zero points, `[..., rows, n_groups]`.
        format: what the codes mean.
    """

    codes: Tensor
    scale: Scale
    format: Format

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., out, in]` of the weight."""
        return tuple(self.codes.shape)

    def take(self, index: tuple[int, ...] = (), rows: slice = EVERYTHING) -> QTensor:
        """Part of the weight: one matrix of several, or some rows.

        Args:
            index: which matrix, as far as the weight has axes before `[out, in]`.
            rows: outputs, a slice with both ends.

        Raises:
            UnsupportedError: the rows begin in the middle of a group.
        """
        if not index and rows == EVERYTHING:
            return self
        parts = take_parts(self.format, self.scale.parts, index, rows)
        return QTensor(self.codes[index][rows], self.format.rule.read(parts), self.format)


def take_parts(
    fmt: Format, parts: Mapping[str, Tensor], index: tuple[int, ...] = (), rows: slice = EVERYTHING
) -> dict[str, Tensor]:
    """Stored parts of a scale that belong to a part of the weight; arguments as for `QTensor.take`."""
    groups = fmt.group.scale_rows(rows)
    stored = fmt.rule.stored
    return {name: part[index][stored[name].rows(groups)] for name, part in parts.items()}


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """What is stored of one quantized layer: its weight, and the number of its input.

    Attributes:
        weight: codes and scales of the matrix.
        input_scale: the number of the input that calibration fixed, `[1]`: its step, or, where groups have
            measured numbers, what these are divided by (`FixedScale.number`); None where all is
            measured as the model runs, or where the input is left alone.
        input_zero: zero point of the input that calibration fixed, `[1]` int8; None where there is none.
    """

    weight: QTensor
    input_scale: Tensor | None = None
    input_zero: Tensor | None = None
