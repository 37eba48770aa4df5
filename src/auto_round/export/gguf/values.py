"""Values of a GGUF file's metadata, before they become bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Metadata = Mapping[str, "Value"]
"""Key -> value, in the order of the file."""


@dataclass(frozen=True, slots=True)
class Value:
    """One value with its type in the file.

    Attributes:
        kind: "u32", "i32", "u64", "f32", "bool", "str", or one of these with "[]" behind it for a list.
        value: the value; a tuple for a list.
    """

    kind: str
    value: Any
