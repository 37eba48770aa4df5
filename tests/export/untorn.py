"""Changes of a plan that leave whole what vLLM merges: it refuses a matrix that is quantized in part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

FAMILIES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def untorn(changes: Mapping[str, T]) -> dict[str, T]:
    """The same changes for all parts of each merged matrix; single experts are left as they are."""
    whole: dict[str, T] = {}
    for name, change in changes.items():
        parent, _, last = name.rpartition(".")
        family = next((f for f in FAMILIES if last in f and ".experts." not in name), (last,))
        whole |= {f"{parent}.{part}": change for part in family}
    return whole
