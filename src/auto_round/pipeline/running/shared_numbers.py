"""Weights that must share a stored number, since engines fuse them into one matrix, are bound together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from auto_round.numerics.format import Format
from auto_round.numerics.scale import Stats
from auto_round.schemes.siblings import joined_matrices


def tied_layers(formats: Mapping[str, Format]) -> list[list[str]]:
    """Sets of two or more layers whose weights share a number: parts of one fused matrix, in one format."""
    found: list[list[str]] = []
    for members in joined_matrices(formats).values():
        alike: dict[Format, list[str]] = {}
        for name in members:
            if formats[name].ties:
                alike.setdefault(formats[name], []).append(name)
        found += [names for names in alike.values() if len(names) > 1]
    return found


def bind_tied(
    formats: Mapping[str, Format], tied: Iterable[list[str]], stats: Mapping[str, Stats]
) -> dict[str, Format]:
    """The formats, those of tied layers bound to the ranges of all of them.

    Args:
        formats: layer -> format.
        tied: from `tied_layers`.
        stats: ranges of each tied layer.
    """
    bound = dict(formats)
    for names in tied:
        for name in names:
            here = stats[name].lo.device
            others = [_moved(stats[other], here) for other in names if other != name]
            bound[name] = formats[name].bind(stats[name], *others)
    return bound


def _moved(stats: Stats, device: torch.device) -> Stats:
    """Ranges of a weight on another device."""
    return Stats(stats.lo.to(device), stats.hi.to(device))
