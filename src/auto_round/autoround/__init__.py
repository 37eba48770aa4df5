"""The Python face: `AutoRound` and the names that stand beside it."""

from __future__ import annotations

from auto_round.autoround.api import AutoRound
from auto_round.autoround.auto_scheme import AutoScheme
from auto_round.autoround.diffusion import AutoRoundDiffusion
from auto_round.autoround.multimodal import AutoRoundMLLM

__all__ = ["AutoRound", "AutoRoundDiffusion", "AutoRoundMLLM", "AutoScheme"]
