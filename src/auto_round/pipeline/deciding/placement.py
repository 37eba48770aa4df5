"""Which matrices of a block lie on other devices than the main one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from auto_round.errors import ConfigError, Refusal, UnsupportedError
from auto_round.facts.layer import Layer
from auto_round.models.source import ModelSource
from auto_round.pipeline.machine.device import Devices
from auto_round.schemes.rules import find_layers, nearest_layers


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the layers of a model are worked on.

    Attributes:
        main: where what flows is held, and all that is not named here.
        elsewhere: module in the tree -> its device, where that is another one.
    """

    main: torch.device
    elsewhere: Mapping[str, torch.device] = field(default_factory=dict)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices that hold something, the main one first."""
        return tuple(dict.fromkeys([self.main, *self.elsewhere.values()]))

    @property
    def kinds(self) -> list[str]:
        """Modules on devices of another kind than the main one: only they compute other last bits."""
        return sorted(f"{m}: {d.type}" for m, d in self.elsewhere.items() if d.type != self.main.type)

    def of(self, layer: Layer) -> torch.device:
        """Where a layer is worked on."""
        return self.elsewhere.get(module_of(layer), self.main)

    def inside(self, prefixes: Mapping[str, str]) -> dict[str, torch.device]:
        """Module of a group of blocks -> its device, where that is not the main one.

        Args:
            prefixes: position in the group -> path of the block in the tree.
        """
        return {
            f"{position}.{module.removeprefix(prefix + '.')}": device
            for module, device in self.elsewhere.items()
            for position, prefix in prefixes.items()
            if module.startswith(f"{prefix}.")
        }


def module_of(layer: Layer) -> str:
    """Path in the tree of the module that holds a layer; fused experts are held by one."""
    return layer.parameter.rpartition(".")[0]


def place_layers(devices: Devices, source: ModelSource) -> Placement:
    """Where the layers of a model go: by the user's rules, or spread over all devices.

    Args:
        devices: what the user named.
        source: the model.

    Raises:
        ConfigError: a name or pattern that finds nothing.
        UnsupportedError: experts of one module are sent to several devices.
    """
    if devices.rules:
        found = _by_rules(devices, source)
    elif devices.others:
        found = _spread(devices, source.layers)
    else:
        found = {}
    return Placement(devices.main, {module: at for module, at in found.items() if at != devices.main})


def _by_rules(devices: Devices, source: ModelSource) -> dict[str, torch.device]:
    """Module -> device. Of several names that find a layer the one that finds fewest wins, then the first."""
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
    at: dict[str, torch.device] = {}
    for name, layer in layers.items():
        device = placed.get(name, devices.main)
        if at.setdefault(module_of(layer), device) != device:
            _refuse_split(module_of(layer))
    return at


def _refuse_split(module: str) -> None:
    reason = f"{module} holds all its experts in one tensor, and device_map sends some of them elsewhere"
    raise UnsupportedError(
        "experts of one block must share a device",
        [Refusal("device_map", reason, "name the same device for all experts of a block")],
    )


def _spread(devices: Devices, layers: Sequence[Layer]) -> dict[str, torch.device]:
    """Modules of each block, the largest first, each to the device that has least of the block so far."""
    blocks: dict[int, dict[str, int]] = {}
    for layer in layers:
        if layer.block is not None:
            sizes = blocks.setdefault(layer.block, {})
            sizes[module_of(layer)] = sizes.get(module_of(layer), 0) + math.prod(layer.shape)
    at: dict[str, torch.device] = {}
    for sizes in blocks.values():
        held = dict.fromkeys((devices.main, *devices.others), 0)
        for module, size in sorted(sizes.items(), key=lambda item: -item[1]):
            device = min(held, key=lambda device: held[device])
            at[module] = device
            held[device] += size
    return at
