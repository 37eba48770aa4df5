"""Arguments of each block beside the hidden states (masks, position embeddings), equal ones kept once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from auto_round.errors import UnsupportedError
from auto_round.facts.flow import BlockCall
from auto_round.facts.nested import map_tensors
from auto_round.models.source import Edits

ArgumentPlace = tuple[object, ...]
"""Path to a tensor among the arguments: block, "args" or "kwargs", then positions and keys."""


def batch_axes(
    one: Sequence[BlockCall | None], two: Sequence[BlockCall | None]
) -> Mapping[ArgumentPlace, int]:
    """Batch axis of each argument, found by calling the model with one batch and with twice that batch.

    Whether rows share a tensor cannot be seen from one row: BLOOM's alibi is `[batch * heads, 1, length]`,
    rotary embeddings are `[1, length, width]` for any batch.

    Args:
        one: what the blocks receive for some rows.
        two: what they receive for those rows twice.

    Returns:
        Place of a tensor -> the axis that is twice as long in `two`; those of one shape are left out.
    """
    found: dict[ArgumentPlace, int] = {}
    for block, (few, many) in enumerate(zip(one, two, strict=True)):
        if few is not None and many is not None:
            _compare((block, "args"), few.args, many.args, found)
            _compare((block, "kwargs"), few.kwargs, many.kwargs, found)
    return found


def _compare(place: ArgumentPlace, few: Any, many: Any, found: dict[ArgumentPlace, int]) -> None:
    if isinstance(few, Tensor) and isinstance(many, Tensor) and few.dim() == many.dim():
        grown = [axis for axis in range(few.dim()) if many.shape[axis] == 2 * few.shape[axis]]
        if grown:
            found[place] = grown[0]
    elif isinstance(few, (tuple, list)) and isinstance(many, (tuple, list)):
        for i, (a, b) in enumerate(zip(few, many, strict=False)):
            _compare((*place, i), a, b, found)
    elif isinstance(few, Mapping) and isinstance(many, Mapping):
        for key in few.keys() & many.keys():
            _compare((*place, key), few[key], many[key], found)


class ArgumentTable:
    """Arguments of every block for every row, found by stub traces of one row each.

    Equal tensors are stored once: rotary embeddings are the same for all rows of one length, and masks for
    all blocks of one kind.
    """

    def __init__(
        self, axes: Mapping[ArgumentPlace, int] | None = None, *, apart: bool = False, alone: bool = False
    ) -> None:
        """An empty table.

        Args:
            axes: what `batch_axes` gives; None where nothing is known: rows share what is equal, and what is
                not is joined along the first axis.
            apart: rows may need arguments that cannot be put into one batch, as those with images do: `kind`
                tells which can.
            alone: no two rows can: encoders put the patches of all images of a row into one tensor.
        """
        self.apart = apart or alone
        self._alone = alone
        self._kinds: list[Hashable] = []
        self._axes = axes or {}
        self._calls: list[tuple[BlockCall | None, ...]] = []
        self._edits: list[tuple[Edits, ...]] = []
        self._known: dict[tuple[object, ...], list[Tensor]] = {}

    def add(self, calls: Sequence[BlockCall | None], edits: Sequence[Edits]) -> None:
        """Append one row."""
        kept: list[BlockCall | None] = []
        for call in calls:
            if call is None:
                kept.append(None)
            else:
                args = tuple(self._intern(a) for a in call.args)
                kwargs = {k: self._intern(v) for k, v in call.kwargs.items()}
                kept.append(replace(call, args=args, kwargs=kwargs))
        self._kinds.append(len(self._calls) if self._alone else _kind(kept) if self.apart else None)
        self._calls.append(tuple(kept))
        self._edits.append(tuple(edits))

    def skipped(self, block: int) -> bool:
        """Whether the model leaves this block out for all rows."""
        return bool(self._calls) and all(calls[block] is None for calls in self._calls)

    def kind(self, row: int) -> Hashable:
        """Rows of one kind can be put into one batch."""
        return self._kinds[row]

    def batch(self, block: int, rows: Iterable[int], device: torch.device) -> tuple[BlockCall | None, Edits]:
        """Arguments of one block for several rows, and what the model adds to its hidden states beforehand.

        Raises:
            UnsupportedError: rows need arguments that cannot be put into one batch.
        """
        index = list(rows)
        calls = [self._calls[i][block] for i in index]
        edits = [self._edits[i][block] for i in index]
        present = [c for c in calls if c is not None]
        if len(present) != len(calls):
            if present:
                raise UnsupportedError(f"block {block} runs for some rows and not for others")
            return None, (None,) * len(edits[0])
        join = _Joiner(self._axes, device)
        args = join([c.args for c in present], (block, "args"))
        kwargs = join([c.kwargs for c in present], (block, "kwargs"))
        added = tuple(join(_whole(column), (block, "edit")) for column in zip(*edits, strict=True))
        return replace(present[0], args=args, kwargs=kwargs), added

    def _intern(self, value: Any) -> Any:
        return map_tensors(self._same, value)

    def _same(self, tensor: Tensor) -> Tensor:
        key = (
            tensor.dtype,
            tensor.shape,
            float(tensor.abs().double().sum()) if tensor.dtype != torch.bool else 0.0,
        )
        bucket = self._known.setdefault(key, [])
        for known in bucket:
            if torch.equal(known, tensor):
                return known
        bucket.append(tensor.detach().cpu())
        return bucket[-1]


def _kind(calls: Sequence[BlockCall | None]) -> Hashable:
    """Which blocks are called, and with what, as far as rows of one batch must agree in it."""
    return tuple(
        None if call is None else (call.lengths, *_alike((), (call.args, call.kwargs))) for call in calls
    )


def _alike(place: ArgumentPlace, value: Any) -> Iterator[Hashable]:
    """Shapes of tensors and values of anything else.

    What no mask means is the model's affair where it reads images: not always that attention is causal.
    """
    if isinstance(value, Tensor):
        yield place, tuple(value.shape)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _alike((*place, key), value[key])
    elif isinstance(value, (tuple, list)):
        for i, part in enumerate(value):
            yield from _alike((*place, i), part)
    elif isinstance(value, (bool, int, float, str)):
        yield place, value


def _whole(edits: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """What is added for each row; zeros for rows without, where others have something."""
    pattern = next((edit for edit in edits if edit is not None), None)
    if pattern is None:
        return edits
    return [torch.zeros_like(pattern) if edit is None else edit for edit in edits]


@dataclass(frozen=True, slots=True)
class _Joiner:
    """Puts the arguments of single rows together into those of a batch.

    Attributes:
        axes: what `batch_axes` gives.
        device: where tensors are wanted.
    """

    axes: Mapping[ArgumentPlace, int]
    device: torch.device

    def __call__(self, values: Sequence[Any], place: ArgumentPlace) -> Any:
        """One argument of the batch from `values`, that argument of each row."""
        first = values[0]
        if any(v is None for v in values) and any(isinstance(v, Tensor) for v in values):
            values = _fill_masks(values)
            first = values[0]
        if isinstance(first, Tensor):
            return self._tensor(values, place)
        if isinstance(first, (tuple, list)):
            return type(first)(self([v[i] for v in values], (*place, i)) for i in range(len(first)))
        if isinstance(first, Mapping):
            keys = dict.fromkeys(key for value in values for key in value)
            return {k: self([v.get(k) for v in values], (*place, k)) for k in keys}
        if any(v != first for v in values):
            raise UnsupportedError(f"rows of one batch need different block arguments: {first!r} and others")
        return first

    def _tensor(self, values: Sequence[Tensor], place: ArgumentPlace) -> Tensor:
        axis = self.axes.get(place)
        first = values[0]
        if any(v is not first for v in values[1:]):
            return torch.cat([v.to(self.device) for v in values], axis or 0)
        moved = first.to(self.device)
        if axis is None or len(values) == 1:
            return moved
        if moved.shape[axis] != 1:
            return torch.cat([moved] * len(values), axis)
        return moved.expand(*(len(values) if i == axis else n for i, n in enumerate(moved.shape)))


_ATTENTION_MASK_DIM = 4


def _fill_masks(values: Sequence[Any]) -> list[Tensor]:
    """Masks of rows without padding are None, written out here.

    For attention, `[1, heads, length, length]`, it stands for plain causal attention; for anything else, such
    as the `[1, length]` of a recurrent layer, it means that every position counts.
    """
    pattern = next(v for v in values if isinstance(v, Tensor))
    if pattern.dim() != _ATTENTION_MASK_DIM:
        return [torch.ones_like(pattern) if v is None else v for v in values]
    causal = torch.ones(pattern.shape[-2:], dtype=torch.bool, device=pattern.device).tril()
    if pattern.dtype is not torch.bool:
        blocked = torch.finfo(pattern.dtype).min
        causal = torch.where(causal, 0.0, blocked).to(pattern.dtype)
    whole = causal.expand(1, *pattern.shape[1:])
    return [whole if v is None else v for v in values]
