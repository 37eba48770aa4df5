"""How alike two pictures are: peak signal-to-noise ratio and structural similarity."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WINDOW, _SPREAD = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
"""Window and constants of Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error
visibility to structural similarity", IEEE Transactions on Image Processing 13 (2004); numbers from 0 to 1."""

IDENTICAL = 99.0
"""What equal pictures get instead of an infinite ratio, dB."""


def psnr(one: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio of two pictures with numbers from 0 to 1, dB; at most `IDENTICAL`."""
    error = float((one.double() - other.double()).square().mean())
    return min(IDENTICAL, -10 * math.log10(error)) if error else IDENTICAL


def ssim(one: Tensor, other: Tensor) -> float:
    """Structural similarity of two pictures `[height, width, channels]` with numbers from 0 to 1.

    The mean over channels and windows; windows are smaller where a picture is.
    """
    x, y = (picture.double().permute(2, 0, 1).unsqueeze(1) for picture in (one, other))
    size = min(_WINDOW, x.shape[-1], x.shape[-2])
    at = torch.arange(size, dtype=torch.float64, device=x.device) - (size - 1) / 2
    line = torch.exp(-(at**2) / (2 * _SPREAD**2))
    window = (line[:, None] * line[None, :] / line.sum() ** 2)[None, None]

    def mean(values: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(values, window)

    mx, my = mean(x), mean(y)
    vx, vy, cross = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    found = (2 * mx * my + _C1) * (2 * cross + _C2) / ((mx**2 + my**2 + _C1) * (vx + vy + _C2))
    return float(found.mean())
