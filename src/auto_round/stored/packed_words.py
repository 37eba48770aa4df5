"""Folders of `auto-round`, `gptq` and `awq`: words of packed codes, and the floats of auto-round folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from auto_round.checkpoint.reader import Checkpoint
from auto_round.errors import CheckpointError, Refusal, UnsupportedError
from auto_round.layouts.gptq import GPTQ
from auto_round.layouts.layout import Layout
from auto_round.numerics.format import Format
from auto_round.schemes.condense import some
from auto_round.schemes.scheme import QuantizationScheme
from auto_round.schemes.vocabulary import SCALE_DTYPE_SPELLINGS
from auto_round.stored.formats import StoredFormats, StoredLayer
from auto_round.stored.matrices import Matrix, find_matrices
from auto_round.stored.packed import StoredWeight

_ORDER = "g_idx"


def read_words(config: Mapping[str, Any], files: Checkpoint) -> list[StoredWeight]:
    """Packed weights of a folder.

    Raises:
        CheckpointError: a layer that headers and configuration disagree about.
        UnsupportedError: an order of bytes that is not known, or rows of unknown length.
    """
    matrices = find_matrices(files)
    # Where inputs are reordered is said in `g_idx` of each layer, and looked at when it is read.
    formats = StoredFormats.of_folder({**config, "desc_act": False}, [m.name for m in matrices])
    lengths = {m.shape[0] for m in matrices} | {m.shape[1] for m in matrices if not m.packed}
    found = [(m, _stored(formats, m)) for m in matrices if m.packed]
    longer = [m.name for m, how in found if _is_filled(how.layout) and m.shape[1] not in lengths]
    if longer:
        reason = f"rows are filled up to whole groups, and do not say how long they are: {some(longer)}"
        remedy = "use a folder with groups that divide the rows, or the original weights"
        raise UnsupportedError(f"{files.folder} cannot be read", [Refusal("stored", reason, remedy)])
    return [_packed(m, how) for m, how in found]


def _stored(formats: StoredFormats, matrix: Matrix) -> StoredLayer:
    how = formats.layer((matrix.name,))
    if how is None or not _agrees(how.format, matrix):
        fmt = None if how is None else how.format
        said = "16 bits" if fmt is None else f"{fmt.grid.bits} bits, groups of {fmt.group.size}"
        raise CheckpointError(
            f'layer "{matrix.name}" is stored with {matrix.bits} bits and {matrix.groups} groups a row of '
            f"{matrix.shape[1]}, but the configuration says {said}"
        )
    return how


def _agrees(fmt: Format, matrix: Matrix) -> bool:
    """Whether headers and configuration agree; headers do not tell the groups of some floats."""
    groups = fmt.group.count(matrix.shape[1])
    return fmt.grid.bits == matrix.bits and matrix.groups in (0, groups)


def _is_filled(layout: Layout) -> bool:
    return isinstance(layout, GPTQ) and layout.filled


def _packed(matrix: Matrix, how: StoredLayer) -> StoredWeight:
    scheme = with_steps(how.scheme, matrix.scale_dtype)
    fmt = scheme.weight_format() or how.format
    layout, order = how.layout, None
    if isinstance(layout, GPTQ):
        layout = replace(layout, indexed=False)
        order = f"{matrix.name}.{_ORDER}" if _ORDER in matrix.stored else None
    parts = {suffix: f"{matrix.name}.{suffix}" for suffix in layout.spec(fmt, matrix.shape)}
    return StoredWeight(f"{matrix.name}.weight", matrix.shape, fmt, layout, parts, order=order, scheme=scheme)


def with_steps(scheme: QuantizationScheme, dtype: torch.dtype | None) -> QuantizationScheme:
    """The same scheme with steps of the dtype in the headers, where it is one of steps."""
    name = str(dtype).removeprefix("torch.")
    return replace(scheme, scale_dtype=name) if name in SCALE_DTYPE_SPELLINGS else scheme
