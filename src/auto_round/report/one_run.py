"""The page of one run: what was planned, what tuning gave, what it cost, and how to do it again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Final

from auto_round.report import plots_quality, plots_run
from auto_round.report.coverage_sections import coverage, experts
from auto_round.report.draw import Words
from auto_round.report.fidelity_section import fidelity_section
from auto_round.report.record import RunRecord
from auto_round.report.run import PlanLine, Run, Spread, far_off, unchanged
from auto_round.report.section import Page, Section, Tile
from auto_round.report.table import Cell, Table, nbytes, number, seconds, share
from auto_round.units import duration, shrinkage, size


def page_of(run: Run) -> Page:
    """Everything that the records of a run say, with pictures."""
    return Page(
        title=f"{run.model}, {run.recipe}",
        subtitle=f"{run.method}; written as {', '.join(run.bytes_after)}",
        tiles=tuple(_tiles(run)),
        notices=tuple(_notices(run)),
        sections=tuple(found for make in _SECTIONS if (found := make(run)) is not None),
    )


def _tiles(run: Run) -> Iterator[Tile]:
    beside = f"from {size(run.bytes_before)}, {shrinkage(run.bytes_before, run.nbytes)}"
    yield Tile("Size", nbytes(run.nbytes), beside)
    kept = run.layers.get("kept", 0)
    counts = f"{run.layers.get('quantized', 0)} matrices quantized, {kept} kept"
    yield Tile("Bits per quantized weight", number(run.bits_per_quantized_weight), counts)
    if (held := run.held_out) is not None:
        change = 100 * (held.perplexity_after / held.perplexity_before - 1)
        text = f"from {held.perplexity_before:.4g} ({change:+.2f} %)"
        yield Tile("Perplexity", number(held.perplexity_after), text)
        yield Tile("KL from the original", number(held.kl), "nats per token")
        yield Tile("Same top token", share(held.same_top_token), f"of {held.positions:,} predictions")
    if (record := run.record) is not None:
        yield Tile("Time", seconds(record.seconds), "of the last part" if record.continued else "")
        planned = f", {size(record.memory['host_bytes'])} planned" if record.memory else ""
        yield Tile("Peak memory", nbytes(record.peak_bytes), f"tuned on {record.device}{planned}")


def _notices(run: Run) -> Iterator[str]:
    if run.held_out is None:
        yield "Quality was not measured: the run had no calibration data."
    elif run.held_out.tuned_on_too:
        yield "Figures of quality are of the row that was tuned on, so they look better than they are."
    hard = run.hard_cases
    if far := hard.get("far_from_the_original"):
        meaning, errors = far_off(far)
        text = f"{meaning[0].upper()}{meaning[1:]}."
        yield f"{text} Rounding changed most in {errors} (share of their outputs)." if errors else text
    if kept := hard.get("kept_as_started"):
        yield f"{unchanged(kept)}."
    for name, checked in run.verified.items():
        if "skipped" in checked:
            yield f"{name} was not reloaded: {checked['skipped']}"
    if not run.verified:
        yield "What was written was not reloaded and compared."


def _plan(run: Run) -> Section | None:
    if not run.plan:
        return None
    blocks = 1 + max((last for line in run.plan for _, last in line.blocks), default=0)
    schemes = list(dict.fromkeys(line.scheme for line in run.plan))
    text = f"{len(run.plan)} kinds of layers in {blocks} blocks: {', '.join(schemes)}."
    words = Words("plan-picture", "The plan: bits of each layer", text)
    table = Table(
        "Plan",
        (
            "layer",
            "blocks",
            "scheme",
            "bits",
            "stored bits",
            "matrices a block",
            "weights a block",
            "because",
        ),
        [_plan_row(line) for line in run.plan],
    )
    note = "Bits per weight as stored, with steps and zero points."
    picture = plots_run.plan_picture(words, run.plan, blocks)
    return Section("plan", "Plan", (note,), picture, (table,))


def _chosen(run: Run) -> Section | None:
    found = run.auto_scheme
    if not found:
        return None
    rows: list[list[Cell]] = [
        ["target", str(found["target"])],
        ["bits per weight reached", number(found["average_bits"])],
        ["KL predicted, before tuning", number(found["predicted_kl"])],
        ["KL measured", number(None if run.held_out is None else run.held_out.kl)],
        ["above the best plan, at most", share(found["gap"])],
        ["options", ", ".join(found["options"])],
    ]
    return Section("chosen", "AutoScheme", (), tables=(Table("What was chosen", ("what", "value"), rows),))


def _plan_row(line: PlanLine) -> list[Cell]:
    where = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in line.blocks) or "outside"
    counts = (number(line.layers), number(line.weights))
    return [line.kind, where, line.scheme, number(line.bits), number(line.stored_bits), *counts, line.reason]


def _sensitivity(run: Run) -> Section | None:
    found = run.sensitivity
    if found is None:
        return None
    options = list(dict.fromkeys(option for layer in found.layers for option in layer.scores))
    rows = [
        [
            layer.kind,
            "outside" if layer.block is None else str(layer.block),
            *(number(layer.scores.get(o)) for o in options),
        ]
        for layer in found.layers
    ]
    table = Table("Sensitivity", ("layer", "block", *options), rows)
    words = Words("sensitivity-picture", "Sensitivity of each layer", f"{found.measure}, at {options[0]}.")
    picture = plots_run.sensitivity_picture(words, found, options[0])
    return Section("sensitivity", "Sensitivity", (f"{found.measure}, at {options[0]}.",), picture, (table,))


def _losses(run: Run) -> Section | None:
    units = run.tuned
    if not units:
        return None
    gains = [1 - (u.loss or 0) / u.initial_loss for u in units if u.initial_loss]
    mean = 100 * sum(gains) / len(gains) if gains else 0.0
    change = f"{abs(mean):.3g} % {'less' if mean >= 0 else 'more'} loss"
    text = f"Tuning left {change} in a block than plain rounding, on average over {len(units)}."
    table = Table(
        "Losses",
        ("block", "rounded", "tuned", "step kept"),
        [[u.unit, number(u.initial_loss), number(u.loss), number(u.best_step)] for u in units],
    )
    picture = plots_run.losses_picture(Words("losses-picture", "Loss before and after tuning", text), units)
    return Section("losses", "Loss before and after tuning", (text,), picture, (table,))


def _errors(run: Run) -> Section | None:
    if not any(0 < error < math.inf for unit in run.units for error in unit.errors.values()):
        return None
    kinds = list(dict.fromkeys(kind for unit in run.units for kind in unit.errors))
    _, worst, unit = max(
        (error, kind, unit.unit) for unit in run.units for kind, error in unit.errors.items()
    )
    text = f"Share of a layer's output that rounding changed; most in {worst} of {unit}."
    table = Table(
        "Errors of layers",
        ("block", *kinds),
        [[u.unit, *(number(u.errors.get(kind)) for kind in kinds)] for u in run.units],
    )
    picture = plots_run.errors_picture(Words("errors-picture", "Errors of layers", text), run.units)
    return Section("errors", "Errors of layers", (text,), picture, (table,))


def _massive(run: Run) -> Section | None:
    if not run.units:
        return None
    units = [unit for unit in run.units if unit.massive_tokens]
    if not units:
        return Section("massive", "Massive activations", ("None were seen.",))
    text = (
        f"In {len(units)} of {len(run.units)} blocks few tokens hold much of what the unquantized block "
        "hands on. Their errors count as others do."
    )
    table = Table(
        "Massive activations",
        ("block", "tokens", "energy"),
        [[u.unit, share(u.massive_tokens), share(u.massive_energy)] for u in units],
    )
    words = Words("massive-picture", "Blocks with massive activations", text)
    return Section(
        "massive", "Massive activations", (text,), plots_run.massive_picture(words, run.units), (table,)
    )


def _quality(run: Run) -> Section | None:
    held = run.held_out
    if held is None:
        return None
    points = [plots_quality.Point(name, name, count, held.kl) for name, count in run.bytes_after.items()]
    text = (
        f"{size(run.nbytes)} at a KL of {held.kl:.4g} nats per token from the original of "
        f"{size(run.bytes_before)}, whose perplexity of {held.perplexity_before:.4g} became "
        f"{held.perplexity_after:.4g}."
    )
    rows: list[list[Cell]] = [
        ["original", nbytes(run.bytes_before), "-", number(held.perplexity_before), "0"]
    ]
    for point in points:
        bits = number(run.bits_per_quantized_weight) if point is points[0] else "-"
        rows.append([point.label, nbytes(point.nbytes), bits, number(held.perplexity_after), number(held.kl)])
    table = Table("Size and quality", ("model", "size", "bits", "perplexity", "KL"), rows)
    words = Words("quality-picture", "Size and distance from the original", text)
    drawn = math.isfinite(held.kl)
    picture = plots_quality.frontier_picture(words, points, run.bytes_before) if drawn else None
    return Section("quality", "Size and quality", (text,), picture, (table,))


def _spread(run: Run) -> Section | None:
    held = run.held_out
    if held is None or held.kl_histogram is None:
        return None
    text = f"How far single predictions are from the original's, over {held.positions:,} of them."
    words = Words("spread-picture", "Divergence of single predictions", text)
    picture = plots_quality.spread_picture(words, {"all": held.kl_histogram})
    table = spread_table({"predictions": held.kl_histogram})
    return Section("spread", "Divergence of single predictions", (text,), picture, (table,))


def _fidelity(run: Run) -> Section | None:
    return None if run.fidelity is None else fidelity_section(run.fidelity)


def spread_table(spreads: Mapping[str, Spread]) -> Table:
    """Counts of one or several histograms, in the bins that any of them fills."""
    first = next(iter(spreads.values()))
    powers = first.powers
    filled = [i for i in range(len(first.positions)) if any(s.positions[i] for s in spreads.values())]
    rows = [
        [
            f"{10 ** powers[i]:.2g} to {10 ** powers[i + 1]:.2g}",
            *(number(s.positions[i]) for s in spreads.values()),
        ]
        for i in filled
    ]
    return Table("Predictions by KL", ("KL, nats", *spreads), rows)


def _cost(run: Run) -> Section | None:
    record = run.record
    if record is None:
        return None
    stages = ", ".join(f"{stage} {duration(taken)}" for stage, taken in record.stages.items())
    words = f"{duration(record.seconds)} in all: {stages}." + (
        " An earlier process did a part of the blocks; these times are of the last one."
        if record.continued
        else ""
    )
    by_stage = Table(
        "Time by stage", ("stage", "time"), [[name, seconds(taken)] for name, taken in record.stages.items()]
    )
    planned = _memory_plan(record)
    if not record.units:
        return Section("cost", "Time and memory", (words,), tables=(by_stage, *planned))
    table = Table(
        "Time and memory by block",
        ("block", "time", "memory held", "peak so far", "peak, accelerator"),
        [
            [
                u.unit,
                seconds(u.seconds),
                nbytes(u.resident_bytes),
                nbytes(u.peak_bytes),
                nbytes(u.device_peak_bytes),
            ]
            for u in record.units
        ],
    )
    slowest = max(record.units, key=lambda unit: unit.seconds)
    text = f"Seconds and memory of {len(record.units)} blocks; the slowest is {slowest.unit}."
    picture = plots_run.cost_picture(Words("cost-picture", "Time and memory", text), record.units)
    return Section("cost", "Time and memory", (words,), picture, (table, by_stage, *planned))


def _memory_plan(record: RunRecord) -> tuple[Table, ...]:
    """What was planned before the first block, part by part, and below it what was measured."""
    plan = record.memory
    if not plan:
        return ()
    rows: list[list[Cell]] = [["before the run", "host", "Python and libraries", nbytes(plan["held"])]]
    for stage, places in plan["stages"].items():
        for place, parts in places.items():
            rows += [[stage, place, part, nbytes(count)] for part, count in parts.items() if count]
    for place, planned, measured in (
        ("host", plan["host_bytes"], record.peak_bytes),
        ("device", plan["device_bytes"], max((u.device_peak_bytes for u in record.units), default=0)),
    ):
        if planned:
            rows.append(["peak", place, "planned", nbytes(planned)])
            rows.append(["peak", place, "measured", nbytes(measured)])
    return (Table("Memory plan", ("stage", "place", "part", "bytes"), rows),)


def _together(run: Run) -> Section | None:
    found = run.distillation
    if not found:
        return None
    kept = (
        f"step {found['kept_step']} was kept" if found["kept_step"] else "no step was better: nothing changed"
    )
    words = (
        f"All blocks learned together for {found['steps']} steps on {found['tokens']:,} tokens of rows that "
        f"blocks were not tuned on: {kept}."
    )
    rows: list[list[Cell]] = [[number(step), number(kl)] for step, kl in found["looks"]]
    table = Table("Looks at held-out rows", ("after step", "KL, nats per token"), rows)
    return Section("together", "All blocks together", (words,), tables=(table,))


def _made_with(run: Run) -> Section:
    record = run.record
    versions = {**run.versions, **(record.versions if record is not None else {})}
    rows: list[list[Cell]] = [[name, version or "not installed"] for name, version in versions.items()]
    if record is not None:
        machine = record.machine
        kinds = [str(machine[k]) for k in ("processor", "capability", "accelerator") if machine.get(k)]
        rows += [["machine", ", ".join(kinds)], ["finished", record.finished]]
    rows += [["seed", str(run.seed)]] if run.seed is not None else []
    for name, verdicts in run.engines.items():
        loads = [engine for engine, verdict in verdicts.items() if verdict.get("loads")]
        rows.append([f"{name} loads in", ", ".join(loads) or "none that is known"])
    return Section("versions", "Made with", tables=(Table("Versions", ("package", "version"), rows),))


def _repeat(run: Run) -> Section | None:
    record = run.record
    if record is None:
        return None
    words = ["Into a folder of its own: add --output_dir."]
    if record.beside_command:
        words.append(f"It was also given, from Python: {'; '.join(record.beside_command)}.")
    return Section("repeat", "The command to repeat it", tuple(words), wide=True, code=record.command)


_SECTIONS: Final = (
    _plan,
    _chosen,
    _sensitivity,
    _losses,
    _errors,
    _massive,
    _together,
    _quality,
    _spread,
    _fidelity,
    _cost,
    coverage,
    experts,
    _made_with,
    _repeat,
)
"""The parts of the page in their order; one without data gives None."""
