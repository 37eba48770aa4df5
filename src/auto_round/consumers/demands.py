"""What an engine demands of a configuration as a whole, before it looks at any layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from auto_round.consumers.folder import Folder
from auto_round.layouts.table import PACKING_FORMAT


@dataclass(frozen=True, slots=True)
class Demands:
    """Keys and values that an engine insists on.

    Attributes:
        keys: keys that must be there; a tuple holds spellings of which one is enough.
        values: key -> accepted values, where the key is there.
        beside: a `quantization_config.json` must say the same as `config.json`: the engine reads it instead.
    """

    keys: tuple[str | tuple[str, ...], ...] = ()
    values: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    beside: bool = False

    def complaints(self, folder: Folder) -> Iterator[str]:
        """Why the engine stops at this configuration."""
        config = folder.quantization
        for key in self.keys:
            spellings = (key,) if isinstance(key, str) else key
            if all(config.get(spelling) is None for spelling in spellings):
                yield f"the configuration lacks {' or '.join(spellings)}"
        for key, accepted in self.values:
            value = config.get(key)
            if value is not None and not _among(value, accepted):
                yield f"{key} {value!r} is not among {', '.join(map(repr, accepted))}"
        if self.beside and folder.beside is not None and _differs(folder.beside, config):
            yield "quantization_config.json and config.json contradict each other"


def _among(value: Any, accepted: tuple[Any, ...]) -> bool:
    return any(type(value) is type(known) and value == known for known in accepted)


def _differs(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    keys = {
        "bits",
        "group_size",
        "sym",
        PACKING_FORMAT,
        "extra_config",
        "block_name_to_quantize",
        "quant_method",
    }
    return any(one.get(key) != other.get(key) for key in keys)
