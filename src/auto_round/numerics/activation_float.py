"""Activation formats made from the floating formats of weights, so that both have the same numbers.

Scales are measured as the model runs (`MeasuredScales`), or calibration fixes one number of them
(`CalibratedScale`, which becomes a `FixedScale`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from auto_round.errors import InternalError
from auto_round.numerics.activation import ActivationFormat, straight_through
from auto_round.numerics.format import Format
from auto_round.numerics.rule import BoundRule, KnownScale
from auto_round.numerics.scale import Stats
from auto_round.numerics.scale_float import BoundOverTensor, LargestToTop, OverTensor


@dataclass(frozen=True, slots=True)
class _OfFormat:
    """What activation formats take from a format of weights.

    Attributes:
        format: numbers, and groups along the last axis.
    """

    format: Format

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.format.grid.bits

    @property
    def end_steps(self) -> float:
        """That of the grid."""
        return self.format.grid.end_steps


@dataclass(frozen=True, slots=True)
class MeasuredScales(_OfFormat):
    """A format of weights as a format of activations: scales follow from each group as the model runs.

    Scales and rounding are computed in float32, as vLLM's kernels do; powers of two are exact in any dtype.

    Attributes:
        format: numbers, and groups along the last axis; size -1 is a group for each token, 0 one for all.
    """

    @property
    def name(self) -> str:
        """For example `mxfp4_measured`."""
        return f"{self.format.name}_measured"

    def fake_quantize(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` rounded to the format, same dtype; the gradient passes straight through."""
        return straight_through(x, self)

    def round(self, x: Tensor) -> Tensor:
        """What `fake_quantize` gives, without a gradient."""
        with torch.no_grad():
            tokens = x.reshape(-1, x.shape[-1]).float()
            stats = _measure(tokens, self.format)
            return self.format.fake_quantize(tokens, stats, None, None).to(x.dtype).reshape(x.shape)

    def step(self, tokens: Tensor) -> Tensor:
        """Step of each group of `[tokens, in]` float32: `[tokens, n_groups]` float32, `[1, 1]` for size 0."""
        stats = _measure(tokens, self.format)
        return self.format.rule_for(stats).fit(stats, self.format.grid).step


def _measure(tokens: Tensor, fmt: Format) -> Stats:
    """Range of each group of `[tokens, in]` float32."""
    grouped = fmt.group.split(tokens)
    # Not `format.stats`: that looks for infinities, and so would wait for an accelerator.
    return Stats(grouped.amin(-1).clamp_max_(0), grouped.amax(-1).clamp_min_(0))


@dataclass(frozen=True, slots=True)
class CalibratedScale(_OfFormat):
    """An activation format with one number for the whole tensor, which calibration has not fixed yet.

    The number follows from the largest magnitude seen at calibration. It is the step itself (FP8), or what
    the measured numbers of the groups are divided by (NVFP4).

    Attributes:
        format: numbers, and groups along the last axis: one for the whole tensor, or groups that share a
            number.
    """

    @property
    def name(self) -> str:
        """For example `nvfp4_calibrated`."""
        return f"{self.format.name}_calibrated"

    @property
    def part(self) -> str:
        """Name of the number in the stored parts of the format's scales."""
        (name,) = self.format.shared
        return name

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the number is stored."""
        return self.format.rule.stored[self.part].dtype

    def stored_in(self, dtype: torch.dtype) -> CalibratedScale:
        """The same with a step that is stored in a model's dtype; other numbers have dtypes of their own."""
        rule = self.format.rule
        if not isinstance(rule, LargestToTop):
            return self
        return replace(self, format=replace(self.format, rule=replace(rule, dtype=dtype)))

    @property
    def has_zero(self) -> bool:
        """Calibration fixes a zero point too."""
        return False

    def fixed(self, largest: float, least: float | None = None) -> FixedScale:
        """The format for inputs from `least` (None: `-largest`) to `largest`, both float32."""
        size = largest if least is None else max(largest, -least)
        hi = torch.full((1, 1), size, dtype=torch.float32, device="cpu")
        stats = Stats(-hi, hi)
        scale = self.format.bind(stats).rule_for(stats).fit(stats, self.format.grid)
        return self.holding(scale.parts[self.part])

    def holding(self, number: Tensor, zero: Tensor | None = None) -> FixedScale:
        """The format with the number as it is stored, one element in the dtype of the part.

        Args:
            number: the number.
            zero: the zero point as it is stored, one element; None for formats without (`has_zero`).
        """
        return FixedScale(self.format, number.reshape(1))


@dataclass(frozen=True, slots=True, eq=False)
class FixedScale(_OfFormat):
    """An activation format whose number for the whole tensor is known; see `CalibratedScale`.

    What lies above the calibrated range saturates. Computed in float32, as for `MeasuredScales`, but for
    the step that the extreme of a measured group asks for: in the dtype of the activations, as
    compressed-tensors 0.20 divides there (`calculate_qparams` in `quantization/utils/helpers.py`). One group
    in a hundred would get another scale; codes this coarse carry that on until the models differ by half of
    what all rounding does. vLLM's kernel divides in float32.

    Attributes:
        format: numbers, and groups along the last axis.
        number: the number as it is stored, `[1]` in the dtype of the part, on any device.
    """

    number: Tensor

    @property
    def name(self) -> str:
        """For example `nvfp4_fixed`."""
        return f"{self.format.name}_fixed"

    def fake_quantize(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` rounded to the format, same dtype; the gradient passes straight through."""
        return straight_through(x, self)

    def round(self, x: Tensor) -> Tensor:
        """What `fake_quantize` gives, without a gradient."""
        with torch.no_grad():
            tokens = x.reshape(-1, x.shape[-1]).float()
            fmt = replace(self.format, bound=self._rule(x.device))
            return (
                fmt.fake_quantize(tokens, self._measured(tokens, x.dtype), None, None)
                .to(x.dtype)
                .reshape(x.shape)
            )

    def step(self, tokens: Tensor) -> Tensor:
        """Step of each group of `[tokens, in]` float32: `[tokens, n_groups]` float32, `[1, 1]` for size 0."""
        return self._rule(tokens.device).fit(self._measured(tokens, tokens.dtype), self.format.grid).step

    def _rule(self, device: torch.device) -> BoundRule:
        """The scale rule that knows the number."""
        number = self.number.to(device).reshape(1, 1)
        rule = self.format.rule
        if isinstance(rule, OverTensor):
            return BoundOverTensor(rule, number)
        (part,) = self.format.shared
        return KnownScale(rule.read({part: number}))

    def _measured(self, tokens: Tensor, dtype: torch.dtype) -> Stats:
        """Ranges of groups whose extremes are as many steps as the grid goes, of steps that `dtype` holds.

        Where one group is the whole tensor its scale is known, and nothing is measured.
        """
        if self.format.group.size == 0:
            nothing = tokens.new_zeros((1, 1))
            return Stats(nothing, nothing)
        stats = _measure(tokens, self.format)
        # A tensor on the device: CUDA multiplies by the reciprocal of a plain number.
        end = torch.full((), self.format.grid.hi, dtype=torch.float32, device=tokens.device)
        return Stats(*((side / end).to(dtype).float() * end for side in (stats.lo, stats.hi)))


InputFormat: TypeAlias = ActivationFormat | CalibratedScale
"""What the input of a layer is rounded to: a format, or one whose scale waits for calibration."""


def with_number(fmt: InputFormat, number: Tensor | None) -> ActivationFormat:
    """The format that rounds inputs: the same, or where calibration fixes a number, the one that has it.

    Args:
        fmt: format of a layer's input.
        number: the number as it is stored, where calibration fixes one.

    Raises:
        InternalError: there is no number where one is needed.
    """
    if not isinstance(fmt, CalibratedScale):
        return fmt
    if number is None:
        raise InternalError(f"nothing has fixed the number of {fmt.name} inputs")
    return fmt.holding(number)
