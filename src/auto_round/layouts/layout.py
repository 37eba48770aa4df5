"""Layout: a lossless permutation between codes and scales and the byte tensors of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from auto_round.errors import Refusal
from auto_round.facts.tensor import TensorSpec
from auto_round.numerics.format import Format
from auto_round.numerics.qtensor import QTensor


class Layout(Protocol):
    """Order of bytes; no float arithmetic and no rounding happens here.

    `shape` is always `[out, in]` of the weight; keys of the mappings are tensor suffixes such as `qweight`.
    """

    @property
    def name(self) -> str:
        """Name in messages, for example `gptq_v1`."""
        ...

    def accepts(self, fmt: Format, shape: Sequence[int]) -> Refusal | None:
        """None when this layout can hold a weight of that format and shape, else the reason."""
        ...

    def spec(self, fmt: Format, shape: Sequence[int]) -> Mapping[str, TensorSpec]:
        """What `pack` will return; needs no data."""
        ...

    def pack(self, q: QTensor) -> Mapping[str, Tensor]:
        """Stored tensors of a quantized weight."""
        ...

    def unpack(self, parts: Mapping[str, Tensor], fmt: Format, shape: Sequence[int]) -> QTensor:
        """Inverse of `pack`, bit for bit."""
        ...
