"""What was hard in a run, said plainly: massive activations, blocks that no step improved, a model far off.

Everything here is read from the journal's entries, so a run that was continued says the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FAR_KL = 0.3
"""Nats per token from which on a run says that the model has become another one, and what would help. It is
a rise of the perplexity by about a third."""
WORST = 3
"""How many kinds of layers are named then, those of the largest errors."""
AT_ONCE = 1 << 22
"""Weights compared at a time."""


def matrix_errors(
    pairs: Iterable[tuple[Tensor, Tensor]], squares: Tensor | None
) -> list[tuple[float, float]]:
    """Numerator and denominator of `share_of_error` for each matrix of a stack.

    Args:
        pairs: of each matrix `[out, in]`, as it would come back from its codes and before rounding. They are
            asked for one by one, so that they need not exist all at once.
        squares: mean square of each input channel, `[in]` float32, or of each matrix's `[matrices, in]`; None
            weighs all alike.
    """
    found = []
    for i, (rounded, original) in enumerate(pairs):
        if squares is None:
            each = torch.ones(original.shape[-1], dtype=torch.float32, device=original.device)
        else:
            each = (squares[i] if squares.dim() > 1 else squares).to(original.device)
        found.append(_squared(rounded, original, each))
    return found


def share_of_error(parts: Sequence[tuple[float, float]]) -> float:
    """Relative squared error of a layer's output, when its input channels are taken as independent.

    Args:
        parts: of each of its matrices, from `matrix_errors`.

    Returns:
        `sum(squares * (rounded - original)**2) / sum(squares * original**2)`; 0 for matrices of zeros.
    """
    error, energy = (sum(each) for each in zip(*parts, strict=True))
    return error / energy if energy > 0 else 0.0


def _squared(rounded: Tensor, original: Tensor, weights: Tensor) -> tuple[float, float]:
    """Weighted squares of the differences, and of the rows themselves."""
    error = energy = 0.0
    rows = max(1, AT_ONCE // original.shape[-1])
    for after, before in zip(torch.split(rounded, rows), torch.split(original, rows), strict=True):
        exact = before.float()
        error += float((after.float() - exact).square().sum(dim=0) @ weights)
        energy += float(exact.square().sum(dim=0) @ weights)
    return error, energy


def by_kind(errors: Mapping[str, float]) -> dict[str, float]:
    """Mean error of the matrices of each kind.

    Args:
        errors: parameter name -> its error.

    Returns:
        Last module name (`down_proj`; for fused experts the parameter's own) -> mean error.
    """
    return _means((name.removesuffix(".weight").rpartition(".")[2], error) for name, error in errors.items())


def hard_cases(entries: Sequence[Mapping[str, Any]], kl: float | None) -> dict[str, Any]:
    """What the report says of hard cases; empty where there were none.

    Args:
        entries: of the journal, one a group of blocks or a layer.
        kl: divergence from the original on held-out rows, nats per token; None where it is not known.
    """
    tuned = [entry for entry in entries if "best_step" in entry]
    found: dict[str, Any] = {}
    if kept := [entry["unit"] for entry in tuned if entry["best_step"] == 0]:
        found["kept_as_started"] = {"units": kept, "of": len(tuned)}
    if massive := [
        {"unit": e["unit"], "tokens": e["massive_tokens"], "energy": e["massive_energy"]}
        for e in entries
        if e.get("massive_tokens")
    ]:
        found["massive_activations"] = {"units": massive, "of": sum("errors" in e for e in entries)}
    if kl is not None and not kl <= FAR_KL:
        found["far_from_the_original"] = {"kl": kl, "bound": FAR_KL, "largest_errors": _largest(entries)}
    return found


def _largest(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The kinds of layers whose outputs changed most, mean over all blocks, largest first."""
    means = _means(pair for entry in entries for pair in entry.get("errors", {}).items())
    ranked = sorted(means.items(), key=lambda pair: -pair[1])
    return {kind: round(error, 4) for kind, error in ranked[:WORST]}


def _means(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Mean of the values of each name."""
    found: dict[str, list[float]] = {}
    for name, value in pairs:
        found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}
