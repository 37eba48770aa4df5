"""Named sets of options: one line each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

# "light" leaves lr to its rule (0.012 at 4 bits): the 5e-3 often quoted for 50 steps lets an offset travel
# 0.13 of a code, so that three weights in four could never change their rounding.
RECIPES: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "default": MappingProxyType({}),
        "best": MappingProxyType({"iters": 1000, "nsamples": 512}),
        "light": MappingProxyType({"iters": 50}),
        "distill": MappingProxyType({"iters": 100, "distill_steps": 200}),
        "rtn": MappingProxyType({"iters": 0, "disable_opt_rtn": True}),
        "opt_rtn": MappingProxyType({"iters": 0, "disable_opt_rtn": False}),
    }
)
