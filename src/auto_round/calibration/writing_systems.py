"""In which scripts calibration text is written: what a model was not shown, it may forget."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from auto_round.calibration.row import CalibrationRow

ROWS = 64
"""Rows that are looked at, evenly spread: more tell nothing new and take seconds to decode."""


def letters_of(rows: Sequence[CalibrationRow], decode: Callable[[list[int]], str]) -> dict[str, int]:
    """Letters by script, the most frequent first.

    Args:
        rows: of text.
        decode: turns token ids into text.

    Returns:
        Script as Unicode names it (`Latin`, `Cyrillic`, `Cjk`, `Hiragana`, `Arabic`, ...) -> letters in it.
    """
    characters = Counter[str]()
    for row in rows[:: -(-len(rows) // ROWS)]:
        characters.update(decode(row.tokens.tolist()))
    found = Counter[str]()
    for character, count in characters.items():
        if character.isalpha():
            found[unicodedata.name(character, "UNKNOWN").split()[0].capitalize()] += count
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))
