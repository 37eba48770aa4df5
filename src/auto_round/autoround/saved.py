"""What `quantize_and_save` gives back: a pair whose model is read from disk when somebody looks at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, SupportsIndex


class Saved(tuple[Any, list[Path]]):
    """The quantized model and the folder of each format.

    Many scripts want the folders alone: then a model is not read, which takes its memory and, of a small one,
    a fifth of the time.
    """

    _read: Callable[[], Any] | None

    def __new__(cls, read: Callable[[], Any] | None, folders: list[Path]) -> Saved:
        """Make the pair.

        Args:
            read: gives the model; None for a pair without one.
            folders: of the formats.
        """
        made = super().__new__(cls, (None, folders))
        made._read = read
        return made

    def __iter__(self) -> Iterator[Any]:
        """The model, read now, and the folders."""
        yield self[0]
        yield self[1]

    def __getitem__(self, place: SupportsIndex | slice) -> Any:
        """One of them, or both; the model is read at most once."""
        if isinstance(place, slice):
            return (self[0], self[1])[place]
        if range(2)[place] == 0 and self._read is not None:
            model = self._read()
            self._read = lambda: model
            return model
        return super().__getitem__(place)
