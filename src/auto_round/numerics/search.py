"""Importance-weighted search for the range of each group, for any format.

A weight is cut into bands of rows, and the format's scale rule searches each band. Followed by rounding to
nearest this is "optimized RTN"; followed by tuning it is the starting point.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from auto_round.numerics.at_once import weights_at_once
from auto_round.numerics.format import Format
from auto_round.numerics.importance import AnyImportance
from auto_round.numerics.rule import Effort, SearchTask
from auto_round.numerics.scale import Knobs

BAND = 1 << 21
"""Weights searched at a time on a CPU: enough to outweigh the calls on small arrays, also of several threads,
which wait for each other between calls (docs/LOG.md)."""

QUICK = Effort(points=10, rounds=2, shared_rounds=1, distances=6)
"""Before tuning: offsets and multipliers are learned afterwards."""
THOROUGH = Effort(points=48, rounds=5, shared_rounds=1, distances=24, sweeps=4)
"""For optimized RTN, where nothing follows."""
BY_SQUARES = replace(THOROUGH, along=1.0)
"""The same with an importance file, which holds squares of inputs only. The least-squares step makes a matrix
shorter, by 2 % at 3 bits. With `along=1` that part of the error counts twice: it halves, and the model's KL
falls by 3 % at 2 and 3 bits (docs/LOG.md)."""


def search_knobs(fmt: Format, w: Tensor, importance: AnyImportance | None, effort: Effort) -> Knobs:
    """Knobs of smallest `sum(importance * (w - dequantize(quantize(w)))**2)` in each group.

    `effort.along` adds a term to that sum (`band.Band` has the formula). Where products of inputs are known,
    the error is `e @ products @ e` instead, the mean square of a group's share of the output's error. The
    result is never worse than the measured range, which is the first candidate.

    Args:
        fmt: numeric format.
        w: weight `[..., out, in]`.
        importance: second moments of the `in` inputs; None, or one that is not usable, weighs all the same.
            Matrices of a stack may have inputs of their own.
        effort: how long to search.

    Returns:
        Multipliers `[..., rows, n_groups]` in 0 ... 16.
    """
    with torch.no_grad():
        if w.dim() > 2:
            flat = w.reshape(-1, *w.shape[-2:])
            parts = [
                search_knobs(fmt.matrix(i), m, None if importance is None else importance.matrix(i), effort)
                for i, m in enumerate(flat)
            ]
            lead = w.shape[:-2]
            return Knobs(*(_stack(side, lead) for side in ([p.lo for p in parts], [p.hi for p in parts])))
        stats = fmt.stats(w)
        rule = fmt.rule_for(stats)
        weight = products = None
        importance = None if importance is None else importance.matrix(0)
        if importance is not None and importance.usable:
            together = w.shape[0] if fmt.group.size == 0 else fmt.group.rows
            weight = fmt.group.split(importance.weights(w.device).expand(together, -1))
            products = importance.pieces(fmt.group, w.device)
        found = []
        for rows, groups in fmt.group.bands(w.shape, weights_at_once(w.device, BAND)):
            grouped = fmt.group.split(w[rows]).to(torch.float32)
            found.append(rule.search(SearchTask(fmt.grid, stats[groups], grouped, weight, products), effort))
        return Knobs(torch.cat([k.lo for k in found]), torch.cat([k.hi for k in found]))


def _stack(tensors: list[Tensor], lead: torch.Size) -> Tensor:
    return torch.stack(tensors).reshape(*lead, *tensors[0].shape)
