"""Entry: what a plan says of one layer."""

from __future__ import annotations

from dataclasses import dataclass

from auto_round.schemes.scheme import QuantizationScheme


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """What becomes of one layer.

    Attributes:
        scheme: how it is stored; None keeps it as it is on disk.
        reason: where that comes from, for people: `scheme W4A16`, `router`, `layer_config "k_proj"`.
        fixed: the user named this layer, so nothing may choose otherwise.
    """

    scheme: QuantizationScheme | None
    reason: str
    fixed: bool = False

    @property
    def label(self) -> str:
        """Short description of the scheme, `16 bits` for a kept layer."""
        return "16 bits" if self.scheme is None else self.scheme.label
