"""Entry: what a plan says of one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from auto_round.schemes.scheme import QuantizationScheme

RULE: Final = "layer_config"
CHOSEN: Final = "AutoScheme"
"""Where a rule comes from: the user, or the choice of a scheme for each layer."""


def by_rule(origin: str, key: str) -> str:
    """Reason of an entry that a rule decides on: `layer_config "k_proj"`."""
    return f'{origin} "{key}"'


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """What becomes of one layer.

    Attributes:
        scheme: how it is stored; None keeps it as it is on disk.
        reason: where that comes from, for people: `scheme W4A16`, `router`, `layer_config "k_proj"`.
        fixed: a rule names this layer, so nothing may choose otherwise.
    """

    scheme: QuantizationScheme | None
    reason: str
    fixed: bool = False

    @property
    def label(self) -> str:
        """Short description of the scheme, `16 bits` for a kept layer."""
        return "16 bits" if self.scheme is None else self.scheme.label

    def why(self, name: str) -> str:
        """Reason of the entry of a layer: a rule for that layer alone does not repeat its name."""
        return next((o for o in (RULE, CHOSEN) if self.reason == by_rule(o, name)), self.reason)
