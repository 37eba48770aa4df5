"""The last words of a run: what was written, how small it is, and what it costs in quality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from auto_round.consumers.lines import loading, refusing
from auto_round.pipeline.running.coverage import coverage_sentence
from auto_round.report.record import DISTILLED
from auto_round.report.run import far_off, unchanged
from auto_round.units import duration, gain, shrinkage, size

if TYPE_CHECKING:
    from auto_round.pipeline.result import Result

MANY_BITS = 4
"""Runs with fewer bits are advised to give their worst layers 4 bits, others 8."""

LARGER_BUDGET = "give AutoScheme a larger budget, or options of more bits"
TOGETHER = "tune all blocks together as well (--distill_steps 100)"


def summary(result: Result) -> str:
    """Say in a few lines what a run gave; what was not measured is left out."""
    return "\n".join(f"{name:<12}{text}" for name, text in _lines(result))


def _lines(result: Result) -> Iterator[tuple[str, str]]:
    report = result.report
    sizes: Mapping[str, int] = report["bytes_after"]
    for folder, after in zip(result.folders, sizes.values(), strict=True):
        yield "written", str(folder)
        before = report["bytes_before"]
        yield "size", f"{size(before)} -> {size(after)} ({shrinkage(before, after)})"
    if chosen := report.get("auto_scheme"):
        yield "chosen", chosen["reached"]
    yield from _quality(report)
    for name, checked in report.get("verified", {}).items():
        if "skipped" in checked:
            yield "reloaded", f"{name}: no, {checked['skipped']}"
            continue
        if "file" in checked:
            yield "read back", f"{checked['file']}: {checked['tensors']} tensors, by {checked['reader']}"
            continue
        if "tokens" in checked:
            yield "reloaded", f"{name}: it loads and predicts"
            continue
        yield "reloaded", f"{name}: KL {checked['kl']:.2g} from the model as tuned"
        if checked["sample"]:
            yield "it writes", repr(checked["sample"])
        elif checked.get("no_sample"):
            yield "no sample", checked["no_sample"]
    for name, verdicts in report.get("engines", {}).items():
        yield "loads in", f"{loading(verdicts)} ({name})" if len(report["engines"]) > 1 else loading(verdicts)
        yield from (("not in", f"{engine}: {reason}") for engine, reason in refusing(verdicts).items())
    yield "took", f"{duration(result.seconds)}, peak memory {size(result.peak_bytes)}"


def _together(found: Mapping[str, Any]) -> str:
    """What tuning all blocks together gave."""
    if not found["kept_step"]:
        return f"none of {found['steps']} steps of all blocks was better than block tuning: nothing changed"
    change = gain(found["kl_before"], found["kl_best"])
    return f"KL {change} by step {found['kept_step']} of {found['steps']} of all blocks"


def _quality(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    held_out = report.get("held_out")
    if held_out is None:
        yield "quality", "not measured: no calibration data was asked for"
        return
    before, after = held_out["perplexity_before"], held_out["perplexity_after"]
    rows = "the row that was tuned on" if held_out.get("tuned_on_too") else "held-out rows"
    yield "perplexity", f"{before:.4g} -> {after:.4g} ({100 * (after / before - 1):+.2f} %) on {rows}"
    yield "KL", f"{held_out['kl']:.4g} nats per token from the original's predictions"
    if together := report.get(DISTILLED):
        yield "together", _together(together)
    if poor := coverage_sentence(report.get("experts", {})):
        yield "experts", poor
    hard = report.get("hard_cases", {})
    yield from _hard_cases(hard)
    if "far_from_the_original" in hard:
        remedy = LARGER_BUDGET if "auto_scheme" in report else _more_bits(report["bits_per_quantized_weight"])
        if DISTILLED not in report:
            remedy = f"{remedy}, or {TOGETHER}"
        yield "far off", _far(hard["far_from_the_original"], remedy)


def _hard_cases(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if massive := found.get("massive_activations"):
        units = massive["units"]
        tokens, energy = (max(unit[name] for unit in units) for name in ("tokens", "energy"))
        yield (
            "massive",
            f"activations in {len(units)} of {massive['of']} blocks: up to {100 * tokens:.2g} % of the "
            f"tokens hold up to {100 * energy:.3g} % of the energy; their errors count as others do",
        )
    if kept := found.get("kept_as_started"):
        yield "unchanged", f"{unchanged(kept)} (more rows may help: --nsamples)"


def _more_bits(bits: float) -> str:
    """Advice to give `LAYER`, which stands for the layers that changed most, more than `bits` per weight."""
    more = 4 if bits < MANY_BITS else 8
    return f"give those layers more bits (--layer_config '{{LAYER: {{bits: {more}}}}}'), or all layers"


def _far(far: Mapping[str, Any], remedy: str) -> str:
    """Say that the quantized model differs much from the original, and what to do about it.

    Args:
        far: `far_from_the_original` of the report's `hard_cases`.
        remedy: what to do; `LAYER` stands for the layers whose rounding changed most.
    """
    meaning, errors = far_off(far)
    if not errors:
        return f"{meaning}; give it more bits"
    advice = remedy.replace("LAYER", next(iter(far["largest_errors"])))
    return f"{meaning}. Rounding changed most in {errors} (share of their outputs); {advice}"
