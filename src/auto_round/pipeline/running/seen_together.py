"""What several ranks saw as the unquantized blocks ran, each in rows of its own, put together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from auto_round.calibration.observe import InputExtremes, InputMoments
from auto_round.calibration.observe_experts import ExpertMoments, SeenExperts
from auto_round.pipeline.running.attention_states import StateRanges
from auto_round.ranks.ranks import Ranks
from auto_round.ranks.tree import TreeSum

Moments = dict[str, InputMoments | ExpertMoments]


def pieces(ranks: Ranks, own: range, by_row: bool) -> Iterator[tuple[int | None, range]]:
    """Rows that are summed up as one, with the place of their sum (see `TreeSum`).

    There is one piece at least, by which modules become known; one without rows has no place.

    Args:
        ranks: who else has rows.
        own: rows of this rank.
        by_row: each row is summed up apart, so that the sum of all is the same bits on any number of ranks.
    """
    if not own:
        yield None, own
    elif by_row:
        yield from ((row, range(row, row + 1)) for row in own)
    else:
        yield ranks.rank, own


class SummedMoments:
    """Moments of inputs and tokens of experts, summed over pieces and then over ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._sum = TreeSum()
        self._counts: list[int] = []
        self._tokens: dict[str, Tensor] = {}
        self._moments: Moments = {}

    def add(self, place: int | None, seen: Mapping[str, InputMoments], experts: SeenExperts) -> None:
        """Add what was seen in one piece; the same modules in each call.

        Args:
            place: of the piece; None for one without rows.
            seen: module -> moments of its input.
            experts: what reached experts.
        """
        self._moments = {**seen, **experts.moments}
        flat = _flat(self._moments)
        if place is not None:
            self._sum.add(place, [t for each in flat for t in (each.squares, each.products)])
        before = self._counts or [0] * len(flat)
        self._counts = [n + each.count for n, each in zip(before, flat, strict=True)]
        for name, tokens in experts.tokens.items():
            self._tokens[name] = self._tokens[name] + tokens if name in self._tokens else tokens

    def of_all(self) -> tuple[Moments, dict[str, Tensor]]:
        """Moments by module (of experts by parameter), and module -> tokens of each expert, of all ranks."""
        flat = _flat(self._moments)
        total = self._ranks.sum(self._sum) or [None] * (2 * len(flat))
        others = self._ranks.objects((self._counts, self._tokens))
        for number, each in enumerate(flat):
            each.squares, each.products = total[2 * number : 2 * number + 2]
            each.count = sum(counts[number] for counts, _ in others)
        tokens = {name: sum_of([found[name].cpu() for _, found in others]) for name in self._tokens}
        return self._moments, tokens


def sum_of(tensors: list[Tensor]) -> Tensor:
    """Sum of whole numbers."""
    total, *rest = tensors
    for each in rest:
        total = total + each
    return total


def _flat(moments: Moments) -> list[InputMoments]:
    """All sums one after another."""
    found: list[InputMoments] = []
    for each in moments.values():
        found += each.experts if isinstance(each, ExpertMoments) else [each]
    return found


def join_ranges(
    ranks: Ranks, extremes: Mapping[str, InputExtremes], states: Mapping[str, StateRanges]
) -> None:
    """Give each rank the ranges that all of them saw; both are changed in place."""
    own = (
        {name: each.ends for name, each in extremes.items()},
        {name: each.largest for name, each in states.items()},
    )
    parts = ranks.objects(own)
    for name, each in extremes.items():
        each.join(ends[name] for ends, _ in parts)
    for part in parts:
        for name, seen in states.items() if part is not own else ():
            seen.join(part[1][name])
