"""A part of the page: words, a picture, and the numbers that it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from auto_round.report.draw import Picture
from auto_round.report.table import Cell, Table


@dataclass(frozen=True, slots=True)
class Section:
    """A card of the page.

    Attributes:
        key: unique on the page.
        title: heading.
        words: paragraphs above the picture.
        picture: None where numbers or words say it all.
        tables: shown when asked for; at once where there is no picture.
        wide: takes the whole width.
        code: a command to copy.
    """

    key: str
    title: str
    words: Sequence[str] = ()
    picture: Picture | None = None
    tables: Sequence[Table] = ()
    wide: bool = False
    code: str = ""


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure at the top: what it is, the value, and what to compare it with."""

    name: str
    value: Cell
    beside: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """All of a page.

    Attributes:
        title: of the window and the heading.
        subtitle: one line.
        tiles: figures at the top.
        notices: what a reader should know first.
        sections: the cards.
    """

    title: str
    subtitle: str
    tiles: Sequence[Tile] = ()
    notices: Sequence[str] = ()
    sections: Sequence[Section] = field(default_factory=tuple)
