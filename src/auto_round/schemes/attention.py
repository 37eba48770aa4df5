"""What is calibrated of attention: FP8 scales of the key/value cache, and of queries."""

from __future__ import annotations

from dataclasses import dataclass

from auto_round.facts.attention import KEYS, QUERIES, VALUES, Attention


@dataclass(frozen=True, slots=True)
class AttentionScheme:
    """FP8 (E4M3) numbers with scales that calibration fixes.

    Attributes:
        queries: queries get scales too; else keys and values only, which caches hold.
        per_head: a scale for each head, rather than one for all.
    """

    queries: bool
    per_head: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """What gets scales, in the order in which they are written."""
        return (*((QUERIES,) if self.queries else ()), KEYS, VALUES)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """The scheme, and the modules that it holds for.

    Attributes:
        scheme: the same for all of them.
        modules: in the order of execution.
    """

    scheme: AttentionScheme
    modules: tuple[Attention, ...]

    def scales(self, attention: Attention) -> dict[str, int]:
        """Part -> how many scales it has."""
        per_head = self.scheme.per_head
        return {part: attention.heads_of(part) if per_head else 1 for part in self.scheme.parts}
