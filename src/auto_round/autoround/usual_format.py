"""Which format a model gets that is not written for anybody: the usual one, or one that holds every plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from auto_round.config import Options
from auto_round.errors import CannotHoldError
from auto_round.log import logger

T = TypeVar("T")

_EVERY_PLAN = "fake"
"""Format that holds every plan: rounded weights, without their codes."""


def usual_or_rounded(options: Options, make: Callable[[Options], T]) -> T:
    """What `make` gives, with rounded weights where nobody chose a format and the usual cannot hold the plan.

    A format that somebody chose is never changed. Callers keep this from folders that stay: rounded weights
    are as large as the original.

    Args:
        options: what the user asked for.
        make: carries them out, as far as the plan.

    Raises:
        CannotHoldError: the chosen format cannot hold the plan.
    """
    try:
        return make(options)
    except CannotHoldError as refused:
        if "format" in options.given:
            raise
        usual = options.output.format
        why = refused.refusals[0].reason if refused.refusals else "it cannot hold this plan"
        logger.warning(
            "nobody chose a format, and %s cannot be it (%s): the model is made of rounded weights. Give "
            "AutoRound(...) a format that holds them, and codes are kept",
            usual,
            why,
        )
        return make(replace(options, output=replace(options.output, format=_EVERY_PLAN)))
