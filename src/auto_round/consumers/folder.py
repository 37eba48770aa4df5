"""A finished folder: its configuration and its matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auto_round.checkpoint.disk import reading
from auto_round.checkpoint.header import read_object
from auto_round.checkpoint.reader import Checkpoint
from auto_round.errors import CheckpointError, ConfigError, MissingError
from auto_round.layouts.table import PACKING_FORMAT
from auto_round.models.hub import refuse_pipeline
from auto_round.stored.matrices import Matrix, find_matrices

CONFIG = "config.json"
QUANTIZATION_CONFIG = "quantization_config.json"


@dataclass(frozen=True, slots=True)
class Folder:
    """What engines read of a folder before its weights.

    Attributes:
        path: the folder.
        config: `config.json`.
        quantization: `quantization_config` of it.
        beside: `quantization_config.json`, which vLLM and SGLang read for `auto-round`; None without.
        matrices: packed and plain matrices.
        nbytes: bytes of all tensors.
    """

    path: Path
    config: Mapping[str, Any]
    quantization: Mapping[str, Any]
    beside: Mapping[str, Any] | None
    matrices: tuple[Matrix, ...]
    nbytes: int

    @property
    def method(self) -> str:
        """`quant_method`, with `-` for `_`."""
        return str(self.quantization.get("quant_method", "")).lower().replace("_", "-")

    @property
    def format(self) -> str:
        """Method and what tells its variants apart, for people."""
        keys = (PACKING_FORMAT, "checkpoint_format", "format", "version")
        variants = [str(self.quantization[key]) for key in keys if self.quantization.get(key)]
        return f"{self.method} ({variants[0]})" if variants else self.method

    @property
    def packed(self) -> tuple[Matrix, ...]:
        """Matrices stored in fewer bits than 16."""
        return tuple(matrix for matrix in self.matrices if matrix.packed)

    @property
    def dtype(self) -> str:
        """Dtype of the model in its configuration, for example `bfloat16`; empty without one."""
        text = self.config.get("dtype") or self.config.get("torch_dtype") or ""
        return str(text).removeprefix("torch.")


def read_folder(path: str | Path) -> Folder:
    """Read the configurations and the headers of all weight files; no weight is read.

    Raises:
        ConfigError: no such folder, no `config.json` in it, or nothing in it is quantized.
        CheckpointError: a file is damaged, or tensors contradict each other.
    """
    folder = Path(path).expanduser()
    config, quantization = read_quantization(folder)
    beside = read_object(folder / QUANTIZATION_CONFIG) if (folder / QUANTIZATION_CONFIG).is_file() else None
    with Checkpoint.open(folder) as checkpoint:
        matrices, nbytes = find_matrices(checkpoint), checkpoint.nbytes
    if not any(matrix.packed for matrix in matrices):
        raise CheckpointError(
            f"{folder}: {CONFIG} says that the model is quantized, but no tensor in it is packed"
        )
    return Folder(folder, config, quantization, beside, matrices, nbytes)


def is_quantized(folder: Path) -> bool:
    """Whether a folder's configuration says that the model in it is quantized.

    Raises:
        MissingError: no such folder, or no `config.json` in it.
        CheckpointError: the file is damaged.
    """
    return _read_config(folder).get("quantization_config") is not None


def read_quantization(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`config.json` and the `quantization_config` in it.

    Raises:
        ConfigError: no such folder, no `config.json` in it, or it says nothing of quantization.
        CheckpointError: the file is damaged.
    """
    config = _read_config(folder)
    quantization = config.get("quantization_config")
    if quantization is None:
        raise ConfigError(
            f"{folder} is not quantized: its {CONFIG} has no quantization_config; "
            "give a folder that auto-round or another tool has quantized"
        )
    if not isinstance(quantization, dict) or not isinstance(quantization.get("quant_method"), str):
        raise CheckpointError(f"{folder / CONFIG}: quantization_config must be an object with a quant_method")
    return config, quantization


def _read_config(folder: Path) -> dict[str, Any]:
    with reading(folder):
        if not folder.is_dir():
            raise MissingError(f"{folder} is not a folder: give the folder of a model")
        if not (folder / CONFIG).is_file():
            refuse_pipeline(folder)
            raise MissingError(f"no {CONFIG} in {folder}: give the folder of a model")
    return read_object(folder / CONFIG)
