"""Whether Transformers loads a folder through this package, as our own reader says."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from auto_round.consumers.compare import compare
from auto_round.consumers.compressed import CompressedReader
from auto_round.consumers.fields import CannotReadError, CompressedFields
from auto_round.consumers.folder import Folder
from auto_round.consumers.modules import Module, split_modules
from auto_round.errors import AutoRoundError
from auto_round.export.compressed_loading import EXPERTS_BY_ROW, EXPERTS_READ
from auto_round.facts.compressed import COMPRESSED_TENSORS
from auto_round.facts.tensor import TensorSpec
from auto_round.layouts.awq import AWQ as AWQLayout  # noqa: N811
from auto_round.layouts.compressed_table import COMPRESSED
from auto_round.schemes.condense import some
from auto_round.stored.formats import StoredFormats
from auto_round.stored.matrices import AWQ, GPTQ, OTHER, Matrix

TRANSFORMERS = "Transformers"

_METHODS = ("auto-round", "gptq", "awq")
_READER = CompressedReader(strict=False)


def ask_ourselves(folder: Folder) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Why Transformers does not load a folder, and what it needs.

    Returns:
        Reasons (none when it loads), and notes.
    """
    if folder.method not in _METHODS:
        reasons = tuple(_mismatches(folder)) if folder.method == COMPRESSED_TENSORS else ()
        return reasons, (f"with the package for {folder.method}",)
    try:
        stored = StoredFormats.of_folder(folder.quantization, [m.name for m in folder.matrices])
        wrong = [m.name for m in _layers(folder) if not _agrees(stored, m)]
    except AutoRoundError as error:
        return (" ".join(str(error).split()),), ()
    if wrong:
        return (f"the configuration and the tensors disagree on {some(wrong)}",), ()
    notes = {
        "auto-round": "with auto-round installed",
        "gptq": "with gptqmodel and optimum, or with auto-round and quantization_config=AutoRoundConfig()",
        "awq": "with gptqmodel, or with auto-round and quantization_config=AutoRoundConfig()",
    }
    return (), (notes[folder.method],)


def _mismatches(folder: Folder) -> Iterator[str]:
    """Where the tensors of a compressed-tensors folder are not what its configuration says."""
    found: dict[str, list[str]] = {}
    for module in split_modules(folder.packed):
        try:
            _compare(folder, module)
        except CannotReadError as error:
            found.setdefault(str(error).replace(module.name, "{}"), []).append(module.name)
    for text, names in found.items():
        yield text.replace("{}", some(names)) if "{}" in text else f"{text}: {some(names)}"


def _compare(folder: Folder, module: Module) -> None:
    fields = _READER(folder, module)
    compare(module, fields)
    if isinstance(fields, CompressedFields) and ".experts." in module.name:
        by_row = fields.form in EXPERTS_BY_ROW and fields.strategy in ("channel", "tensor")
        if fields.form not in EXPERTS_READ and not by_row:
            raise CannotReadError(f"misreads experts in {fields.form}")
    if isinstance(fields, CompressedFields) and fields.form not in COMPRESSED:
        raise CannotReadError(f"expects {module.name} stored as {fields.form}, which is not known here")


def _layers(folder: Folder) -> list[Matrix]:
    return [part for module in split_modules(folder.matrices) for part in module.parts]


def _agrees(stored: StoredFormats, matrix: Matrix) -> bool:
    """Whether our reader expects what lies on disk.

    A plain matrix that the order of bytes cannot hold is left alone, whatever the configuration says.
    """
    how = stored.layer((matrix.name,))
    held = how is not None and how.layout.accepts(how.format, matrix.shape) is None
    if how is None or not held or not matrix.packed:
        return held == matrix.packed
    if matrix.order == OTHER:
        spec = how.tensors(matrix.shape).spec()
        found = {n: t for n, t in matrix.stored.items() if n in spec or not n.startswith("input_")}
        return found.keys() == spec.keys() and all(_fits(found[name], spec[name]) for name in spec)
    order = AWQ if isinstance(how.layout, AWQLayout) else GPTQ
    seen = (matrix.order, matrix.bits, matrix.groups)
    return seen == (order, how.format.grid.bits, how.format.group.count(matrix.shape[1]))


def _fits(stored: TensorSpec, wanted: TensorSpec) -> bool:
    """Whether a tensor is what is expected, or floats that become so without loss while they are loaded."""
    if stored == wanted or tuple(stored.shape) != tuple(wanted.shape):
        return stored == wanted
    narrow = stored.dtype in (torch.float16, torch.bfloat16)
    return narrow and wanted.dtype is torch.float32
