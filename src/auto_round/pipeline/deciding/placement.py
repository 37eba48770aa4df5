"""Which matrices of a block lie on other devices than the main one, experts of one parameter among them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from auto_round.errors import ConfigError, Refusal, UnsupportedError
from auto_round.facts.group_names import inside
from auto_round.facts.layer import Layer
from auto_round.models.divided_experts import path_of_piece
from auto_round.models.source import ModelSource
from auto_round.pipeline.machine.device import Devices
from auto_round.schemes.plan import Plan
from auto_round.schemes.rules import find_layers, nearest_layers


@dataclass(frozen=True, slots=True)
class ExpertsOnDevice:
    """Those experts of a module that are worked on by one device.

    Attributes:
        experts: their numbers, ascending.
        device: where they are worked on.
    """

    experts: tuple[int, ...]
    device: torch.device

    @property
    def text(self) -> str:
        """The experts for people."""
        first, last = self.experts[0], self.experts[-1]
        together = len(self.experts) == last - first + 1
        return f"{first}-{last}" if together else ",".join(map(str, self.experts))

    def number(self, expert: int) -> int | None:
        """Number of an expert among those here; None where it is not."""
        number = bisect_left(self.experts, expert)
        return number if self.experts[number : number + 1] == (expert,) else None


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the layers of a model are worked on.

    Attributes:
        main: where what flows is held, and all that is not named here.
        elsewhere: module in the tree -> its device, where that is another one.
        divided: module of experts whose experts lie on several devices -> its pieces.
    """

    main: torch.device
    elsewhere: Mapping[str, torch.device] = field(default_factory=dict)
    divided: Mapping[str, tuple[ExpertsOnDevice, ...]] = field(default_factory=dict)

    @property
    def several(self) -> bool:
        """Whether anything lies elsewhere."""
        return bool(self.elsewhere or self.divided)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices that hold something, the main one first."""
        pieces = [piece.device for each in self.divided.values() for piece in each]
        return tuple(dict.fromkeys([self.main, *self.elsewhere.values(), *pieces]))

    @property
    def kinds(self) -> list[str]:
        """Modules on devices of another kind than the main one: only they compute other last bits."""
        whole = {(m, d.type) for m, d in self.elsewhere.items()}
        parts = {(f"{m} {p.text}", p.device.type) for m, each in self.divided.items() for p in each}
        return sorted(f"{what}: {kind}" for what, kind in whole | parts if kind != self.main.type)

    def of(self, layer: Layer) -> torch.device:
        """Where a layer is worked on."""
        piece = self.piece_of(layer)
        if piece is not None:
            return self.divided[module_of(layer)][piece[0]].device
        return self.elsewhere.get(module_of(layer), self.main)

    def piece_of(self, layer: Layer) -> tuple[int, int] | None:
        """Piece that holds an expert's matrix, and the expert's number in it; None for undivided modules."""
        expert, pieces = layer.expert, self.divided.get(module_of(layer), ())
        if expert is None:
            return None
        places = ((i, piece.number(expert)) for i, piece in enumerate(pieces))
        return next(((i, number) for i, number in places if number is not None), None)

    def shares_inside(self, prefixes: Mapping[str, str]) -> dict[str, list[tuple[int, ...]]]:
        """Module of a group of blocks -> the experts of its pieces; arguments of `devices_inside`."""
        shares = {module: [piece.experts for piece in pieces] for module, pieces in self.divided.items()}
        return inside(shares, prefixes)

    def devices_inside(self, prefixes: Mapping[str, str]) -> dict[str, torch.device]:
        """Module of a group of blocks -> its device, where that is not the main one.

        Args:
            prefixes: position in the group -> path of the block in the tree.
        """
        pieces = {
            path_of_piece(m, i): p.device for m, each in self.divided.items() for i, p in enumerate(each)
        }
        return inside({**self.elsewhere, **pieces}, prefixes)


def module_of(layer: Layer) -> str:
    """Path in the tree of the module that holds a layer; fused experts are held by one."""
    return layer.parameter.rpartition(".")[0]


def refuse_together(placement: Placement, steps: int) -> None:
    """Refuse to tune all blocks together where matrices lie on several devices.

    Args:
        placement: of the run.
        steps: `distill_steps`.

    Raises:
        ConfigError: it is such a run.
    """
    if steps and placement.several:
        raise ConfigError(
            "distill_steps runs on one device, and device_map names several: leave it out, or give one device"
        )


def place_layers(devices: Devices, source: ModelSource, plan: Plan | None = None) -> Placement:
    """Where the layers of a model go: by the user's rules, or spread over all devices.

    Args:
        devices: what the user named.
        source: the model.
        plan: what becomes of its layers; None where nothing that flows into them is rounded.

    Raises:
        ConfigError: a name or pattern that finds nothing.
        UnsupportedError: several devices for one matrix, or for experts that cannot be told apart.
    """
    whole = _undivided(source, plan)
    if devices.rules:
        found = _by_rules(devices, source, whole)
    elif devices.others:
        found = _spread(devices, source, whole)
    else:
        found = {}
    elsewhere: dict[str, torch.device] = {}
    divided: dict[str, tuple[ExpertsOnDevice, ...]] = {}
    for module, at in found.items():
        first, *others = dict.fromkeys(at.values())
        if others:
            divided[module] = _pieces(at)
        elif first != devices.main:
            elsewhere[module] = first
    return Placement(devices.main, elsewhere, divided)


Found = dict[str, dict[int | None, torch.device]]
"""Module -> the device of each of its experts; under None that of all it holds."""


def _undivided(source: ModelSource, plan: Plan | None) -> dict[str, str]:
    """Modules that hold several experts and stay in one piece -> why."""
    parameters = {layer.parameter: layer for layer in source.layers if layer.expert is not None}
    found: dict[str, str] = {}
    for parameter in parameters:
        if not source.tells_experts_apart(parameter):
            found[parameter.rpartition(".")[0]] = "its code does not say which expert computes what"
    rounded = (a for a in source.layers if a.expert is not None and plan and plan.inputs_of(a) is not None)
    return found | {module_of(a): "what flows into its experts is rounded, too" for a in rounded}


def _by_rules(devices: Devices, source: ModelSource, whole: Mapping[str, str]) -> Found:
    """Of several names that find a layer the one that finds fewest wins, then the first."""
    layers = {layer.name: layer for layer in source.layers}
    names = dict.fromkeys(layers)
    beside = dict.fromkeys(name.rpartition(".")[0] for name in source.tensors)
    found: list[tuple[list[str], torch.device]] = []
    for key, device in devices.rules:
        inside = find_layers(key, names, "device_map")
        if not inside and not find_layers(key, beside, "device_map"):
            raise ConfigError(f'device_map "{key}" matches no layer; {nearest_layers(key, names)}')
        found.append((inside, device))
    placed: dict[str, torch.device] = {}
    for inside, device in sorted(found, key=lambda rule: -len(rule[0])):
        placed.update(dict.fromkeys(inside, device))
    at: Found = {}
    for name, layer in layers.items():
        module, device = module_of(layer), placed.get(name, devices.main)
        expert = None if module in whole else layer.expert
        if at.setdefault(module, {}).setdefault(expert, device) != device:
            what = "one tensor" if layer.expert is None else "one expert"
            _refuse_split(module, whole.get(module, f"device_map names several devices for {what} of it"))
    return at


def _refuse_split(module: str, why: str) -> None:
    remedy = "name one device for all of its layers, or, of experts, for each expert as a whole"
    raise UnsupportedError(
        "these layers must share a device",
        [Refusal("device_map", f"{module} cannot be cut like this: {why}", remedy)],
    )


def _pieces(at: Mapping[int | None, torch.device]) -> tuple[ExpertsOnDevice, ...]:
    """Experts by their devices, in the order of their first experts."""
    shares: dict[torch.device, list[int]] = {}
    for expert in sorted(e for e in at if e is not None):
        shares.setdefault(at[expert], []).append(expert)
    return tuple(ExpertsOnDevice(tuple(experts), device) for device, experts in shares.items())


def _spread(devices: Devices, source: ModelSource, whole: Mapping[str, str]) -> Found:
    """What each block consists of, the largest first, each to the device that has least of it so far.

    Experts go one by one, where that is possible, and then those of a device are neighbours.
    """
    blocks: dict[int, dict[tuple[str, int | None], int]] = {}
    for layer in source.layers:
        if layer.block is not None:
            module = module_of(layer)
            unit = (module, None if module in whole else layer.expert)
            sizes = blocks.setdefault(layer.block, {})
            sizes[unit] = sizes.get(unit, 0) + layer.weights
    at: Found = {}
    for sizes in blocks.values():
        held = dict.fromkeys((devices.main, *devices.others), 0)
        for (module, expert), size in sorted(sizes.items(), key=lambda item: -item[1]):
            device = min(held, key=lambda device: held[device])
            at.setdefault(module, {})[expert] = device
            held[device] += size
    places = {device: i for i, device in enumerate((devices.main, *devices.others))}
    for module, each in at.items():
        if None not in each:
            experts = sorted(e for e in each if e is not None)
            at[module] = dict(zip(experts, sorted(each.values(), key=places.__getitem__), strict=True))
    return at
