"""What a format that plans for itself is asked for: the plan, and the exporters that write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from auto_round.config.options import Options
from auto_round.models.source import ModelSource
from auto_round.schemes.plan import Plan

if TYPE_CHECKING:
    from auto_round.export.exporter import Exporter


@dataclass(frozen=True, slots=True)
class Planned:
    """What becomes of every layer, and who writes it.

    Attributes:
        plan: scheme of every layer.
        exporters: format name -> exporter with its variant decided.
        importance: tensor in the source -> mean square of its inputs `[in]`, where a file says so.
        notes: what the user may want to know of it, a sentence each.
    """

    plan: Plan
    exporters: Mapping[str, Exporter]
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Planner(Protocol):
    """Makes the plan of a run."""

    def __call__(
        self, source: ModelSource, tokenizer: Any, options: Options, asked: Sequence[Exporter]
    ) -> Planned:
        """Plan a run.

        Args:
            source: the model.
            tokenizer: its tokenizer; None where no format needs one.
            options: what the user asked for, in line with the formats.
            asked: the formats as asked for.

        Raises:
            AutoRoundError: the formats cannot hold what is asked for.
        """
        ...
