"""What a finished run in memory keeps to be saved from, and which formats it cannot be saved in."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from auto_round.config import Options
from auto_round.errors import CannotHoldError, ConfigError, Refusal

if TYPE_CHECKING:
    from auto_round.export.exporter import Exporter
    from auto_round.pipeline.deciding.job import Job
    from auto_round.pipeline.result import Result
    from auto_round.schemes.plan import Plan
    from auto_round.schemes.scheme import QuantizationScheme


@dataclass(frozen=True, slots=True)
class Finished:
    """What `quantize()` leaves for `save_quantized`.

    Attributes:
        scratch: folder of the result, which goes with this object.
        job: the run.
        result: what came of it.
        asked: what the user asked for, with the schemes that AutoScheme chose.
    """

    scratch: tempfile.TemporaryDirectory[str]
    job: Job
    result: Result
    asked: Options

    @property
    def planned_by(self) -> Exporter | None:
        """Format that made the plan for itself; None where all formats share a plan."""
        return next((e for e in self.job.exporters.values() if e.planner is not None), None)

    def refuse_other_plans(self, formats: Sequence[str]) -> None:
        """Refuse formats whose plan is not the one that was carried out.

        Raises:
            ConfigError: a GGUF file of another type, or packed formats after a GGUF file.
        """
        from auto_round.export.table import parse_formats

        planner = self.planned_by
        own = None if planner is None else planner.name
        asked = [exporter for name in formats for exporter in parse_formats(name)]
        others = [e for e in asked if not e.any_plan and (e.name if e.planner is not None else None) != own]
        if others:
            noun = next(e.noun for e in (planner, *others) if e is not None and e.planner is not None)
            made = "whole numbers" if own is None else f"{noun} of type {own.partition(':')[2]}"
            raise ConfigError(
                f"{', '.join(e.name for e in others)}: {noun} has a plan of its own, and quantize() made "
                f"{made}; call quantize_and_save(format=...), or give AutoRound(...) the scheme (such as "
                "GGUF:Q4_K_M) or the format before quantize()"
            )

    def refuse_other_schemes(self, plan: Plan, formats: Sequence[str]) -> None:
        """Refuse formats that would have given some layers other schemes, such as groups of one size for all.

        Raises:
            CannotHoldError: their codes would have to be made again.
        """
        from auto_round.schemes.condense import some

        if next(iter(self.job.exporters.values())).any_plan:
            return  # rounded weights without codes, as `rewrite` says
        made = self.result.plan
        pairs = {name: (_label(made.scheme_of(name)), _label(plan.scheme_of(name))) for name in made.entries}
        other = {n: f"{was} instead of {wanted}" for n, (was, wanted) in pairs.items() if was != wanted}
        if not other:
            return
        names = ",".join(formats)
        refusals = [
            Refusal(names, f"quantize() gave {text}: {some(name for name in other if other[name] == text)}")
            for text in dict.fromkeys(other.values())
        ]
        raise CannotHoldError(
            f"{names} cannot hold what quantize() made: save it as {','.join(self.job.exporters)}, or say "
            f'AutoRound(..., format="{names}") before quantize(), or call '
            f'quantize_and_save(format="{names}")',
            refusals,
        )


def _label(scheme: QuantizationScheme | None) -> str:
    """Scheme in words; the dtype of scales is among them, for some formats want the model's."""
    return "16 bits" if scheme is None else scheme.label
