"""Where the rows of each tensor on disk end up inside a parameter of the module tree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from auto_round.facts.tensor import TensorSpec
from auto_round.models.fused import MatrixPlace, Stacking
from auto_round.models.names import Recipe

_ROW_BITS = 32


class Locator:
    """Finds places by converting row numbers instead of weights, with Transformers' own operations.

    Every matrix on disk is replaced by one column that holds its number and its rows' numbers; what comes out
    of the conversion tells which rows went where. So no table of fused layouts is needed, and a conversion
    that does anything else than stacking whole rows (transposing, interleaving, permuting) is noticed.
    """

    def __init__(self, model: Any, disk: Mapping[str, TensorSpec]) -> None:
        self._model = model
        self._disk = disk
        self._known: dict[object, tuple[MatrixPlace, ...] | str] = {}

    def locate(self, recipe: Recipe) -> Mapping[str, MatrixPlace] | str:
        """Disk name -> place, or the reason why the pieces cannot be addressed by rows."""
        if recipe.converter is None:
            return {recipe.pieces[0].name: MatrixPlace()}
        if isinstance(recipe.converter, Stacking):
            return recipe.converter.places
        shapes = tuple(self._disk[p.name].shape for p in recipe.pieces)
        if len(recipe.targets) != 1:
            return "one matrix on disk is split into several weights of the module"
        if any(len(shape) != 2 for shape in shapes):
            return "its experts lie on disk as one fused tensor, not as one matrix per expert"
        signature = (tuple(p.pattern for p in recipe.pieces), shapes)
        if signature not in self._known:
            self._known[signature] = self._rehearse(recipe)
        places = self._known[signature]
        if isinstance(places, str):
            return places
        return {piece.name: place for piece, place in zip(recipe.pieces, places, strict=True)}

    def _rehearse(self, recipe: Recipe) -> tuple[MatrixPlace, ...] | str:
        numbers = {piece.name: i for i, piece in enumerate(recipe.pieces)}

        def read(name: str) -> Tensor:
            rows = torch.arange(self._disk[name].shape[0], device="cpu")
            return (rows + (numbers[name] << _ROW_BITS)).unsqueeze(1)

        try:
            (labels,) = recipe.make(read, self._model).values()
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
            return f"the conversion from disk does more than stack whole rows ({error})"
        heights = [self._disk[piece.name].shape[0] for piece in recipe.pieces]
        return _read_labels(labels, heights)


def _read_labels(labels: Tensor, heights: list[int]) -> tuple[MatrixPlace, ...] | str:
    """Places of all pieces from labels `[rows, 1]` or `[experts, rows, 1]` int64."""
    bad = "the conversion from disk reorders rows"
    if labels.shape[-1] != 1 or labels.dim() not in {2, 3}:
        return bad
    fused = labels.dim() == 3
    found: dict[int, MatrixPlace] = {}
    for expert, column in enumerate(labels[..., 0] if fused else labels.T):
        pieces, counts = torch.unique_consecutive(column >> _ROW_BITS, return_counts=True)
        start = 0
        for piece, count in zip(pieces.tolist(), counts.tolist(), strict=True):
            rows = column[start : start + count] & ((1 << _ROW_BITS) - 1)
            whole = count == heights[piece] and torch.equal(rows, torch.arange(count, device=rows.device))
            if not whole or piece in found:
                return bad
            all_rows = count == len(column)
            found[piece] = MatrixPlace(
                expert if fused else None, None if all_rows else (start, start + count)
            )
            start += count
    if len(found) != len(heights):
        return "some matrices on disk have no place in the module's weight"
    return tuple(found[i] for i in range(len(heights)))
