"""What a conformance kit raises when its subject breaks a promise."""

from __future__ import annotations

from auto_round.errors import AutoRoundError


class ConformanceError(AutoRoundError):
    """A layout, exporter, format or kernel does not do what its protocol promises."""


def require(kept: bool, promise: str) -> None:
    """Raise unless a promise is kept.

    Raises:
        ConformanceError: it is broken.
    """
    if not kept:
        raise ConformanceError(promise)
