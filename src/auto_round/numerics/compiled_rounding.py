"""Rounding to whole numbers by a C program on CPUs: the bits of `Format` from one pass over the weights."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.compiled import addresses, can_read, numeric_library, threads_for
from auto_round.numerics.grid import Grid, IntGrid
from auto_round.numerics.group import Group
from auto_round.numerics.scale import Scale

SOURCE = Path(__file__).with_name("products.c")
"""It includes `rounding.c`."""

OPTIONS = ("-ffp-contract=off",)
"""A fused product is rounded once where PyTorch rounds twice."""

FEWEST = 16
"""Weights of a group from which on the program adds as PyTorch does: fewer are no vector of sixteen."""

_ROWS_TOGETHER, _COLUMNS_TOGETHER = 4, 32
"""What the program's products take at a time: rows and columns of a matrix are multiples of them."""

FEW_TOKENS = 64
"""Tokens up to which products by the program, row by row, take less time than those of a library, for which
all of the matrix and its gradient have to be written and read again (docs/LOG.md)."""


class _Slopes(ctypes.Structure):
    """`Slopes` of the program."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("grad", "to_step", "to_outside", "to_v", "v")),
        ("move", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("half", "held")),
    )


class _Products(ctypes.Structure):
    """`Products` of the program."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "grad", "to_x")),
        ("tokens", ctypes.c_int64),
    )


class _Request(ctypes.Structure):
    """`Matrix` of the program."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("w", "v", "step", "zero", "floor")),
        *((name, ctypes.c_float) for name in ("lo", "hi")),
        *((name, ctypes.c_int64) for name in ("rows", "length", "width")),
        *((name, ctypes.c_int) for name in ("half", "threads")),
    )


@dataclass(frozen=True, slots=True)
class CompiledRounding:
    """How the weights of one tensor are rounded to whole numbers; what `compiled_rounding` is asked for.

    Attributes:
        grid: numbers that weights are rounded to.
        group: weights that share a scale: pieces of a row.
        w: `[..., out, in]` float32 or bfloat16.
        v: rounding offsets, shape of `w`, float32; None for none.
        scale: of each group, `[..., out, n_groups]`.
    """

    grid: Grid
    group: Group
    w: Tensor
    v: Tensor | None
    scale: Scale

    def codes(self) -> Tensor:
        """`uint8` codes, shape of the weight."""
        codes = torch.empty(self.w.shape, dtype=torch.uint8, device="cpu")
        self._run("encode", *addresses(codes))
        return codes

    def weights(self, dtype: torch.dtype = torch.float32, *, hold: bool = False) -> Tensor:
        """The rounded weights, with straight-through gradients in offsets and scales, as `Format.rounded`.

        bfloat16 is written at once.
        """
        s, how = self.scale, _How(self, dtype if dtype is torch.bfloat16 else torch.float32, hold)
        made: Tensor = _Round.apply(self.w, s.step, s.zero, s.floor, self.v, how)  # type: ignore[no-untyped-call]
        return made.to(dtype)

    def write(self, out: Tensor) -> None:
        """Write the rounded weights, without gradients, into memory that is there.

        Args:
            out: of the weight's shape, float32 or bfloat16, contiguous, on the host.
        """
        self._run("round_to_half" if out.dtype is torch.bfloat16 else "round", *addresses(out))

    def multiplies(self, x: Tensor) -> bool:
        """Whether the program multiplies these tokens `[tokens, in]`: few of them, by a bfloat16 matrix."""
        rows, length = self.w.shape[-2:]
        return (
            x.dtype is torch.bfloat16
            and len(x) <= FEW_TOKENS
            and self.w.dim() == 2
            and rows % _ROWS_TOGETHER == 0
            and length % _COLUMNS_TOGETHER == 0
            and self.group.width(length) % _COLUMNS_TOGETHER == 0
            and _multiplies()
        )

    def multiply(self, x: Tensor, out: Tensor) -> None:
        """`x` times the transposed rounded weights, which are bfloat16 and never a tensor.

        Args:
            x: `[tokens, in]` bfloat16, see `multiplies`.
            out: where the product goes, `[tokens, out]` bfloat16, contiguous.
        """
        x = x.contiguous()
        self._run("multiply", *addresses(x), ctypes.c_int64(len(x)), *addresses(out))

    def learn(
        self, grad: Tensor, x: Tensor, to_x: Tensor | None, *, steps: bool, outside: bool, move: float
    ) -> tuple[Tensor | None, Tensor | None]:
        """As `slopes`, from the gradient of `multiply`'s product: that of the weights never is a tensor.

        Args:
            grad: of the product, `[tokens, out]` bfloat16.
            x: what was multiplied, `[tokens, in]` bfloat16.
            to_x: where its gradient goes, bfloat16 and contiguous; None where none is wanted.
            steps: as for `slopes`.
            outside: as for `slopes`.
            move: as for `slopes`.

        Raises:
            MemoryError: there is none left for what the program forms.
        """
        found = self._for_groups(steps, outside)
        grad, x = grad.contiguous(), x.contiguous()
        slopes = _Slopes(*addresses(None, *found, None, self.v), move, True, False)
        products = _Products(*addresses(x, grad, to_x), len(x))
        if self._run("learn", ctypes.byref(slopes), ctypes.byref(products)):
            raise MemoryError("no memory for a product with a rounded matrix")
        return found

    def _for_groups(self, steps: bool, outside: bool) -> tuple[Tensor | None, Tensor | None]:
        """Memory for gradients of steps and of floors, where they are wanted."""
        shape = self.group.scale_shape(self.w.shape)
        to_step, to_floor = (
            torch.empty(shape, dtype=torch.float32, device="cpu") if wanted else None
            for wanted in (steps, outside)
        )
        return to_step, to_floor

    def slopes(
        self,
        grad: Tensor,
        *,
        steps: bool,
        outside: bool,
        to_v: Tensor | None = None,
        move: float = 0.0,
        hold: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients from that of the rounded weights, straight through.

        Args:
            grad: of the rounded weights, float32 or bfloat16, shape of the weight.
            steps: whether that of the steps is wanted.
            outside: whether that of floors is wanted, which is that of zero points over the step.
            to_v: takes the gradient of the offsets.
            move: how far the offsets are moved, in place, against the sign of their gradient.
            hold: see `Format.rounded`.

        Returns:
            Those of steps and of floors, `[..., out, n_groups]`.
        """
        found = self._for_groups(steps, outside)
        places = addresses(grad, *found, to_v, self.v if move else None)
        asked = _Slopes(*places, move, grad.dtype is torch.bfloat16, hold)
        self._run("differentiate", ctypes.byref(asked))
        return found

    def _run(self, function: str, *arguments: Any) -> Any:
        length = self.w.shape[-1]
        parts = [self.scale.step, self.scale.zero, self.scale.floor]
        laid = [None if x is None else x.contiguous() for x in parts]
        request = _Request(
            *addresses(self.w, self.v, *laid),
            self.grid.lo,
            self.grid.hi,
            self.w.numel() // max(1, length),
            length,
            self.group.width(length),
            self.w.dtype is torch.bfloat16,
            threads_for(self.w.numel()),
        )
        return getattr(_program(), f"auto_round_{function}")(ctypes.byref(request), *arguments)


@dataclass(frozen=True, slots=True)
class _How:
    """What `_Round` knows beside tensors; `written` is a dtype that the program writes."""

    asked: CompiledRounding
    written: torch.dtype
    hold: bool


class _Round(torch.autograd.Function):
    """`format._FakeQuantize`, where the formulas stand; nothing is kept but what was given."""

    @staticmethod
    def forward(
        ctx: Any,
        w: Tensor,
        step: Tensor,
        zero: Tensor | None,
        floor: Tensor | None,
        v: Tensor | None,
        how: _How,
    ) -> Tensor:
        ctx.save_for_backward(w, step, zero, floor, v)
        ctx.grid, ctx.group, ctx.hold = how.asked.grid, how.asked.group, how.hold
        out = torch.empty(w.shape, dtype=how.written, device="cpu")
        how.asked.write(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w, step, zero, floor, v = ctx.saved_tensors
        _, wants_step, wants_zero, wants_floor, wants_v, *_ = ctx.needs_input_grad
        wants_zero = wants_zero and not ctx.hold
        to_v = torch.empty(w.shape, dtype=torch.float32, device="cpu") if wants_v else None
        asked = CompiledRounding(ctx.grid, ctx.group, w, v, Scale(step, zero, floor=floor))
        to_step, outside = asked.slopes(
            grad.contiguous(),
            steps=wants_step,
            outside=wants_zero or wants_floor,
            to_v=to_v,
            hold=ctx.hold,
        )
        d_zero = outside * step if wants_zero and outside is not None else None
        return None, to_step, d_zero, outside if wants_floor else None, to_v, None


def is_written_for(grid: Grid, group: Group) -> bool:
    """Whether the C program rounds to these numbers in these groups."""
    return type(grid) is IntGrid and group.rows == 1 and group.size != 0


def can_round(grid: Grid, group: Group) -> bool:
    """Whether the C program is here and rounds weights of this kind on a CPU, contiguous ones as models have.

    While such weights are tuned, nothing is kept of their rounding.
    """
    return is_written_for(grid, group) and _program() is not None


def compiled_rounding(
    grid: Grid, group: Group, w: Tensor, v: Tensor | None, scale: Scale
) -> CompiledRounding | None:
    """Rounding by the C program; None where PyTorch has to do it. Arguments as for `CompiledRounding`."""
    if not is_written_for(grid, group):
        return None
    offsets = w.new_empty(0, dtype=torch.float32) if v is None else v
    usable = (
        can_read(w, offsets)
        and w.dtype in (torch.float32, torch.bfloat16)
        and all(x is None or x.dtype is torch.float32 for x in (offsets, scale.step, scale.zero, scale.floor))
        and scale.step.shape == group.scale_shape(w.shape)
        and group.width(w.shape[-1]) >= FEWEST
    )
    return CompiledRounding(grid, group, w, v, scale) if usable and _program() is not None else None


@functools.cache
def _lanes() -> int:
    """How many numbers PyTorch adds side by side: 8, or 16 in builds that sum with AVX-512.

    It does not follow from what the CPU can do, so a sum tells: with 8 lanes the ninth number is added to
    the first, which swallows it; with 16 it is added behind the second, which cancels the first.
    """
    probe = torch.zeros(1, FEWEST, dtype=torch.float32, device="cpu")
    probe[0, 0], probe[0, 1], probe[0, 8] = 2.0**24, -(2.0**24), 1.0
    return 16 if float(probe.sum(-1)) else 8


@functools.cache
def _multiplies() -> bool:
    """Whether the program has products for this CPU."""
    program = _program()
    return program is not None and bool(program.auto_round_multiplies())


def _program() -> ctypes.CDLL | None:
    """The compiled program; None where it cannot be made."""
    return numeric_library(
        SOURCE,
        (*OPTIONS, f"-DLANES={_lanes()}"),
        "weights are rounded without a compiled program, which makes tuning slower",
    )
