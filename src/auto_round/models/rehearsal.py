"""Runs each block once without weights, to find out whether it leaves anything behind for later blocks.

While tuning, a block is computed alone, from a fresh copy, with the arguments that the trace found. A block
may leave results in its arguments, in modules or objects that it shares with other blocks, in attributes that
others ask for, or in global names of its source file. These would be lost, or be stale.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    MutableSequence,
    Sequence,
)
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from auto_round.errors import UnsupportedError
from auto_round.facts.flow import BlockCall, States
from auto_round.facts.tensor import dtype_name
from auto_round.log import logger
from auto_round.models.class_source import asks_of_parts, classes_of
from auto_round.models.config_facts import shares_no_caches
from auto_round.models.earlier_results import Marks, arguments, untraceable, walk
from auto_round.models.families import parameter_names
from auto_round.models.source import Traceable

_PRODUCTS = {
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.mm.out: 0,
    torch.ops.aten.bmm.default: 0,
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten.baddbmm.default: 1,
    torch.ops.aten._grouped_mm.default: 0,
}
"""Products of matrices -> position of the first matrix."""
_CLONE = torch.ops.aten.clone.default

WANTS_WEIGHTS = (
    TypeError,
    ValueError,
    RuntimeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    ImportError,
)
"""What a block may raise that cannot run with zeros, or with weights that are one number in memory."""
_PLAIN = (dict, list, defaultdict, OrderedDict)
"""Containers that only hold values; others may make an entry when they are asked for it."""


class WeightlessProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Weights are zeros that take no memory; products with them are zero and are not computed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operator's result."""
        named = kwargs or {}
        first = _PRODUCTS.get(func)
        if first is not None and _is_one_number(args[first + 1]):
            one, other = args[first : first + 2]
            if one.dtype != other.dtype:
                return func(*args, **named)  # refuses them
            if "out" in named:
                return named["out"].zero_()
            return one.new_zeros(*one.shape[:-1], other.shape[-1])
        if func is _CLONE and "memory_format" in named and _is_one_number(args[0]):
            return args[0].detach()  # asked for by `contiguous`, which promises no copy
        return func(*args, **named)


def _is_one_number(tensor: Tensor) -> bool:
    return tensor.numel() > 1 and tensor.untyped_storage().nbytes() == tensor.element_size()


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """What a rehearsal found.

    Attributes:
        skipped: indices of blocks that were not run; some are for images only.
        failed: index of each block that does not run without weights -> what it raised.
    """

    skipped: frozenset[int]
    failed: Mapping[int, Exception]


@dataclass(frozen=True, slots=True)
class RehearsedBlock:
    """One block of a rehearsal.

    Attributes:
        index: position among all blocks.
        skeleton: the block in the model without weights, whose modules other blocks may share.
        real: a copy of it that runs.
        states: what flows in.
        call: what else it is called with.
    """

    index: int
    skeleton: nn.Module
    real: nn.Module
    states: States
    call: BlockCall


@dataclass(frozen=True, slots=True)
class _Holder:
    """Something that outlives a call, and what it held before.

    Attributes:
        where: what it is, for people.
        holder: mapping, list, tensor, class or other object.
        held: its content, kept alive.
        any_change: everything new counts as state, not tensors only.
        read: names that others ask for; None where they may ask for all.
    """

    where: str
    holder: Any
    held: Mapping[Any, Any]
    any_change: bool = False
    read: frozenset[str] | None = None

    def new(self) -> dict[Any, Any]:
        """Content that is not what it was before the call."""
        now = {k: v for k, v in _content(self.holder).items() if self.read is None or k in self.read}
        return {k: v for k, v in now.items() if k not in self.held or not _same(self.held[k], v)}

    def restore(self) -> None:
        """Bring back what was there."""
        if isinstance(self.holder, MutableSequence):
            self.holder[:] = list(self.held.values())
        elif not isinstance(self.holder, Tensor):
            for key in self.new():
                _put_back(self.holder, self.held, key)


def widened(
    rehearse: Callable[[torch.dtype], Rehearsed], dtype: torch.dtype, device: torch.device
) -> Traceable:
    """How a model runs block by block: in a dtype, or in float32 where only that lets it run.

    Code that computes some steps in float32 may hand them to a product whose other side has 16 bits.

    Args:
        rehearse: runs model and blocks without weights, in a dtype.
        dtype: the dtype that is wanted.
        device: where blocks will run. What this processor cannot do with 16 bits says nothing of others.

    Raises:
        UnsupportedError: it cannot be run block by block.
    """
    try:
        found = rehearse(dtype)
    except UnsupportedError as refused:
        if dtype == torch.float32:
            raise
        wide, why = rehearse(torch.float32), refused.refusals[0].reason
    else:
        ignored = () if device.type == "cpu" else NotImplementedError
        failed = {i: error for i, error in found.failed.items() if not isinstance(error, ignored)}
        if not failed or dtype == torch.float32:
            return Traceable(found.skipped, dtype)
        try:
            wide = rehearse(torch.float32)
        except UnsupportedError:
            return Traceable(found.skipped, dtype)
        mended = [i for i in failed if i not in wide.failed]
        if not mended:
            return Traceable(found.skipped, dtype)
        why = f"block {mended[0]}: {str(failed[mended[0]]).strip()[:200]}"
    narrow = dtype_name(dtype)
    logger.info("blocks run in float32: the model's own code fails in %s (%s)", narrow, why)
    return Traceable(wide.skipped, torch.float32)


def refuse_left_state(
    model: Any, parts: Iterable[RehearsedBlock], calls: Sequence[BlockCall | None]
) -> dict[int, Exception]:
    """Run blocks without weights and refuse what they leave behind for others.

    A block that does not run without weights is passed over.

    Args:
        model: the skeleton.
        parts: the blocks that run, in order; made one by one.
        calls: of all blocks; what several of them are given is shared.

    Returns:
        Index of each block that was passed over -> what it raised.

    Raises:
        UnsupportedError: a block leaves state behind.
    """
    given = [{id(part) for _, v in arguments(call) for part in walk(v)} for call in calls if call is not None]
    counts = Counter() if shares_no_caches(model.config) else Counter(key for keys in given for key in keys)
    in_calls = frozenset(key for key, n in counts.items() if n > 1)
    asked: dict[frozenset[Any], frozenset[str]] = {}
    failed: dict[int, Exception] = {}
    owners = _owners(model)
    for part in parts:
        own = frozenset(kind for module in part.skeleton.modules() for kind in classes_of(module))
        if own not in asked:
            asked[own] = _asked_outside(model, own)
        holders = [
            *_in_arguments(part, in_calls),
            *_in_modules(part, owners, asked[own]),
            *_in_files(own),
        ]
        try:
            left = _left_behind(part, holders)
        except WANTS_WEIGHTS as error:
            failed[part.index], left = error.with_traceback(None), None
        finally:
            for holder in holders:
                holder.restore()
        if left is not None:
            raise untraceable(f"block {part.index} leaves state for others in {left}")
    return failed


def _left_behind(part: RehearsedBlock, holders: Sequence[_Holder]) -> str | None:
    """Where a block leaves tensors that depend on its input, or that it makes anew in each call."""
    found: list[list[dict[Any, Any]]] = []
    for seed in range(2):
        args, kwargs = part.call.given(Marks(seed)(part.states))
        with torch.enable_grad(), WeightlessProducts():  # type: ignore[no-untyped-call]
            part.real(*args, **kwargs)
        found.append([holder.new() for holder in holders])
    for holder, first, second in zip(holders, *found, strict=True):
        for key, value in second.items():
            if holder.any_change or _is_state(first.get(key), value):
                return f'"{holder.where}.{key}"' if isinstance(key, str) else f'"{holder.where}"'
    return None


def _is_state(first: Any, second: Any) -> bool:
    """Whether tensors depend on the input or are new in each call; tables made once and kept are neither."""
    before, after = ([t for t in walk(value) if isinstance(t, Tensor)] for value in (first, second))
    replaced = len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True))
    return any(t.requires_grad for t in after) or (bool(after) and replaced)


def _in_arguments(part: RehearsedBlock, shared: frozenset[int]) -> Iterator[_Holder]:
    for name, value in arguments(part.call, parameter_names(part.skeleton)):
        for inner in walk(value):
            if id(inner) in shared and (isinstance(inner, Tensor) or _may_change(inner)):
                yield _Holder(name, inner, _content(inner), any_change=True)


def _in_modules(part: RehearsedBlock, owners: Mapping[int, int], asked: frozenset[str]) -> Iterator[_Holder]:
    """Attributes of the block's modules, and of the objects in these attributes."""
    for path, module in part.real.named_modules():
        original = part.skeleton.get_submodule(path)
        read = None if owners[id(original)] > 1 else asked
        where = f"{type(module).__name__}"
        yield _Holder(where, module, _content(module), read=read)
        yield _Holder(where, module._buffers, dict(module._buffers), read=read)
        for name, value in vars(module).items():
            alone = owners.get(id(vars(original).get(name)), 0) < 2
            if name in _TORCHS or not _may_change(value):
                continue
            if not alone or read is None or name in read:
                yield _Holder(f"{where}.{name}", value, _content(value))


def _in_files(kinds: Collection[Any]) -> Iterator[_Holder]:
    """Names of the source files of a block's classes, and attributes of the classes."""
    files = {kind.__module__ for kind in kinds}
    named = [(kind.__name__, kind) for kind in kinds] + [(file, sys.modules[file]) for file in files]
    for where, holder in named:
        yield _Holder(where, holder, _content(holder))
        for name, value in list(vars(holder).items()):
            if not name.startswith("__") and type(value) in _PLAIN:
                yield _Holder(f"{where}.{name}", value, _content(value))


def _owners(model: nn.Module) -> Counter[int]:
    """`id` of each module, and of each changeable object that modules hold -> how many modules hold it."""
    held: Counter[int] = Counter()
    for module in model.modules():
        held.update(id(child) for child in module.children())
        held.update(id(value) for name, value in vars(module).items() if name not in _TORCHS)
    return held


def _asked_outside(model: nn.Module, own: frozenset[Any]) -> frozenset[str]:
    """Attributes that other classes ask of their parts."""
    kinds = {kind for module in model.modules() for kind in classes_of(module)} - own
    return frozenset().union(*map(asks_of_parts, kinds))


_TORCHS = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


def _may_change(value: Any) -> bool:
    """Whether a value is a container or an object of attributes."""
    if isinstance(value, (MutableMapping, MutableSequence)):
        return True
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, (Tensor, nn.Module, type))
        and not callable(value)
    )


def _content(holder: Any) -> dict[Any, Any]:
    if isinstance(holder, Tensor):
        return {0: holder._version}
    if isinstance(holder, Mapping):
        return dict(holder)
    if isinstance(holder, Sequence):
        return dict(enumerate(holder))
    return {key: value for key, value in vars(holder).items() if not key.startswith("__")}


def _same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, int) and isinstance(other, int) and one == other)


def _put_back(holder: Any, held: Mapping[Any, Any], key: Any) -> None:
    if isinstance(holder, type):  # whose attributes cannot be reached as a mapping
        if key in held:
            setattr(holder, key, held[key])
        else:
            delattr(holder, key)
        return
    content = holder if isinstance(holder, MutableMapping) else vars(holder)
    if key in held:
        content[key] = held[key]
    else:
        del content[key]
