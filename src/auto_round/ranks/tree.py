"""Sums whose order of additions depends on nothing but the places of what is added.

Floating-point sums depend on their order. Here values stand at places 0, 1, 2, ..., and neighbours are added
in a binary tree over the places: (0 + 1) + (2 + 3), and so on. Whoever holds some neighbouring places can
add up whole subtrees, and hand on a few of them instead of every value: the sum is the same bits for any
division of the places among processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Node = tuple[int, int]
"""Level and number: node `(level, i)` is over the places `i * 2**level ... (i + 1) * 2**level - 1`."""

Values = list[Tensor | None]
"""What is added, tensor by tensor; None adds nothing."""

_WIDE = (torch.float32, torch.float64)


class TreeSum:
    """A sum of lists of tensors, as far as this process holds it: some subtrees.

    Tensors that are added belong to the sum from then on, and may be changed.
    """

    def __init__(self) -> None:
        self._nodes: dict[Node, Values] = {}
        self._open = -1

    def add(self, place: int, values: Sequence[Tensor | None]) -> None:
        """Add values at a place; what comes for one place is added in the order in which it comes.

        Args:
            place: not before the one of the last call.
            values: as many as in other calls.
        """
        leaf = (0, place)
        if place == self._open:
            self._nodes[leaf] = added(self._nodes[leaf], values)
            return
        self._close()
        self._open = place
        self._nodes[leaf] = list(values)

    def nodes(self) -> Mapping[Node, Values]:
        """The subtrees that this process holds; nothing may be added afterwards."""
        self._close()
        return self._nodes

    def _close(self) -> None:
        """Add up the subtrees that the last place made whole."""
        level, number = 0, self._open
        while number % 2 and (level, number) in self._nodes and (level, number - 1) in self._nodes:
            right = self._nodes.pop((level, number))
            left = self._nodes.pop((level, number - 1))
            level, number = level + 1, number // 2
            self._nodes[level, number] = added(left, right)


def fold(nodes: Mapping[Node, Values]) -> Values:
    """The sum of subtrees that are together over the places 0 ... n - 1; empty for none."""
    left, level = dict(nodes), 0
    while len(left) > 1:
        for node in sorted(node for node in left if node[0] == level):
            value, up = left.pop(node), (level + 1, node[1] // 2)
            left[up] = added(left[up], value) if up in left else value
        level += 1
    return next(iter(left.values()), [])


def added(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> Values:
    """Sums, tensor by tensor, kept in float32 at least: many small ones would get lost in 16 bits."""
    return [_added(x, y) for x, y in zip(a, b, strict=True)]


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return (a if a.dtype in _WIDE else a.float()).add_(b)
