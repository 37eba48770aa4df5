"""How far a kernel's result may be from the exact one, and a trial of kernels before they are trusted.

A wrong kernel (a driver, a compiler, another package's new version) does not fail: it answers nonsense.
Kernels that depend on such are therefore tried once for each kind of layer on the machine at hand, on a few
rows.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from auto_round.errors import Refusal
from auto_round.kernels.kernel import INPUT, Kernel, LinearSpec, rounded_input
from auto_round.numerics.activation_float import CalibratedScale
from auto_round.numerics.qtensor import QTensor

EPS32 = 2.0**-24
"""Unit roundoff of float32."""

TRIAL_ROWS = 256
"""Outputs of a trial; every kernel's blocks of outputs divide it."""

TRIAL_TOKENS = (1, 5, 160)
"""Tokens of a trial: one for each path that kernels have."""


def error_bound(kernel: Kernel, spec: LinearSpec, q: QTensor, x: Tensor, y: Tensor) -> Tensor:
    """Largest error that a kernel's dtype explains, the bound of `Kernel.compute_dtype`: float64 like `y`.

    Args:
        kernel: the kernel.
        spec: the layer.
        q: its weight.
        x: activations `[..., in]`.
        y: the exact result `[..., out]`.
    """
    u = torch.finfo(kernel.compute_dtype(spec)).eps / 2
    magnitude = spec.fmt.dequantize(q).double().abs() + _offset(q).expand(spec.shape)
    sums = x.double().abs() @ magnitude.t()
    return (4 * u + 2 * spec.shape[1] * EPS32) * sums + 4 * u * y.abs() + 1e-30


@functools.cache
def trial(kernel: Kernel, spec: LinearSpec) -> Refusal | None:
    """Multiply a random weight of a layer's kind; a refusal when the result is wrong or there is none.

    Results are kept for the life of the process: one trial for each format, shape and dtype.
    """
    try:
        with torch.device("cpu"), torch.no_grad():  # models are built under another default device
            right = _is_right(kernel, replace(spec, shape=(min(spec.shape[0], TRIAL_ROWS), spec.shape[1])))
    except Exception as error:  # noqa: BLE001 - compilers and drivers raise classes of their own
        first = str(error).strip().partition("\n")[0]
        return Refusal(kernel.name, f"fails on this machine: {type(error).__name__}: {first}")
    return None if right else Refusal(kernel.name, f"gives wrong results for {spec.fmt.name} on this machine")


def _is_right(kernel: Kernel, spec: LinearSpec) -> bool:
    generator = torch.Generator().manual_seed(0)
    q = spec.fmt.quantize(
        torch.randn(spec.shape, generator=generator, dtype=torch.float32, device="cpu").to(spec.device)
    )
    w = spec.fmt.dequantize(q).double()
    buffers = dict(kernel.prepare(q, spec))
    for tokens in TRIAL_TOKENS:
        x = torch.randn(tokens, spec.shape[1], generator=generator, dtype=torch.float32, device="cpu")
        x = x.to(spec.device, spec.dtype)
        if isinstance(spec.inputs, CalibratedScale):
            buffers[INPUT] = spec.inputs.fixed(float(x.max()), float(x.min())).number.to(spec.device)
        rounded = rounded_input(x, buffers, spec)
        y = rounded.double() @ w.t()
        error = (kernel.linear(x, buffers, spec, None).double() - y).abs()
        if not bool((error <= error_bound(kernel, spec, q, rounded, y)).all()):
            return False
    return True


def _offset(q: QTensor) -> Tensor:
    """Offset that a kernel may round apart from each weight: its zero point's distance from the middle."""
    if q.scale.zero is None:
        return torch.zeros(1, 1, dtype=torch.float64, device=q.codes.device)
    middle = 1 << (q.format.grid.bits - 1)
    offset = ((q.scale.zero - middle) * q.scale.step).abs().double()
    return q.format.group.spread(offset, q.shape)
