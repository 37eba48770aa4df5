"""The seam: what the processes of a run do together, and the one process that does all of it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from auto_round.errors import RankError
from auto_round.ranks.tree import TreeSum, Values, fold

T = TypeVar("T")
K = TypeVar("K")


class Ranks(Protocol):
    """The processes of a run, which all call the same methods in the same order.

    Attributes:
        rank: number of this process; 0 writes the output.
        size: how many there are.
    """

    @property
    def rank(self) -> int:
        """Number of this process."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def sum(self, own: TreeSum) -> Values:
        """The sum of what all added, each at places of its own; the same bits for each."""
        ...

    def objects(self, own: T) -> list[T]:
        """What each of them has, in the order of their numbers; tensors come to this process's device."""
        ...

    def first(self, own: T) -> T:
        """What the first one has."""
        ...

    def share(self, states: Sequence[Tensor], rows: range) -> None:
        """Fill in rows that others computed: of `rows`, each has computed its own (see `own_rows`)."""
        ...

    def spread(self, states: Sequence[Tensor]) -> None:
        """Give all what the first one has, in place."""
        ...

    def to_first(self, tensors: Mapping[K, Tensor]) -> Iterator[dict[K, Tensor]]:
        """Named tensors of all others for the first, on the host, rank by rank; nothing for the others."""
        ...


class Alone:
    """One process, which has nobody to talk to."""

    rank = 0
    size = 1

    def sum(self, own: TreeSum) -> Values:
        """The sum of what was added."""
        return fold(own.nodes())

    def objects(self, own: T) -> list[T]:
        """Its own only."""
        return [own]

    def first(self, own: T) -> T:
        """Its own."""
        return own

    def share(self, states: Sequence[Tensor], rows: range) -> None:
        """Nothing is missing."""

    def spread(self, states: Sequence[Tensor]) -> None:
        """There are no others."""

    def to_first(self, tensors: Mapping[K, Tensor]) -> Iterator[dict[K, Tensor]]:
        """There are no others."""
        return iter(())


ALONE = Alone()
"""The processes of an ordinary run."""


def part_of(rank: int, size: int, whole: range) -> range:
    """A rank's part of a range: neighbours, as equal as can be, and rank 0 has some if there are any."""
    start, stop = (-(-len(whole) * number // size) for number in (rank, rank + 1))
    return whole[start:stop]


def own_rows(ranks: Ranks, rows: range) -> range:
    """The rows, or other pieces of work, that this process does."""
    return part_of(ranks.rank, ranks.size, rows)


def divide(costs: Mapping[str, int], size: int) -> list[list[str]]:
    """Named pieces of work divided among `size` ranks, the dearest first to whoever has least to do."""
    shares: list[list[str]] = [[] for _ in range(size)]
    filled = [0] * size
    for name in sorted(costs, key=lambda name: -costs[name]):
        least = filled.index(min(filled))
        shares[least].append(name)
        filled[least] += costs[name]
    return shares


def done_together(ranks: Ranks, costs: Mapping[str, int], work: Callable[[str], T]) -> dict[str, T]:
    """Results of named pieces of work, each done by one of the ranks and given to all.

    Args:
        ranks: who does it.
        costs: name -> how much work it is, in any unit.
        work: does one piece.
    """
    own = {name: work(name) for name in divide(costs, ranks.size)[ranks.rank]}
    found = {name: value for part in ranks.objects(own) for name, value in part.items()}
    return {name: found[name] for name in costs}


def refuse_difference(ranks: Ranks, what: str, own: object) -> None:
    """Compare what all ranks must have computed alike.

    Args:
        ranks: all of them.
        what: what it is, for the error.
        own: what this process has; compared by value.

    Raises:
        RankError: some rank has something else.
    """
    found = ranks.objects(own)
    other = next((rank for rank, value in enumerate(found) if value != found[0]), None)
    if other is not None:
        raise RankError(
            f"rank {other} came to other {what} than rank 0, where both do the same work: their machines or "
            "packages differ in a way that is not known here. Run on machines of one kind"
        )
