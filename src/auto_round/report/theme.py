"""Colours of the page, each with a value for light and one for dark rooms.

Pictures are drawn in the light colours. Each of these is used for one thing only, so it can be replaced by
the name of a CSS variable afterwards, and the reader's setting decides.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

TONES: Final = MappingProxyType(
    {
        "page": ("#f3f5f8", "#0e1217"),
        "card": ("#fefeff", "#171c24"),
        "ink": ("#1b2330", "#e8ebf0"),
        "muted": ("#576272", "#a2adbb"),
        "line": ("#dbe0e8", "#2d3642"),
        "accent": ("#1d5fae", "#74b0ff"),
        "before": ("#a54d0a", "#ffa866"),
        "third": ("#1a7a4c", "#57d297"),
        "fourth": ("#7440ae", "#c8a2ff"),
        "notice": ("#fff4dc", "#33290f"),
        "on-cell": ("#11161d", "#11161e"),
        "bits-2": ("#e8695c", "#e8695d"),
        "bits-3": ("#f09a4f", "#f09a50"),
        "bits-4": ("#efc94c", "#efc94d"),
        "bits-5": ("#b5cc63", "#b5cc64"),
        "bits-6": ("#74c69d", "#74c69e"),
        "bits-8": ("#66a9d8", "#66a9d9"),
        "bits-16": ("#c3cad4", "#8e98a6"),
        "heat-0": ("#eaf1fa", "#1c2a3c"),
        "heat-1": ("#cadef3", "#203c5d"),
        "heat-2": ("#a0c4e8", "#27527f"),
        "heat-3": ("#6fa3d6", "#356da6"),
        "heat-4": ("#4280be", "#4f8ecb"),
        "heat-5": ("#265e9c", "#7fb4ea"),
        "heat-6": ("#123d6e", "#bfdcfb"),
    }
)
"""Name -> colour on a light and on a dark page. Text on `card` has a contrast of at least 4.5 in both."""

SERIES: Final = ("accent", "before", "third", "fourth")
"""Tones of several runs in one picture."""
HEAT: Final = tuple(name for name in TONES if name.startswith("heat-"))
"""From little to much."""
_BITS: Final = {int(name.removeprefix("bits-")): name for name in TONES if name.startswith("bits-")}


def light(name: str) -> str:
    """The colour to draw in."""
    return TONES[name][0]


def tone_of_bits(bits: int) -> str:
    """Tone of a width: its own, or that of the widest one below."""
    return _BITS[max((width for width in _BITS if width <= bits), default=min(_BITS))]


def variables(dark: bool) -> str:
    """CSS that gives the tones their values."""
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in TONES.items())
