"""What a config group of compressed-tensors says, in this package's words: the reverse of writing one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from auto_round.errors import ConfigError, UnsupportedError
from auto_round.facts.tensor import dtype_name
from auto_round.schemes.number_types import NUMBER_TYPES
from auto_round.schemes.scheme import QuantizationScheme
from auto_round.schemes.vocabulary import SCALE_DTYPE_SPELLINGS

Args = Mapping[str, Any]

_SIZES = {"channel": -1, "tensor": 0, "token": -1}
"""Group size that a `strategy` means; the others name it."""


def schemes_of(group: Args, steps: torch.dtype) -> Iterator[QuantizationScheme]:
    """Schemes that a config group may mean; several where a scale's dtype tells them apart.

    Args:
        group: one of `config_groups`.
        steps: dtype of the stored scales.
    """
    said = group["weights"]
    scale = dtype_name(steps)
    scale_dtype = scale if scale in SCALE_DTYPE_SPELLINGS else "float16"
    for data_type in _types(said):
        if NUMBER_TYPES[data_type].bits.count(said.get("num_bits")):
            fields = {**_fields(said, data_type), "data_type": data_type, "scale_dtype": scale_dtype}
            yield from _possible({**fields, **_inputs(group.get("input_activations"))}, fields)


def _types(said: Args) -> Iterator[str]:
    """Number types with these words."""
    for name, row in NUMBER_TYPES.items():
        words = row.compressed
        if words is not None and words.type == said.get("type", "int"):
            strategy = _strategy(said)
            sized = strategy in _SIZES and words.strategy == "group"
            blocks = words.block is None or list(words.block) == said.get("block_structure")
            if blocks and (sized or strategy == words.strategy):
                yield name


def _strategy(said: Args) -> str:
    return str(said.get("strategy") or ("group" if said.get("group_size") else "tensor"))


def _fields(said: Args, data_type: str) -> dict[str, Any]:
    words = NUMBER_TYPES[data_type].compressed
    block = None if words is None or words.block is None else words.block[1]
    size = _SIZES.get(_strategy(said), block or said.get("group_size"))
    return {"bits": said.get("num_bits"), "group_size": size, "sym": bool(said.get("symmetric", True))}


def _inputs(said: Args | None) -> dict[str, Any]:
    """Fields of what flows in; none where it is left alone."""
    if not isinstance(said, Mapping):
        return {}
    for data_type in sorted(_types(said), key=lambda name: not _same_scales(said, name)):
        row = NUMBER_TYPES[data_type]
        # NVFP4 inputs are fixed at calibration in part (`local`), which is a type of its own.
        if said.get("num_bits") in row.input_bits and (said.get("dynamic") != "local" or not row.bits):
            fields = {f"act_{key}": value for key, value in _fields(said, data_type).items()}
            return {**fields, "act_data_type": data_type, "act_dynamic": said.get("dynamic") is not False}
    return {}


def _same_scales(said: Args, data_type: str) -> bool:
    """Whether scales are of the dtype that tells a type from others."""
    words = NUMBER_TYPES[data_type].compressed
    return words is not None and said.get("scale_dtype") == words.scale_dtype


def _possible(*tries: dict[str, Any]) -> Iterator[QuantizationScheme]:
    """The first of these fields that make a scheme which can be computed."""
    for fields in tries:
        try:
            scheme = QuantizationScheme.from_dict(fields)
            scheme.weight_format()
        except (ConfigError, UnsupportedError):
            continue
        yield scheme
        return
