"""A component of a diffusers pipeline, such as its transformer, read from disk block by block."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from auto_round.checkpoint.header import read_object
from auto_round.checkpoint.reader import Checkpoint
from auto_round.errors import CheckpointError, MissingError, Refusal, UnsupportedError
from auto_round.facts.attention import Attention
from auto_round.facts.layer import Block, Layer, Role
from auto_round.facts.loading import Loading
from auto_round.facts.tensor import TensorSpec
from auto_round.models.anatomy import Anatomy
from auto_round.models.families import LISTS, flow_of
from auto_round.models.materialize import META
from auto_round.models.names import DiskTensor, NameMap, Recipe, check_complete
from auto_round.models.parts import ModelParts
from auto_round.models.replayed_source import ReplayedSource
from auto_round.models.roles import find_block_lists, is_linear
from auto_round.models.source import CPU, Traceable
from auto_round.models.weight_readers import ASKED, read_elsewhere

MODULATION = re.compile(r"(?:^|\.)(?:norm\w*\.linear(?:_\d)?|\w*_mod\.\d+|adaLN_modulation\.\d+)$")
"""Layers of a block that turn the embedded timestep into scales and shifts. They see one vector a picture
and steer every token of it."""


class ComponentSource(ReplayedSource):
    """A `ModelSource` over the folder of a component. It reads no text: `replay_stem` has its stem."""

    def __init__(self, files: Checkpoint, parts: ModelParts) -> None:
        super().__init__(parts)
        self._files = files

    @classmethod
    def open(cls, folder: Path, kind: Any) -> ComponentSource:
        """Read the configuration and the headers of the weight files.

        Args:
            folder: folder of the component, with `config.json` and safetensors files.
            kind: its class, of diffusers.

        Raises:
            UnsupportedError: nothing is known of the blocks of this class.
            CheckpointError: weights are missing, damaged, or of another model than the configuration.
        """
        refuse_unknown(kind.__name__)
        _refuse_quantized(folder)
        files = Checkpoint.open(folder)
        try:
            return cls(files, _parts(files, kind))
        except BaseException:
            files.close()
            raise

    @property
    def folder(self) -> Path:
        """The component's folder."""
        return self._files.folder

    @property
    def files(self) -> Checkpoint:
        """Its tensors as they are copied; see `ModelSource`."""
        return self._files

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """None whose states have scales."""
        return ()

    @property
    def tied_head(self) -> bool:
        """False: there is no head."""
        return False

    @property
    def loading(self) -> Loading:
        """Nothing: diffusers loads tensors as they lie."""
        return Loading()

    @property
    def class_name(self) -> str:
        """Name of the component's class."""
        return type(self._parts.model).__name__

    def read_tensor(self, name: str) -> Tensor:
        """Any tensor of `tensors`."""
        return self._files.read(name)

    def refuse_untraceable(
        self,
        inputs: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device = CPU,
    ) -> Traceable:
        """Nothing to refuse: the blocks of the classes that are known run one after another."""
        del inputs, device
        return Traceable(frozenset(), dtype or self.dtype)

    def _fetch(self, recipe: Recipe, dtype: torch.dtype) -> Mapping[str, Tensor]:
        kept = self._kept_dtype(recipe, dtype)  # blocks see what outputs hold
        return {recipe.targets[0]: self._files.read_as(recipe.pieces[0].name, kept).to(dtype)}

    def _dtypes_for(self, dtype: torch.dtype) -> Mapping[str, torch.dtype]:
        if dtype not in self._dtypes:
            self._dtypes[dtype] = _dtypes(self._parts, dtype)
        return self._dtypes[dtype]

    def close(self) -> None:
        """Close the files."""
        self._files.close()


def refuse_unknown(class_name: str) -> None:
    """Refuse a class of which the blocks are not known.

    Raises:
        UnsupportedError: with the classes that are.
    """
    if class_name not in LISTS:
        raise UnsupportedError(
            f"the blocks of {class_name} are not known",
            [Refusal("models", "it has no row in models/families.py", f"known are {', '.join(LISTS)}")],
        )


def _refuse_quantized(folder: Path) -> None:
    """Refuse a folder whose weights are packed.

    Raises:
        UnsupportedError: its configuration says so.
        MissingError: it has no configuration.
    """
    path = folder / "config.json"
    if folder.is_dir() and not path.is_file():
        raise MissingError(f"{path} is missing: expected a component as diffusers saves it")
    if folder.is_dir() and "quantization_config" in read_object(path):
        raise UnsupportedError(
            f"{folder} is quantized already",
            [Refusal("models", "packed weights of diffusers are not unpacked", "name the original pipeline")],
        )


class _EmptyOnMeta(TorchFunctionMode):
    """Parameters without memory, while everything that is computed (rotary tables) gets its values.

    Layers make their parameters by `torch.empty`. A whole model on the meta device would lose the tensors
    that a class keeps in plain attributes.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func is torch.empty and named.get("device") is None:
            named["device"] = META
        return func(*args, **named)


def _parts(files: Checkpoint, kind: Any) -> ModelParts:
    model = _skeleton(files.folder, kind)
    disk = {name: files.spec(name) for name in files.names}
    names = _names(model, disk, files.folder)
    floats = (spec.dtype for spec in disk.values() if spec.dtype.is_floating_point)
    return ModelParts(model, next(floats, torch.float32), disk, names, {}, _anatomy(model, disk))


def _skeleton(folder: Path, kind: Any) -> Any:
    """The component with its parameters on the meta device, in evaluation mode."""
    config = {k: v for k, v in dict(kind.load_config(folder)).items() if k != "quantization_config"}
    with _EmptyOnMeta(), torch.no_grad():
        model = kind.from_config(config)
    saved = model.state_dict(keep_vars=True)
    for name in saved:
        parent, _, leaf = name.rpartition(".")
        owner, value = model.get_submodule(parent), torch.empty_like(saved[name], device=META)
        if leaf in owner._parameters:
            owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
        else:
            owner.register_buffer(leaf, value)
    return model.requires_grad_(False).eval()


def _names(model: nn.Module, disk: Mapping[str, TensorSpec], folder: Path) -> NameMap:
    """Names on disk are those of the modules.

    Raises:
        CheckpointError: some are missing, or have other shapes.
    """
    wanted = model.state_dict()
    check_complete(set(wanted) - set(disk), str(folder))
    for name, tensor in wanted.items():
        if tuple(disk[name].shape) != tuple(tensor.shape):
            raise CheckpointError(
                f'{folder}: tensor "{name}" has shape {list(disk[name].shape)} on disk, but the '
                f"configuration asks for {list(tensor.shape)}: they are not of the same model"
            )
    recipes = tuple(Recipe(name, (name,), (DiskTensor(name, name),), None) for name in disk if name in wanted)
    orphans = tuple(name for name in disk if name not in wanted)
    return NameMap(recipes, {recipe.key: recipe for recipe in recipes}, orphans)


def _anatomy(model: nn.Module, disk: Mapping[str, TensorSpec]) -> Anatomy:
    """Layers in the blocks, then those outside."""
    lists = find_block_lists(model)
    blocks: list[Block] = []
    layers: list[Layer] = []
    refusals: list[Refusal] = []
    read = read_elsewhere(model)
    for number, members in enumerate(lists):
        for path in members:
            block = model.get_submodule(path)
            blocks.append(Block(len(blocks), path, path, flow_of(block), number))
    home = {f"{block.module}.": block.index for block in blocks}
    for name, module in model.named_modules():
        if not is_linear(module):
            continue
        index = next((i for prefix, i in home.items() if name.startswith(prefix)), None)
        if read.get(name, ASKED) != ASKED:
            refusals.append(Refusal(f"{name}.weight", read[name], "kept at 16 bits"))
        else:
            layers.append(_layer(name, disk[f"{name}.weight"], index, asked=name in read))
    order = sorted(layers, key=lambda layer: len(blocks) if layer.block is None else layer.block)
    return Anatomy(tuple(order), tuple(blocks), None, tuple(refusals))


def _layer(name: str, spec: TensorSpec, index: int | None, *, asked: bool) -> Layer:
    role = Role.OUTSIDE if index is None else Role.MODULATION if MODULATION.search(name) else Role.LINEAR
    shape = (spec.shape[0], spec.shape[1])
    weight = f"{name}.weight"
    return Layer(name, weight, weight, shape, spec.dtype, index, role, asked=asked)


def _dtypes(parts: ModelParts, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Dtype of every tensor; diffusers keeps modules that a class names in float32."""
    kept = set(parts.model._keep_in_fp32_modules or ())

    def choose(name: str) -> torch.dtype:
        own = parts.tensors[name].dtype
        if not own.is_floating_point:
            return own
        return torch.float32 if kept.intersection(name.split(".")) else dtype

    return {name: choose(name) for name in parts.model.state_dict()}
