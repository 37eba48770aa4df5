"""Condense: a long list of layer names, for people: those that differ in numbers only become one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NameSet:
    """All names that one template gives when each of its holes takes each of its numbers.

    Attributes:
        parts: dotted components; None is a hole.
        numbers: the numbers of each hole, ascending.
    """

    parts: tuple[str | None, ...]
    numbers: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        """For example `model.layers.{0-7}.mlp.down_proj`."""
        texts = iter(self.numbers)
        return ".".join(_braces(next(texts)) if part is None else part for part in self.parts)

    @property
    def first(self) -> str:
        """The name with the smallest numbers."""
        texts = iter(self.numbers)
        return ".".join(str(next(texts)[0]) if part is None else part for part in self.parts)


def condense(names: Iterable[str]) -> list[NameSet]:
    """Sets that cover the names exactly, in the order in which their templates first appear."""
    rows: dict[tuple[str | None, ...], list[tuple[int, ...]]] = {}
    for name in names:
        parts = name.split(".")
        template = tuple(None if _is_number(part) else part for part in parts)
        rows.setdefault(template, []).append(tuple(int(part) for part in parts if _is_number(part)))
    return [NameSet(template, box) for template, tuples in rows.items() for box in _boxes(sorted(tuples))]


def some(names: Iterable[str], most: int = 3) -> str:
    """The names condensed, in one line; of many sets the first `most`, and how many more there are."""
    sets = [str(found) for found in condense(names)]
    rest = len(sets) - most
    return ", ".join(sets[:most]) + (f" and {rest} more" if rest > 0 else "")


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and (part == "0" or part[0] != "0")


def _boxes(rows: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
    """Products of sets of numbers that cover equally long `rows` exactly."""
    if not rows or not rows[0]:
        return [()]
    rests: dict[int, list[tuple[int, ...]]] = {}
    for first, *rest in rows:
        rests.setdefault(first, []).append(tuple(rest))
    firsts: dict[tuple[tuple[tuple[int, ...], ...], ...], list[int]] = {}
    for first, tails in rests.items():
        firsts.setdefault(tuple(_boxes(tails)), []).append(first)
    return [(tuple(numbers), *tail) for tails, numbers in firsts.items() for tail in tails]


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def _braces(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in _runs(numbers)) + "}"
