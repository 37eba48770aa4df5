"""What flows into linear layers: the mean square of each input channel, the weight of its rounding errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.errors import ConfigError, NumericsError, nearest

MaskOf = Callable[[], Tensor | None]


class InputSquares:
    """Sum of squares of each input channel over all tokens seen.

    Attributes:
        total: `[in] float64` (float32 on devices without it); None before the first token.
        count: tokens seen.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Count activations.

        Args:
            x: `[..., in]`, any float dtype; squared in float32.
            mask: bool over the leading dimensions of `x`, False for tokens that do not count; None: all
                count. Ignored where its shape is another, as behind a router that picked tokens.
        """
        if mask is not None and mask.shape == x.shape[:-1]:
            x = x[mask.to(x.device)]
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        exact = torch.float32 if x.device.type == "mps" else torch.float64
        squares = rows.square().sum(dim=0, dtype=exact)
        self.total = squares if self.total is None else self.total + squares
        self.count += rows.shape[0]

    def importance(self) -> Tensor | None:
        """Return the mean square of each channel, `[in] float32`; None when no token was seen.

        Raises:
            NumericsError: an activation was not finite.
        """
        if self.total is None or self.count == 0:
            return None
        mean = (self.total / self.count).float()
        if bad := int((~mean.isfinite()).sum()):
            raise NumericsError(f"{bad} of {mean.numel()} input channels saw activations that are not finite")
        return mean


@contextmanager
def observe_inputs(
    block: nn.Module, names: Sequence[str], mask_of: MaskOf | None = None
) -> Iterator[Mapping[str, InputSquares]]:
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
    modules = dict(block.named_modules())
    if missing := [name for name in names if name not in modules]:
        raise ConfigError(
            f'the block has no module "{missing[0]}"; {nearest(missing[0], filter(None, modules))}'
        )
    squares = {name: InputSquares() for name in names}
    handles = [
        modules[name].register_forward_pre_hook(partial(_observe, seen, mask_of), with_kwargs=True)
        for name, seen in squares.items()
    ]
    try:
        yield squares
    finally:
        for handle in handles:
            handle.remove()


def _observe(
    squares: InputSquares,
    mask_of: MaskOf | None,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    del module
    x = args[0] if args else next(iter(kwargs.values()))
    squares.add(x, None if mask_of is None else mask_of())
