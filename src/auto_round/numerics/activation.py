"""Activation formats: what the input of a quantized layer is rounded to while the model runs.

A format is all that one layer needs: formats whose scales come from calibration hold them. Codes of
activations are never stored, so there is one operation; it gives back numbers in the dtype of its argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from auto_round.errors import ConfigError

ACTIVATION_BITS = (2, 3, 4, 5, 6, 7, 8)
"""Widths of whole-number activations."""


class ActivationFormat(Protocol):
    """Rounding of what flows into one layer."""

    @property
    def name(self) -> str:
        """Name in messages, for example `int8_token_sym`."""
        ...

    @property
    def bits(self) -> int:
        """Width of a code."""
        ...

    @property
    def end_steps(self) -> float:
        """The largest number in units of the widest step: how finely inputs are told apart."""
        ...

    def fake_quantize(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` rounded to the format, same dtype; the gradient passes straight through."""
        ...


@dataclass(frozen=True, slots=True)
class TokenInt:
    """Whole numbers with a step (and zero point) for each token, measured as the model runs.

    All arithmetic is done in the dtype of the activations: so does compressed-tensors 0.20 when it runs a
    folder (`calculate_qparams` in `quantization/utils/helpers.py`, `_quantize_dequantize` in
    `quantization/lifecycle/forward_helpers.py`), and these numbers equal its numbers bit for bit. vLLM's
    kernel divides the larger extreme by 127, in float32; here 127.5 divides it: steps that differ by 0.4 %.

    Attributes:
        bits: width of a code, 2 to 8.
        sym: step from the larger extreme, no zero point; else the range from the least to the greatest value
            is spread over all codes.
    """

    bits: int
    sym: bool

    def __post_init__(self) -> None:
        if self.bits not in ACTIVATION_BITS:
            raise ConfigError(f"act_bits must be one of {ACTIVATION_BITS}, got {self.bits}")

    @property
    def name(self) -> str:
        """For example `int8_token_sym`."""
        return f"int{self.bits}_token_{'sym' if self.sym else 'asym'}"

    @property
    def end_steps(self) -> float:
        """`2**(bits-1)`."""
        return float(1 << (self.bits - 1))

    def fake_quantize(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` with each token (everything but the last axis) on its own grid, same dtype."""
        return straight_through(x, self)

    def round(self, x: Tensor) -> Tensor:
        """What `fake_quantize` gives, without a gradient."""
        half = 1 << (self.bits - 1)
        lo = x.amin(dim=-1, keepdim=True).clamp_max(0)
        hi = x.amax(dim=-1, keepdim=True).clamp_min(0)
        # Divisors are tensors on the device: CUDA multiplies by the reciprocal of a plain number.
        levels = torch.full((), 2 * half - 1, dtype=x.dtype, device=x.device)
        step = torch.maximum(-lo, hi) / (levels / 2) if self.sym else (hi - lo) / levels
        step = step.masked_fill(step == 0, torch.finfo(x.dtype).eps)
        u = x / step
        if self.sym:
            return u.clamp_(-half, half - 1).round_().mul_(step)
        zero = (-half - lo / step).clamp_(-half, half - 1).round_()
        return (u + zero).clamp_(-half, half - 1).round_().sub_(zero).mul_(step)


class Rounder(Protocol):
    """What a straight-through rounding rounds with."""

    def round(self, x: Tensor) -> Tensor:
        """`x` rounded, same shape and dtype."""
        ...


def straight_through(x: Tensor, fmt: Rounder) -> Tensor:
    """`fmt.round(x)`, whose gradient passes to `x` unchanged."""
    return _StraightThrough.apply(x, fmt)  # type: ignore[no-any-return,no-untyped-call]


class _StraightThrough(torch.autograd.Function):
    """Rounded forward, identity backward.

    A step follows the extremes of its token, so nothing but the extreme itself can saturate. That the step
    moves with the extreme is left out: it would add the token's rounding errors, of mean 0, to one gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, fmt: Rounder) -> Tensor:
        return fmt.round(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


ACTIVATIONS: dict[str, TokenInt] = {
    f.name: f for f in (TokenInt(bits, sym) for bits in ACTIVATION_BITS for sym in (True, False))
}
"""Activation formats by name."""
