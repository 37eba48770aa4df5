"""What an exporter may ask of a finished run to verify what it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from auto_round.models.source import ModelSource

if TYPE_CHECKING:
    from auto_round.export.exporter import Exporter


class WrittenRun(Protocol):
    """A run whose outputs are written, and the tuned model that they should be."""

    @property
    def source(self) -> ModelSource:
        """The original model."""
        ...

    @property
    def norms_tuned(self) -> bool:
        """Norm weights and biases are no longer the source's."""
        ...

    def reload(self, folder: Path, exporter: Exporter) -> dict[str, Any]:
        """Load a folder with Transformers and compare its predictions with the tuned model's.

        Raises:
            CheckpointError: it does not load, or predicts something else.
        """
        ...

    def held_out(self, most: int) -> Tensor | None:
        """The first tokens of a row that was not tuned on, `[at most most]` int64; None without data."""
        ...

    def compare(self, ids: Tensor, logits: Tensor) -> dict[str, float]:
        """Another reader's predictions beside those of the tuned model: figures for people.

        Args:
            ids: from `held_out`, `[tokens]`.
            logits: what the reader predicts after each token but the last, `[tokens - 1, vocabulary]`.
        """
        ...
