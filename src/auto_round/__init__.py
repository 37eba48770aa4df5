"""auto_round: make large language models small by tuning how their weights are rounded.

The public names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from auto_round.version import __version__

if TYPE_CHECKING:
    from transformers import AutoRoundConfig

    from auto_round.autoround import AutoRound, AutoRoundDiffusion, AutoRoundMLLM, AutoScheme
    from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme

__all__ = [
    "PRESET_SCHEMES",
    "AutoRound",
    "AutoRoundConfig",
    "AutoRoundDiffusion",
    "AutoRoundMLLM",
    "AutoScheme",
    "QuantizationScheme",
    "__version__",
]

_HOMES = {
    "AutoRound": "auto_round.autoround",
    "AutoRoundMLLM": "auto_round.autoround",
    "AutoRoundDiffusion": "auto_round.autoround",
    "AutoScheme": "auto_round.autoround",
    "AutoRoundConfig": "transformers",
    "QuantizationScheme": "auto_round.schemes",
    "PRESET_SCHEMES": "auto_round.schemes",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'auto_round' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted([*globals(), *__all__])
