"""Folders of quant_method `mxfp4` (gpt-oss): experts in stacks of MXFP4 matrices.

`<name>_blocks` `[experts, out, groups, 16]` uint8, two codes a byte with the first input in the low half, and
`<name>_scales` `[experts, out, groups]` uint8, biased powers of two. The plain tensor `<name>` is
`[experts, in, out]`.

Source: Transformers 5.24 `integrations/mxfp4.py` (`convert_moe_packed_tensors`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from auto_round.checkpoint.reader import Checkpoint
from auto_round.errors import CheckpointError
from auto_round.facts.compressed import MXFP4
from auto_round.layouts.compressed_float import FLOATS
from auto_round.numerics.presets_float import mx_format
from auto_round.stored.packed import StoredWeight

_CODES, _SCALES = "_blocks", "_scales"
_FORMAT = mx_format("fp4")
_AXES = 4


def read_mxfp4(config: Mapping[str, Any], files: Checkpoint) -> list[StoredWeight]:
    """Packed weights of a folder; the configuration says nothing more of them.

    Raises:
        CheckpointError: codes without scales, or of another shape.
    """
    names = [n.removesuffix(_CODES) for n in files.names if n.endswith(_CODES)]
    return [_packed(name, files) for name in names]


def _packed(name: str, files: Checkpoint) -> StoredWeight:
    shape = files.info(name + _CODES).shape
    if name + _SCALES not in files or len(shape) != _AXES:
        raise CheckpointError(
            f'{files.folder}: "{name + _CODES}" has shape {list(shape)}; expected '
            f'[experts, out, groups, 16] and "{name + _SCALES}"'
        )
    experts, n_out, groups, _ = shape
    return StoredWeight(
        name,
        (n_out, groups * _FORMAT.group.size),
        _FORMAT,
        FLOATS[MXFP4],
        {"weight_packed": name + _CODES, "weight_scale": name + _SCALES},
        stack=experts,
        transposed=True,
    )
