"""Decisions: a target, the choice that meets it, and what is said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from auto_round.autoscheme.candidates import BitsOf, Candidates, code_bits, reachable, stored_bits
from auto_round.autoscheme.choose import Choice, least_cost, least_loss
from auto_round.autoscheme.parts import Part
from auto_round.autoscheme.plan_file import written
from auto_round.autoscheme.sizes import file_bits, rest_bits
from auto_round.config.auto_scheme import AutoSchemeOptions
from auto_round.errors import ConfigError
from auto_round.log import logger
from auto_round.pipeline.deciding.decide import Decided
from auto_round.pipeline.deciding.open_model import Opened
from auto_round.schemes.gguf_types import type_of_scheme


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be met.

    Attributes:
        avg_bits: bits per weight of the layers that are chosen or fixed; None for another target.
        size: bytes of the weight files.
        kl: predicted divergence, nats per token.
        codes_only: only the bits of codes count.
    """

    avg_bits: float | None = None
    size: int | None = None
    kl: float | None = None
    codes_only: bool = False

    @property
    def folder(self) -> str:
        """Name of the output folder where there are several targets."""
        return self.text.replace(" ", "")

    @property
    def text(self) -> str:
        """For people, `3 bits`, `4.2 GB` or `0.02 nats`."""
        if self.avg_bits is not None:
            return f"{self.avg_bits:g} bits"
        if self.size is not None:
            unit, factor = next(
                (u, f) for u, f in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)) if self.size >= f
            )
            return f"{self.size / factor:g} {unit}"
        return f"{self.kl:g} nats"


@dataclass(frozen=True, slots=True)
class Decision:
    """What a target came to.

    Attributes:
        target: what was to be met.
        choice: option of each group.
        average: bits per weight of the layers that are chosen or fixed, as they count.
        labels: of the options.
    """

    target: Target
    choice: Choice
    average: float
    labels: tuple[str, ...]

    @property
    def summary(self) -> str:
        """One line for people."""
        counts = {label: self.choice.picks.count(i) for i, label in enumerate(self.labels)}
        parts = ", ".join(f"{label} for {count}" for label, count in counts.items() if count)
        gap = (
            "proved the best"
            if self.choice.gap == 0
            else f"at most {100 * self.choice.gap:.2g} % above the best"
        )
        return (
            f"{self.target.text}: {self.average:.3f} bits per weight, predicted KL {self.choice.loss:.4g}, "
            f"{gap} ({parts} groups)"
        )

    def document(self, candidates: Candidates) -> dict[str, Any]:
        """The plan as JSON: what was reached, and the scheme of every layer, which `--layer_config` takes."""
        return {
            "made_by": "AutoScheme",
            "use": "edit and give it back: --layer_config THIS_FILE, in Python layer_config=THIS_FILE",
            "reached": self.summary,
            "target": self.target.text,
            "average_bits": round(self.average, 4),
            "predicted_kl": self.choice.loss,
            "gap": self.choice.gap,
            "options": list(self.labels),
            "layer_config": {
                **{name: written(scheme) for name, scheme in candidates.fixed.items()},
                **{
                    name: written(candidates.plans[pick].scheme_of(name))
                    for names, pick in zip(candidates.groups, self.choice.picks, strict=True)
                    for name in names
                },
            },
        }


def targets_of(auto: AutoSchemeOptions) -> tuple[Target, ...]:
    """The targets that the user gave."""
    found = [Target(avg_bits=bits, codes_only=auto.ignore_scale_zp_bits) for bits in auto.avg_bits]
    found += [Target(size=size) for size in auto.target_size]
    if auto.target_kl is not None:
        found.append(Target(kl=auto.target_kl, codes_only=auto.ignore_scale_zp_bits))
    return tuple(found)


def refuse_unreachable(target: Target, candidates: Candidates, decided: Decided, opened: Opened) -> None:
    """Refuse a budget that no mix of the options meets, before anything is measured.

    Raises:
        ConfigError: says what can be reached.
    """
    if target.kl is not None:
        return
    bits_of, fixed, budget = _limits(target, candidates, decided, opened)
    least, most = reachable(candidates.costs(bits_of), fixed)
    unit = candidates.weights if target.avg_bits is not None else 8e6
    name = "bits per weight" if target.avg_bits is not None else "MB"
    if most <= budget:
        logger.warning(
            "AutoScheme: %s leave nothing to choose: these layers take %.3f %s at most with %s",
            *(target.text, most / unit, name, ", ".join(candidates.labels)),
        )
    if least <= budget:
        return
    held = f", of which {fixed / unit:.3f} are fixed" if fixed else ""
    span = f"{least / unit:.3f}" + (f" to {most / unit:.3f}" if most > least else "")
    raise ConfigError(
        f"{target.text} cannot be reached with {', '.join(candidates.labels)}: these layers take "
        f"{span} {name}{held}{_other_types(candidates)}; give a larger target, or smaller options"
    )


def _other_types(candidates: Candidates) -> str:
    """How many layers get other GGUF types than the options name; empty where none does."""
    kinds = [type_of_scheme(replace(plan.scheme, recipe=None)) for plan in candidates.plans]
    widths = [candidates.layers[name].shape[-1] for name in candidates.chosen]
    blocks = [{k.block for k in kinds if k is not None and not k.fits(width)} for width in widths]
    if not any(blocks):
        return ""
    return (
        f" ({sum(map(bool, blocks))} of {len(blocks)} layers have rows that are no multiple of "
        f"{max(set().union(*blocks))}, and get other types in a GGUF file)"
    )


def decide_on(
    target: Target,
    candidates: Candidates,
    scores: Mapping[Part, Sequence[float]],
    decided: Decided,
    opened: Opened,
) -> Decision:
    """The best choice for a target.

    Raises:
        ConfigError: it cannot be met.
    """
    bits_of, fixed, budget = _limits(target, candidates, decided, opened)
    costs, losses = candidates.costs(bits_of), _losses(candidates, scores)
    if target.kl is not None:
        _refuse_too_near(target, candidates, losses)
        choice = least_cost(costs, losses, target.kl)
    else:
        choice = least_loss(costs, losses, budget - fixed)
    counted = code_bits if target.codes_only else stored_bits
    total = candidates.fixed_bits(counted) + sum(
        row[pick] for row, pick in zip(candidates.costs(counted), choice.picks, strict=True)
    )
    return Decision(target, choice, total / candidates.weights, candidates.labels)


def _refuse_too_near(target: Target, candidates: Candidates, losses: Sequence[Sequence[float]]) -> None:
    least = sum(map(min, losses))
    if target.kl is not None and least > target.kl:
        raise ConfigError(
            f"target_kl: {target.text} cannot be reached with {', '.join(candidates.labels)}: the least that "
            f"is predicted for them is {least:.3g} nats per token; give a larger target, or larger options"
        )


def _limits(
    target: Target, candidates: Candidates, decided: Decided, opened: Opened
) -> tuple[BitsOf, float, float]:
    """How bits are counted, those that are not chosen, and the budget for all."""
    if target.size is not None:
        exporter = next(iter(decided.exporters.values()))
        return (
            partial(file_bits, exporter),
            rest_bits(exporter, decided.plan, opened.source, candidates),
            target.size * 8.0,
        )
    bits_of = code_bits if target.codes_only else stored_bits
    average = target.avg_bits or 0.0
    return bits_of, candidates.fixed_bits(bits_of), average * candidates.weights


def _losses(candidates: Candidates, scores: Mapping[Part, Sequence[float]]) -> list[list[float]]:
    """Loss of each group and option: the sum over its parts."""
    group_of = {name: i for i, names in enumerate(candidates.groups) for name in names}
    losses = [[0.0] * len(candidates.labels) for _ in candidates.groups]
    for part, found in scores.items():
        row = losses[group_of[part.layers[0]]]
        for option, score in enumerate(found):
            row[option] += score
    return losses
