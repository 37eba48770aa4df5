"""Names of later work: they can be imported, and say so when used."""

from __future__ import annotations

from typing import Any, NoReturn

from auto_round.errors import UnsupportedError


class AutoRoundDiffusion:
    """Diffusion models; not there yet."""

    def __init__(self, *given: Any, **options: Any) -> NoReturn:
        raise UnsupportedError("quantization of diffusion models is not there yet in this version")
