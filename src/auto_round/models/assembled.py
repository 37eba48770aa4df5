"""The parts of a model source that do not depend on where the weights come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.checkpoint.tensors import read_matrix
from auto_round.errors import Refusal, UnsupportedError
from auto_round.facts.attention import Attention
from auto_round.facts.flow import BlockCall, States
from auto_round.facts.layer import Block, Layer
from auto_round.facts.loading import Loading
from auto_round.facts.model import TOKENS, ModelFacts
from auto_round.facts.roles import RoleRow
from auto_round.facts.tensor import TensorSpec
from auto_round.models.attention_modules import find_attentions
from auto_round.models.config_facts import model_facts
from auto_round.models.families import parameter_names
from auto_round.models.find_carried import Weightless
from auto_round.models.kept import Casts, kept_layers, kept_tensors, main_dtype
from auto_round.models.loading import loading_of
from auto_round.models.materialize import freed_on_exit, real_copy
from auto_round.models.matrix_experts import matrix_experts
from auto_round.models.names import Recipe, recipe_for
from auto_round.models.parts import ModelParts
from auto_round.models.recorder import Recorder, make_stubs
from auto_round.models.rehearsal import Rehearsed, RehearsedBlock, refuse_left_state, widened
from auto_round.models.role_table import role_table
from auto_round.models.roles import find_head, find_towers
from auto_round.models.skeleton import weight_dtypes
from auto_round.models.source import CPU, Stem, Traceable
from auto_round.models.text_part import text_tensors
from auto_round.models.trace import LeftOut, StemParts, StubStem
from auto_round.models.trial import TRIAL_TOKENS, trial_traces
from auto_round.models.tried_families import TRIED


class AssembledSource(ABC):
    """A `ModelSource` over a skeleton; subclasses fetch the weights."""

    def __init__(self, parts: ModelParts) -> None:
        self._parts = parts
        self._dtypes: dict[torch.dtype, Mapping[str, torch.dtype]] = {}
        self._traceable_by_text: dict[tuple[torch.dtype, str], Traceable] = {}
        self._hands_on: bool | None = None
        self._handed_on: dict[tuple[int, torch.dtype], int] = {}

    @abstractmethod
    def read_tensor(self, name: str) -> Tensor:
        """Any tensor of `tensors`."""

    def read_entry(self, name: str, index: int) -> Tensor:
        """One entry of the first axis of a tensor."""
        return self.read_tensor(name)[index]

    @abstractmethod
    def _fetch(self, recipe: Recipe, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Module tensors of one recipe in fresh memory."""

    @property
    @abstractmethod
    def folder(self) -> Path | None:
        """The checkpoint's folder; None for a model in memory."""

    @property
    def config(self) -> Any:
        """The model's Transformers configuration."""
        return self._parts.model.config

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the model computes unless asked otherwise."""
        return self._parts.dtype

    @cached_property
    def facts(self) -> ModelFacts:
        """See `ModelSource`."""
        return model_facts(self.config)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """See `ModelSource`."""
        return kept_layers(self._parts.anatomy.layers, self._casts)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """See `ModelSource`."""
        return self._parts.anatomy.blocks

    @property
    def block_lists(self) -> tuple[tuple[Block, ...], ...]:
        """See `ModelSource`."""
        return tuple(tuple(members) for _, members in groupby(self.blocks, lambda block: block.in_list))

    @cached_property
    def attentions(self) -> tuple[Attention, ...]:
        """See `ModelSource`."""
        return find_attentions(self._parts.model, self.blocks, self.disk_name, self.dtype)

    def tells_experts_apart(self, parameter: str) -> bool:
        """See `ModelSource`."""
        return matrix_experts(self._parts.model, parameter) is not None

    @property
    def head(self) -> str | None:
        """See `ModelSource`."""
        return self._parts.anatomy.head

    @cached_property
    def tied_head(self) -> bool:
        """See `ModelSource`. Kept once found: it is a walk through the whole model, and every layer asks."""
        head = find_head(self._parts.model)
        pairs = self._parts.tied.items()
        return head is not None and any(f"{head}.weight" in pair for pair in pairs)

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """See `ModelSource`."""
        return self._parts.tensors

    @cached_property
    def kept(self) -> Mapping[str, TensorSpec]:
        """See `ModelSource`."""
        return kept_tensors(self._parts.tensors, self._casts)

    @cached_property
    def _casts(self) -> Casts | None:
        own, wanted = main_dtype(self._parts.tensors), self._parts.wanted
        if own is None or wanted is None or wanted == own:
            return None
        dtypes = self._dtypes_for(wanted)
        wide = (recipe for recipe in self._parts.names.recipes if dtypes[recipe.targets[0]] != wanted)
        return Casts(own, wanted, frozenset(piece.name for recipe in wide for piece in recipe.pieces))

    def _kept_dtype(self, recipe: Recipe, dtype: torch.dtype) -> torch.dtype:
        """The dtype that a recipe's tensors pass through on their way to `dtype`: that of the outputs."""
        name = recipe.pieces[0].name
        kept = self.kept[name].dtype
        return dtype if kept == self.tensors[name].dtype else kept

    @cached_property
    def text_tensors(self) -> Mapping[str, str]:
        """See `ModelSource`."""
        parts = self._parts
        return text_tensors(parts.model, parts.anatomy, parts.names, parts.tensors)

    @property
    def unsupported(self) -> tuple[Refusal, ...]:
        """See `ModelSource`."""
        return self._parts.anatomy.unsupported

    @property
    def model_class(self) -> str:
        """See `ModelSource`."""
        return type(self._parts.model).__name__

    @property
    def tried(self) -> bool:
        """See `ModelSource`."""
        own = type(self._parts.model).__module__.partition(".")[0] == "transformers"
        return own and self.config.model_type in TRIED

    @property
    def block_classes(self) -> tuple[str, ...]:
        """See `ModelSource`."""
        return tuple(type(self._parts.model.get_submodule(block.module)).__name__ for block in self.blocks)

    @cached_property
    def roles(self) -> tuple[RoleRow, ...]:
        """See `ModelSource`."""
        parts = self._parts
        return role_table(parts.model, parts.anatomy, parts.names, parts.tensors)

    @property
    def input_names(self) -> frozenset[str]:
        """See `ModelSource`."""
        model = self._parts.model
        return frozenset(name for part in (model, model.base_model) for name in parameter_names(part))

    @property
    def loading(self) -> Loading:
        """See `ModelSource`."""
        return loading_of(self._parts.model, self._parts.names)

    @property
    def parameters(self) -> Mapping[str, str]:
        """See `ModelSource`."""
        return self._parts.names.parameters

    def read(self, layer: Layer) -> Tensor:
        """Weight of a layer, `[out, in]`."""
        return read_matrix(layer, self.read_tensor, self.read_entry)

    def disk_name(self, parameter: str) -> str:
        """Name on disk of a parameter that is stored alone; see `ModelSource`."""
        recipe = recipe_for(parameter, self._parts.names, self._parts.tied)
        if recipe is None or len(recipe.pieces) != 1:
            raise UnsupportedError(f"{parameter} is not stored as one tensor")
        return recipe.pieces[0].name

    @contextmanager
    def block(
        self, index: int, device: torch.device = CPU, dtype: torch.dtype | None = None
    ) -> Iterator[nn.Module]:
        """Block `index` with its weights, freed on exit; see `ModelSource`."""
        path = self.blocks[index].module
        module = self._parts.model.get_submodule(path)
        names = [f"{path}.{name}" for name in module.state_dict()]
        tensors = self._gather(names, device, dtype)
        inside = {name.removeprefix(f"{path}."): tensor for name, tensor in tensors.items()}
        real = real_copy(module, inside, device, {}, self.block_dtypes(index, dtype or self.dtype))
        del tensors, inside
        with freed_on_exit(real):
            yield real

    @contextmanager
    def loaded(self, device: torch.device = CPU, dtype: torch.dtype | None = None) -> Iterator[nn.Module]:
        """The model with its weights, freed on exit; see `ModelSource`."""
        left_out = self._outside_stem(None, towers=False)[len(self.blocks) :]
        tensors = self._gather(self._in_stem(left_out), device, dtype)
        gone = {id(self._parts.model.get_submodule(path)): LeftOut() for path in left_out}
        real = real_copy(self._parts.model, tensors, device, gone, self._dtypes_for(dtype or self.dtype))
        del tensors
        with freed_on_exit(real):
            yield real

    def block_dtypes(self, index: int, dtype: torch.dtype) -> Mapping[str, torch.dtype]:
        """See `ModelSource`."""
        inside = f"{self.blocks[index].module}."
        dtypes = self._dtypes_for(dtype).items()
        return {name.removeprefix(inside): kept for name, kept in dtypes if name.startswith(inside)}

    @contextmanager
    def stem(
        self,
        device: torch.device = CPU,
        dtype: torch.dtype | None = None,
        *,
        head: bool = True,
        towers: bool = False,
        replaced: Mapping[str, Tensor] | None = None,
    ) -> Iterator[Stem]:
        """The model without its blocks, freed on exit; see `ModelSource`."""
        head_path = find_head(self._parts.model)
        spare = head_path if head_path and not head and not self.tied_head else None  # tied costs nothing
        left_out = self._outside_stem(spare, towers=towers)
        tensors = self._gather(self._in_stem(left_out), device, dtype)
        tensors |= {n: v.to(device).clone() for n, v in (replaced or {}).items() if n in tensors}
        real, recorders = self._stubbed(left_out, tensors, device, dtype or self.dtype)
        output = real.get_submodule(head_path) if head_path and head else None
        with freed_on_exit(real):
            lists = self._weightless_lists(dtype or self.dtype)
            yield StubStem(real, self._stem_parts(real), recorders, output, lists)

    def refuse_untraceable(
        self,
        inputs: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device = CPU,
    ) -> Traceable:
        """See `ModelSource`; what holds for text alone is found out once."""
        wanted = dtype or self.dtype
        if inputs is not None:
            return widened(partial(self._rehearse, inputs), wanted, device)
        asked = (wanted, device.type)
        if asked not in self._traceable_by_text:
            self._traceable_by_text[asked] = widened(partial(self._rehearse, None), wanted, device)
        return self._traceable_by_text[asked]

    def handed_on(self, length: int, dtype: torch.dtype) -> int:
        """See `ModelSource`; found out once for a length."""
        if self._hands_on is False:
            return 0
        if (length, dtype) not in self._handed_on:
            with self._weightless_stem(dtype, towers=False) as stem:
                row = torch.zeros(1, length, dtype=torch.int64, device=CPU)
                beside = stem.trace({TOKENS: row}).beside if self._hands_on else ()
            self._handed_on[length, dtype] = sum(s.numel() * s.element_size() for s in beside)
        return self._handed_on[length, dtype]

    def _rehearse(self, inputs: Mapping[str, Tensor] | None, dtype: torch.dtype) -> Rehearsed:
        """Run stem and blocks with zeros for weights, which take no memory."""
        with self._weightless_stem(dtype, towers=inputs is not None) as stem:
            traces = trial_traces(stem, inputs, len(self.block_lists), self.facts.context or TRIAL_TOKENS)
        calls = [call for trace in traces for call in trace.calls]
        flowing = [trace.states for trace in traces for _ in trace.calls]
        blocks = self._weightless(self.blocks, calls, flowing, dtype)
        failed = refuse_left_state(self._parts.model, blocks, calls)
        skipped = (b.index for b, call in zip(self.blocks, calls, strict=True) if call is None)
        return Rehearsed(frozenset(skipped), failed)

    @contextmanager
    def _weightless_stem(self, dtype: torch.dtype, *, towers: bool) -> Iterator[StubStem]:
        """A stem with zeros for weights, which take no memory."""
        model = self._parts.model
        spare = None if self.tied_head else find_head(model)
        left_out = self._outside_stem(spare, towers=towers)
        dtypes, meta = self._dtypes_for(dtype), model.state_dict()
        absent = [name for name in self._in_stem(left_out) if meta[name].is_meta]
        zeros = {n: torch.zeros((), dtype=dtypes[n], device=CPU).expand(meta[n].shape) for n in absent}
        real, recorders = self._stubbed(left_out, zeros, CPU, dtype)
        with freed_on_exit(real):
            lists = self._weightless_lists(dtype)
            stem = StubStem(real, self._stem_parts(real), recorders, None, lists)
            self._hands_on = any(recorder.carriers for recorder in recorders)
            yield stem

    def _stem_parts(self, model: Any) -> StemParts:
        return StemParts.of(model, [block.module for block in self.blocks])

    def _weightless_lists(self, dtype: torch.dtype) -> list[Weightless]:
        """The blocks of each list, as `_weightless` gives them."""

        def of(blocks: Sequence[Block]) -> Weightless:
            return lambda calls, flowing: self._weightless(blocks, calls, flowing, dtype)

        return [of(blocks) for blocks in self.block_lists]

    def _weightless(
        self,
        blocks: Sequence[Block],
        calls: Sequence[BlockCall | None],
        flowing: Sequence[States],
        dtype: torch.dtype,
    ) -> Iterator[RehearsedBlock]:
        """Blocks with zeros for weights, which take no memory, and what each is called with."""
        for block, call, states in zip(blocks, calls, flowing, strict=True):
            if call is not None:
                module = self._parts.model.get_submodule(block.module)
                dtypes = self.block_dtypes(block.index, dtype)
                zeros = {
                    name: torch.zeros((), dtype=dtypes[name], device=CPU).expand(meta.shape)
                    for name, meta in module.state_dict().items()
                    if meta.is_meta
                }
                real = real_copy(module, zeros, CPU, {}, dtypes)
                yield RehearsedBlock(block.index, module, real, states, call)

    def _outside_stem(self, spare: str | None, *, towers: bool) -> list[str]:
        """Module paths that a stem does without: blocks, encoders unless `towers`, and `spare`."""
        blocks = [block.module for block in self.blocks]
        others = [
            tower
            for tower in find_towers(self._parts.model)
            if not towers and not any(path.startswith(f"{tower}.") for path in blocks)
        ]
        return [*blocks, *others, *([spare] if spare else [])]

    def _in_stem(self, left_out: Sequence[str]) -> list[str]:
        """Names of the tensors of a stem."""
        outside = tuple(f"{path}." for path in left_out)
        return [name for name in self._parts.model.state_dict() if not name.startswith(outside)]

    def _stubbed(
        self,
        left_out: Sequence[str],
        tensors: Mapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> tuple[nn.Module, list[Recorder]]:
        """A copy of the model with stubs for blocks and nothing in place of what else is left out.

        Returns it with the recorders to which the stubs report, one for each list of blocks.
        """
        model = self._parts.model
        recorders = [Recorder([block.flow for block in blocks]) for blocks in self.block_lists]
        replaced: dict[int, object] = {}
        for recorder, blocks in zip(recorders, self.block_lists, strict=True):
            replaced |= make_stubs([model.get_submodule(block.module) for block in blocks], recorder.receive)
        for path in left_out[len(self.blocks) :]:
            replaced[id(model.get_submodule(path))] = LeftOut()
        return real_copy(model, tensors, device, replaced, self._dtypes_for(dtype)), recorders

    def _gather(
        self, names: Iterable[str], device: torch.device, dtype: torch.dtype | None
    ) -> dict[str, Tensor]:
        """Values of module tensors by full name, in their dtypes and on the device.

        Tied tensors are fetched once. Tensors that no checkpoint holds (derived buffers) are left out: the
        skeleton has their values.
        """
        dtypes = self._dtypes_for(self._parts.dtype if dtype is None else dtype)
        made: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        for name in names:
            recipe = recipe_for(name, self._parts.names, self._parts.tied)
            if recipe is None:
                continue
            if recipe.key not in made:
                fetched = self._fetch(recipe, dtypes[recipe.targets[0]])
                made.update({target: fetched[target].to(device) for target in recipe.targets})
                made[recipe.key] = made[recipe.targets[0]]
            values[name] = made[name] if name in made else made[recipe.targets[0]]
        return values

    def _dtypes_for(self, dtype: torch.dtype) -> Mapping[str, torch.dtype]:
        if dtype not in self._dtypes:
            self._dtypes[dtype] = weight_dtypes(self._parts.model, dtype)
        return self._dtypes[dtype]
