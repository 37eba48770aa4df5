"""The `fp8_scaled_mm` kernel: FP8 weights times FP8 activations by `torch._scaled_mm`.

`y = (a step_a) (w step_w)^T` with codes `a` and `w` in FP8 (E4M3), sums in float32, and one step for each
token and each output. Steps that are one for a whole tensor are repeated, so that one form serves for all.

Source: PyTorch 2.13 `torch/_meta_registrations.py` (`meta_scaled_mm`: order and shapes). Not measured on a
GPU by this version; every kind of layer is tried before it is used (`kernels/check.py`). On a CPU the same
operator shows that shapes, steps and codes are right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.errors import InternalError, Refusal
from auto_round.kernels.kernel import INPUT, LinearSpec
from auto_round.kernels.reference import PART
from auto_round.numerics.activation_float import (
    CalibratedScale,
    FixedScale,
    InputFormat,
    MeasuredScales,
    with_number,
)
from auto_round.numerics.format import Format
from auto_round.numerics.grid_float import E4M3
from auto_round.numerics.qtensor import QTensor

CAPABILITY = (8, 9)
"""Compute capability from which there are products of FP8."""

MULTIPLE = 16
"""Inputs and outputs are multiples of it."""

_CODES = torch.float8_e4m3fn
_STEP = "step"


@dataclass(frozen=True, slots=True)
class ScaledMmKernel:
    """FP8 by FP8, for layers whose weights and inputs have one step for each row or for the whole tensor.

    Attributes:
        device: kind of device that it runs on.
    """

    name: str = "fp8_scaled_mm"
    device: str = "cuda"

    def refuses(self, spec: LinearSpec) -> Refusal | None:
        """None for FP8 of such steps in bfloat16 on a device that multiplies FP8."""
        if spec.device != self.device:
            return Refusal(self.name, f"runs on {self.device}, not on {spec.device}")
        if why := _other_numbers(spec):
            return Refusal(self.name, why)
        if any(side % MULTIPLE for side in spec.shape):
            return Refusal(self.name, f"needs sides that are multiples of {MULTIPLE}, not {list(spec.shape)}")
        if self.device == "cuda" and not _has_fp8():
            return Refusal(
                self.name, "needs a CUDA device of compute capability 8.9 or more, and none is here"
            )
        return None

    def compute_dtype(self, spec: LinearSpec) -> torch.dtype:
        """Always bfloat16: results are rounded to it."""
        return torch.bfloat16

    def prepare(self, q: QTensor, spec: LinearSpec) -> Mapping[str, Tensor]:
        """Codes as FP8 numbers `[out, in]`, and the step as stored."""
        return {"codes": q.codes.view(_CODES), PART + _STEP: q.scale.parts[_STEP]}

    def restore(self, buffers: Mapping[str, Tensor], spec: LinearSpec) -> QTensor:
        """Inverse of `prepare`."""
        codes = buffers["codes"].view(torch.uint8)
        return QTensor(codes, spec.fmt.rule.read({_STEP: buffers[PART + _STEP]}), spec.fmt)

    def linear(
        self, x: Tensor, buffers: Mapping[str, Tensor], spec: LinearSpec, bias: Tensor | None
    ) -> Tensor:
        """`x W^T + bias`, with `x` rounded to FP8."""
        tokens = x.reshape(-1, x.shape[-1]).float()
        step = _input_format(spec, buffers).step(tokens)
        n_out = spec.shape[0]
        y = torch._scaled_mm(
            _to_codes(tokens, step),
            buffers["codes"].t(),
            scale_a=step.expand(len(tokens), 1).contiguous(),
            scale_b=buffers[PART + _STEP].float().reshape(1, -1).expand(1, n_out).contiguous(),
            out_dtype=torch.bfloat16,
        )
        y = y.reshape(*x.shape[:-1], n_out)
        return y if bias is None else y + bias


def _other_numbers(spec: LinearSpec) -> str:
    """Which numbers of a layer are none that are multiplied here; empty where all are."""
    if not _by_rows(spec.fmt):
        return f"holds FP8 weights with a step for each row or for all, not {spec.fmt.name}"
    if spec.inputs is None or not _rounds_by_rows(spec.inputs):
        how = "are left alone" if spec.inputs is None else f"are {spec.inputs.name}"
        return f"multiplies FP8 inputs with a step for each token or for all; these {how}"
    return "" if spec.dtype is torch.bfloat16 else f"takes bfloat16 activations, not {spec.dtype}"


def _to_codes(tokens: Tensor, step: Tensor) -> Tensor:
    """FP8 numbers nearest to `tokens / step`, saturated: the cast alone would give NaN above the largest."""
    return (tokens / step).clamp_(E4M3.lo, E4M3.hi).to(_CODES)


def _input_format(spec: LinearSpec, buffers: Mapping[str, Tensor]) -> MeasuredScales | FixedScale:
    """What inputs are rounded to, with its number."""
    found = None if spec.inputs is None else with_number(spec.inputs, buffers.get(INPUT))
    if isinstance(found, MeasuredScales | FixedScale):
        return found
    raise InternalError("fp8_scaled_mm runs a layer that it refuses")


def _by_rows(fmt: Format) -> bool:
    """Whether a format is FP8 with a step for each row, or one for all."""
    return (
        fmt.grid == E4M3 and fmt.group.size <= 0 and fmt.group.rows == 1 and list(fmt.rule.stored) == [_STEP]
    )


def _rounds_by_rows(inputs: InputFormat) -> bool:
    return isinstance(inputs, MeasuredScales | CalibratedScale) and _by_rows(inputs.format)


def _has_fp8() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= CAPABILITY
