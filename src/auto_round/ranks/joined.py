"""Several processes that talk through `torch.distributed`."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from auto_round.errors import InternalError, RankError
from auto_round.ranks.ranks import part_of
from auto_round.ranks.tree import Node, TreeSum, Values, fold

T = TypeVar("T")
K = TypeVar("K")

_HOST = torch.device("cpu")
BUCKET = 1 << 24
"""Most numbers that are added in one exchange: more at once needs more memory and is no faster."""


class Joined:
    """The processes of the default group; see `ranks.Ranks`.

    What is exchanged passes as it is: no number is changed on its way. Sums are made in the order of
    `TreeSum` on whichever rank owns that part of the numbers, and then given to all.

    Args:
        device: where this process computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._device = device
        self._wire = _HOST if dist.get_backend() in ("gloo", "mpi") else device

    def sum(self, own: TreeSum) -> Values:
        """The sum of what all added; every rank gets the same bits."""
        nodes = own.nodes()
        listed = self.objects((list(nodes), _kinds(nodes)))
        keys = [of for of, _ in listed]
        kinds = _known(kinds for _, kinds in listed)
        total: Values = [None] * len(kinds)
        for bucket in _buckets(kinds):
            for place, value in zip(bucket, self._sum_bucket(bucket, kinds, nodes, keys), strict=True):
                total[place] = value
        return total

    def _sum_bucket(
        self,
        bucket: Sequence[int],
        kinds: Sequence[Any],
        nodes: Mapping[Node, Values],
        keys: list[list[Node]],
    ) -> list[Tensor]:
        """Sums of some tensors of one dtype: each rank adds up its share of the numbers for all."""
        shapes, dtype = [kinds[i][0] for i in bucket], kinds[bucket[0]][1]
        lengths = [shape.numel() for shape in shapes]
        share = -(-sum(lengths) // self.size)
        # A negative zero changes no sum, not even the sign of a zero.
        sent = torch.full((len(nodes), share * self.size), -0.0, dtype=dtype, device=self._device)
        for row, values in zip(sent, nodes.values(), strict=True):
            parts = torch.split(row[: sum(lengths)], lengths)
            for part, i in zip(parts, bucket, strict=True):
                if (value := values[i]) is not None:
                    part.copy_(value.reshape(-1))
        sent = sent.reshape(len(nodes), self.size, share).transpose(0, 1).contiguous()
        sizes = [len(of) * share for of in keys]
        got = torch.empty(sum(sizes), dtype=dtype, device=self._wire)
        away = [len(nodes) * share] * self.size
        _talk(dist.all_to_all_single, got, sent.reshape(-1).to(self._wire), sizes, away)
        rows = got.to(self._device).reshape(-1, share)
        (own,) = fold({node: [row] for node, row in zip((n for of in keys for n in of), rows, strict=True)})
        if own is None:
            raise InternalError("a sum of nothing")
        whole = torch.empty(share * self.size, dtype=dtype, device=self._wire)
        _talk(dist.all_gather, list(whole.reshape(self.size, share)), own.to(self._wire).contiguous())
        whole = whole.to(self._device)
        flat = torch.split(whole[: sum(lengths)], lengths)
        return [part.reshape(shape) for part, shape in zip(flat, shapes, strict=True)]

    def objects(self, own: T) -> list[T]:
        """What each of them has; sent as bytes, so that it may hold tensors of any kind."""
        data = _packed(own)
        sizes = torch.zeros(self.size, dtype=torch.int64, device=self._wire)
        mine = torch.tensor([len(data)], dtype=torch.int64, device=self._wire)
        _talk(dist.all_gather, list(sizes.reshape(self.size, 1)), mine)
        found: list[T] = []
        for rank, size in enumerate(sizes.tolist()):
            if rank == self.rank:
                _talk(dist.broadcast, data.to(self._wire), rank)
                found.append(own)
            else:
                found.append(self._received(size, rank))
        return found

    def first(self, own: T) -> T:
        """What the first one has."""
        data = _packed(own) if not self.rank else torch.empty(0, dtype=torch.uint8, device=_HOST)
        size = torch.tensor([len(data)], dtype=torch.int64, device=self._wire)
        _talk(dist.broadcast, size, 0)
        if self.rank:
            found: T = self._received(int(size), 0)
            return found
        _talk(dist.broadcast, data.to(self._wire), 0)
        return own

    def _received(self, size: int, source: int) -> Any:
        """A value that another rank broadcasts, as so many bytes."""
        data = torch.empty(size, dtype=torch.uint8, device=self._wire)
        _talk(dist.broadcast, data, source)
        # Bytes come from the other processes of this run, which run the same code.
        file = io.BytesIO(data.cpu().numpy().tobytes())
        return torch.load(file, map_location=self._device, weights_only=False)

    def share(self, states: Sequence[Tensor], rows: range) -> None:
        """Fill in the rows that others computed."""
        for state in states:
            for rank in range(self.size):
                part = part_of(rank, self.size, rows)
                if len(part):
                    self._send_rows(state, slice(part.start, part.stop), rank)

    def _send_rows(self, state: Tensor, rows: slice, owner: int) -> None:
        """Give neighbouring rows of one rank to all."""
        own = state[rows]
        passed = own.to(self._wire).contiguous()
        _talk(dist.broadcast, passed.view(torch.uint8), owner)
        if passed.data_ptr() != own.data_ptr():
            own.copy_(passed)

    def spread(self, states: Sequence[Tensor]) -> None:
        """Give all what the first one has, in place."""
        for state in states:
            self._send_rows(state, slice(None), 0)

    def to_first(self, tensors: Mapping[K, Tensor]) -> Iterator[dict[K, Tensor]]:
        """Named tensors of all others for the first, on the host."""
        about = self.objects([(n, t.dtype, t.shape) for n, t in tensors.items()] if self.rank else [])
        if self.rank:
            for tensor in tensors.values():
                _talk(dist.send, _bytes(tensor.detach().to(self._wire)), 0)
            return
        for rank, listed in enumerate(about[1:], start=1):
            got = {name: torch.empty(shape, dtype=dtype, device=self._wire) for name, dtype, shape in listed}
            for tensor in got.values():
                _talk(dist.recv, _bytes(tensor), rank)
            yield {name: tensor.to(_HOST) for name, tensor in got.items()}


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor as uint8, in its own memory where that is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _kinds(nodes: Mapping[Node, Values]) -> list[Any]:
    """Shape and dtype of each tensor of a sum; None where nothing was added."""
    columns = zip(*nodes.values(), strict=True)
    return [next(((v.shape, _wide(v.dtype)) for v in column if v is not None), None) for column in columns]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _known(listed: Iterator[list[Any]]) -> list[Any]:
    """The same of what all ranks have together."""
    held = [kinds for kinds in listed if kinds]
    return [next((k for k in column if k is not None), None) for column in zip(*held, strict=True)]


def _buckets(kinds: Sequence[Any]) -> Iterator[list[int]]:
    """Places of tensors that are added in one exchange."""
    for dtype in dict.fromkeys(kind[1] for kind in kinds if kind is not None):
        bucket: list[int] = []
        filled = 0
        for place, kind in enumerate(kinds):
            if kind is None or kind[1] is not dtype:
                continue
            bucket.append(place)
            filled += kind[0].numel()
            if filled >= BUCKET:
                yield bucket
                bucket, filled = [], 0
        if bucket:
            yield bucket


def _packed(value: object) -> Tensor:
    """Bytes of a value, uint8."""
    file = io.BytesIO()
    torch.save(value, file)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


def _talk(call: Callable[..., object], *arguments: object) -> None:
    """Exchange something; what went wrong there is said in our words.

    Raises:
        RankError: another process is gone, or did not answer for long.
    """
    try:
        call(*arguments)
    except RuntimeError as error:  # backends have classes of their own for some of their errors only
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise RankError(
            f"another process of this run has ended or does not answer ({reason}). What was finished is "
            "kept: the same command continues, with as many processes or others"
        ) from error
