"""Pictures of quality: size against divergence, how the divergence is spread, losses of several runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from auto_round.report.draw import Picture, Words, legend, picture, plain_numbers, whole_numbers
from auto_round.report.run import Spread, UnitRecord
from auto_round.report.theme import SERIES, light

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MEGA = 1e6


@dataclass(frozen=True, slots=True)
class Point:
    """A run by size and quality.

    Attributes:
        label: of the run.
        mark: written beside the point.
        nbytes: of all its tensors.
        kl: divergence from the original, nats per token.
    """

    label: str
    mark: str
    nbytes: int
    kl: float


def frontier_of(points: Sequence[Point]) -> list[Point]:
    """Points that no other one beats: none is as small and as close to the original, or better; by size."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.nbytes, p.kl)):
        if not kept or point.kl < kept[-1].kl:
            kept.append(point)
    return kept


def frontier_picture(words: Words, points: Sequence[Point], original: int | None = None) -> Picture:
    """Size against divergence, with a line through the points that no other one beats.

    Args:
        words: what is said of it.
        points: of the runs; those with a divergence of 0 are drawn at the bottom.
        original: bytes of the original, drawn as a line; None to show the runs closer.
    """
    best = frontier_of(points)
    floor = min((point.kl for point in points if point.kl > 0), default=1e-6) / 2

    def paint(axes: Sequence[Axes]) -> None:
        (only,) = axes
        if original is not None:
            only.axvline(original / _MEGA, color=light("muted"), linestyle=":", label="size of the original")
        x, y = _places(best, floor)
        only.step(x, y, where="post", color=light("muted"), linewidth=1)
        rest = [point for point in points if point not in best]
        only.plot(*_places(rest, floor), "o", color=light("before"), fillstyle="none", markersize=6)
        only.plot(x, y, "o", color=light("accent"), markersize=7)
        for point in points:
            place = (point.nbytes / _MEGA, max(point.kl, floor))
            only.annotate(point.mark, place, textcoords="offset points", xytext=(6, 5))
        only.set_yscale("log")
        plain_numbers(only.yaxis)
        only.margins(0.12)
        only.set_xlabel("MB")
        only.set_ylabel("KL from the original")
        if original is not None:
            only.set_xlim(left=0)
            legend(only)

    return picture(words, 290, paint)


def spread_picture(words: Words, spreads: Mapping[str, Spread]) -> Picture:
    """Share of the positions at each divergence, one line a run.

    Args:
        words: what is said of it.
        spreads: label -> positions.
    """

    def paint(axes: Sequence[Axes]) -> None:
        (only,) = axes
        for index, (label, spread) in enumerate(spreads.items()):
            total = sum(spread.positions) or 1
            shares = [100 * count / total for count in spread.positions]
            edges = [10**power for power in spread.powers]
            only.stairs(shares, edges, label=label, fill=len(spreads) == 1, **_line(index))
        only.set_xscale("log")
        plain_numbers(only.xaxis, marks=(1,))
        only.set_xlim(*_seen(spreads.values()))
        only.set_xlabel("KL of one prediction, nats")
        only.set_ylabel("% of the predictions")
        if len(spreads) > 1:
            legend(only)

    return picture(words, 240 + 16 * (len(spreads) // 2), paint)


@dataclass(frozen=True, slots=True)
class QuantileBand:
    """Divergences that shares of the predictions stay below, with their intervals.

    Attributes:
        names: of the places on the horizontal axis, for example `90 %`.
        values: nats.
        low: lower ends of the intervals.
        high: upper ends.
    """

    names: Sequence[str]
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def quantiles_picture(words: Words, bands: Mapping[str, QuantileBand], floor: float | None) -> Picture:
    """Divergence that a share of the predictions stays below, one line a run, with its interval.

    Args:
        words: what is said of it.
        bands: label -> divergences, all at the same places.
        floor: mean divergence of the original from itself in another dtype, drawn as a line; None for none.
    """
    least = min((v for band in bands.values() for v in band.values if v > 0), default=1e-6) / 2

    def paint(axes: Sequence[Axes]) -> None:
        (only,) = axes
        for index, (label, band) in enumerate(bands.items()):
            places = range(len(band.names))
            values, low, high = ([max(v, least) for v in each] for each in (band.values, band.low, band.high))
            only.fill_between(
                places, low, high, color=light(SERIES[index % len(SERIES)]), alpha=0.15, linewidth=0
            )
            only.plot(places, values, marker="o", markersize=4, label=label, **_line(index))
            only.set_xticks(list(places), band.names)
        if floor is not None and floor > 0:
            only.axhline(floor, color=light("muted"), linestyle=":", label="original in another dtype, mean")
        only.set_yscale("log")
        plain_numbers(only.yaxis, marks=(1,))
        only.set_xlabel("share of the predictions below")
        only.set_ylabel("KL, nats")
        if len(bands) > 1 or floor:
            legend(only)

    return picture(words, 240 + 16 * (len(bands) // 2), paint)


def losses_of_runs(words: Words, runs: Mapping[str, Sequence[UnitRecord]]) -> Picture:
    """Loss that was kept in each block, one line a run."""

    def paint(axes: Sequence[Axes]) -> None:
        (only,) = axes
        for index, (label, units) in enumerate(runs.items()):
            only.plot(range(len(units)), [u.loss or math.nan for u in units], label=label, **_line(index))
        only.set_yscale("log")
        plain_numbers(only.yaxis)
        only.set_xlabel("block")
        only.set_ylabel("loss after tuning")
        whole_numbers(only)
        legend(only)

    return picture(words, 240 + 16 * (len(runs) // 2), paint)


def _line(index: int) -> dict[str, Any]:
    """How the line of a run is drawn: colours first, then dashes."""
    tones, dashes = len(SERIES), ("-", "--", ":", "-.")
    style = dashes[index // tones % len(dashes)]
    return {"color": light(SERIES[index % tones]), "linestyle": style, "linewidth": 1.6}


def _places(points: Sequence[Point], floor: float) -> tuple[list[float], list[float]]:
    return [point.nbytes / _MEGA for point in points], [max(point.kl, floor) for point in points]


def _seen(spreads: Iterable[Spread]) -> tuple[float, float]:
    """First and last border of the bins that hold something in any run."""
    powers: list[float] = []
    for spread in spreads:
        filled = [i for i, count in enumerate(spread.positions) if count]
        if filled:
            powers += [spread.powers[filled[0]], spread.powers[filled[-1] + 1]]
    return (10 ** min(powers), 10 ** max(powers)) if powers else (1e-8, 1.0)
