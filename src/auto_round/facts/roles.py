"""What the roles of a model's matrices are, as rows for people."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RoleRow:
    """Matrices that agree in all but the numbers in their names.

    Attributes:
        role: `text`, `expert`, `shared expert`, `router`, `tower`, `head`, `embedding` or `kept`.
        names: their names on disk, condensed, for example `model.layers.{0-7}.mlp.down_proj`.
        shape: of each, as on disk.
        count: how many there are.
        note: why they stay as they are, where they do by default; empty for those that are quantized.
    """

    role: str
    names: str
    shape: tuple[int, ...]
    count: int
    note: str = ""

    @property
    def weights(self) -> int:
        """Numbers in all of them."""
        return self.count * math.prod(self.shape)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "role": self.role,
            "names": self.names,
            "shape": list(self.shape),
            "matrices": self.count,
            "weights": self.weights,
            "note": self.note,
        }


def render_roles(rows: Iterable[RoleRow]) -> str:
    """The table as text, one row a line."""
    lines = [(r.role, r.names, "x".join(map(str, r.shape)), f"{r.count}", r.note) for r in rows]
    if not lines:
        return ""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )
