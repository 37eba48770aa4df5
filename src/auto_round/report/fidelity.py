"""What `auto-round eval` measured of a run's folder, read from the file beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from auto_round.errors import CheckpointError

QUANTILES: Final = {
    "mean": "mean",
    "median": "median",
    "p90": "90 %",
    "p99": "99 %",
    "p99_9": "99.9 %",
}
"""Figures of a divergence that have intervals, by their names in the file -> for people."""

LARGEST: Final = "largest"


@dataclass(frozen=True, slots=True)
class ConfidenceInterval:
    """A figure with its interval of 95 %."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How far a folder's predictions are from its original's on a text.

    Attributes:
        text: name of the text.
        positions: predictions.
        kl: key of `QUANTILES` -> divergence of the folder from the original, nats per token.
        reverse: the same the other way round.
        largest: largest of both.
        ratio: of the perplexities.
        perplexities: of the original and of the folder.
        same_top: share of positions with the same most likely token.
        rms: of differences of probabilities of the text's tokens.
        floor: divergence of the original from itself in another dtype; None where it was not measured.
    """

    text: str
    positions: int
    kl: Mapping[str, ConfidenceInterval]
    reverse: Mapping[str, ConfidenceInterval]
    largest: tuple[float, float]
    ratio: ConfidenceInterval
    perplexities: tuple[float, float]
    same_top: ConfidenceInterval
    rms: ConfidenceInterval
    floor: float | None = None

    @property
    def measured_on(self) -> tuple[str, int]:
        """What has to be equal where two are compared."""
        return self.text, self.positions


def fidelity_of(values: Mapping[str, Any], file: Path) -> Fidelity | None:
    """The comparison in an evaluation's JSON; None where there is none, but tasks alone.

    Args:
        values: as `evaluate.evaluation.evaluate` gives them.
        file: named where they are not what they should be.

    Raises:
        CheckpointError: a value is missing or of another type.
    """
    if "kl" not in values:
        return None
    try:
        both = [{name: _estimate(values[way][name]) for name in QUANTILES} for way in ("kl", "kl_reverse")]
        floor = values.get("noise_floor")
        return Fidelity(
            text=Path(str(values["text"])).name,
            positions=int(values["positions"]),
            kl=both[0],
            reverse=both[1],
            largest=(float(values["kl"][LARGEST]), float(values["kl_reverse"][LARGEST])),
            ratio=_estimate(values["perplexity_ratio"]),
            perplexities=(
                float(values["perplexity_original"]["value"]),
                float(values["perplexity"]["value"]),
            ),
            same_top=_estimate(values["same_top"]),
            rms=_estimate(values["probability_difference"]["rms"]),
            floor=None if floor is None else float(floor["kl"]),
        )
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{file}: not what auto-round eval writes ({error}): make it again, or move it away"
        ) from error


def _estimate(part: Mapping[str, Any]) -> ConfidenceInterval:
    return ConfidenceInterval(*(float(part[name]) for name in ("value", "low", "high")))
