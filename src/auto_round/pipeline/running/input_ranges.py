"""Calibrated inputs: the largest magnitude of each layer's input, from which its stored scale follows.

Layers that engines keep as one matrix share one magnitude.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from auto_round.errors import Refusal, UnsupportedError
from auto_round.numerics.activation import ActivationFormat
from auto_round.numerics.activation_float import CalibratedScale, InputFormat
from auto_round.schemes.condense import some
from auto_round.schemes.siblings import expert_peers, joined_matrices

_SEEN, _BORROWED = "input_largest", "input_largest_of_peers"
"""Keys of a journal entry."""


@dataclass(frozen=True, slots=True)
class InputRanges:
    """Largest magnitudes of inputs.

    Attributes:
        largest: module -> largest magnitude of its input.
        borrowed: experts that no token reached: they have the largest magnitude of the other experts.
    """

    largest: Mapping[str, float] = field(default_factory=dict)
    borrowed: tuple[str, ...] = ()

    def to_entry(self) -> dict[str, Any]:
        """Part of a journal entry; `from_entries` gives back the same numbers."""
        if not self.largest:
            return {}
        return {_SEEN: dict(self.largest), **({_BORROWED: list(self.borrowed)} if self.borrowed else {})}

    @classmethod
    def from_entries(cls, entries: Iterable[Mapping[str, Any]]) -> InputRanges:
        """Ranges of all entries of a journal."""
        largest: dict[str, float] = {}
        borrowed: list[str] = []
        for entry in entries:
            largest |= entry.get(_SEEN, {})
            borrowed += entry.get(_BORROWED, [])
        return cls(largest, tuple(borrowed))

    def formats(self, formats: Mapping[str, InputFormat]) -> dict[str, ActivationFormat]:
        """Module -> activation format, with the scales that follow from these magnitudes."""
        found: dict[str, ActivationFormat] = {}
        for name, fmt in formats.items():
            found[name] = fmt.fixed(self.largest[name]) if isinstance(fmt, CalibratedScale) else fmt
        return found


NO_RANGES = InputRanges()
"""Where nothing is calibrated."""


def settle_ranges(seen: Mapping[str, float | None]) -> InputRanges:
    """Largest magnitudes for all modules of some blocks.

    Layers that engines keep as one matrix get the largest of theirs. An expert without tokens gets the
    largest magnitude of the same layer in the other experts.

    Args:
        seen: module -> largest magnitude of its input; None where no token reached it.

    Raises:
        UnsupportedError: nothing is known of the input of a layer.
    """
    found: dict[str, float] = {}
    for members in joined_matrices(seen).values():
        sizes = [size for name in members if (size := seen[name]) is not None]
        found |= dict.fromkeys(members, max(sizes)) if sizes else {}
    borrowed: dict[str, float] = {}
    for members in expert_peers(seen).values():
        sizes = [found[name] for name in members if name in found]
        borrowed |= {name: max(sizes) for name in members if name not in found} if sizes else {}
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
