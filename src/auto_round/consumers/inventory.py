"""What a finished folder holds: schemes, sizes, what was kept, and what engines make of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auto_round.consumers.compressed import CompressedReader
from auto_round.consumers.fields import FLOAT_NAMES, CannotReadError, CompressedFields, Inputs
from auto_round.consumers.folder import Folder, read_folder
from auto_round.consumers.modules import Module
from auto_round.consumers.verdict import Verdict, judge_folder
from auto_round.errors import AutoRoundError
from auto_round.facts.compressed import COMPRESSED_TENSORS
from auto_round.schemes.condense import some
from auto_round.schemes.scheme import QuantizationScheme
from auto_round.stored.formats import StoredFormats, StoredLayer
from auto_round.stored.matrices import Matrix


@dataclass(frozen=True, slots=True)
class Inventory:
    """Contents of a folder.

    Attributes:
        format: method and packing.
        nbytes: bytes of all tensors.
        bits_per_weight: stored bits per quantized weight, steps and zero points included; 0 where headers do
            not tell how many weights there are.
        schemes: scheme -> number of matrices and of weights.
        kept: dtype -> names of the matrices that are not packed.
        verdicts: what each engine does with it.
    """

    format: str
    nbytes: int
    bits_per_weight: float
    schemes: Mapping[str, tuple[int, int]]
    kept: Mapping[str, tuple[str, ...]]
    verdicts: tuple[Verdict, ...]

    def condensed(self, dtype: str) -> str:
        """Names of the matrices kept in a dtype, those that differ in numbers as one; the first few."""
        return some(self.kept[dtype], most=6)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "format": self.format,
            "bytes": self.nbytes,
            "bits_per_quantized_weight": round(self.bits_per_weight, 4),
            "schemes": {s: {"matrices": n, "weights": w} for s, (n, w) in self.schemes.items()},
            "kept": {dtype: list(names) for dtype, names in self.kept.items()},
            "engines": {verdict.engine: verdict.to_dict() for verdict in self.verdicts},
        }


def take_inventory(path: str | Path) -> Inventory:
    """Read a folder's configuration and headers.

    Raises:
        ConfigError: no folder of a quantized model.
        CheckpointError: a damaged file.
    """
    folder = read_folder(path)
    contents = _compressed(folder) if folder.method == COMPRESSED_TENSORS else _integers(folder)
    schemes: dict[str, tuple[int, int]] = {}
    kept: dict[str, list[str]] = {}
    for matrix in folder.matrices:
        if matrix.packed:
            label, held = contents[matrix.name]
            count, total = schemes.get(label, (0, 0))
            schemes[label] = (count + 1, total + held)
        else:
            kept.setdefault(f"{matrix.bits} bits", []).append(matrix.name)
    known = all(held for _, held in contents.values())
    weights = sum(held for _, held in contents.values())
    stored = sum(matrix.nbytes for matrix in folder.packed)
    return Inventory(
        folder.format,
        folder.nbytes,
        8 * stored / weights if known else 0.0,
        schemes,
        {dtype: tuple(names) for dtype, names in kept.items()},
        judge_folder(folder),
    )


Contents = dict[str, tuple[str, int]]
"""Packed matrix -> its scheme, and its number of weights; 0 where headers do not tell."""


def _compressed(folder: Folder) -> Contents:
    """compressed-tensors: headers tell words, the configuration how wide a code is."""
    read = CompressedReader(strict=False)
    found: Contents = {}
    for matrix in folder.packed:
        try:
            fields = read(folder, Module(matrix.name, (matrix,)))
        except CannotReadError:
            fields = None
        label = str(fields) if fields is not None else f"{matrix.bits or 'few'} bits, not as configured"
        known = not matrix.words or fields is not None
        found[matrix.name] = (
            label,
            matrix.shape[0] * matrix.inputs(fields.bits if fields else 1) if known else 0,
        )
    return found


def _integers(folder: Folder) -> Contents:
    """GPTQ and AWQ words, and floats; bits alone where the configuration cannot be read."""
    try:
        stored = StoredFormats.of_folder(folder.quantization, [m.name for m in folder.matrices])
        labels = {m.name: _label(stored, m) for m in folder.packed}
    except AutoRoundError:
        labels = {m.name: f"{m.bits or 'few'} bits" for m in folder.packed}
    return {m.name: (labels[m.name], m.weights if m.bits else 0) for m in folder.packed}


def _float_label(matrix: Matrix, how: StoredLayer) -> str:
    """The same words for floats as in compressed-tensors folders."""
    size, inputs = how.format.group.size, how.inputs
    strategy = {-1: "channel", 0: "tensor"}.get(size, "group")
    rounded = None if inputs is None else Inputs(inputs.bits, "float", "", None, sym=True, dynamic=True)
    return str(
        CompressedFields(
            matrix.bits, size, sym=True, strategy=strategy, form=matrix.form, numbers="float", inputs=rounded
        )
    )


def _label(stored: StoredFormats, matrix: Matrix) -> str:
    how = stored.layer((matrix.name,))
    if how is None or how.format.grid.bits != matrix.bits:
        return f"W{matrix.bits}, not as configured"
    if matrix.form in FLOAT_NAMES:
        return _float_label(matrix, how)
    step = str(matrix.scale_dtype).removeprefix("torch.")
    return QuantizationScheme(matrix.bits, how.format.group.size, how.sym, scale_dtype=step).label
