"""The tensors of a model of which only the configuration is there: names, dtypes and shapes, no numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from auto_round.errors import ConfigError
from auto_round.facts.tensor import TensorSpec
from auto_round.models.folder import FolderSource, read_parts
from auto_round.models.skeleton import build_skeleton, read_model_config, saved_specs


class PaperTensors:
    """What a model would be saved as; nothing of it can be read."""

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec]) -> None:
        self.folder = folder
        self._specs = specs

    @property
    def names(self) -> tuple[str, ...]:
        """Tensor names."""
        return tuple(self._specs)

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor."""
        return self._specs[name]

    def read(self, name: str) -> Tensor:
        """Nothing is there.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f'"{self.folder}" has no weights, "{name}" was asked for; expected .safetensors files beside '
            "config.json. Without them only a dry run is possible (--dry_run)"
        )

    def read_as(self, name: str, dtype: torch.dtype) -> Tensor:
        """Nothing is there; see `read`."""
        del dtype
        return self.read(name)

    def read_entry(self, name: str, index: int) -> Tensor:
        """Nothing is there; see `read`."""
        del index
        return self.read(name)

    def copy_into(self, name: str, fd: int, offset: int) -> None:
        """Nothing is there; see `read`."""
        del fd, offset
        self.read(name)

    def fingerprint(self) -> str:
        """Its configuration is all that tells it apart."""
        return "no weights"

    def close(self) -> None:
        """There are no files."""


def is_on_paper(folder: Path) -> bool:
    """Whether a folder holds a configuration, and no weights."""
    return (folder / "config.json").is_file() and not any(folder.glob("*.safetensors"))


def open_on_paper(
    folder: Path, *, trust_remote_code: bool = False, dtype: torch.dtype | None = None
) -> FolderSource:
    """A source over a configuration alone; arguments as for `FolderSource.open`."""
    config = read_model_config(folder, trust_remote_code=trust_remote_code)
    own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    skeleton = build_skeleton(config, dtype or own, trust_remote_code=trust_remote_code)
    tensors = PaperTensors(folder, saved_specs(skeleton))
    return FolderSource(tensors, read_parts(tensors, config, lambda _: skeleton, dtype or own))
