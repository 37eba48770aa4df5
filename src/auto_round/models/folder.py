"""A model folder on disk, read block by block."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from auto_round.checkpoint.header import read_object
from auto_round.checkpoint.reader import Checkpoint
from auto_round.checkpoint.rescaled import RescaledTensors
from auto_round.checkpoint.tensors import Tensors
from auto_round.errors import Refusal, UnsupportedError
from auto_round.facts.tensor import TensorSpec
from auto_round.log import logger
from auto_round.models.anatomy import dissect
from auto_round.models.assembled import AssembledSource
from auto_round.models.names import LOST, NameMap, Recipe, check_complete, map_names, missing_tensors
from auto_round.models.parts import ModelParts
from auto_round.models.roles import ONE_EXPERT
from auto_round.models.skeleton import (
    absent_by_design,
    build_skeleton,
    fill_derived,
    read_model_config,
    share_position_tables,
    straighten,
    tied_weights,
    untie,
)
from auto_round.numerics.smoothing import Rescaling
from auto_round.stored.unpacked import open_plain

_EXPERTS = re.compile(r"\.experts\.[^.\d][^.]*$")
"""A parameter of the module of all experts."""


class FolderSource(AssembledSource):
    """A `ModelSource` over a folder of safetensors files, plain or quantized.

    Only what is asked for is read, so that memory holds about one block. Packed weights are unpacked one
    matrix at a time.
    """

    def __init__(self, files: Tensors, parts: ModelParts) -> None:
        super().__init__(parts)
        self._files = files

    @classmethod
    def open(
        cls, path: str | Path, *, trust_remote_code: bool = False, dtype: torch.dtype | None = None
    ) -> FolderSource:
        """Read the configuration and the headers of the weight files.

        Args:
            path: folder with `config.json` and safetensors files.
            trust_remote_code: run model code that lies in that folder.
            dtype: dtype in which blocks compute and outputs keep the weights; None for the configuration's,
                else that of the weights, and for weights as they are.

        Raises:
            ConfigError: no such folder, no configuration, or it needs code that is not trusted.
            CheckpointError: weights are missing, damaged, or of another model than the configuration.
            UnsupportedError: not a causal language model, or quantized in a way that is not known.
        """
        folder = Path(path)
        checkpoint = Checkpoint.open(folder)
        for mistake in checkpoint.mistakes:
            logger.warning(mistake)
        try:
            config = read_model_config(folder, trust_remote_code=trust_remote_code)
            files = open_plain(checkpoint, read_object(folder / "config.json"))
            return cls.over(files, config, trust_remote_code=trust_remote_code, dtype=dtype)
        except BaseException:
            checkpoint.close()
            raise

    @classmethod
    def over(
        cls, files: Tensors, config: Any, *, trust_remote_code: bool = False, dtype: torch.dtype | None = None
    ) -> FolderSource:
        """A source over tensors that are plain numbers under the names of the model, wherever they lie.

        Args:
            files: the tensors; the source closes them.
            config: the model's configuration.
            trust_remote_code: run model code that lies in the folder.
            dtype: of blocks and outputs, as for `open`.

        Raises:
            CheckpointError: weights are missing, or of another model than the configuration.
            UnsupportedError: not a causal language model.
        """

        def build(computing: torch.dtype) -> Any:
            return build_skeleton(config, computing, trust_remote_code=trust_remote_code)

        return cls(files, read_parts(files, config, build, dtype))

    def rescaled(self, changes: Mapping[str, Rescaling]) -> FolderSource:
        """The same model with some of its tensors rescaled as they are read; closing either closes the files.

        Args:
            changes: tensor on disk -> what becomes of it.
        """
        return FolderSource(RescaledTensors(self._files, changes), self._parts)

    @property
    def folder(self) -> Path:
        """The folder."""
        return self._files.folder

    @property
    def files(self) -> Tensors:
        """Its tensors as they are copied; see `ModelSource`."""
        return self._files

    def read_tensor(self, name: str) -> Tensor:
        """Any tensor of `tensors`."""
        return self._files.read(name)

    def read_entry(self, name: str, index: int) -> Tensor:
        """One entry of the first axis of a tensor; only that is read."""
        return self._files.read_entry(name, index)

    def _fetch(self, recipe: Recipe, dtype: torch.dtype) -> Mapping[str, Tensor]:
        kept = self._kept_dtype(recipe, dtype)  # blocks see what outputs hold

        def read(name: str) -> Tensor:
            return self._files.read_as(name, kept).to(dtype)

        return recipe.make(read, self._parts.model)

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def __enter__(self) -> FolderSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_parts(
    files: Tensors, config: Any, build: Callable[[torch.dtype], Any], dtype: torch.dtype | None = None
) -> ModelParts:
    """What a folder holds, and which modules it belongs to.

    Args:
        files: its tensors.
        config: its configuration, of Transformers.
        build: makes the skeleton in a dtype.
        dtype: of blocks and outputs, as for `FolderSource.open`.

    Raises:
        CheckpointError: weights are missing, or of another model than the configuration.
        UnsupportedError: no such model.
    """
    disk = {name: files.spec(name) for name in files.names}
    computing = dtype or _own_dtype(config, disk)
    model = build(computing)
    names = map_names(model, disk, straighten(model))
    tied = _really_tied(model, names, files) | share_position_tables(model)
    missing = missing_tensors(model, names, tied)
    _refuse_split_experts(names, missing, files.folder)
    excused = absent_by_design(model, missing)
    check_complete(missing - excused, str(files.folder), _cause(config, model))
    fill_derived(model, excused)
    return ModelParts(model, computing, disk, names, tied, dissect(model, names, disk, tied), dtype)


def _refuse_split_experts(names: NameMap, missing: Collection[str], folder: Path) -> None:
    """Refuse a folder that has experts one by one where its model has one tensor for all.

    Raises:
        UnsupportedError: it is one that this package wrote of such a model.
    """
    found = next((name for name in names.orphans if ONE_EXPERT.search(name)), None)
    if found is not None and any(_EXPERTS.search(name) for name in missing):
        reason = f"{found} is one of several matrices that its model has in one tensor"
        raise UnsupportedError(
            f"{folder} holds experts one by one, as they are written when they are quantized",
            [Refusal("models", reason, "start from the original folder")],
        )


def _own_dtype(config: Any, disk: Mapping[str, TensorSpec]) -> torch.dtype:
    """Dtype in the configuration, else of the first weight: the order in which Transformers looks."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return next((spec.dtype for spec in disk.values() if spec.dtype.is_floating_point), torch.float32)


def _cause(config: Any, model: Any) -> str:
    """Why weights may be missing: where the folder says that it holds another class, one without a head."""
    saved, kind = (getattr(config, "architectures", None) or [None])[0], type(model).__name__
    if saved is None or saved == kind:
        return LOST
    return (
        f"a shard is missing, or the folder holds a {saved} (config.json, architectures), which is no "
        f"{kind}: save the latter"
    )


def _really_tied(model: Any, names: NameMap, files: Tensors) -> dict[str, str]:
    """Tied weights, without those that the checkpoint holds twice with different values."""
    tied = tied_weights(model)
    for target, source in list(tied.items()):
        pair = [names.by_target.get(n) for n in (target, source)]
        recipes = [r for r in pair if r is not None and r.converter is None]
        if len(recipes) < 2:
            continue
        first, second = (files.read(r.pieces[0].name) for r in recipes)
        if not torch.equal(first, second):
            del tied[target]
            untie(model, target)
    return tied
