"""A quantized tensor (codes, scale and the format that gives them meaning), and the layer it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from auto_round.numerics.scale import Scale

if TYPE_CHECKING:
    from auto_round.numerics.format import Format


@dataclass(frozen=True, slots=True)
class QTensor:
    """Codes and scales of one weight.

    Attributes:
        codes: `[..., out, in]` uint8, the grid's code of each weight (for whole-number grids `n - grid.lo`).
        scale: steps and zero points, `[..., out, n_groups]`.
        format: what the codes mean.
    """

    codes: Tensor
    scale: Scale
    format: Format

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., out, in]` of the weight."""
        return tuple(self.codes.shape)


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """What is stored of one quantized layer: its weight, and scales of what flows in and out.

    Attributes:
        weight: codes and scales of the matrix.
        input_scale: step of the input where calibration fixed it, float32; None where it is measured as the
            model runs, or where the input is left alone.
        output_scale: step of the output where a cache holds it quantized, float32; None elsewhere.
    """

    weight: QTensor
    input_scale: Tensor | None = None
    output_scale: Tensor | None = None
