"""Calibrated inputs: the extremes of each layer's input, from which its stored scale follows.

Layers that engines keep as one matrix share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from auto_round.calibration.observe import Extremes
from auto_round.errors import Refusal, UnsupportedError
from auto_round.numerics.activation import ActivationFormat
from auto_round.numerics.activation_float import CalibratedScale, InputFormat
from auto_round.schemes.condense import some
from auto_round.schemes.siblings import expert_peers, joined_matrices

_SEEN, _BORROWED = "input_extremes", "input_extremes_of_peers"
"""Keys of a journal entry."""


@dataclass(frozen=True, slots=True)
class InputRanges:
    """Extremes of inputs.

    Attributes:
        extremes: module -> extremes of its input.
        borrowed: experts that no token reached: they have the extremes of the other experts.
    """

    extremes: Mapping[str, Extremes] = field(default_factory=dict)
    borrowed: tuple[str, ...] = ()

    def to_entry(self) -> dict[str, Any]:
        """Part of a journal entry; `from_entries` gives back the same numbers."""
        if not self.extremes:
            return {}
        seen = {name: list(ends) for name, ends in self.extremes.items()}
        return {_SEEN: seen, **({_BORROWED: list(self.borrowed)} if self.borrowed else {})}

    @classmethod
    def from_entries(cls, entries: Iterable[Mapping[str, Any]]) -> InputRanges:
        """Ranges of all entries of a journal."""
        extremes: dict[str, Extremes] = {}
        borrowed: list[str] = []
        for entry in entries:
            extremes |= {name: Extremes(*ends) for name, ends in entry.get(_SEEN, {}).items()}
            borrowed += entry.get(_BORROWED, [])
        return cls(extremes, tuple(borrowed))

    def formats(self, formats: Mapping[str, InputFormat]) -> dict[str, ActivationFormat]:
        """Module -> activation format, with the scales that follow from these extremes."""
        found: dict[str, ActivationFormat] = {}
        for name, fmt in formats.items():
            if isinstance(fmt, CalibratedScale):
                least, largest = self.extremes[name]
                found[name] = fmt.fixed(largest, least)
            else:
                found[name] = fmt
        return found


NO_RANGES = InputRanges()
"""Where nothing is calibrated."""


def settle_ranges(seen: Mapping[str, Extremes | None]) -> InputRanges:
    """Extremes for all modules of some blocks.

    Layers that engines keep as one matrix get the widest range of theirs. An expert without tokens gets the
    widest range of the same layer in the other experts.

    Args:
        seen: module -> extremes of its input; None where no token reached it.

    Raises:
        UnsupportedError: nothing is known of the input of a layer.
    """
    found: dict[str, Extremes] = {}
    for members in joined_matrices(seen).values():
        ranges = [ends for name in members if (ends := seen[name]) is not None]
        found |= dict.fromkeys(members, _widest(ranges)) if ranges else {}
    borrowed: dict[str, Extremes] = {}
    for members in expert_peers(seen).values():
        ranges = [found[name] for name in members if name in found]
        borrowed |= {name: _widest(ranges) for name in members if name not in found} if ranges else {}
    if missing := [name for name in seen if name not in found and name not in borrowed]:
        raise UnsupportedError(
            "the inputs of some layers cannot be calibrated",
            [
                Refusal(
                    "activations",
                    f"no token of the calibration rows reached {some(missing)}",
                    "give more or other rows (--nsamples, --dataset), or keep these layers (--ignore_layers)",
                )
            ],
        )
    return InputRanges({name: (found | borrowed)[name] for name in seen}, tuple(borrowed))


def _widest(ranges: Sequence[Extremes]) -> Extremes:
    """The least and the largest of several."""
    return Extremes(min(each.least for each in ranges), max(each.largest for each in ranges))
