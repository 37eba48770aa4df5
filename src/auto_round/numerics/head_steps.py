"""FP8 numbers of queries, keys and values, with a step for each head or one for all."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from auto_round.numerics.activation import straight_through
from auto_round.numerics.group import Group
from auto_round.numerics.presets_float import fp8_format
from auto_round.numerics.rule import KnownScale
from auto_round.numerics.scale import Stats


@dataclass(frozen=True, slots=True, eq=False)
class HeadSteps:
    """FP8 (E4M3) with steps that calibration fixed; what lies above the calibrated range saturates.

    Computed in float32. compressed-tensors 0.20 divides in the dtype of the states
    (`_quantize` in `quantization/lifecycle/forward_helpers.py`), vLLM's kernels in float32.

    Attributes:
        step: `[heads]` or `[1]` as stored.
    """

    step: Tensor

    @classmethod
    def of(cls, largest: Tensor, dtype: torch.dtype) -> HeadSteps:
        """Steps under which the largest magnitudes become the largest number of the grid.

        Args:
            largest: `[heads]` or `[1]` float32.
            dtype: in which steps are stored.
        """
        fmt, hi = fp8_format(Group(-1), scale_dtype=dtype), largest.float().reshape(-1, 1)
        return cls(fmt.rule_for(Stats(-hi, hi)).fit(Stats(-hi, hi), fmt.grid).parts["step"].reshape(-1))

    def fake_quantize(self, x: Tensor) -> Tensor:
        """`x` `[batch, heads, tokens, width]` rounded, same dtype; the gradient passes straight through."""
        return straight_through(x, self)

    def round(self, x: Tensor) -> Tensor:
        """What `fake_quantize` gives, without a gradient."""
        with torch.no_grad():
            step = self.step.to(x.device).reshape(-1, 1)
            fmt = fp8_format(Group(-1), scale_dtype=step.dtype)
            by_head = x.transpose(0, 1)
            rows = by_head.reshape(len(step), -1).float()
            known = replace(fmt, bound=KnownScale(fmt.rule.read({"step": step})))
            nothing = torch.zeros_like(step, dtype=torch.float32)
            rounded = known.fake_quantize(rows, Stats(nothing, nothing), None, None)
            return rounded.to(x.dtype).reshape(by_head.shape).transpose(0, 1)
