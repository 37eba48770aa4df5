"""Products of tokens with the matrices of experts, of which only the one at hand exists in full.

Whoever has the matrices in another form (codes, rounded as they are learned) gives one at a time. Every sum
has the order that it has in the grouped product of Transformers: outputs and gradients are the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from auto_round.numerics.activation import ActivationFormat

FEWEST = 32
"""Tokens of the smallest product of an expert whose number is filled up."""


class Matrices(Protocol):
    """The matrices of a stack, in whatever form they are kept.

    Attributes:
        height: rows of each.
        anchor: a scalar that gradients are asked for, so that `reached` is called; None where they are not.
    """

    @property
    def height(self) -> int:
        """Rows of each."""
        ...

    @property
    def anchor(self) -> Tensor | None:
        """A scalar that gradients are asked for; None where none are wanted."""
        ...

    def matrix(self, index: int, dtype: torch.dtype) -> Tensor:
        """One of them, `[out, in]`, valid until another one is asked for."""
        ...

    def multiply(self, index: int, x: Tensor, out: Tensor) -> bool:
        """Put `x` times one of them, transposed, into `out`.

        Returns:
            False where nothing was done: whoever asks multiplies by `matrix`.
        """
        ...

    def learn(self, index: int, grad: Tensor, x: Tensor, to_x: Tensor | None) -> bool:
        """Take the gradient of a product with one of them, in place of `reached`.

        Args:
            index: of the matrix.
            grad: of the product, `[tokens, out]`.
            x: what was multiplied, `[tokens, in]`.
            to_x: where its gradient goes, contiguous; None where none is wanted.

        Returns:
            False where nothing was done.
        """
        ...

    def expect(self) -> None:
        """One more product was made whose gradients will be handed to `learn` or `reached`."""
        ...

    def room(self, index: int, dtype: torch.dtype) -> Tensor | None:
        """Where the gradient of one of them may be put for `reached`; None for a tensor of its own."""
        ...

    def reached(self, index: int, gradient: Tensor) -> None:
        """Take the gradient of one of them, `[out, in]`; the tensor belongs to the taker.

        The product that it is from does not ask for this matrix again.
        """
        ...


class FixedMatrices:
    """The part of `Matrices` that is about gradients, for matrices that do not learn."""

    __slots__ = ()

    @property
    def anchor(self) -> Tensor | None:
        """None: no gradients are wanted."""
        return None

    def multiply(self, index: int, x: Tensor, out: Tensor) -> bool:
        """False: libraries do."""
        return False

    def learn(self, index: int, grad: Tensor, x: Tensor, to_x: Tensor | None) -> bool:
        """False: nothing is learned."""
        return False

    def expect(self) -> None:
        """Nobody waits for gradients."""

    def room(self, index: int, dtype: torch.dtype) -> Tensor | None:
        """None: nobody waits for gradients."""
        return None

    def reached(self, index: int, gradient: Tensor) -> None:
        """Nobody wants it."""


class OwnMatrices(FixedMatrices):
    """The matrices of a parameter `[n_experts, out, in]`, cast as they are multiplied."""

    def __init__(self, stack: Tensor) -> None:
        self.stack, self.height = stack, int(stack.shape[1])

    def matrix(self, index: int, dtype: torch.dtype) -> Tensor:
        """One of them, `[out, in]`."""
        return self.stack[index].to(dtype)


def filled_up(tokens: int) -> int:
    """Tokens of which an expert's product in bfloat16 is made: an eighth or 31 too many at most.

    oneDNN makes a program for each number of tokens. That takes longer than the product of a small matrix,
    and half a megabyte that lies wherever there was room between tensors of the step: after 200 steps these
    had left holes as large as all the rest (docs/LOG.md). Tokens of zeros change no bit of the products of
    others, nor of sums over tokens.
    """
    step = max(FEWEST, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


def _filled_up(x: Tensor) -> Tensor:
    """Tokens `[n, width]` and zeros behind them, where programs are made for each number of tokens."""
    more = filled_up(len(x)) - len(x)
    if not more or x.dtype is not torch.bfloat16 or x.device.type != "cpu":
        return x
    return torch.cat([x, x.new_zeros(more, x.shape[1])])


def _multiply(x: Tensor, factor: Tensor, out: Tensor) -> None:
    """Tokens `[n, in]` times a factor `[in, out]`, into `out`, `[n, out]`."""
    more = _filled_up(x)
    if len(more) == len(x):
        torch.mm(x, factor, out=out)
    else:
        out.copy_(torch.mm(more, factor)[: len(x)])


def product(x: Tensor, matrices: Matrices, ends: Sequence[int], *, turned: bool) -> Tensor:
    """Rows of `x`, each times the transposed matrix of its expert, `[rows, out]`.

    Args:
        x: `[rows, in]`, sorted by expert.
        matrices: one for each expert.
        ends: where the rows of each expert end.
        turned: the model keeps its matrices the other way round: libraries add in another order there.
    """
    made: Tensor = _Product.apply(x, matrices.anchor, matrices, ends, turned)  # type: ignore[no-untyped-call]
    return made


class _Product(torch.autograd.Function):
    """Rows of `x`, sorted by expert, times the transposed matrix of each; `ends` of each one's rows.

    Libraries add in another order where a factor lies in memory the other way round; with `turned` it does.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor | None, matrices: Matrices, ends: Sequence[int], turned: bool
    ) -> Tensor:
        out = x.new_zeros(len(x), matrices.height)
        for expert, rows in _spans(ends):
            if matrices.multiply(expert, x[rows], out[rows]):
                continue
            factor = matrices.matrix(expert, x.dtype).T
            _multiply(x[rows], factor.contiguous() if turned else factor, out[rows])
        ctx.save_for_backward(x)
        ctx.matrices, ctx.ends = matrices, ends
        if ctx.needs_input_grad[1]:
            matrices.expect()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        to_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        for expert, rows in _spans(ctx.ends):
            part = None if to_x is None else to_x[rows]
            if ctx.needs_input_grad[1] and ctx.matrices.learn(expert, grad[rows], x[rows], part):
                continue
            if to_x is not None:
                _multiply(grad[rows], ctx.matrices.matrix(expert, x.dtype), to_x[rows])
            if ctx.needs_input_grad[1]:
                factors = _filled_up(grad[rows]).T, _filled_up(x[rows])
                ctx.matrices.reached(expert, torch.mm(*factors, out=ctx.matrices.room(expert, x.dtype)))
        return to_x, (grad.new_zeros(()) if ctx.needs_input_grad[1] else None), None, None, None


def _spans(ends: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, with their rows."""
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end > start:
            yield expert, slice(start, end)


def rounded_tokens(x: Tensor, formats: Mapping[int, ActivationFormat], ends: Sequence[int]) -> Tensor:
    """Rows sorted by expert, those of each rounded to its format."""
    parts = [
        formats[expert].fake_quantize(x[rows]) if expert in formats else x[rows]
        for expert, rows in _spans(ends)
    ]
    return torch.cat([*parts, x[ends[-1] :]])


def product_of_stack(x: Tensor, stack: Tensor, ends: Sequence[int]) -> Tensor:
    """The product where gradients of the whole parameter are wanted."""
    parts = [x[rows] @ stack[expert].to(x.dtype).T for expert, rows in _spans(ends)]
    return torch.cat([*parts, x.new_zeros(len(x) - ends[-1], stack.shape[1])])
