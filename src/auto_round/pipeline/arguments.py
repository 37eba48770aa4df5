"""What each block receives beside hidden states, kept once however many rows and blocks share it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from auto_round.errors import UnsupportedError
from auto_round.models.source import BlockCall


class ArgumentTable:
    """Arguments of every block for every row, found by stub traces of one row each.

    Equal tensors are stored once: rotary embeddings are the same for all rows of one length, and masks for
    all blocks of one kind.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[BlockCall | None, ...]] = []
        self._edits: list[tuple[Tensor | None, ...]] = []
        self._known: dict[tuple[object, ...], list[Tensor]] = {}

    def add(self, calls: Sequence[BlockCall | None], edits: Sequence[Tensor | None]) -> None:
        """Append one row."""
        kept: list[BlockCall | None] = []
        for call in calls:
            if call is None:
                kept.append(None)
            else:
                args = tuple(self._intern(a) for a in call.args)
                kept.append(BlockCall(args, {k: self._intern(v) for k, v in call.kwargs.items()}))
        self._calls.append(tuple(kept))
        self._edits.append(tuple(edits))

    def skipped(self, block: int) -> bool:
        """The model leaves this block out for these rows."""
        return bool(self._calls) and self._calls[0][block] is None

    def batch(
        self, block: int, rows: Iterable[int], device: torch.device
    ) -> tuple[BlockCall | None, Tensor | None]:
        """Arguments of one block for several rows, and what is added to its input beforehand.

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
            return None, None
        args = tuple(_collate([c.args[i] for c in present], device) for i in range(len(present[0].args)))
        kwargs = {k: _collate([c.kwargs[k] for c in present], device) for k in present[0].kwargs}
        added = None if edits[0] is None else _collate(edits, device)
        return BlockCall(args, kwargs), added

    def _intern(self, value: Any) -> Any:
        return _map_tensors(self._same, value)

    def _same(self, tensor: Tensor) -> Tensor:
        key = (
            tensor.dtype,
            tensor.shape,
            float(tensor.double().abs().sum()) if tensor.dtype != torch.bool else 0.0,
        )
        bucket = self._known.setdefault(key, [])
        for known in bucket:
            if torch.equal(known, tensor):
                return known
        bucket.append(tensor.detach().cpu())
        return bucket[-1]


def _map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply `change` to every tensor inside nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_map_tensors(change, v) for v in value)
    if isinstance(value, Mapping):
        return {k: _map_tensors(change, v) for k, v in value.items()}
    return value


def _collate(values: Sequence[Any], device: torch.device) -> Any:
    """One value for several rows: shared when equal, joined along the first dimension otherwise."""
    first = values[0]
    if all(v is first for v in values):
        return _map_tensors(lambda t: t.to(device), first)
    if any(v is None for v in values) and any(isinstance(v, Tensor) for v in values):
        values = _fill_masks(values)
        first = values[0]
    if isinstance(first, Tensor):
        return torch.cat([v.to(device) for v in values])
    if isinstance(first, (tuple, list)):
        return type(first)(_collate([v[i] for v in values], device) for i in range(len(first)))
    if isinstance(first, Mapping):
        return {k: _collate([v[k] for v in values], device) for k in first}
    if any(v != first for v in values):
        raise UnsupportedError(f"rows of one batch need different block arguments: {first!r} and others")
    return first


def _fill_masks(values: Sequence[Any]) -> list[Tensor]:
    """Attention masks of rows without padding are None: plain causal attention, written out here."""
    pattern = next(v for v in values if isinstance(v, Tensor))
    causal = torch.ones(pattern.shape[-2:], dtype=torch.bool, device=pattern.device).tril()
    if pattern.dtype is not torch.bool:
        blocked = torch.finfo(pattern.dtype).min
        causal = torch.where(causal, 0.0, blocked).to(pattern.dtype)
    whole = causal.expand(1, *pattern.shape[1:])
    return [whole if v is None else v for v in values]
