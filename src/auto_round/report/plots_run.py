"""Pictures of one run: plan, losses, errors of layers, massive activations, time and memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from auto_round.report.draw import Picture, Words, legend, picture, plain_numbers, whole_numbers
from auto_round.report.record import UnitCost
from auto_round.report.run import PlanLine, Sensitivity, UnitRecord
from auto_round.report.theme import HEAT, light, tone_of_bits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROW = 24
"""Units of height of a row of layers."""
_AROUND = 64
"""Units of height of what is around them."""
_SHOWN_WIDTH = 0.07
"""Share of the picture's width from which on a stretch of blocks has room for a number."""
_MEGA = 1e6


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighbouring blocks that look alike in one row.

    Attributes:
        first: block.
        last: block.
        tone: name of a colour.
        text: written in it where there is room.
    """

    first: int
    last: int
    tone: str
    text: str = ""


def short(kind: str, others: Sequence[str]) -> str:
    """The last word of a kind of layer, or more where another one ends alike."""
    words = kind.split(".")
    for count in range(1, len(words)):
        ending = ".".join(words[-count:])
        if not any(other != kind and f".{other}".endswith(f".{ending}") for other in others):
            return ending
    return kind


def plan_picture(words: Words, plan: Sequence[PlanLine], blocks: int) -> Picture:
    """Layers x blocks, coloured by bits.

    Args:
        words: what is said of it.
        plan: what became of the layers.
        blocks: how many there are.
    """
    rows: dict[str, list[Stretch]] = {}
    for line in plan:
        stretches = line.blocks or [(0, max(blocks - 1, 0))]
        tone, text = tone_of_bits(line.bits), f"{line.stored_bits:.3g}"
        rows.setdefault(line.kind, []).extend(Stretch(first, last, tone, text) for first, last in stretches)
    widths = sorted({line.bits for line in plan})
    keys = {f"{bits} bits": tone_of_bits(bits) for bits in widths}
    return _rows_picture(words, rows, keys)


def errors_picture(words: Words, units: Sequence[UnitRecord]) -> Picture:
    """Kinds of layers x blocks, coloured by the share of their output that rounding changed."""
    values = [(kind, at, error) for at, unit in enumerate(units) for kind, error in unit.errors.items()]
    return _heat(words, values, lambda value: f"{100 * value:.2g} %")


def sensitivity_picture(words: Words, found: Sensitivity, option: str) -> Picture:
    """Kinds of layers x blocks, coloured by what one option is estimated to harm; others take a whole row."""
    layers = [layer for layer in found.layers if option in layer.scores]
    blocks = [layer for layer in layers if layer.block is not None]
    values = [(layer.kind, layer.block or 0, layer.scores[option]) for layer in blocks]
    places = sorted({at for _, at, _ in values}) or [0]
    outside = [layer for layer in layers if layer.block is None]
    values += [(layer.kind, at, layer.scores[option]) for layer in outside for at in places]
    return _heat(words, values, lambda value: f"{value:.2g}")


def losses_picture(words: Words, units: Sequence[UnitRecord]) -> Picture:
    """Loss of each block before and after tuning, and what was gained."""
    before = [unit.initial_loss or 0.0 for unit in units]
    after = [unit.loss or 0.0 for unit in units]
    gains = [100 * (1 - b / a) if a > 0 else 0.0 for a, b in zip(before, after, strict=True)]
    at = range(len(units))

    def paint(axes: Sequence[Axes]) -> None:
        upper, lower = axes
        upper.vlines(at, after, before, color=light("line"), linewidth=2)
        upper.plot(at, before, "o", color=light("before"), label="rounded", fillstyle="none", markersize=7)
        upper.plot(at, after, "o", color=light("accent"), label="tuned")
        if min(*before, *after, math.inf) > 0:
            upper.set_yscale("log")
            plain_numbers(upper.yaxis)
        upper.set_ylabel("loss")
        legend(upper)
        lower.bar(at, gains, color=light("accent"), width=0.7)
        lower.set_ylabel("% less")
        lower.set_xlabel("block")
        whole_numbers(lower)

    return picture(words, 330, paint, shares=(3, 2))


def massive_picture(words: Words, units: Sequence[UnitRecord]) -> Picture:
    """Share of each block's energy that few tokens hold."""
    at = range(len(units))

    def paint(axes: Sequence[Axes]) -> None:
        (only,) = axes
        only.bar(
            at, [100 * u.massive_energy for u in units], color=light("before"), width=0.7, label="energy"
        )
        only.plot(
            at,
            [100 * u.massive_tokens or math.nan for u in units],
            "o",
            color=light("accent"),
            label="tokens",
        )
        only.set_yscale("log")
        plain_numbers(only.yaxis)
        only.set_ylabel("% of the block's output")
        only.set_xlabel("block")
        whole_numbers(only)
        legend(only)

    return picture(words, 240, paint)


def experts_picture(words: Words, counts: Sequence[Sequence[int]]) -> Picture:
    """Tokens of the experts of each block: a bar from the least to the most, a dot at the median.

    Args:
        words: what is said of it.
        counts: tokens of each expert, a block each.
    """
    at = range(len(counts))

    def paint(axes: Sequence[Axes]) -> None:
        (only,) = axes
        least, most = [min(c) for c in counts], [max(c) for c in counts]
        heights = [b - a for a, b in zip(least, most, strict=True)]
        only.bar(at, heights, bottom=least, color=light("heat-2"), width=0.7, label="least to most")
        only.plot(at, [median(c) for c in counts], "o", color=light("accent"), label="median")
        only.plot(
            at, [0 if not a else math.nan for a in least], "v", color=light("before"), label="one without any"
        )
        only.set_ylim(bottom=0)
        only.set_ylabel("tokens of an expert")
        only.set_xlabel("block")
        whole_numbers(only)
        legend(only, columns=3)

    return picture(words, 240, paint)


def cost_picture(words: Words, units: Sequence[UnitCost]) -> Picture:
    """Time of each block, and memory held and at most."""
    at = range(len(units))
    device = any(unit.device_peak_bytes for unit in units)

    def paint(axes: Sequence[Axes]) -> None:
        upper, lower = axes
        upper.bar(at, [unit.seconds for unit in units], color=light("accent"), width=0.7)
        upper.set_ylabel("seconds")
        held, most = ([getattr(u, name) / _MEGA for u in units] for name in ("resident_bytes", "peak_bytes"))
        lower.plot(at, most, color=light("before"), label="peak so far")
        lower.fill_between(at, held, color=light("heat-2"), label="held")
        if device:
            on_device = [unit.device_peak_bytes / _MEGA for unit in units]
            lower.plot(at, on_device, color=light("third"), label="peak, accelerator")
        lower.set_ylim(bottom=0)
        lower.set_ylabel("MB")
        lower.set_xlabel("block")
        whole_numbers(lower)
        legend(lower, columns=3)

    return picture(words, 330, paint, shares=(1, 1))


def _heat(words: Words, values: Sequence[tuple[str, int, float]], shown: Callable[[float], str]) -> Picture:
    """Kinds of layers x blocks, coloured by a value in equal steps of its logarithm.

    Args:
        words: what is said of it.
        values: kind of layer, block and value of each cell, blocks ascending; one of them is above 0.
        shown: a value in the legend.
    """
    powers = [math.log10(value) for _, _, value in values if 0 < value < math.inf]
    low, step = min(powers), max(max(powers) - min(powers), 1e-9) / len(HEAT)
    rows: dict[str, list[Stretch]] = {}
    for kind, block, value in values:
        last = len(HEAT) - 1
        place = min(int((math.log10(value) - low) / step), last) if 0 < value < math.inf else 0
        _lengthen(rows.setdefault(kind, []), block, HEAT[place if value < math.inf else last])
    ends = {i: 10 ** (low + step * i) for i in (0, len(HEAT) // 2, len(HEAT) - 1)}
    return _rows_picture(words, rows, {f"from {shown(end)}": HEAT[i] for i, end in ends.items()})


def _lengthen(row: list[Stretch], index: int, tone: str) -> None:
    """Add a block to a row, to its last stretch where it looks the same."""
    if row and row[-1].tone == tone and row[-1].last == index - 1:
        row[-1] = Stretch(row[-1].first, index, tone)
    else:
        row.append(Stretch(index, index, tone))


def _rows_picture(words: Words, rows: Mapping[str, Sequence[Stretch]], keys: Mapping[str, str]) -> Picture:
    """Rows of layers over blocks; `keys` says what colours mean."""
    blocks = 1 + max(stretch.last for row in rows.values() for stretch in row)
    names = [short(kind, list(rows)) for kind in rows]

    def paint(axes: Sequence[Axes]) -> None:
        from matplotlib.patches import Patch

        (only,) = axes
        for place, row in enumerate(rows.values()):
            _paint_row(only, place, row, blocks)
        for block in range(1, blocks):
            only.axvline(block - 0.5, color=light("card"), linewidth=0.6 if blocks > 1 else 0)
        only.grid(visible=False)
        only.set_xlim(-0.5, blocks - 0.5)
        only.set_ylim(len(rows) - 0.5, -0.5)
        only.set_yticks(range(len(rows)), names)
        only.tick_params(length=0)
        only.spines[:].set_visible(False)
        only.set_xlabel("block")
        whole_numbers(only)
        patches = [Patch(color=light(tone), label=label) for label, tone in keys.items()]
        only.legend(
            handles=patches,
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=4,
            frameon=False,
            handlelength=1,
            columnspacing=1,
            borderaxespad=0.2,
        )

    return picture(words, _AROUND + _ROW * len(rows), paint)


def _paint_row(axes: Axes, place: int, row: Sequence[Stretch], blocks: int) -> None:
    for stretch in row:
        width = stretch.last - stretch.first + 1
        axes.broken_barh([(stretch.first - 0.5, width)], (place - 0.44, 0.88), facecolors=light(stretch.tone))
        if stretch.text and width / blocks >= _SHOWN_WIDTH:
            middle = (stretch.first + stretch.last) / 2
            axes.text(
                middle, place, stretch.text, ha="center", va="center", color=light("on-cell"), fontsize=10
            )
