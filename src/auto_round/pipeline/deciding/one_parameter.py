"""Matrices that a module holds in one parameter, as fused experts do: tuned together, so with one scheme."""

from __future__ import annotations

from collections.abc import Sequence

from auto_round.errors import Refusal, UnsupportedError
from auto_round.facts.layer import Layer
from auto_round.schemes.condense import some
from auto_round.schemes.plan import Plan


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
