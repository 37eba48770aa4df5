"""What flows into linear layers: second moments of channels, the weights of rounding errors, and extremes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from auto_round.errors import ConfigError, NumericsError, nearest
from auto_round.numerics.importance import TILE, Importance
from auto_round.numerics.token_weights import token_energy, token_weights

MaskOf = Callable[[], Tensor | None]
"""Gives the mask of the batch that is running, `[batch, tokens]` bool; None where every token counts."""


class InputMoments:
    """Second moments of the input channels over all tokens seen.

    Each token is scaled down to what `token_weights` lets it count: one massive activation would hide what
    the other tokens need.

    Attributes:
        squares: sum of squares, `[in] float64` (float32 on devices without it); None before the first token.
        products: sum of products inside of each tile, `[n_tiles, TILE, TILE] float32`; None like `squares`.
        count: tokens seen.
    """

    def __init__(self) -> None:
        self.squares: Tensor | None = None
        self.products: Tensor | None = None
        self.count = 0

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Count the tokens of one call, each with its weight (`token_weights`).

        Args:
            x: `[..., in]`, any float dtype; multiplied in float32.
            mask: bool over the leading dimensions of `x`, False for tokens that do not count; None: all
                count. Ignored where its shape is another, as behind a router that picked tokens.
        """
        if mask is not None:
            mask = mask.to(x.device) if mask.shape == x.shape[:-1] else None
        weights = token_weights(token_energy(x), mask)
        if mask is not None:
            x, weights = x[mask], weights[mask]
        self.add_tokens(x.reshape(-1, x.shape[-1]), weights.reshape(-1))

    def add_tokens(self, x: Tensor, weights: Tensor) -> None:
        """Count tokens that all count, and whose weights are known.

        Args:
            x: `[tokens, in]`, any float dtype; multiplied in float32.
            weights: what `token_weights` lets each count, `[tokens]` float32.
        """
        rows = x.detach().float() * weights.unsqueeze(1).sqrt()
        exact = torch.float32 if x.device.type == "mps" else torch.float64
        squares = rows.square().sum(dim=0, dtype=exact)
        tiles = nn.functional.pad(rows, (0, -rows.shape[-1] % TILE)).reshape(
            len(rows), -(-rows.shape[-1] // TILE), TILE
        )
        products = torch.bmm(tiles.permute(1, 2, 0), tiles.permute(1, 0, 2))
        self.squares = squares if self.squares is None else self.squares + squares
        self.products = products if self.products is None else self.products.add_(products)
        self.count += rows.shape[0]

    def matrix(self, index: int) -> InputMoments:
        """Moments for one matrix of a stack, all of which see the same inputs: these."""
        del index
        return self

    def importance(self) -> Importance | None:
        """Return the mean squares and products; None when no token was seen.

        Products are shrunk as if `TILE` more tokens had been seen whose channels had nothing in common:
        few tokens say little about them.

        Raises:
            NumericsError: an activation was not finite.
        """
        if self.squares is None or self.products is None or self.count == 0:
            return None
        squares = (self.squares / self.count).float()
        if bad := int((~squares.isfinite()).sum()):
            raise NumericsError(
                f"{bad} of {squares.numel()} input channels saw activations that are not finite"
            )
        products = self.products / (self.count + TILE)
        padded = nn.functional.pad(squares, (0, -squares.shape[0] % TILE))
        products.diagonal(dim1=1, dim2=2).copy_(padded.reshape(-1, TILE))
        return Importance(squares, products)


class Extremes(NamedTuple):
    """The range of an input, 0 included: `least <= 0 <= largest`."""

    least: float
    largest: float


class InputExtremes:
    """Extremes of the activations at tokens that count: each counts in full, however large.

    Args:
        percentile: percent of the tokens that lie inside; the others, with the largest activations, are left
            out, at each end by itself. With 100 nothing is left out, and nothing is kept of single tokens.

    Attributes:
        ends: `[-least, largest]` of each token, `[tokens, 2]` float32 on the host, or with 100 percent of all
            together, `[1, 2]`; None before the first token.
    """

    def __init__(self, percentile: float = 100.0) -> None:
        self.ends: Tensor | None = None
        self._percentile = percentile

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Look at activations; arguments as for `InputMoments.add`."""
        if mask is not None and mask.shape == x.shape[:-1]:
            x = x[mask.to(x.device)]
        if x.numel():
            tokens = x.detach().reshape(-1, x.shape[-1])
            ends = torch.stack([-tokens.amin(-1), tokens.amax(-1)], -1).float().clamp_min(0)
            both = ends if self.ends is None else torch.cat([self.ends.to(ends.device), ends])
            self.ends = both.amax(0, keepdim=True) if self._percentile == 100 else both.cpu()

    def join(self, seen: Iterable[Tensor | None]) -> None:
        """Take the `ends` that several observers saw, this one among them, in place of its own."""
        found = [ends for ends in seen if ends is not None]
        if len(found) > 1:
            both = torch.cat([ends.to(found[0].device) for ends in found])
            self.ends = both.amax(0, keepdim=True) if self._percentile == 100 else both
        elif found:
            (self.ends,) = found

    def value(self) -> Extremes | None:
        """The extremes; None when no token was seen.

        Raises:
            NumericsError: an activation was not finite.
        """
        if self.ends is None:
            return None
        rank = max(1, math.ceil(len(self.ends) * self._percentile / 100))
        below, above = self.ends.sort(dim=0).values[rank - 1].tolist()
        if not (math.isfinite(below) and math.isfinite(above)):
            raise NumericsError("an input channel saw activations that are not finite")
        return Extremes(0.0 - below, above)


class _Observer(Protocol):
    def add(self, x: Tensor, mask: Tensor | None = None) -> None: ...


@contextmanager
def observe_inputs(
    block: nn.Module, names: Sequence[str], mask_of: MaskOf | None = None
) -> Iterator[Mapping[str, InputMoments]]:
    """Count what flows into some modules of a block while the context lasts.

    Args:
        block: any module; it is left as it was.
        names: dotted names of modules below `block` whose first input is `[..., in]`.
        mask_of: asked at each call for the mask of the batch that is running, `[batch, tokens] bool`.

    Yields:
        name -> its counts, filled by running the block.

    Raises:
        ConfigError: the block has no such module.
    """
    moments = {name: InputMoments() for name in names}
    with _observing(block, moments, mask_of):
        yield moments


@contextmanager
def observe_extremes(
    block: nn.Module, names: Sequence[str], mask_of: MaskOf | None = None, percentile: float = 100.0
) -> Iterator[Mapping[str, InputExtremes]]:
    """As `observe_inputs`, for the extremes of what flows in."""
    extremes = {name: InputExtremes(percentile) for name in names}
    with _observing(block, extremes, mask_of):
        yield extremes


@contextmanager
def _observing(
    block: nn.Module, observers: Mapping[str, _Observer], mask_of: MaskOf | None
) -> Iterator[None]:
    """Show observers the first input of their modules while the context lasts."""
    modules = dict(block.named_modules())
    if missing := [name for name in observers if name not in modules]:
        raise ConfigError(
            f'the block has no module "{missing[0]}"; {nearest(missing[0], filter(None, modules))}'
        )
    handles = [
        modules[name].register_forward_pre_hook(partial(_observe, seen, mask_of), with_kwargs=True)
        for name, seen in observers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observe(
    observer: _Observer,
    mask_of: MaskOf | None,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    del module
    x = args[0] if args else next(iter(kwargs.values()))
    mask = None if mask_of is None else mask_of()
    # What attention across to images reads does not stand at the rows' positions.
    observer.add(x, mask if mask is None or x.shape[: mask.dim()] == mask.shape else None)
