"""Rounding of one matrix without tuning: in runs without data, outside of the blocks, or of embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.errors import NumericsError
from auto_round.numerics.format import Format
from auto_round.numerics.importance import AnyImportance
from auto_round.numerics.qtensor import QTensor
from auto_round.numerics.rule import Effort
from auto_round.tuning.weights import round_to_nearest


def round_matrix(
    name: str,
    weight: Tensor,
    fmt: Format,
    device: torch.device,
    importance: AnyImportance | None = None,
    effort: Effort | None = None,
) -> QTensor:
    """Round a matrix to nearest; with `effort` the range of each group is searched first.

    Args:
        name: what it is called, for errors.
        weight: `[out, in]`, anywhere.
        fmt: numeric format.
        device: where to round.
        importance: second moments of the inputs; None weighs all alike.
        effort: search of the range; None for the measured one.

    Raises:
        NumericsError: a weight is not finite; names the tensor.
    """
    try:
        return round_to_nearest(weight.to(device), fmt, importance, effort)
    except NumericsError as error:
        raise NumericsError(f"{name}: {error}") from error
