"""Kernel: one way to multiply activations by a quantized weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from auto_round.errors import Refusal
from auto_round.numerics.activation_float import InputFormat, with_number
from auto_round.numerics.format import Format
from auto_round.numerics.qtensor import QTensor


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """One linear layer as a kernel sees it.

    Attributes:
        fmt: numeric format of the weight.
        shape: `(out, in)`.
        dtype: dtype of the activations and of the result.
        device: kind of device that holds both, for example `cpu`.
        inputs: what the input is rounded to before it is multiplied; None where it is left alone. The number
            that calibration fixed for it, where there is one, lies in the buffer `INPUT`.
        held: dtype to which dequantized weights are rounded before they are multiplied, where that is another
            one; None for none.
    """

    fmt: Format
    shape: tuple[int, int]
    dtype: torch.dtype
    device: str
    inputs: InputFormat | None = None
    held: torch.dtype | None = None


INPUT = "input"
"""Buffer of a layer with the number of its input that calibration fixed, `[1]`.

It belongs to no weight, so no kernel prepares or restores it."""


def rounded_input(x: Tensor, buffers: Mapping[str, Tensor], spec: LinearSpec) -> Tensor:
    """What flows into a layer as it is to be multiplied, same shape and dtype.

    Args:
        x: `[..., in]`.
        buffers: those of the layer.
        spec: the layer.
    """
    if spec.inputs is None:
        return x
    return with_number(spec.inputs, buffers.get(INPUT)).fake_quantize(x)


class Kernel(Protocol):
    """Stateless: what is kept between calls is the mapping of buffers that `prepare` returns."""

    @property
    def name(self) -> str:
        """Name in the table, in messages and in `AutoRoundConfig(backend=...)`."""
        ...

    def __hash__(self) -> int:
        """Kernels are values: results of trials are kept by kernel."""
        ...

    def refuses(self, spec: LinearSpec) -> Refusal | None:
        """None when this kernel can run that layer on this machine, else the reason."""
        ...

    def compute_dtype(self, spec: LinearSpec) -> torch.dtype:
        """Dtype to which weights, activations and results are rounded; sums are kept in float32.

        Error: with `u` the unit roundoff of this dtype and `y` the exact result, at most
        `(4 u + 2 in 2^-24) |x| |W|^T + 4 u |y|`, where `|W|` also counts the distance of a zero point from
        the middle of its codes, which a kernel may round apart from the weight.
        """
        ...

    def prepare(self, q: QTensor, spec: LinearSpec) -> Mapping[str, Tensor]:
        """Reorder a weight once, at load; the tensors live where `q` lives."""
        ...

    def restore(self, buffers: Mapping[str, Tensor], spec: LinearSpec) -> QTensor:
        """Inverse of `prepare`, bit for bit: what saving a loaded model needs."""
        ...

    def linear(
        self, x: Tensor, buffers: Mapping[str, Tensor], spec: LinearSpec, bias: Tensor | None
    ) -> Tensor:
        """`x W^T + bias`, where `x` is rounded first if the layer says so.

        Args:
            x: `[..., in]` in `spec.dtype`.
            buffers: at least what `prepare` returned, and `INPUT` where calibration fixes a number of `x`.
            spec: the layer.
            bias: `[out]` or None.

        Returns:
            `[..., out]` in the dtype of `x`.
        """
        ...
