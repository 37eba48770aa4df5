"""The canvas in the page's colours, and the picture it becomes: what knows the plotting library."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from auto_round.errors import ConfigError
from auto_round.report.svg import inline
from auto_round.report.theme import light

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

INSTALL = 'pip install "auto-round[report]"'
WIDTH = 400
"""Units of a picture's width. Cards are about as wide in pixels, so letters keep their size."""
_LETTERS = 11
_POINTS_PER_INCH = 72


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of the page.

    Attributes:
        svg: the element.
        title: its name.
        text: what it shows, in a sentence.
    """

    svg: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Words:
    """What is said of a picture: a key that is unique on the page, a title, and what is to be seen."""

    key: str
    title: str
    text: str


def require_plotting() -> None:
    """Refuse a page that cannot be drawn.

    Raises:
        ConfigError: a package is missing.
    """
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the report page is drawn with {' and '.join(missing)}, not installed here: {INSTALL}"
        )


def picture(
    words: Words, height: int, paint: Callable[[Sequence[Axes]], None], shares: Sequence[int] = (1,)
) -> Picture:
    """Draw a picture.

    Args:
        words: what is said of it.
        height: units.
        paint: draws on the axes.
        shares: height of each of the axes, one above the other, which have the horizontal axis in common.

    Raises:
        ConfigError: the plotting library is missing.
    """
    require_plotting()
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(_settings()):
        figure = Figure(figsize=(WIDTH / _POINTS_PER_INCH, height / _POINTS_PER_INCH), layout="constrained")
        FigureCanvasSVG(figure)
        grid = figure.subplots(len(shares), 1, sharex=True, squeeze=False, height_ratios=list(shares))
        axes = [row[0] for row in grid]
        paint(axes)
        text = StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return Picture(inline(text.getvalue(), words.key, words.title, words.text), words.title, words.text)


def legend(axes: Axes, columns: int = 2) -> None:
    """Names of what is drawn, above the axes."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, frameon=False, borderaxespad=0.2)


def whole_numbers(axes: Axes) -> None:
    """Mark the horizontal axis at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def plain_numbers(axis: Axis, marks: Sequence[float] = (1, 2, 5)) -> None:
    """Write plain numbers on a logarithmic axis, at some multiples of the powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=marks, numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _settings() -> Any:
    ink, muted, line = light("ink"), light("muted"), light("line")
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "auto-round",
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "axes.facecolor": "none",
        "axes.edgecolor": line,
        "axes.labelcolor": muted,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": line,
        "grid.linewidth": 0.7,
        "xtick.color": line,
        "ytick.color": line,
        "xtick.labelcolor": muted,
        "ytick.labelcolor": muted,
        "text.color": ink,
        "legend.labelcolor": ink,
        "font.family": "DejaVu Sans",
        "font.size": _LETTERS,
        "axes.labelsize": _LETTERS,
        "legend.fontsize": _LETTERS,
        "xtick.labelsize": _LETTERS - 1,
        "ytick.labelsize": _LETTERS - 1,
        "lines.linewidth": 1.6,
        "lines.markersize": 4.5,
    }
