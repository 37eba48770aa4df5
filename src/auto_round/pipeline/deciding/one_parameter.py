"""Matrices that a module holds in one parameter, as fused experts do: tuned together, so with one scheme."""

from __future__ import annotations

from collections.abc import Sequence

from auto_round.errors import Refusal, UnsupportedError
from auto_round.facts.layer import Layer
from auto_round.schemes.condense import some
from auto_round.schemes.plan import Plan


def refuse_torn_tensors(plan: Plan, layers: Sequence[Layer]) -> None:
    """Refuse a plan that some matrices of one tensor on disk cannot follow while others do.

    Args:
        plan: what becomes of each layer.
        layers: the layers of the plan.

    Raises:
        UnsupportedError: a tensor of experts only some of which are quantized, or whose rows, which belong to
            two matrices in turn, would share scales.
    """
    members: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.fused:
            members.setdefault(layer.tensor, []).append(layer)
    for tensor, inside in members.items():
        formats = {layer.name: plan.format_of(layer.name) for layer in inside}
        kept = [name for name, fmt in formats.items() if fmt is None]
        in_turn = [layer.name for layer in inside if layer.rows is not None and len(layer.rows) > 2]
        wide = [n for n in in_turn if (fmt := formats[n]) is not None and fmt.group.rows > 1]
        if wide:
            reason = f"rows of {some(wide)} stand in turn in {tensor}, and neighbours would share a scale"
            raise UnsupportedError(
                "these experts cannot be quantized in groups of several rows",
                [Refusal("models", reason, "use groups of one row, or keep them (--ignore_layers)")],
            )
        if kept and len(kept) < len(inside):
            reason = f"{tensor} holds {len(inside)} matrices, of which the plan keeps {some(kept)}"
            raise UnsupportedError(
                "experts of one tensor are quantized together",
                [Refusal("models", reason, "quantize all experts of a layer, or keep all of them")],
            )


def refuse_mixed_parameters(plan: Plan, layers: Sequence[Layer]) -> None:
    """Refuse a plan that gives the matrices of one parameter different schemes.

    Args:
        plan: what becomes of each layer.
        layers: the layers of the plan.

    Raises:
        UnsupportedError: there is such a parameter; names the matrices that differ from the first.
    """
    members: dict[str, list[Layer]] = {}
    for layer in layers:
        members.setdefault(layer.parameter, []).append(layer)
    for parameter, inside in members.items():
        first = plan.format_of(inside[0].name)
        others = [layer.name for layer in inside[1:] if plan.format_of(layer.name) != first]
        if others:
            raise UnsupportedError(
                "matrices that the model holds in one parameter are tuned together",
                [
                    Refusal(
                        "tuning",
                        f"{parameter} holds {len(inside)} matrices, and the plan gives them different "
                        f"schemes: {inside[0].name} one, {some(others)} another",
                        "give all experts of a layer one scheme, or use plain rounding, which takes each "
                        "matrix by itself: --recipe rtn",
                    )
                ],
            )
