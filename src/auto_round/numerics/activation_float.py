"""Activations in the floating formats of weights: one definition of the numbers serves both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.numerics.activation import straight_through
from auto_round.numerics.format import Format
from auto_round.numerics.scale import Stats


@dataclass(frozen=True, slots=True)
class MeasuredScales:
    """A format of weights as a format of activations: scales follow from each group as the model runs.

    Scales and rounding are computed in float32, as vLLM's kernels do; powers of two are exact in any dtype.

    Attributes:
        format: numbers, and groups along the last axis; size -1 is a group for each token, 0 one for all.
    """

    format: Format

    @property
    def name(self) -> str:
        """For example `mxfp4_measured`."""
        return f"{self.format.name}_measured"

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.format.grid.bits

    @property
    def end_steps(self) -> float:
        """That of the grid."""
        return self.format.grid.end_steps

    def fake_quantize(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` rounded to the format, same dtype; the gradient passes straight through."""
        return straight_through(x, self)

    def round(self, x: Tensor) -> Tensor:
        """What `fake_quantize` gives, without a gradient."""
        with torch.no_grad():
            tokens = x.reshape(-1, x.shape[-1]).float()
            grouped = self.format.group.split(tokens)
            # Not `format.stats`: that looks for infinities, and so would wait for an accelerator.
            stats = Stats(grouped.amin(-1).clamp_max_(0), grouped.amax(-1).clamp_min_(0))
            return self.format.fake_quantize(tokens, stats, None, None).to(x.dtype).reshape(x.shape)
