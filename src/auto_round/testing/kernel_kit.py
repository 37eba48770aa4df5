"""Conformance of kernels: exact inputs give exact results, random ones stay within a derived bound.

A kernel that passes cannot swap codes, shift groups or move a zero point: exact results would change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from auto_round.kernels.check import error_bound
from auto_round.kernels.kernel import Kernel, LinearSpec
from auto_round.numerics.grid_float import FloatGrid
from auto_round.numerics.presets import int_format
from auto_round.numerics.presets_float import FLOAT_FORMATS
from auto_round.numerics.qtensor import QTensor
from auto_round.numerics.scale_float import OverTensor
from auto_round.numerics.scale_integer import MinMax, SignedMax
from auto_round.testing.grid_kit import every_code

TOKENS = (1, 3, 64, 130)
"""Tokens in a call: one while generating, a few, and enough for the paths of long prompts."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

E8M0_ONE = 127
"""E8M0 byte of a step of 1."""
_OCTET = 8
_LARGEST_EXACT = 448.0
"""Largest magnitude of 8-bit floats whose products with small whole numbers add up exactly in float32."""


def specs(device: str = "cpu") -> Iterator[LinearSpec]:
    """Layers of every width, with and without zero point, of several groups and shapes."""
    shapes = {32: (64, 256), 128: (96, 384), -1: (160, 192), 0: (32, 64), 96: (64, 160)}
    for bits in range(2, 9):
        for sym in (True, False):
            for group_size, shape in shapes.items():
                yield LinearSpec(int_format(bits, group_size, sym=sym), shape, torch.bfloat16, device)


def float_specs(device: str = "cpu") -> Iterator[LinearSpec]:
    """Layers of every floating format, in float32: sums of the others' products are not exact."""
    shapes = {"fp8_e4m3_128x128": (200, 256)}
    for name, fmt in FLOAT_FORMATS.items():
        yield LinearSpec(fmt, shapes.get(name, (64, 128)), torch.float32, device)


def exact_case(spec: LinearSpec, seed: int = 0) -> QTensor:
    """A weight with every code and steps that are powers of two: products with whole numbers are exact.

    Of floating numbers of 8 bits only those from 1 to 448 are taken, and 0: sums of the others are not exact.
    """
    if not isinstance(spec.fmt.rule, SignedMax | MinMax):
        return _exact_floats(spec, seed)
    g = torch.Generator().manual_seed(seed)
    fmt, shape = spec.fmt, spec.shape
    codes = torch.randint(0, 1 << fmt.grid.bits, shape, generator=g, dtype=torch.uint8)
    scales = fmt.group.scale_shape(shape)
    sign = torch.where(torch.rand(scales, generator=g) < 0.3, -1.0, 1.0)
    step = sign * 2.0 ** torch.randint(-2, 2, scales, generator=g)
    parts = {"step": step.to(torch.float16)}
    if not isinstance(fmt.rule, SignedMax):
        parts["step"] = step.abs().to(torch.float16)
        parts["zero"] = torch.randint(0, 1 << fmt.grid.bits, scales, generator=g, dtype=torch.uint8)
    return QTensor(codes.to(spec.device), fmt.rule.read(_to(parts, spec.device)), fmt)


def _exact_floats(spec: LinearSpec, seed: int) -> QTensor:
    g = torch.Generator().manual_seed(seed)
    fmt, grid = spec.fmt, spec.fmt.grid
    codes = every_code(grid)
    size = grid.decode(codes).abs()
    if isinstance(grid, FloatGrid) and grid.bits == _OCTET:
        codes = codes[(size == 0) | ((size >= 1) & (size <= _LARGEST_EXACT))]
    chosen = codes[torch.randint(0, len(codes), spec.shape, generator=g)]
    parts = dict(fmt.quantize(torch.randn(spec.shape, generator=g)).scale.parts)
    groups = fmt.group.scale_shape(spec.shape)
    power = torch.randint(-2, 2, groups, generator=g)
    for name, part in parts.items():
        if name == "exponent":
            parts[name] = (power + E8M0_ONE).to(torch.uint8)
        elif name == "block" and isinstance(fmt.rule, OverTensor):
            parts[name] = fmt.rule.blocks.encode(2.0**power)
        else:  # a step of each group, or the number that all groups share
            parts[name] = (2.0**power).to(part.dtype) if part.shape == groups else torch.full_like(part, 4.0)
    return QTensor(chosen.to(spec.device), fmt.rule.read(_to(parts, spec.device)), fmt)


def random_case(spec: LinearSpec, seed: int = 0) -> QTensor:
    """A rounded random weight."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(spec.shape, generator=g) + 0.3
    return spec.fmt.quantize((0.05 * w).to(spec.device))


def check_exact(kernel: Kernel, spec: LinearSpec, seed: int = 0) -> None:
    """Whole numbers as activations: the result is the exact one rounded once to the kernel's dtype.

    Raises:
        AssertionError: it is not.
    """
    q = exact_case(spec, seed)
    buffers = kernel.prepare(q, spec)
    w = spec.fmt.dequantize(q, torch.float64)
    g = torch.Generator().manual_seed(seed + 1)
    for tokens in TOKENS:
        x = torch.randint(-4, 5, (tokens, spec.shape[1]), generator=g).to(spec.device, spec.dtype)
        want = (x.double() @ w.t()).to(kernel.compute_dtype(spec)).to(spec.dtype)
        got = kernel.linear(x, buffers, spec, None)
        _equal(got, want, f"{kernel.name} on {spec.fmt.name} {list(spec.shape)} with {tokens} tokens")


def check_bound(kernel: Kernel, spec: LinearSpec, seed: int = 0) -> float:
    """Random activations and bias: the error stays below the bound of `Kernel.compute_dtype`.

    Returns:
        The largest error as a share of the bound.

    Raises:
        AssertionError: a share above 1.
    """
    q = random_case(spec, seed)
    buffers = kernel.prepare(q, spec)
    w = spec.fmt.dequantize(q).double()
    g = torch.Generator().manual_seed(seed + 1)
    worst = 0.0
    for tokens in TOKENS:
        x = torch.randn(2, tokens, spec.shape[1], generator=g).to(spec.device, spec.dtype)
        bias = torch.randn(spec.shape[0], generator=g).to(spec.device, spec.dtype)
        want = x.double() @ w.t() + bias.double()
        error = (kernel.linear(x, buffers, spec, bias).double() - want).abs()
        worst = max(worst, (error / error_bound(kernel, spec, q, x, want)).max().item())
    if worst > 1:
        raise AssertionError(f"{kernel.name} on {spec.fmt.name} errs {worst:.3g} times the bound")
    return worst


def check_restore(kernel: Kernel, spec: LinearSpec, seed: int = 0) -> None:
    """`restore(prepare(q))` is `q`, and what is kept is not the float weight.

    Raises:
        AssertionError: it is not.
    """
    for q in (exact_case(spec, seed), random_case(spec, seed)):
        back = kernel.restore(kernel.prepare(q, spec), spec)
        _equal(back.codes, q.codes, f"codes after {kernel.name}")
        if set(back.scale.parts) != set(q.scale.parts):
            raise AssertionError(f"{kernel.name} kept {set(back.scale.parts)} of {set(q.scale.parts)}")
        for name, part in q.scale.parts.items():
            _equal(back.scale.parts[name], part, f"{name} after {kernel.name}")


CHECKS: tuple[Callable[[Kernel, LinearSpec], object], ...] = (check_exact, check_bound, check_restore)
"""The kit."""


def fails(kernel: Kernel, spec: LinearSpec) -> bool:
    """Whether some check fails: what a deliberately wrong kernel must do."""
    for check in CHECKS:
        try:
            check(kernel, spec)
        except AssertionError:
            return True
    return False


def _to(parts: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: part.to(device) for name, part in parts.items()}


def _equal(got: Tensor, want: Tensor, what: str) -> None:
    if got.dtype != want.dtype or got.shape != want.shape or not torch.equal(got, want):
        wrong = int((got != want).sum()) if got.shape == want.shape else got.numel()
        raise AssertionError(f"{what}: {wrong} of {want.numel()} values are wrong")
