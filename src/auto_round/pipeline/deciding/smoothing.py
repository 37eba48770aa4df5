"""Whether channels of inputs are evened out before rounding (`numerics.smoothing`), and what is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from auto_round.errors import ConfigError
from auto_round.facts.layer import Layer
from auto_round.log import logger
from auto_round.models.folder import FolderSource
from auto_round.models.live import LiveSource
from auto_round.numerics.smoothing import Rescaling
from auto_round.schemes.plan import Plan
from auto_round.schemes.scheme import QuantizationScheme

if TYPE_CHECKING:
    from auto_round.pipeline.deciding.job import Job

STRENGTHS = {("mx_fp", 4): 0.5, ("nv_fp", 4): 0.2, ("int", 8): 0.5, ("int", 4): 0.5}
"""Data type (as it begins) and bits of inputs that gain by it -> strength where the user gives none: the best
of those tried on a real model (docs/LOG.md). Other inputs gain little or nothing."""
WEIGHTS_ALONE = {("int", 4): 0.25, ("int", 3): 0.25}
"""The same by data type and bits of weights, where inputs are not rounded."""
RESCALED = (FolderSource, LiveSource)
"""Models that can be read with factors."""


@dataclass(frozen=True, slots=True)
class Smoothing:
    """What smoothing did to a model's tensors, as the report says it.

    Attributes:
        strength: see `channel_factors`.
        tensors: how many tensors are rescaled.
        smallest: smallest divisor of a channel.
        largest: largest divisor of a channel.
    """

    strength: float
    tensors: int
    smallest: float
    largest: float

    @classmethod
    def of(cls, strength: float, changes: Mapping[str, Rescaling]) -> Smoothing:
        """Summed up from the changes of all tensors."""
        factors = [change.divided for change in changes.values() if change.divided is not None]
        every = torch.cat(factors) if factors else torch.ones(1, dtype=torch.float32, device="cpu")
        return cls(strength, len(changes), float(every.min()), float(every.max()))

    @property
    def sentence(self) -> str:
        """One line for people."""
        if not self.tensors:
            return (
                "smoothing: the model is left as it is: no channel can be rescaled, or the weights that read "
                "them lie on the grid to which they go already"
            )
        return (
            f"smoothing: channels of inputs divided by {self.smallest:.2g} to {self.largest:.2g}, "
            f"{self.tensors} tensors rescaled"
        )


def strength_of(job: Job) -> float:
    """Strength of smoothing in a run: what the user asked for, else what suits the layers; 0 for none."""
    return wanted_strength(job) if job.tunes and job.tune.needs_rows else 0.0


def wanted_strength(job: Job) -> float:
    """The same for a run whose rows are not there yet."""
    asked = job.options.tune.smooth
    if asked is not None:
        return asked
    return 0.0 if _obstacle(job) else _usual(job)


def refuse_smoothing(job: Job) -> None:
    """Refuse smoothing where it cannot be done; say so where it would have been done unasked.

    Raises:
        ConfigError: it was asked for.
    """
    asked, why = job.options.tune.smooth, _obstacle(job)
    if not why or not job.tune.needs_rows:
        return
    if asked:
        raise ConfigError(f"smooth {asked:g} is not possible: {why}; leave smooth out")
    if asked is None and _usual(job):
        if any(rounds_inputs(job.plan, name) for name in job.plan.entries):
            logger.warning("inputs are not smoothed, which costs accuracy: %s", why)
        else:
            logger.info("weights are not smoothed: %s", why)


def gains(plan: Plan, layer: str) -> bool:
    """A layer is rounded to numbers that gain by smoothing."""
    entry = plan.entries.get(layer)
    return entry is not None and _suiting(entry.scheme) > 0


def is_whole(layer: Layer) -> bool:
    """A layer is one tensor of a block, axis by axis: only its channels can be rescaled."""
    own = layer.block is not None and layer.expert is None and layer.rows is None
    return own and not (layer.fused or layer.transposed)


def rounds_inputs(plan: Plan, layer: str) -> bool:
    """Inputs of a layer are rounded, not its weights alone."""
    entry = plan.entries.get(layer)
    return entry is not None and entry.scheme is not None and entry.scheme.act_quantized


def _usual(job: Job) -> float:
    """The strength that suits the layers of a run, the smallest of several; 0 for none."""
    if not (job.tune.iters or job.tune.search):
        return 0.0  # plain rounding gives the codes of other packages' plain rounding
    entries = (job.plan.entries.get(layer.name) for layer in job.source.layers if is_whole(layer))
    found = (_suiting(entry.scheme) for entry in entries if entry is not None)
    return min((strength for strength in found if strength), default=0.0)


def _suiting(scheme: QuantizationScheme | None) -> float:
    """The strength that suits one scheme; 0 for none."""
    if scheme is None:
        return 0.0
    if not scheme.act_quantized:
        return WEIGHTS_ALONE.get((scheme.data_type, scheme.bits), 0.0)
    name, width = scheme.act_data_type or scheme.data_type, scheme.act_bits
    rows = STRENGTHS.items()
    return next((s for (begins, bits), s in rows if name.startswith(begins) and width == bits), 0.0)


def _obstacle(job: Job) -> str:
    """Why the model of a run cannot be rescaled; empty where it can."""
    if not isinstance(job.source, RESCALED):
        return "only language models are read with factors"
    if job.saves_imatrix or job.importance:
        return "files of importances (save_imatrix, imatrix) are of the model as it is"
    return ""
