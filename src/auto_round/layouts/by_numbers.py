"""Several orders of bytes under one name, told apart by the numbers that they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from auto_round.errors import InternalError, Refusal
from auto_round.facts.tensor import TensorSpec
from auto_round.layouts.compressed import IntQuantized
from auto_round.layouts.compressed_float import FloatLayout
from auto_round.numerics.format import Format
from auto_round.numerics.qtensor import QTensor


@dataclass(frozen=True, slots=True)
class ByNumbers:
    """The first of its layouts that holds a format.

    Attributes:
        name: name of the layout.
        layouts: those that it stands for; no two hold the same numbers.
    """

    name: str
    layouts: tuple[FloatLayout | IntQuantized, ...]

    def accepts(self, fmt: Format, shape: Sequence[int]) -> Refusal | None:
        """None where one of the layouts holds such a weight, else the reason of the one for its numbers."""
        layout = self._find(fmt)
        if layout is None:
            return Refusal(self.name, f"holds numbers of {self._known()}, not those of {fmt.name}")
        return layout.accepts(fmt, shape)

    def spec(self, fmt: Format, shape: Sequence[int]) -> Mapping[str, TensorSpec]:
        """What `pack` will return."""
        return self._of(fmt).spec(fmt, shape)

    def pack(self, q: QTensor) -> Mapping[str, Tensor]:
        """Stored tensors of a quantized weight."""
        return self._of(q.format).pack(q)

    def unpack(self, parts: Mapping[str, Tensor], fmt: Format, shape: Sequence[int]) -> QTensor:
        """Inverse of `pack`.

        Raises:
            CheckpointError: tensors that `pack` would not have written.
        """
        return self._of(fmt).unpack(parts, fmt, shape)

    def holds(self, fmt: Format) -> bool:
        """Whether one of the layouts has the numbers and scales of a format, sizes aside."""
        return self._find(fmt) is not None

    def _known(self) -> str:
        return " or ".join(layout.name for layout in self.layouts)

    def _find(self, fmt: Format) -> FloatLayout | IntQuantized | None:
        return next((layout for layout in self.layouts if layout.holds(fmt)), None)

    def _of(self, fmt: Format) -> FloatLayout | IntQuantized:
        layout = self._find(fmt)
        if layout is None:
            raise InternalError(f"{self.name} holds no {fmt.name}")
        return layout
