"""Names that safetensors gives to element types, and the torch types behind them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from auto_round.errors import InternalError

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "I16": torch.int16,
        "U16": torch.uint16,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I32": torch.int32,
        "U32": torch.uint32,
        "F32": torch.float32,
        "I64": torch.int64,
        "U64": torch.uint64,
        "F64": torch.float64,
    }
)
"""Source: the dtype list of the safetensors format, less the types narrower than a byte."""

_NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})


def safetensors_name(dtype: torch.dtype) -> str:
    """Name of a torch dtype in a safetensors header.

    Raises:
        InternalError: safetensors has no name for it.
    """
    try:
        return _NAMES[dtype]
    except KeyError:
        raise InternalError(f"{dtype} cannot be stored in safetensors; known: {', '.join(DTYPES)}") from None
