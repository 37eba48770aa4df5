"""`AutoRoundMLLM`: the class that models with images had of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from auto_round.autoround.api import AutoRound

if TYPE_CHECKING:
    from torch import nn


class AutoRoundMLLM(AutoRound):
    """`AutoRound` with the processor among its first arguments, as earlier versions had it.

    Models that read images need no class of their own.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        tokenizer: Any = None,
        processor: Any = None,
        image_processor: Any = None,
        *positional: Any,
        **named: Any,
    ) -> None:
        """Take the arguments of `AutoRound`.

        Args:
            model: folder or hub name, or a Transformers model in memory (left as it is).
            tokenizer: folder or hub name, or a tokenizer.
            processor: folder or hub name, or a processor; the model's own when not given.
            image_processor: another image processor than the processor's.
            positional: further arguments in the order of `AutoRound`.
            named: arguments of `AutoRound` by name.
        """
        given = {"processor": processor, "image_processor": image_processor}
        named |= {name: value for name, value in given.items() if value is not None}
        super().__init__(model, tokenizer, *positional, **named)
