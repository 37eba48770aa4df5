"""A finished run as its page needs it, read from the records in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from auto_round.errors import CheckpointError, ConfigError
from auto_round.report.fidelity import Fidelity, fidelity_of
from auto_round.report.record import EVALUATION_SUFFIX, REPORT, RUN_RECORD, SENSITIVITY, RunRecord
from auto_round.schemes.vocabulary import KEPT_BITS

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PlanLine:
    """Layers of one kind that are stored alike; a line of `plan` in `report.json`.

    Attributes:
        kind: name inside the block, numbers of experts as `*`; the whole name outside of blocks.
        scheme: for example `W4 g128 sym`.
        bits: of a code.
        stored_bits: per weight, with steps and zero points.
        layers: in each block.
        weights: in each block.
        reason: where that comes from.
        blocks: first and last of each stretch of blocks; empty outside of blocks.
    """

    kind: str
    scheme: str
    bits: int
    stored_bits: float
    layers: int
    weights: int
    reason: str
    blocks: Sequence[Sequence[int]] = ()


@dataclass(frozen=True, slots=True)
class UnitRecord:
    """A block, or neighbouring blocks tuned as one; an entry of `blocks` in `report.json`.

    Attributes:
        unit: name.
        errors: kind of layer -> share of its output that rounding changed.
        initial_loss: loss of plain rounding; None where nothing was tuned.
        loss: loss of what was kept.
        best_step: step that was kept; 0 for plain rounding.
        massive_tokens: share of the tokens that have massive activations in the unquantized output.
        massive_energy: share of the output's energy that these hold.
        experts: module of fused experts -> tuned tokens that reached each of them.
    """

    unit: str
    errors: Mapping[str, float] = field(default_factory=dict)
    initial_loss: float | None = None
    loss: float | None = None
    best_step: int | None = None
    massive_tokens: float = 0.0
    massive_energy: float = 0.0
    experts: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SourceCounts:
    """What one data set gave: samples read, rows made, reasons for which others were dropped."""

    name: str
    samples: int
    rows: int
    dropped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the run was calibrated on; `calibration` in `report.json`."""

    summary: str
    fingerprint: str
    rows_tuned: int
    rows_held_out: int
    tokens_per_row: int
    dataset: str = ""
    tokens_tuned: int | None = None
    sources: Sequence[SourceCounts] = ()
    letters: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Spread:
    """Positions by their divergence; `kl_histogram` in `report.json`, see `evaluate.histogram`."""

    first_power: int
    bins_per_decade: int
    positions: Sequence[int]

    @property
    def powers(self) -> list[float]:
        """Borders of the bins as powers of ten of nats; one more than there are bins."""
        return [self.first_power + i / self.bins_per_decade for i in range(len(self.positions) + 1)]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What rows that nothing was tuned on say of the result; `held_out` in `report.json`."""

    positions: int
    perplexity_before: float
    perplexity_after: float
    kl: float
    same_top_token: float
    tuned_on_too: bool = False
    kl_histogram: Spread | None = None


@dataclass(frozen=True, slots=True)
class LayerScore:
    """Sensitivity of one kind of layer in one block: option -> estimated harm of choosing it."""

    kind: str
    block: int | None
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How much each layer minds being rounded; `sensitivity` in `report.json`, where a run measured it.

    Attributes:
        measure: what the scores are, for people.
        layers: scores of each layer.
    """

    measure: str
    layers: Sequence[LayerScore]


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run.

    Attributes:
        label: what tells it from others, for people.
        model: name of the original.
        scheme: scheme of layers that nothing else is said of.
        method: how weights were rounded.
        bits_per_quantized_weight: stored bits, with steps and zero points.
        bytes_before: of all tensors of the original.
        bytes_after: format -> bytes of all tensors; sizes are told of the first.
        layers: how many were quantized and kept.
        plan: what became of the layers.
        units: blocks in their order, those of which there are figures.
        calibration: None without data.
        held_out: None where nothing was measured.
        sensitivity: None where nothing was measured.
        auto_scheme: what AutoScheme reached, see `autoscheme.decision`; empty where it was not asked.
        distillation: what tuning all blocks together gave, see `pipeline.distilling.stage.distill`; empty
            where it was not asked for.
        hard_cases: what was hard, see `pipeline.running.hard_cases`.
        engines: format -> engine -> verdict.
        verified: format -> what reloading it gave.
        versions: package -> version.
        seed: of every random choice.
        record: what the run cost; None where an older version wrote none.
        fidelity: what `auto-round eval` measured of the folder; None where it was not asked.
    """

    label: str
    scheme: str
    method: str
    bits_per_quantized_weight: float
    bytes_before: int
    bytes_after: Mapping[str, int]
    layers: Mapping[str, int]
    model: str = "model"
    seed: int | None = None
    plan: Sequence[PlanLine] = ()
    units: Sequence[UnitRecord] = ()
    calibration: Calibration | None = None
    held_out: HeldOut | None = None
    sensitivity: Sensitivity | None = None
    auto_scheme: Mapping[str, Any] = field(default_factory=dict)
    distillation: Mapping[str, Any] = field(default_factory=dict)
    hard_cases: Mapping[str, Any] = field(default_factory=dict)
    engines: Mapping[str, Any] = field(default_factory=dict)
    verified: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=dict)
    record: RunRecord | None = None
    fidelity: Fidelity | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the first format."""
        return next(iter(self.bytes_after.values()))

    @property
    def recipe(self) -> str:
        """The schemes of quantized layers, for people."""
        found = dict.fromkeys(line.scheme for line in self.plan if line.bits < KEPT_BITS)
        return "mixed: " + ", ".join(found) if len(found) > 1 else self.scheme

    @property
    def tuned(self) -> list[UnitRecord]:
        """Units with losses."""
        return [unit for unit in self.units if unit.loss is not None and unit.initial_loss is not None]


def far_off(far: Mapping[str, Any]) -> tuple[str, str]:
    """What `far_from_the_original` of `hard_cases` means, and the largest errors; empty without any."""
    meaning = f"a KL above {far['bound']} means that the model says other things than the original"
    errors = (f"{kind} {100 * error:.2g} %" for kind, error in far["largest_errors"].items())
    return meaning, ", ".join(errors)


def unchanged(kept: Mapping[str, Any]) -> str:
    """What `kept_as_started` of `hard_cases` means."""
    return (
        f"{len(kept['units'])} of {kept['of']} blocks were kept as they started, with the codes found before "
        "the first step: none made them better on rows that are not tuned on"
    )


def read_run(folder: Path, label: str) -> Run:
    """Read the records of a finished run.

    Args:
        folder: output folder of a run.
        label: what the page calls it.

    Raises:
        ConfigError: no such folder, or not one of a finished run.
        CheckpointError: a record is damaged.
    """
    file = folder / REPORT
    if not file.is_file():
        raise ConfigError(
            f"{folder} is not the output of a finished run: there is no {REPORT} in it{_inside(folder)}"
        )
    cost = folder / RUN_RECORD
    record = _json(cost) if cost.is_file() else None
    run = run_of(_json(file), record, label, file)
    measured = folder.resolve().with_name(folder.resolve().name + EVALUATION_SUFFIX)
    return replace(run, fidelity=fidelity_of(_json(measured), measured)) if measured.is_file() else run


def run_of(report: Mapping[str, Any], record: Mapping[str, Any] | None, label: str, file: Path) -> Run:
    """A run from the values of its records; `file` is named where they are not what they should be.

    Raises:
        CheckpointError: a value is missing or of another type.
    """
    try:
        held, data, scores = (report.get(name) for name in ("held_out", "calibration", SENSITIVITY))
        parts = {
            "label": label,
            "bytes_after": _filled(report, "bytes_after"),
            "layers": _filled(report, "layers"),
            "plan": [_made(PlanLine, line) for line in report.get("plan", ())],
            "units": [_made(UnitRecord, unit) for unit in report.get("blocks", ()) if "errors" in unit],
            "calibration": data
            and _made(Calibration, data, sources=_all(SourceCounts, data.get("sources", ()))),
            "held_out": held and _made(HeldOut, held, kl_histogram=_spread(held)),
            "sensitivity": scores and _made(Sensitivity, scores, layers=_all(LayerScore, scores["layers"])),
            "record": record and RunRecord.from_json(record),
        }
        return _made(Run, report, **parts)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: not the report of a run ({error}): make it again by the same command"
        ) from error


def _made(kind: type[T], values: Mapping[str, Any], **own: Any) -> T:
    """A dataclass from the values that bear its fields' names; others are left alone.

    Raises:
        TypeError: a value without a default is missing.
    """
    known = fields(kind)  # type: ignore[arg-type]
    found = {f.name: values[f.name] for f in known if f.name in values} | own
    missing = [f.name for f in known if f.name not in found and f.default is f.default_factory is MISSING]
    if missing:
        raise TypeError(f"no {missing[0]}")
    return kind(**found)


def _filled(values: Mapping[str, Any], name: str) -> Mapping[str, int]:
    found = values.get(name)
    if not isinstance(found, Mapping) or not found:
        raise TypeError(f"no {name}")
    return found


def _all(kind: type[T], many: Sequence[Mapping[str, Any]]) -> tuple[T, ...]:
    return tuple(_made(kind, values) for values in many)


def _spread(held: Mapping[str, Any]) -> Spread | None:
    found = held.get("kl_histogram")
    return None if found is None else _made(Spread, found)


def _json(file: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged ({error}): make it again by the same command") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is damaged: expected a JSON object")
    return value


def _inside(folder: Path) -> str:
    """Where the runs may be instead."""
    found = sorted(file.parent.name for file in folder.glob(f"*/{REPORT}")) if folder.is_dir() else []
    return f"; expected one of {', '.join(str(folder / name) for name in found)}" if found else ""
