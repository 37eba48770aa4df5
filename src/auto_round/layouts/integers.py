"""What the layouts of whole-number formats share: which formats they hold, and zero points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from auto_round.errors import CheckpointError, Refusal
from auto_round.facts.tensor import TensorSpec
from auto_round.numerics.format import Format
from auto_round.numerics.grid import IntGrid
from auto_round.numerics.qtensor import QTensor
from auto_round.numerics.scale_integer import MinMax, SignedMax


def has_steps(fmt: Format) -> bool:
    """Whether a format stores one step for each group, and a zero point or none."""
    return isinstance(fmt.rule, (SignedMax, MinMax))


def is_symmetric(fmt: Format) -> bool:
    """Whether a whole-number format stores no zero point."""
    return isinstance(fmt.rule, SignedMax)


def refuse(who: str, fmt: Format, shape: Sequence[int], widths: Sequence[int]) -> Refusal | None:
    """Why a layout of whole-number matrices with steps per row and group cannot hold a weight, or None.

    Args:
        who: name of the layout.
        fmt: format of the weight.
        shape: `[out, in]`.
        widths: widths of codes that the layout can hold, bits.
    """
    if not isinstance(fmt.grid, IntGrid) or not has_steps(fmt):
        return Refusal(who, f"holds whole numbers with one step a group, not {fmt.name}")
    if fmt.grid.lo != (-(1 << (fmt.grid.bits - 1)) if is_symmetric(fmt) else 0):
        return Refusal(who, f"holds full-range whole numbers, not {fmt.name}")
    if fmt.grid.bits not in widths:
        return Refusal(who, f"holds codes of {_enumerate(widths)} bits, not {fmt.grid.bits}")
    if fmt.group.size == 0 or fmt.group.rows > 1:
        together = "a whole tensor" if fmt.group.size == 0 else f"{fmt.group.rows} rows together"
        return Refusal(who, f"has one scale for each row and group, none for {together}", "use group_size -1")
    if len(shape) != 2:
        return Refusal(who, f"holds matrices [out, in], not shape {list(shape)}")
    return None


def step_dtype(fmt: Format) -> torch.dtype:
    """Stored dtype of the step of a format that `refuse` let pass."""
    if not isinstance(fmt.rule, (SignedMax, MinMax)):
        raise TypeError(f"{fmt.name} does not store one step a group")
    return fmt.rule.dtype


def stored_zero(q: QTensor) -> Tensor:
    """Zero points `[out, n_groups]` uint8 as code values: `2**(bits-1)` for symmetric formats."""
    if is_symmetric(q.format):
        step = q.scale.parts["step"]
        return torch.full(step.shape, 1 << (q.format.grid.bits - 1), dtype=torch.uint8, device=step.device)
    return q.scale.parts["zero"]


def mirrored(q: QTensor, groups: Tensor) -> QTensor:
    """The same weights with some groups written the other way round: no number changes.

    With codes `n`, zero point `z`, step `s` and the highest code `t`, `(n - z) * s` is
    `((t - n) - (t - z)) * -s`, so codes and zero points change places end for end and the step its sign.

    Args:
        q: an asymmetric weight.
        groups: which groups to turn, bool `[out, n_groups]`.
    """
    top = (1 << q.format.grid.bits) - 1
    split = q.format.group.split(q.codes)
    codes = torch.where(groups.unsqueeze(-1), top - split, split)
    step, zero = q.scale.parts["step"], q.scale.parts["zero"]
    parts = {"step": torch.where(groups, -step, step), "zero": torch.where(groups, top - zero, zero)}
    return QTensor(q.format.group.join(codes, q.shape), q.format.rule.read(parts), q.format)


def assemble(who: str, codes: Tensor, step: Tensor, zero: Tensor, fmt: Format) -> QTensor:
    """Quantized tensor of codes `[out, in]` uint8, steps and stored zero points `[out, n_groups]`.

    Raises:
        CheckpointError: a symmetric format with other zero points than the middle of its codes.
    """
    if not is_symmetric(fmt):
        return QTensor(codes, fmt.rule.read({"step": step, "zero": zero}), fmt)
    middle = 1 << (fmt.grid.bits - 1)
    others = zero[zero != middle]
    if others.numel():
        raise CheckpointError(
            f"{who}: qzeros of a symmetric {fmt.grid.bits}-bit weight must all stand for {middle}, "
            f"{others.numel()} do not (the first for {int(others[0])}); the file is asymmetric or damaged"
        )
    return QTensor(codes, fmt.rule.read({"step": step}), fmt)


def check_parts(who: str, parts: Mapping[str, Tensor], spec: Mapping[str, TensorSpec]) -> None:
    """Compare stored tensors with what a layout would have written.

    Raises:
        CheckpointError: a tensor is missing or has another dtype or shape.
    """
    for suffix, want in spec.items():
        if suffix not in parts:
            raise CheckpointError(f"{who}: tensor {suffix} is missing; found {sorted(parts)}")
        got = parts[suffix]
        if (got.dtype, tuple(got.shape)) != (want.dtype, want.shape):
            raise CheckpointError(
                f"{who}: tensor {suffix} is {got.dtype} {list(got.shape)}, "
                f"expected {want.dtype} {list(want.shape)}"
            )


def _enumerate(values: Sequence[int]) -> str:
    """For example `2, 3, 4 or 8`."""
    head, last = values[:-1], values[-1]
    return f"{', '.join(map(str, head))} or {last}" if head else str(last)
