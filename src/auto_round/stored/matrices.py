"""The matrices of a finished folder as its headers show them: no weight is read, no configuration trusted."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from auto_round.checkpoint.header import TensorInfo
from auto_round.checkpoint.reader import Checkpoint
from auto_round.errors import CheckpointError
from auto_round.facts.tensor import TensorSpec
from auto_round.layouts.compressed import INT_QUANTIZED, PACK_QUANTIZED
from auto_round.layouts.compressed_float import FLOATS, FP8_DTYPES, FloatLayout

WORD = 32
"""Bits of the words that codes are packed in."""

_IN_BLOCK = re.compile(r"(?:^|\.)\d+\.")

_WORDS = ("qweight", "qzeros", "scales", "g_idx")
_COMPRESSED = (
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_global_scale",
    "weight_scale_inv",
    "weight_g_idx",
    "input_scale",
    "input_zero_point",
    "input_global_scale",
)

PLAIN, GPTQ, AWQ, BLOCKS, OTHER = "plain", "gptq", "awq", "blocks", "other"
"""Orders of stored codes: none (16 bits or more), packed along the input, along the output, FP8 with
`weight_scale_inv`, anything else."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix as it lies on disk.

    Attributes:
        name: name on disk, without suffix.
        order: one of `PLAIN`, `GPTQ`, `AWQ`, `BLOCKS`, `OTHER`.
        shape: `(out, in)`; of packed words of compressed-tensors in stored words.
        bits: width of a code; of a plain matrix that of its dtype; 0 where the headers do not tell.
        groups: groups in a row; 0 where the headers do not tell.
        nbytes: bytes of all tensors that stand for it.
        tensors: their names.
        scale_dtype: dtype of the stored steps, None without.
        form: of `OTHER`, the `format` of compressed-tensors that its tensors look like; empty where they look
            like none.
        stored: what lies on disk, by the last name of each tensor.
    """

    name: str
    order: str
    shape: tuple[int, int]
    bits: int
    groups: int
    nbytes: int
    tensors: tuple[str, ...]
    scale_dtype: torch.dtype | None = None
    form: str = ""
    stored: Mapping[str, TensorSpec] = field(default_factory=dict, hash=False)

    @property
    def packed(self) -> bool:
        """Whether it is stored in fewer bits than 16."""
        return self.order != PLAIN

    @property
    def in_block(self) -> bool:
        """Whether its name has a number, as those of the layers of a decoder block have."""
        return _IN_BLOCK.search(self.name) is not None

    def inputs(self, bits: int) -> int:
        """Weights in a row, where the headers of packed words tell words only.

        Args:
            bits: width of a code, as the configuration says.
        """
        return self.shape[1] * WORD // bits if self.words else self.shape[1]

    @property
    def words(self) -> bool:
        """Whether it is one of compressed-tensors' matrices of packed words."""
        return self.form == PACK_QUANTIZED.name

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def find_matrices(checkpoint: Checkpoint) -> tuple[Matrix, ...]:
    """Matrices of a checkpoint in the order of their tensors: packed ones, and plain two-dimensional weights.

    Raises:
        CheckpointError: packed tensors that contradict each other; names the matrix.
    """
    parts: dict[str, dict[str, TensorInfo]] = {}
    for name in checkpoint.names:
        layer, _, suffix = name.rpartition(".")
        if suffix in (*_WORDS, *_COMPRESSED, "weight"):
            parts.setdefault(layer, {})[suffix] = checkpoint.info(name)
    return tuple(_matrices(parts))


def _matrices(parts: Mapping[str, Mapping[str, TensorInfo]]) -> Iterator[Matrix]:
    for layer, tensors in parts.items():
        if "qweight" in tensors:
            yield _words(layer, tensors)
        elif _is_compressed(tensors):
            yield _compressed(layer, tensors)
        elif "weight" in tensors and len(tensors["weight"].shape) == 2:
            weight = tensors["weight"]
            out, n_in = weight.shape
            bits = 8 * weight.dtype.itemsize
            yield Matrix(layer, PLAIN, (out, n_in), bits, 0, weight.nbytes, (f"{layer}.weight",))


def _is_compressed(tensors: Iterable[str]) -> bool:
    return any(suffix in _COMPRESSED for suffix in tensors if not suffix.startswith("input_"))


def _words(layer: str, tensors: Mapping[str, TensorInfo]) -> Matrix:
    """A matrix of words of 32 bits.

    `scales` `[groups, out]` and `qzeros` `[groups, out * bits / 32]` tell outputs and bits; the codes are
    packed along the input where `qweight` has as many columns as there are outputs, else along the output.
    """
    missing = [suffix for suffix in ("scales", "qzeros") if suffix not in tensors]
    if missing:
        raise CheckpointError(
            f'layer "{layer}" has a qweight but no {" and no ".join(missing)}: the checkpoint is incomplete'
        )
    found = {suffix: tensors[suffix].shape for suffix in ("qweight", "qzeros", "scales")}
    try:
        (rows, columns), (groups, words), (same_groups, out) = found.values()
        bits, rest = divmod(words * WORD, out)
        order = GPTQ if columns == out else AWQ
        n_in = rows * WORD // bits if order == GPTQ else rows
        exact = (columns * WORD == out * bits) if order == AWQ else (rows * WORD % bits == 0)
    except (ValueError, ZeroDivisionError):
        exact, rest, groups, same_groups, order, n_in, out, bits = False, 0, 0, 0, GPTQ, 0, 0, 0
    if not exact or rest or groups != same_groups or not groups or not n_in:
        shapes = ", ".join(f"{suffix} {list(shape)}" for suffix, shape in found.items())
        raise CheckpointError(
            f'the packed tensors of layer "{layer}" contradict each other: {shapes}; expected qzeros '
            "[groups, out * bits / 32], scales [groups, out] and qweight to match"
        )
    scale = tensors["scales"].dtype
    return _made(layer, order, (out, n_in), bits, groups, tensors, scale)


def _compressed(layer: str, tensors: Mapping[str, TensorInfo]) -> Matrix:
    """A matrix of the compressed-tensors family; the bits of whole numbers are in the configuration only."""
    main = tensors.get("weight_packed") or tensors.get("weight")
    if main is None or len(main.shape) != 2:
        raise CheckpointError(f'layer "{layer}" has {", ".join(sorted(tensors))} but no matrix of codes')
    scale = tensors.get("weight_scale") or tensors.get("weight_scale_inv")
    dtype = None if scale is None else scale.dtype
    columns = scale.shape[1] if scale is not None and len(scale.shape) == 2 else 0
    shape, bits, groups, form = (main.shape[0], main.shape[1]), 0, 0, ""
    floats = None if scale is None else _float_layout(tensors, scale)
    if floats is not None:
        form, bits = floats.name, floats.grid.bits
        groups = columns if floats.sizes else 0
        shape = (main.shape[0], main.shape[1] * 8 * main.dtype.itemsize // bits)
    elif main.dtype in (torch.int32, torch.int8):
        form = PACK_QUANTIZED.name if main.dtype is torch.int32 else INT_QUANTIZED.name
        groups = columns
    elif "weight_packed" not in tensors:
        bits = 8 * main.dtype.itemsize
    order = BLOCKS if "weight_scale_inv" in tensors else OTHER
    return replace(_made(layer, order, shape, bits, groups, tensors, dtype), form=form)


def _float_layout(tensors: Mapping[str, TensorInfo], scale: TensorInfo) -> FloatLayout | None:
    """The floating layout that these tensors look like.

    Codes of 4 and 6 bits are both bytes; how many there are for one scale tells them apart.
    """
    for layout in FLOATS.values():
        fp8 = FP8_DTYPES.get(layout.grid)
        main = tensors.get("weight_packed" if fp8 is None else "weight")
        if main is None or main.dtype is not (fp8 or torch.uint8):
            continue
        named = {name: dtype for _, name, dtype in layout.parts}
        if not layout.sizes:
            if scale.dtype.is_floating_point and scale.dtype.itemsize > 1:
                return layout
            continue
        (size,) = layout.sizes
        wanted = named.get("weight_scale") or torch.uint8
        columns = scale.shape[1] if len(scale.shape) == 2 else 0
        nbytes = columns * size * layout.grid.bits // 8
        if scale.dtype is wanted and set(named) <= set(tensors) and main.shape[1] == nbytes:
            return layout
    return None


def _made(
    layer: str,
    order: str,
    shape: tuple[int, int],
    bits: int,
    groups: int,
    tensors: Mapping[str, TensorInfo],
    scale: torch.dtype | None,
) -> Matrix:
    nbytes = sum(info.nbytes for info in tensors.values())
    names = tuple(f"{layer}.{suffix}" for suffix in tensors)
    stored = {suffix: TensorSpec(info.dtype, tuple(info.shape)) for suffix, info in tensors.items()}
    return Matrix(layer, order, shape, bits, groups, nbytes, names, scale, "", stored)
