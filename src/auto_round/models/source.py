"""What the pipeline asks of a model: layers, blocks, and weights one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from auto_round.checkpoint.tensors import Tensors
from auto_round.errors import Refusal, UnsupportedError
from auto_round.facts.attention import Attention
from auto_round.facts.flow import BlockCall, States
from auto_round.facts.layer import Block, Layer
from auto_round.facts.loading import Loading
from auto_round.facts.model import ModelFacts
from auto_round.facts.roles import RoleRow
from auto_round.facts.tensor import TensorSpec

CPU = torch.device("cpu")


Edits = tuple[Tensor | None, ...]
"""What a model adds to each of the `States` between two blocks; None where it adds nothing."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Everything that the blocks of one list receive for one batch, found without running any of them.

    Attributes:
        states: what flows into the first block, each `[B, L, H]`, and room for what blocks hand on beside it.
        calls: one entry per block in order; None where the model skips that block for this input.
        edits: one entry per block; nothing for the first.
        flowing: how many of the states flow.
    """

    states: States
    calls: tuple[BlockCall | None, ...]
    edits: tuple[Edits, ...]
    flowing: int = 1

    @property
    def beside(self) -> States:
        """What blocks hand on beside what flows, before the first of them."""
        return self.states[self.flowing :]


@dataclass(frozen=True, slots=True)
class Traceable:
    """How a model is run block by block.

    Attributes:
        skipped: indices of blocks that are not run for some inputs: some are for images only.
        dtype: dtype in which the blocks run: the wanted one, or float32 where the model's own code fails in
            that.
    """

    skipped: frozenset[int]
    dtype: torch.dtype


class Stem(Protocol):
    """A model without its blocks: embeddings, masks, positions before them; norm and head after them."""

    def trace(self, inputs: Mapping[str, Tensor], ended: Sequence[States] = ()) -> Trace:
        """Inputs of every block of one list.

        Args:
            inputs: what the model is called with, by name: `input_ids` `[B, L]` int64, where some tokens do
                not count `attention_mask` `[B, L]`, and whatever else it takes.
            ended: what flows out of the lists before; it says which list is traced, by their number.

        Raises:
            UnsupportedError: the model hands on more from block to block than what flows.
        """
        ...

    def refuse_more_at_the_end(self, inputs: Mapping[str, Tensor]) -> None:
        """Refuse a model that, for these inputs, changes what its last block hands on.

        Raises:
            UnsupportedError: it does.
        """
        ...

    @property
    def model(self) -> nn.Module:
        """The model itself, with stubs for blocks, for whoever looks at what flows into its modules."""
        ...

    def finish(self, hidden: Tensor, head: Tensor | None = None) -> Tensor:
        """Logits `[B, L, vocabulary]` from the last block's output `[B, L, H]`, differentiable in it.

        Args:
            hidden: output of the last block, the first of its `States`.
            head: another weight for the head, `[vocabulary, H]`; None for its own.
        """
        ...

    def embedding(self, weight: Tensor) -> AbstractContextManager[None]:
        """Let `trace` look tokens up in another weight `[vocabulary, H]` for a while."""
        ...

    def finish_inputs(self, hidden: Tensor) -> Tensor:
        """Input of the head layer, `[B, L, H]`, from the last block's output."""
        ...


class ModelSource(Protocol):
    """A model whose weights are fetched piece by piece; nothing is modified or kept."""

    @property
    def config(self) -> Any:
        """The model's Transformers configuration."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the model computes unless asked otherwise."""
        ...

    @property
    def facts(self) -> ModelFacts:
        """What the configuration says."""
        ...

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every matrix that could be quantized: in the blocks by order of execution, outside, the head."""
        ...

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of all lists in order of execution."""
        ...

    @property
    def block_lists(self) -> tuple[tuple[Block, ...], ...]:
        """The blocks list by list: what one hands on flows into the next one of the same list."""
        ...

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """Attention modules of the blocks, whose queries, keys and values can be looked at.

        Raises:
            UnsupportedError: there are none, or some that keep something else.
        """
        ...

    def tells_experts_apart(self, parameter: str) -> bool:
        """Whether what flows into each matrix of a parameter of fused experts can be looked at."""
        ...

    @property
    def tied_head(self) -> bool:
        """True when the head shares its weight with the embedding."""
        ...

    @property
    def head(self) -> str | None:
        """Name of the head's layer; None when the model has no head that is a plain linear layer."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every tensor on disk, in disk order, those without a module included; packed ones as if plain."""
        ...

    @property
    def kept(self) -> Mapping[str, TensorSpec]:
        """`tensors` in the dtypes in which an output keeps those that are not quantized."""
        ...

    @property
    def text_tensors(self) -> Mapping[str, str]:
        """Tensor on disk -> its name in a model of text alone; those of encoders and projectors are left out.

        All tensors, under their own names, where the model reads text only.
        """
        ...

    @property
    def unsupported(self) -> tuple[Refusal, ...]:
        """Matrices that are kept at 16 bits because they cannot be addressed one by one, and why."""
        ...

    @property
    def model_class(self) -> str:
        """Name of the class that computes the model."""
        ...

    @property
    def tried(self) -> bool:
        """Whether Transformers' own code computes the model, and tests quantize models of its family."""
        ...

    @property
    def block_classes(self) -> tuple[str, ...]:
        """Name of the class of each of `blocks`."""
        ...

    @property
    def roles(self) -> tuple[RoleRow, ...]:
        """The role of every matrix on disk, for people: those that differ in numbers only are one row."""
        ...

    @property
    def loading(self) -> Loading:
        """What Transformers does with the tensors while it loads the model."""
        ...

    @property
    def parameters(self) -> Mapping[str, str]:
        """Tensor on disk -> parameter of the module tree, where both are the same matrix."""
        ...

    @property
    def folder(self) -> Path | None:
        """The checkpoint's folder; None for a model in memory."""
        ...

    @property
    def files(self) -> Tensors | None:
        """The tensors on disk, to be copied from file to file; None for a model in memory."""
        ...

    def block(
        self, index: int, device: torch.device = CPU, dtype: torch.dtype | None = None
    ) -> AbstractContextManager[nn.Module]:
        """Block `index` with its weights: evaluation mode, no gradients.

        On exit the memory of every weight is freed, even if somebody still holds the tensor: clone what is
        to be kept.

        Args:
            index: position in `blocks`.
            device: where the weights go.
            dtype: dtype of the weights; None for the model's own.

        Raises:
            CheckpointError: a tensor cannot be read.
        """
        ...

    def loaded(
        self, device: torch.device = CPU, dtype: torch.dtype | None = None
    ) -> AbstractContextManager[nn.Module]:
        """The model with all of its weights, encoders of images and sound left out; freed on exit.

        Args:
            device: where the weights go.
            dtype: dtype of the weights; None for the model's own.
        """
        ...

    def block_dtypes(self, index: int, dtype: torch.dtype) -> Mapping[str, torch.dtype]:
        """Dtype of each tensor of block `index` when the model computes in `dtype`, by name in the block.

        A model may keep some of them in float32.
        """
        ...

    def read(self, layer: Layer) -> Tensor:
        """Weight of a layer, `[out, in]`, in its dtype on disk; unpacked where it is packed there."""
        ...

    def disk_name(self, parameter: str) -> str:
        """Name on disk of a parameter of the module tree that is stored alone.

        Raises:
            UnsupportedError: it is made from several tensors.
        """
        ...

    def read_tensor(self, name: str) -> Tensor:
        """Any tensor of `tensors`."""
        ...

    @property
    def input_names(self) -> frozenset[str]:
        """Names of what the model can be called with."""
        ...

    def refuse_untraceable(
        self,
        inputs: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device = CPU,
    ) -> Traceable:
        """Find out, without reading a weight, whether the model can be run block by block.

        Args:
            inputs: of one row with images, say; None for a few tokens.
            dtype: dtype in which it should compute; None for the model's own.
            device: where it will run.

        Raises:
            UnsupportedError: it cannot be run block by block, with the reason.
        """
        ...

    def handed_on(self, length: int, dtype: torch.dtype) -> int:
        """What blocks hand on beside hidden states, of one row; bytes.

        Args:
            length: tokens of a row.
            dtype: dtype in which blocks run.
        """
        ...

    def stem(
        self,
        device: torch.device = CPU,
        dtype: torch.dtype | None = None,
        *,
        head: bool = True,
        towers: bool = False,
        replaced: Mapping[str, Tensor] | None = None,
    ) -> AbstractContextManager[Stem]:
        """The model without its blocks; weights on entry, freed on exit.

        Args:
            device: where the weights go.
            dtype: dtype of the weights; None for the model's own.
            head: False leaves out the output head, which saves its memory; then only `trace` works.
            towers: keep encoders of images and sound; without them only text can be traced.
            replaced: parameter -> another value.
        """
        ...


def name_on_disk(source: ModelSource, parameter: str) -> str:
    """`disk_name` of a parameter; empty where it is made from several tensors."""
    try:
        return source.disk_name(parameter)
    except UnsupportedError:
        return ""


def matrix_tensors(source: ModelSource) -> dict[str, TensorSpec]:
    """Every tensor on disk; for one that holds the matrices of all experts these, by `Layer.alone`."""
    inside: dict[str, dict[str, tuple[int, int]]] = {}
    for layer in source.layers:
        if layer.fused:
            inside.setdefault(layer.tensor, {})[layer.alone] = layer.shape
    found: dict[str, TensorSpec] = {}
    for name, spec in source.tensors.items():
        matrices = inside.get(name, {name: spec.shape})
        found |= {matrix: replace(spec, shape=shape) for matrix, shape in matrices.items()}
    return found


def matrix_reader(source: ModelSource) -> Callable[[str], Tensor]:
    """Reads what `matrix_tensors` names, and any tensor of the source."""
    inside = {layer.alone: layer for layer in source.layers if layer.fused}

    def read(name: str) -> Tensor:
        layer = inside.get(name)
        return source.read_tensor(name) if layer is None else source.read(layer)

    return read
