"""Candidates: which layers may get which schemes, and what each costs in storage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from auto_round.autoscheme.groups import Fusing, group_layers
from auto_round.errors import ConfigError
from auto_round.facts.layer import Layer
from auto_round.schemes.entry import PlanEntry
from auto_round.schemes.gguf_mixture import fitting
from auto_round.schemes.gguf_types import TYPES, type_of_scheme
from auto_round.schemes.plan import Plan
from auto_round.schemes.scheme import QuantizationScheme
from auto_round.schemes.siblings import fused_groups

BitsOf = Callable[[Layer, QuantizationScheme | None], float]
"""Bits that a layer takes under a scheme; None keeps it as it is."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The options, the groups of layers that choose among them, and what the user fixed.

    Attributes:
        labels: of the options, for people.
        plans: for each option, the plan that gives every layer this option; the scheme may differ by layer
            where rows need smaller groups.
        groups: layers that are decided together, in the order of execution.
        fixed: layers that the user's rules quantize, with their schemes: they count, and nothing is chosen.
        layers: every layer of the model by name, and the embedding where its scheme is chosen.
        fused: what readers fuse is measured, and chosen for, together.
        embedding: name of the embedding where its scheme is chosen; the last group.
    """

    labels: tuple[str, ...]
    plans: tuple[Plan, ...]
    groups: tuple[tuple[str, ...], ...]
    fixed: Mapping[str, QuantizationScheme]
    layers: Mapping[str, Layer]
    fused: Fusing = fused_groups
    embedding: str | None = None

    @property
    def weights(self) -> int:
        """Weights in the layers whose scheme is chosen or fixed."""
        names = [*self.fixed, *(name for names in self.groups for name in names)]
        return sum(self.layers[name].weights for name in names)

    @property
    def chosen(self) -> tuple[str, ...]:
        """Layers whose scheme is chosen."""
        return tuple(name for names in self.groups for name in names)

    @property
    def in_turn(self) -> tuple[int, ...]:
        """Picks of a plan that has all options."""
        return tuple(i % len(self.plans) for i in range(len(self.groups)))

    def with_embedding(self, layer: Layer, schemes: Sequence[QuantizationScheme | None]) -> Candidates:
        """The same, and the embedding's scheme is chosen too.

        Args:
            layer: the embedding.
            schemes: of each option.
        """
        name = layer.name
        entries = [PlanEntry(scheme, "option of AutoScheme") for scheme in schemes]
        pairs = zip(self.plans, entries, strict=True)
        return replace(
            self,
            plans=tuple(replace(plan, entries={**plan.entries, name: entry}) for plan, entry in pairs),
            groups=(*self.groups, (name,)),
            layers={**self.layers, name: layer},
            embedding=name,
        )

    def costs(self, bits_of: BitsOf) -> tuple[tuple[float, ...], ...]:
        """Bits of each group under each option."""
        return tuple(
            tuple(sum(bits_of(self.layers[n], plan.scheme_of(n)) for n in names) for plan in self.plans)
            for names in self.groups
        )

    def fixed_bits(self, bits_of: BitsOf) -> float:
        """Bits of the layers that are fixed."""
        return sum(bits_of(self.layers[name], scheme) for name, scheme in self.fixed.items())


def make_candidates(
    layers: Sequence[Layer],
    plans: Mapping[str, Plan],
    shared: Sequence[Sequence[str]] = (),
    *,
    fused: Fusing = fused_groups,
) -> Candidates:
    """Find the layers that are left to choose for.

    Args:
        layers: every layer, in the order of execution.
        plans: label of an option -> the plan that gives every layer this option.
        shared: the user's sets of layers that get one scheme.
        fused: what readers fuse gets one, too.

    Raises:
        ConfigError: a set names no layer, or there is nothing to choose.
    """
    entries = [plan.entries for plan in plans.values()]
    first = entries[0]
    chosen = [
        layer.name
        for layer in layers
        if not first[layer.name].fixed and any(e[layer.name].scheme is not None for e in entries)
    ]
    fixed = {name: e.scheme for name, e in first.items() if e.fixed and e.scheme is not None}
    groups = group_layers(layers, chosen, shared, fused=fused)
    if not groups:
        raise ConfigError(
            "there is no layer to choose a scheme for: rules and roles decide on all of them; leave out the "
            "budget and the options, or rules of layer_config and ignore_layers"
        )
    return Candidates(
        labels=tuple(plans),
        plans=tuple(plans.values()),
        groups=tuple(groups),
        fixed=fixed,
        layers={layer.name: layer for layer in layers},
        fused=fused,
    )


def in_gguf(layer: Layer, scheme: QuantizationScheme | None) -> QuantizationScheme | None:
    """What a GGUF file gives a layer: types whose blocks do not divide its rows have a substitute."""
    kind = None if scheme is None else type_of_scheme(scheme)
    return scheme if kind is None else TYPES[fitting(kind.name, layer.shape[-1])].scheme


def stored_bits(layer: Layer, scheme: QuantizationScheme | None) -> float:
    """Bits of codes, scales and zero points; of a layer that is kept, its bits in 16-bit storage on disk."""
    fmt = None if scheme is None else scheme.weight_format()
    weights = layer.weights
    return weights * (layer.dtype.itemsize * 8 if fmt is None else fmt.bits_per_weight(layer.shape))


def code_bits(layer: Layer, scheme: QuantizationScheme | None) -> float:
    """Bits of codes without scales and zero points; of a layer that is kept, its bits on disk."""
    fmt = None if scheme is None else scheme.weight_format()
    return layer.weights * (layer.dtype.itemsize * 8 if fmt is None else fmt.grid.bits)


def reachable(costs: Iterable[Sequence[float]], fixed: float) -> tuple[float, float]:
    """Least and largest sum of costs."""
    listed = list(costs)
    return fixed + sum(map(min, listed)), fixed + sum(map(max, listed))
