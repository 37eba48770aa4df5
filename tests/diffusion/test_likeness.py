"""Signal-to-noise ratio and structural similarity, against slow formulas."""

from __future__ import annotations

import math

import pytest
import torch

from auto_round.diffusion.likeness import IDENTICAL, psnr, ssim


def pictures(size=16, noise=0.1):
    generator = torch.Generator().manual_seed(0)
    one = torch.rand(size, size, 3, generator=generator)
    return one, (one + noise * torch.randn(size, size, 3, generator=generator)).clamp(0, 1)


def test_psnr():
    one = torch.zeros(4, 4, 3)
    assert psnr(one, one + 0.1) == pytest.approx(20.0, abs=1e-4)
    assert psnr(one, one) == IDENTICAL


def test_ssim_is_the_formula():
    one, other = pictures(12)
    at = [i - 5.0 for i in range(11)]
    line = [math.exp(-(x**2) / (2 * 1.5**2)) for x in at]
    total = sum(line) ** 2
    found = []
    for channel in range(3):
        for top in range(2):
            for left in range(2):
                x, y = (p[top : top + 11, left : left + 11, channel].double() for p in (one, other))
                w = torch.tensor(line, dtype=torch.float64)[:, None] * torch.tensor(line) / total
                mx, my = (w * x).sum(), (w * y).sum()
                vx, vy = (w * x * x).sum() - mx**2, (w * y * y).sum() - my**2
                cross = (w * x * y).sum() - mx * my
                above = (2 * mx * my + 1e-4) * (2 * cross + 9e-4)
                found.append(float(above / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))))
    assert ssim(one, other) == pytest.approx(sum(found) / len(found), abs=1e-5)


def test_ssim_knows_equal_and_worse_pictures():
    one, near = pictures(16, 0.05)
    _, far = pictures(16, 0.5)
    assert ssim(one, one) == pytest.approx(1.0)
    assert 1 > ssim(one, near) > ssim(one, far)
    assert ssim(one[:4, :4], one[:4, :4]) == pytest.approx(1.0)  # smaller than a window
