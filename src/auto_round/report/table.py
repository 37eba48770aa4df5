"""Tables of the page: what is shown is rounded, the exact value stands beside it for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from auto_round.units import duration, size

DIGITS = 4
"""Significant digits that people are shown."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number in a cell.

    Attributes:
        value: as the record has it.
        shown: as people read it.
    """

    value: float
    shown: str


Cell = str | Number

NONE = "-"
"""Where there is no number."""


@dataclass(frozen=True, slots=True)
class Table:
    """Numbers under a picture.

    Attributes:
        caption: what it holds.
        columns: heads, with units.
        rows: cells; the first of each row names it.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    @property
    def words(self) -> tuple[bool, ...]:
        """Whether a column holds words, which begin at the left, rather than numbers."""
        columns = zip(*self.rows, strict=True)
        return tuple(any(isinstance(cell, str) and cell != NONE for cell in column) for column in columns)


def number(value: float | None) -> Cell:
    """A number, rounded for people; a dash where there is none."""
    if value is None:
        return NONE
    return Number(value, f"{value:,}" if isinstance(value, int) else f"{value:.{DIGITS}g}")


def share(value: float) -> Cell:
    """A share of one, in percent."""
    return Number(value, f"{100 * value:.3g} %")


def nbytes(value: int) -> Cell:
    """Bytes."""
    return Number(value, size(value)) if value else NONE


def seconds(value: float) -> Cell:
    """Seconds of wall time."""
    return Number(value, duration(value))
