"""Whether Transformers loads a folder through this package: the question is put to our own reader."""

from __future__ import annotations

from auto_round.consumers.folder import Folder
from auto_round.consumers.matrices import AWQ, GPTQ, Matrix
from auto_round.consumers.modules import split_modules
from auto_round.errors import AutoRoundError
from auto_round.inference.stored_formats import StoredFormats
from auto_round.layouts.awq import AWQ as AWQLayout  # noqa: N811
from auto_round.schemes.condense import some

TRANSFORMERS = "Transformers"

_METHODS = ("auto-round", "gptq", "awq")


def ask_ourselves(folder: Folder) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Why Transformers does not load a folder, and what it needs.

    Returns:
        Reasons (none when it loads), and notes.
    """
    if folder.method not in _METHODS:
        return (), (f"with the package for {folder.method}",)
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
    order = AWQ if isinstance(how.layout, AWQLayout) else GPTQ
    found = (matrix.order, matrix.bits, matrix.groups)
    return found == (order, how.format.grid.bits, how.format.group.count(matrix.shape[1]))
