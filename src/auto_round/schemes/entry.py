"""Entry: what a plan says of one layer, and what it needs to know of that layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from auto_round.schemes.scheme import QuantizationScheme


class RoleLike(Protocol):
    """A role by its text: `models.layer.Role`."""

    @property
    def value(self) -> str:
        """Text of the role."""
        ...


class DtypeLike(Protocol):
    """A dtype by its width: `torch.dtype`."""

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        ...


class LayerLike(Protocol):
    """What a plan needs of a layer: `models.layer.Layer`."""

    @property
    def name(self) -> str:
        """Name on disk without `.weight`."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        ...

    @property
    def dtype(self) -> DtypeLike:
        """Dtype on disk."""
        ...

    @property
    def block(self) -> int | None:
        """Index of its block, None outside of blocks."""
        ...

    @property
    def role(self) -> RoleLike:
        """What it does."""
        ...


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
