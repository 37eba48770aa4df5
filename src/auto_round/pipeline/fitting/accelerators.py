"""Accelerators that a run can be planned for without having them: declared figures, with their sources."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from auto_round.errors import ConfigError, nearest

PRODUCTS_REACHED = 0.4
"""Share of the declared rate of products in 16 bits that a tuning step is assumed to reach."""
BANDWIDTH_REACHED = 0.7
"""Share of the declared memory bandwidth that rounding is assumed to reach."""
NODE = 8
"""Accelerators of one machine, between which activations move over `link`; machines exchange gradients."""
NETWORK = 50e9
"""Bytes per second between two machines for each accelerator: 400 Gbit/s InfiniBand NDR, one card each, as
in NVIDIA's DGX H100 datasheet."""
DISK = 3e9
"""Bytes per second that weights are read with: assumed, a PCIe 4 solid-state disk reads up to 7e9."""


@dataclass(frozen=True, slots=True)
class Accelerator:
    """Declared figures of one accelerator.

    Attributes:
        nbytes: memory.
        products: operations per second of dense products in bfloat16.
        bandwidth: bytes per second of its memory.
        link: bytes per second to a neighbour, one way.
        source: where they are declared.
    """

    nbytes: float
    products: float
    bandwidth: float
    link: float
    source: str


_NVIDIA = "NVIDIA {} datasheet"
ACCELERATORS: Final[Mapping[str, Accelerator]] = MappingProxyType(
    {
        "A100": Accelerator(80e9, 312e12, 2.039e12, 300e9, _NVIDIA.format("A100 80GB SXM")),
        "H100": Accelerator(80e9, 989e12, 3.35e12, 450e9, _NVIDIA.format("H100 SXM")),
        "H200": Accelerator(141e9, 989e12, 4.8e12, 450e9, _NVIDIA.format("H200 SXM")),
        "B200": Accelerator(180e9, 2250e12, 8e12, 900e9, _NVIDIA.format("DGX B200")),
        "L40S": Accelerator(48e9, 362e12, 0.864e12, 32e9, _NVIDIA.format("L40S")),
        "MI300X": Accelerator(192e9, 1307e12, 5.3e12, 64e9, "AMD Instinct MI300X data sheet"),
    }
)
"""Name -> figures; `8xH100` means eight of them."""

_WORDS = re.compile(r"\s*(\d+)\s*x\s*([A-Za-z]\w*)\s*\Z")


@dataclass(frozen=True, slots=True)
class Machines:
    """Accelerators to plan for.

    Attributes:
        name: of the accelerator.
        count: how many.
        each: figures of one.
    """

    name: str
    count: int
    each: Accelerator

    @property
    def inside(self) -> int:
        """Accelerators of one machine."""
        return min(self.count, NODE)

    @property
    def nodes(self) -> int:
        """Machines."""
        return -(-self.count // NODE)


def read_machines(text: object) -> Machines | None:
    """`8xH100` as machines; None for anything that is no such words.

    Raises:
        ConfigError: an accelerator whose figures are not known, or none at all.
    """
    found = _WORDS.match(text) if isinstance(text, str) else None
    if found is None:
        return None
    count, name = int(found[1]), found[2].upper()
    if name not in ACCELERATORS:
        raise ConfigError(f'devices "{text}": {found[2]} is not known; {nearest(name, ACCELERATORS)}')
    if not count:
        raise ConfigError(f'devices "{text}": at least one')
    return Machines(name, count, ACCELERATORS[name])
